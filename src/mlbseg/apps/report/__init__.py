"""Pages that show what a run, masks or a bench came to: each one HTML file that needs nothing else."""

from mlbseg.apps.report.masks import masks_report
from mlbseg.apps.report.runs import REPORT, Report, report

__all__ = ["REPORT", "Report", "masks_report", "report"]
