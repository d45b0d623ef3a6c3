"""What a run takes from other packages: noted when it begins, asked for when it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mlbseg.config import Config
from mlbseg.data.augment import AUGMENTATIONS
from mlbseg.data.plan import Plan
from mlbseg.data.records import read_record, validate
from mlbseg.errors import UserError
from mlbseg.methods import LOSSES, METHODS
from mlbseg.networks import NETWORKS
from mlbseg.registry import Registry

_REGISTRIES: dict[str, Registry[Any]] = {r.what: r for r in (METHODS, NETWORKS, LOSSES, AUGMENTATIONS)}


@dataclass(frozen=True)
class Plugin:
    """Something that a run takes from another package.

    Attributes:
        what: Its kind, such as ``method``.
        name: Its name.
        package: The package that brings it.
        version: Of the package.
    """

    what: str
    name: str
    package: str
    version: str


def plugins_of(config: Config, plan: Plan) -> list[Plugin]:
    """Return what a run takes from other packages."""
    names = {
        "method": config.method,
        "network": plan.network,
        "loss": config.train.loss,
        "augmentation": config.train.augmentation,
    }
    found = []
    for what, name in names.items():
        if (source := _REGISTRIES[what].source(name)) is not None:
            found.append(Plugin(what, name, source.package, source.version))
    return found


def require_plugins(environment: Path) -> None:
    """Refuse a run whose packages are not installed here.

    Only names are looked up, among installed packages; nothing that a run folder says is imported.

    Args:
        environment: The run's env.json; a run without one is let pass.

    Raises:
        UserError: naming what is missing and the package that brought it, or for a damaged record.
    """
    if not environment.is_file():
        return
    noted = read_record(environment, "the environment of a run").get("plugins", ())
    for one in validate(TypeAdapter(tuple[Plugin, ...]), noted, f"{environment}: plugins"):
        if one.what in _REGISTRIES and one.name not in _REGISTRIES[one.what]:
            package = f"{one.package} {one.version}"
            raise UserError(
                f"{environment.parent}: found the {one.what} {one.name!r} of {package}, which is not installed here "
                f"(install it: pip install {one.package}=={one.version})"
            )
