"""The methods. To add one: write its file, add a line here; the contract tests cover it."""

from mlbseg.errors import UserError, nearest
from mlbseg.methods.base import Method
from mlbseg.methods.bcp import BCP
from mlbseg.methods.cct import CCT
from mlbseg.methods.cps import CPS
from mlbseg.methods.entropy import Entropy
from mlbseg.methods.fixmatch import FixMatch
from mlbseg.methods.ict import ICT
from mlbseg.methods.mean_teacher import MeanTeacher
from mlbseg.methods.mlb import MLB
from mlbseg.methods.pseudo_label import PseudoLabel
from mlbseg.methods.supervised import Supervised
from mlbseg.methods.ua_mt import UAMT
from mlbseg.methods.unimatch import UniMatch

METHODS: dict[str, type[Method]] = {
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
}


def find_method(name: str) -> type[Method]:
    """Return the method of that name.

    Raises:
        UserError: naming the nearest ones.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UserError(f"unknown method {name!r}: {nearest(name, METHODS)}") from None


__all__ = ["METHODS", "Method", "find_method"]
