from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlbseg.data.splits import Split, apply_split, make_split
from mlbseg.errors import UserError
from mlbseg.types import Case, Role


def case(name: str, role: Role = Role.CLEAN, patient: str = "") -> Case:
    label = None if role == Role.UNLABELLED else Path(f"labels/{name}.nii.gz")
    return Case(name, (Path(f"images/{name}.nii.gz"),), label, role, patient)


def clean(count: int) -> list[Case]:
    return [case(f"c{i:02}") for i in range(count)]


def everyone(split: Split) -> list[str]:
    return [*split.clean, *split.noisy, *split.unlabelled, *split.validation, *split.test]


def test_without_requests_every_case_keeps_its_role() -> None:
    cases = [case("a"), case("b", Role.NOISY), case("c", Role.UNLABELLED), case("d", Role.TEST)]
    split = make_split(cases)
    assert (split.clean, split.noisy, split.unlabelled, split.validation, split.test) == (
        ("a",),
        ("b",),
        ("c",),
        (),
        ("d",),
    )
    applied = {c.id: c for c in apply_split(cases, split)}
    assert applied["a"] == cases[0]
    assert applied["b"] == cases[1]
    assert applied["d"].label is None


def test_the_datas_own_order_counts() -> None:
    order = [f"c{i:02}" for i in (7, 3, 9, 1, 0, 8, 2, 6, 4, 5)]
    split = make_split(clean(10), order=order, labelled=3, test=2)
    assert split.clean == ("c07", "c03", "c09")
    assert split.test == ("c04", "c05")
    assert split.unlabelled == ("c01", "c00", "c08", "c02", "c06")
    assert "own order" in split.rule


def test_cases_outside_the_order_come_after_it_and_foreign_names_are_passed_over() -> None:
    split = make_split(clean(5), order=["c04", "elsewhere", "c02"], labelled=2)
    assert split.clean == ("c04", "c02")
    assert set(split.unlabelled) == {"c00", "c01", "c03"}


def test_the_shuffle_depends_on_the_seed_alone() -> None:
    cases = clean(20)
    first = make_split(cases, labelled=5, test=5, seed=1)
    assert make_split(cases[::-1], labelled=5, test=5, seed=1) == first
    assert make_split(cases, labelled=5, test=5, seed=2).clean != first.clean
    assert "seed 1" in first.rule


def test_a_larger_budget_contains_the_smaller_and_leaves_the_test_set() -> None:
    few = make_split(clean(20), labelled=3, test=5)
    many = make_split(clean(20), labelled=8, test=5)
    assert many.clean[:3] == few.clean
    assert many.test == few.test


def test_hidden_and_test_labels_are_gone_from_what_is_returned() -> None:
    cases = clean(10)
    split = make_split(cases, labelled=2, test=3, validation=1)
    for applied in apply_split(cases, split):
        if applied.id in (*split.clean, *split.validation):
            assert applied.role == Role.CLEAN
            assert applied.label is not None
        else:
            assert applied.role == (Role.TEST if applied.id in split.test else Role.UNLABELLED)
            assert applied.label is None


def test_noisy_labels_stay_beside_few_clean_ones() -> None:
    cases = [*clean(4), case("n", Role.NOISY)]
    split = make_split(cases, labelled=1)
    assert split.noisy == ("n",)
    assert len(split.unlabelled) == 3
    assert {c.id: c for c in apply_split(cases, split)}["n"].label == cases[-1].label


def test_unlabelled_cases_count_neither_as_labelled_nor_as_test() -> None:
    cases = [
        case("u0", Role.UNLABELLED),
        case("a"),
        case("u1", Role.UNLABELLED),
        case("b"),
        case("u2", Role.UNLABELLED),
    ]
    split = make_split(cases, order=[c.id for c in cases], labelled=1, test=1)
    assert split.clean == ("a",)
    assert split.test == ("b",)


def test_named_cases_are_taken() -> None:
    split = make_split(clean(6), labelled=["c05", "c01", "c02"], test=["c00"], validation=["c01"])
    assert set(split.clean) == {"c05", "c02"}
    assert split.validation == ("c01",)
    assert split.test == ("c00",)
    assert set(split.unlabelled) == {"c03", "c04"}


def test_a_patient_goes_to_the_test_set_as_a_whole() -> None:
    cases = [*clean(3), case("p1", patient="p"), case("p2", Role.UNLABELLED, "p")]
    split = make_split(cases, test=["p1"])
    assert set(split.test) == {"p1", "p2"}
    given = make_split([*clean(3), case("p1", Role.TEST, "p"), case("p2", Role.CLEAN, "p")])
    assert set(given.test) == {"p1", "p2"}


