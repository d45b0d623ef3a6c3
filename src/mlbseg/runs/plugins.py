"""What a run takes from other packages: noted when it begins, asked for when it is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlbseg.config import Config
from mlbseg.data.augment import AUGMENTATIONS
from mlbseg.data.plan import Plan
from mlbseg.data.records import read_record
from mlbseg.errors import UserError
from mlbseg.methods import LOSSES, METHODS
from mlbseg.networks import NETWORKS
from mlbseg.registry import Registry

_REGISTRIES: dict[str, Registry[Any]] = {r.what: r for r in (METHODS, NETWORKS, LOSSES, AUGMENTATIONS)}


def plugins_of(config: Config, plan: Plan) -> list[dict[str, str]]:
    """Return what a run takes from other packages: what it is, its name, and package and version that bring it."""
    names = {
        "method": config.method,
        "network": plan.network,
        "loss": config.train.loss,
        "augmentation": config.train.augmentation,
    }
    found = []
    for what, name in names.items():
        if (source := _REGISTRIES[what].source(name)) is not None:
            found.append({"what": what, "name": name, "package": source.package, "version": source.version})
    return found


def require_plugins(environment: Path) -> None:
    """Refuse a run whose packages are not installed here.

    Only names are looked up, among installed packages; nothing that a run folder says is imported.

    Args:
        environment: The run's env.json; a run without one is let pass.

    Raises:
        UserError: naming what is missing and the package that brought it.
    """
    if not environment.is_file():
        return
    noted = read_record(environment, "the environment of a run").get("plugins")
    for entry in noted if isinstance(noted, list) else ():
        what, name, package, version = (str(entry.get(key)) for key in ("what", "name", "package", "version"))
        if what in _REGISTRIES and name not in _REGISTRIES[what]:
            raise UserError(
                f"{environment.parent}: found the {what} {name!r} of {package} {version}, which is not installed here "
                f"(install it: pip install {package}=={version})"
            )
