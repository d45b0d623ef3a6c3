"""Who is trained on, who chooses a checkpoint, who is only scored at the end. By patient, seeded, saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from mlbseg.data.patients import UNKNOWN, Patients
from mlbseg.data.records import read_record, validate, write_record
from mlbseg.errors import UserError, nearest
from mlbseg.types import Case, Role


@dataclass(frozen=True)
class Split:
    """Case ids by what they are for; no case is in two lists, no patient on two sides.

    Attributes:
        clean: Trained on with their labels.
        noisy: Trained on with unverified labels.
        unlabelled: Trained on without labels; those of hidden labels are among them.
        validation: Clean cases kept out of training to choose a checkpoint; may be empty.
        test: Never trained on.
        seed: Of the shuffle, where there was one.
        rule: How the split came about, in a sentence.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    clean: tuple[str, ...]
    noisy: tuple[str, ...]
    unlabelled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    seed: int
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, object], where: str = "split") -> Split:
        """Rebuild a split from `as_dict`.

        Raises:
            UserError: A field is missing, unknown or wrong, or a case is in two lists.
        """
        split = validate(TypeAdapter(cls), dict(record), where)
        ids = [*split.clean, *split.noisy, *split.unlabelled, *split.validation, *split.test]
        twice = sorted(name for name, count in Counter(ids).items() if count > 1)
        if twice:
            raise UserError(f"{where}: {', '.join(twice[:5])} in two lists, expected each case in one")
        return split

    def write(self, path: Path) -> None:
        """Write the split as JSON, whole or not at all."""
        write_record(path, self.as_dict())

    @classmethod
    def read(cls, path: Path) -> Split:
        """Read a split that `write` wrote.

        Raises:
            UserError: The file is not a split.
        """
        return cls.from_dict(read_record(path, "a split written by mlbseg"), str(path))


def make_split(
    cases: Sequence[Case],
    *,
    order: Sequence[str] = (),
    labelled: int | Sequence[str] | None = None,
    test: int | Sequence[str] | None = None,
    validation: int | Sequence[str] = 0,
    seed: int = 0,
    patients: Patients | None = None,
) -> Split:
    """Divide the cases. All numbers count along one order: the data's own, else a seeded shuffle.

    A patient goes as a whole: with a test case, all of the patient's cases are set apart for testing; with a
    validation case, the patient's other cases are left out altogether (they are in no list).

    Args:
        cases: All cases, each id once.
        order: The data's own order of case ids; names of cases that are not there are passed over. Cases that
            it does not name come after it, shuffled.
        labelled: How many (the first of the order) or which clean cases keep their label, validation
            included; all other careful labels are hidden. None: all. Noisy cases stay noisy.
        test: How many (the last of the order that carry a careful label) or which cases are set apart,
            besides those whose role is test already.
        validation: How many (the last of the clean ones) or which clean cases choose a checkpoint instead.
        seed: Of the shuffle.
        patients: How the cases were joined to patients, for the sentence; None says that nobody looked.

    Raises:
        UserError: A name is unknown, a number too large, two requests overlap, or no clean case is left.
    """
    by_id = {case.id: case for case in cases}
    ordered = _ordered(by_id, order, seed)
    careful = [c.id for c in ordered if c.role == Role.CLEAN and c.label is not None]

    asked = _last(careful, test, "test", by_id)
    given = {case.id for case in cases if case.role == Role.TEST}
    tested = _whole_patients(cases, given.union(asked))
    candidates = [name for name in careful if name not in tested]

    clean = _first(candidates, labelled, by_id, tested)
    validated = _last(clean, validation, "validation", by_id)
    set_aside = _whole_patients(cases, validated)
    train = [c for c in ordered if c.id not in tested and c.id not in set_aside]
    trained = {name for name in clean if name not in set_aside}
    if not trained:
        raise UserError(
            f"no clean case is left to train on: {len(careful)} carry a careful label, of which test takes "
            f"{len(tested.intersection(careful))} and validation {len(set_aside.intersection(clean))} "
            "(whole patients); ask for fewer"
        )
    return Split(
        clean=tuple(name for name in clean if name in trained),
        noisy=tuple(c.id for c in train if c.role == Role.NOISY),
        unlabelled=tuple(c.id for c in train if c.role != Role.NOISY and c.id not in trained),
        validation=tuple(name for name in clean if name in set_aside),
        test=tuple(c.id for c in ordered if c.id in tested),
        seed=seed,
        rule=_rule(by_id, order, seed, labelled, test, validation, patients),
    )


