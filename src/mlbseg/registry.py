"""Things by name: our own, and those that installed packages bring by entry points.

A package declares what it brings in its own `pyproject.toml`::

    [project.entry-points."mlbseg.methods"]
    half = "my_package:Half"

The name is then known wherever mlbseg runs with that package installed: on the command line, in every rank, in the
cells of a bench, and where a run is opened later. Nothing that a run folder says is imported by its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from mlbseg.errors import UserError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """The package that brings a thing.

    Attributes:
        package: Its name, as pip knows it.
        version: Of the package.
    """

    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


class Registry(Mapping[str, T], Generic[T]):
    """One kind of things, by name. A name of ours always means ours.

    Args:
        what: One of them in words, such as ``method``.
        group: The group of entry points, such as ``mlbseg.methods``.
        own: Those of mlbseg.
        is_one: Whether an object is such a thing: what an entry point leads to is not trusted to be one.
    """

    def __init__(self, what: str, group: str, own: Mapping[str, T], is_one: Callable[[object], bool]) -> None:
        self.what = what
        self.group = group
        self.own = dict(own)
        self._is_one = is_one
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise KeyError(name)
        return self.find(name)

    def __iter__(self) -> Iterator[str]:
        yield from sorted({*self.own, *self._added})

    def __len__(self) -> int:
        return len({*self.own, *self._added})

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self._added

    def find(self, name: str) -> T:
        """Return the thing of that name.

        Raises:
            UserError: for an unknown name, naming the nearest; for a package that cannot be imported, or brings
                something else; and for a name that several packages bring.
        """
        if name in self.own:
            return self.own[name]
        if name not in self._added:
            raise UserError(f"unknown {self.what} {name!r}: {nearest(name, self)}")
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def source(self, name: str) -> Source | None:
        """Return the package that brings a name; None for ours, and for one that nobody brings."""
        if name in self.own or name not in self._added:
            return None
        return _source(self._added[name][0])

    @cached_property
    def _added(self) -> dict[str, list[EntryPoint]]:
        """The entry points of installed packages, by name."""
        added: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            if entry.name not in self.own:
                added.setdefault(entry.name, []).append(entry)
        return added

    def _load(self, name: str) -> T:
        entry, *others = self._added[name]
        source = _source(entry)
        if others:
            packages = " and ".join(str(_source(each)) for each in (entry, *others))
            raise UserError(f"{self.what} {name!r}: brought by {packages} (uninstall all but one)")
        try:
            thing = entry.load()
        except Exception as error:  # whatever a foreign module does when it is imported
            raise UserError(
                f"{self.what} {name!r}: {source} cannot be imported: {type(error).__name__}: {error} "
                "(mend or uninstall that package)"
            ) from error
        if not self._is_one(thing):
            raise UserError(
                f"{self.what} {name!r}: {source} brings {thing!r} ({entry.value}), which is no {self.what} "
                "(mend or uninstall that package)"
            )
        return thing


def _source(entry: EntryPoint) -> Source:
    dist = entry.dist
    return Source("an unknown package", "") if dist is None else Source(dist.name, dist.version)