def test_a_validation_patients_other_cases_are_left_out() -> None:
    cases = [*clean(3), case("p1", patient="p"), case("p2", Role.UNLABELLED, "p")]
    split = make_split(cases, validation=["p1"])
    assert split.validation == ("p1",)
    assert "p2" not in everyone(split)
    assert {c.id for c in apply_split(cases, split)} == {"c00", "c01", "c02", "p1"}


@given(
    patients=st.lists(st.integers(0, 8), min_size=8, max_size=24),
    roles=st.randoms(use_true_random=False),
    labelled=st.integers(1, 3),
    test=st.integers(0, 3),
    validation=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=200)
def test_no_patient_is_on_two_sides_and_no_case_in_two_lists(
    patients: list[int], roles: object, labelled: int, test: int, validation: int, seed: int
) -> None:
    choice = roles.choice  # type: ignore[attr-defined]
    cases = [
        case(f"c{i}", choice([Role.CLEAN, Role.CLEAN, Role.UNLABELLED, Role.NOISY, Role.TEST]), f"p{p}")
        for i, p in enumerate(patients)
    ]
    try:
        split = make_split(cases, labelled=labelled, test=test, validation=validation, seed=seed)
    except UserError:
        return
    names = everyone(split)
    assert len(names) == len(set(names))
    patient = {c.id: c.patient for c in cases}
    train = {patient[n] for n in (*split.clean, *split.noisy, *split.unlabelled)}
    held = {patient[n] for n in split.validation}
    tested = {patient[n] for n in split.test}
    assert not train & held
    assert not train & tested
    assert not held & tested
    assert len(split.clean) + len(split.validation) == labelled
    assert len(split.validation) >= validation
    assert split.clean


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"labelled": 11}, r"labelled: found 11, expected 1 to 10"),
        ({"labelled": 0}, r"labelled: found 0, expected 1 to 10"),
        ({"labelled": 6, "test": 5}, r"labelled: found 6, expected 1 to 5"),
        ({"test": 11}, r"test: found 11, expected 0 to 10"),
        ({"test": -1}, r"test: found -1"),
        ({"validation": 11}, r"validation: found 11"),
        ({"test": 10}, r"no clean case is left"),
        ({"labelled": 2, "validation": 2}, r"no clean case is left"),
        ({"labelled": ["c1"]}, r"labelled: no case 'c1', did you mean 'c.1'"),
        ({"test": ["zzz"]}, r"test: no case 'zzz'"),
        ({"labelled": ["c01", "c02"], "test": ["c02"]}, r"labelled and test overlap: c02"),
        ({"labelled": ["c01"], "validation": ["c02"]}, r"validation: c02 without a label"),
    ],
)
def test_impossible_requests_are_explained(wanted: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_split(clean(10), **wanted)  # type: ignore[arg-type]


def test_a_named_case_without_a_label_is_refused() -> None:
    with pytest.raises(UserError, match="u without a label to use"):
        make_split([*clean(2), case("u", Role.UNLABELLED)], labelled=["u"])


def test_an_unknown_name_among_many_cases_gets_a_short_answer() -> None:
    with pytest.raises(UserError, match="did you mean") as error:
        make_split(clean(60), labelled=["c599"])
    assert len(str(error.value)) < 120
    with pytest.raises(UserError, match="none of the 60 known"):
        make_split(clean(60), labelled=["?"])


def test_a_split_survives_the_disk(tmp_path: Path) -> None:
    split = make_split(clean(10), labelled=4, test=2, validation=1)
    split.write(tmp_path / "split.json")
    assert Split.read(tmp_path / "split.json") == split
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]


def test_a_tampered_split_is_refused(tmp_path: Path) -> None:
    split = make_split(clean(6), labelled=2, test=2)
    twice = replace(split, test=split.clean)
    with pytest.raises(UserError, match="in two lists"):
        Split.from_dict(twice.as_dict())
    path = tmp_path / "split.json"
    path.write_text(json.dumps({**split.as_dict(), "seed": "x"}))
    with pytest.raises(UserError, match=r"split\.json\.seed"):
        Split.read(path)


def test_applying_a_split_to_other_cases_is_refused() -> None:
    split = make_split(clean(4), labelled=2)
    with pytest.raises(UserError, match="the split: no case"):
        apply_split(clean(2)[:1], split)
    bare = [replace(c, label=None, role=Role.UNLABELLED) for c in clean(4)]
    with pytest.raises(UserError, match="has no label, expected one"):
        apply_split(bare, split)
