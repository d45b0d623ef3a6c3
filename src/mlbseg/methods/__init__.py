"""The methods: ours in a table, others' from installed packages. The contract tests cover every line of the table."""

from mlbseg.methods.base import Context, Method
from mlbseg.methods.bcp import BCP
from mlbseg.methods.cct import CCT
from mlbseg.methods.cps import CPS
from mlbseg.methods.entropy import Entropy
from mlbseg.methods.fixmatch import FixMatch
from mlbseg.methods.ict import ICT
from mlbseg.methods.losses import LOSSES
from mlbseg.methods.mean_teacher import MeanTeacher
from mlbseg.methods.mlb import MLB
from mlbseg.methods.pseudo_label import PseudoLabel
from mlbseg.methods.supervised import Supervised
from mlbseg.methods.ua_mt import UAMT
from mlbseg.methods.unimatch import UniMatch
from mlbseg.registry import Registry

METHODS: Registry[type[Method]] = Registry(
    "method",
    "mlbseg.methods",
    {
        "bcp": BCP,
        "cct": CCT,
        "cps": CPS,
        "entropy": Entropy,
        "fixmatch": FixMatch,
        "ict": ICT,
        "mean-teacher": MeanTeacher,
        "mlb": MLB,
        "pseudo-label": PseudoLabel,
        "supervised": Supervised,
        "ua-mt": UAMT,
        "unimatch": UniMatch,
    },
    lambda thing: isinstance(thing, type) and issubclass(thing, Method),
)


def find_method(name: str) -> type[Method]:
    """Return the method of that name.

    Raises:
        UserError: naming the nearest ones.
    """
    return METHODS.find(name)


__all__ = ["LOSSES", "METHODS", "Context", "Method", "find_method"]
