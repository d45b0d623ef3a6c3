"""mlbseg: segment many medical scans from few labels (MLB-Seg, arXiv 2307.11604)."""

__version__ = "0.1.0"