def apply_split(cases: Sequence[Case], split: Split, *, every: int | None = None) -> tuple[Case, ...]:
    """Return the cases of the split in their roles, in the order of `cases`.

    Hidden and test labels are gone from what is returned, so nothing downstream can read them. Validation
    cases are clean, with their label: training must leave them out by `split.validation`. Cases that the
    split does not name are left out.

    Args:
        cases: The cases.
        split: Their parts.
        every: Of each clean training label only one slice in so many is kept; all when None.

    Raises:
        UserError: The split names a case that is not there, or a clean or noisy one that has no label.
    """
    by_id = {case.id: case for case in cases}
    roles = {
        **dict.fromkeys((*split.clean, *split.validation), Role.CLEAN),
        **dict.fromkeys(split.noisy, Role.NOISY),
        **dict.fromkeys(split.unlabelled, Role.UNLABELLED),
        **dict.fromkeys(split.test, Role.TEST),
    }
    _known(roles, by_id, "the split")
    result = []
    for case in cases:
        if case.id not in roles:
            continue
        role = roles[case.id]
        keeps = role in (Role.CLEAN, Role.NOISY)
        if keeps and case.label is None:
            raise UserError(f"{case.id}: has no label, expected one as the split has it as {role.value}")
        known = replace(case.known, every=every) if case.id in split.clean else case.known
        result.append(replace(case, role=role, label=case.label if keeps else None, known=known))
    return tuple(result)


def leave_out(split: Split, ids: Collection[str]) -> Split:
    """Return the split without the cases `ids`; all others keep their part, so fewer may be labelled than asked.

    Raises:
        UserError: No clean case is left.
    """
    parts: dict[str, Any] = {
        part: tuple(name for name in getattr(split, part) if name not in ids)
        for part in ("clean", "noisy", "unlabelled", "validation", "test")
    }
    gone = [name for part in parts for name in getattr(split, part) if name in ids]
    if not parts["clean"]:
        raise UserError(
            f"no clean case is left to train on without {', '.join(split.clean)} (correct one of them: "
            "`mlbseg check` says what is wrong)"
        )
    rule = f"{split.rule} Left out for their faults: {', '.join(gone)}." if gone else split.rule
    return replace(split, **parts, rule=rule)


def _ordered(by_id: Mapping[str, Case], order: Sequence[str], seed: int) -> list[Case]:
    known = list(dict.fromkeys(name for name in order if name in by_id))
    rest = sorted(by_id.keys() - set(known))
    shuffled = [rest[i] for i in np.random.default_rng(seed).permutation(len(rest))]
    return [by_id[name] for name in (*known, *shuffled)]


def _whole_patients(cases: Iterable[Case], ids: Iterable[str]) -> set[str]:
    cases, ids = list(cases), set(ids)
    patients = {case.patient for case in cases if case.id in ids}
    return {case.id for case in cases if case.patient in patients}


def _last(
    names: Sequence[str], wanted: int | Sequence[str] | None, what: str, by_id: Mapping[str, Case]
) -> list[str]:
    """Return the last `wanted` of `names`, or those that `wanted` names."""
    if wanted is None:
        return []
    if not isinstance(wanted, int):
        _known(wanted, by_id, what)
        if what == "validation":
            _carry_label(wanted, names, what)
        return list(wanted)
    if not 0 <= wanted <= len(names):
        raise UserError(f"{what}: found {wanted}, expected 0 to {len(names)}, the cases with a usable label")
    return list(names[len(names) - wanted :])


def _first(
    candidates: Sequence[str],
    labelled: int | Sequence[str] | None,
    by_id: Mapping[str, Case],
    tested: set[str],
) -> list[str]:
    if labelled is None:
        return list(candidates)
    if not isinstance(labelled, int):
        _known(labelled, by_id, "labelled")
        both = sorted(tested.intersection(labelled))
        if both:
            raise UserError(f"labelled and test overlap: {', '.join(both[:5])}, expected no patient in both")
        _carry_label(labelled, candidates, "labelled")
        return [name for name in candidates if name in set(labelled)]
    if not 1 <= labelled <= len(candidates):
        raise UserError(
            f"labelled: found {labelled}, expected 1 to {len(candidates)}, the cases with a careful label "
            "that are not set apart for testing"
        )
    return list(candidates[:labelled])


def _known(names: Iterable[str], by_id: Mapping[str, Case], what: str) -> None:
    for name in names:
        if name not in by_id:
            raise UserError(f"{what}: no case {name!r}, {nearest(name, by_id)}")


def _carry_label(names: Iterable[str], careful: Sequence[str], what: str) -> None:
    without = [name for name in names if name not in set(careful)]
    if without:
        raise UserError(f"{what}: {', '.join(without[:5])} without a label to use, expected clean cases")


def _rule(
    by_id: Mapping[str, Case],
    order: Sequence[str],
    seed: int,
    labelled: int | Sequence[str] | None,
    test: int | Sequence[str] | None,
    validation: int | Sequence[str],
    patients: Patients | None,
) -> str:
    along = "the data's own order" if by_id.keys() & set(order) else f"a shuffle with seed {seed}"

    def amount(wanted: int | Sequence[str], which: str) -> str:
        return f"the {which} {wanted}" if isinstance(wanted, int) else f"{len(wanted)} named ones"

    parts = ["all careful labels kept" if labelled is None else f"labels kept of {amount(labelled, 'first')}"]
    if test:
        parts.append(f"{amount(test, 'last')} set apart for testing")
    parts.append(
        f"{amount(validation, 'last')} of the clean for validation" if validation else "no validation"
    )
    if patients is not None:
        whole = f"patients kept whole: {patients}" if patients.known else f"patients {patients}"
    elif any(case.patient != case.id for case in by_id.values()):
        whole = "patients kept whole"
    else:
        whole = f"patients {UNKNOWN}"
    return f"Along {along}: {'; '.join(parts)}; {whole}."
