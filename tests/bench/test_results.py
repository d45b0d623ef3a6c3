"""The lines of the table."""

from __future__ import annotations

from mlbseg.apps.bench.cells import Row
from mlbseg.apps.bench.record import Setup
from mlbseg.apps.bench.results import Group, Results


def test_each_table_has_the_best_row_first() -> None:
    rows = {name: Row(name, "mlb") for name in ("a", "b", "c")}
    setup = Setup("data", "cache", 0, "", ("x",), ("t",), ("t",), {}, {}, rows)
    dice = {
        ("a", 4): 0.8,
        ("b", 4): 0.7,
        ("a", 8): 0.8,
        ("b", 8): 0.9,
        ("c", 8): 0.85,
        ("supervised", None): 0.95,
    }
    groups = {key: Group(key[0], key[0], key[1], dice={0: {"t": value}}) for key, value in dice.items()}
    results = Results(setup, [], [], groups, [4, 8])
    order = {budget: [line.group.slug for line in results.lines(budget)] for budget in (4, 8)}
    assert order == {4: ["a", "b", "supervised"], 8: ["b", "c", "a", "supervised"]}
    assert results.slugs() == ["a", "b", "c"]
