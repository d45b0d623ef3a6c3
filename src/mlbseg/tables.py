"""Results as data frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlbseg.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


def data_frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return rows as a pandas data frame. A missing value is NaN or None.

    Args:
        rows: The value of each column, by name.
        columns: The columns, in order; those of the rows when None.

    Raises:
        UserError: if pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise UserError(
            "to_pandas() needs pandas, which is not installed (pip install 'mlbseg[pandas]')"
        ) from None
    return pd.DataFrame(list(rows), columns=None if columns is None else list(columns))
