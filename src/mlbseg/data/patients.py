"""Which cases are of one patient: told by the user or a list, or recognised; never guessed without saying so.

Two scans of one patient on both sides of a split make test scores too good. What names a patient is, in this order:
an expression of the user's, a list's column, DICOM's PatientID, and ids that follow a form that names patients.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import SimpleITK as sitk  # noqa: N813 - as its documentation does
from pydantic import ConfigDict

from mlbseg.data.formats import dicom
from mlbseg.data.places import is_folder
from mlbseg.errors import UserError
from mlbseg.types import Case

UNKNOWN = "unknown: each case taken as its own"
MOST_VISITS = 12
"""More scans of one patient than this are not believed of a form that does not say what it counts."""

_PATIENT_ID = "0010|0020"
_NO_ID = re.compile(
    r"[0x*?\W_]*|anon(ym(ou|i[sz]e)[sd])?|unknown|none|null|n/?a|patient|removed|de-?identified",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Form:
    """A form of case ids.

    Attributes:
        shown: What users are told.
        pattern: Matches a whole id; its first group is the patient.
        limited: Whether more than `MOST_VISITS` cases of one patient make it unlikely.
    """

    shown: str
    pattern: re.Pattern[str]
    limited: bool = False


def _form(shown: str, pattern: str, *, limited: bool = False) -> _Form:
    return _Form(shown, re.compile(pattern, re.IGNORECASE), limited)


_FORMS = (
    _form("sub-X_…", r"(sub-[a-z0-9]+)(_.+)?"),  # BIDS
    _form("patientN_frameN", r"(patient\d+)_(frame\d+|4d).*"),  # ACDC
    _form("NNN_kHC", r"(\d{3})_\d*HC"),  # HC18
    _form("BraTS-X-N-N", r"(BraTS-[a-z]+-\d{5})-\d{3}"),
    _form("UPENN-GBM-N_N", r"(UPENN-GBM-\d{5})_\d{2}"),
    _form("OASN_N_MRN", r"(OAS\d_\d{4})_MR\d"),  # OASIS
    _form("N_S_N", r"(\d{3}_S_\d{4})(_.+)?"),  # ADNI
    _form("TCGA-X-X", r"(TCGA-\w\w-\w{4})([-_.].+)?"),
    _form(
        "patientN_…",
        r"((?:patient|pat|subject|subj|sub|participant|pt)[-_ ]?\d+)([-_ .].+)?",
        limited=True,
    ),
)
_PART = r"(?:slice|frame)[-_]?\d+"
_VISIT = (
    r"t[12](?:w|c|ce|gd|n|f)?|flair|pd|dwi|adc|lge|cine|ct|mri?|pet"  # sequences
    r"|e[ds]|rest|stress|insp|exp|pre|post|arterial|venous|native"  # phases
    r"|baseline|bl|follow-?up|fu|before|after|test|retest|left|right|l|r"
    r"|(?:visit|v|ses|session|t|tp|timepoint|time|scan|exam|acq|run|follow-?up|fu|month|m|year|y|week|w|day|d)[-_]?\d+"
)
_ENDING = re.compile(rf"(?P<rest>.*[a-z0-9].*?)[-_. ](?:(?P<part>{_PART})|{_VISIT})", re.IGNORECASE)


@dataclass(frozen=True)
class Patients:
    """How cases were joined to patients.

    Attributes:
        known: Whether anything says which patient a case is of.
        how: What says it, or why nothing does; "" where there is nothing to say.
        cases: Number of cases.
        groups: Ids of the cases of each patient of more than one.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    known: bool
    how: str
    cases: int
    groups: tuple[tuple[str, ...], ...] = ()

    @property
    def count(self) -> int:
        """Number of patients; of cases where they are unknown."""
        return self.cases - sum(len(group) - 1 for group in self.groups)

    def __str__(self) -> str:
        if not self.known:
            return UNKNOWN + (f" ({self.how})" if self.how else "")
        cases = f"{self.cases} case{'s' if self.cases != 1 else ''}"
        return f"{cases} of {self.count} patient{'s' if self.count != 1 else ''}, {self.how}"

    @property
    def advice(self) -> str:
        """What to do if this is wrong."""
        if self.known:
            return "--patient REGEX says otherwise, --patient '(.*)' that each case is a patient"
        return "say them with --patient REGEX, or in the column patient of a list of cases"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """Return the fields, their number, and all of it in words, for `mlbseg check`."""
        return {**self.as_dict(), "count": self.count, "words": f"{self} ({self.advice})"}

    def join(self, cases: Iterable[Case]) -> tuple[Case, ...]:
        """Return the cases with their patient, which is called after the first of its cases."""
        first = {name: group[0] for group in self.groups for name in group}
        return tuple(replace(case, patient=first.get(case.id, case.id)) for case in cases)


def find_patients(
    cases: Sequence[Case], pattern: str | None = None, *, listed: Mapping[str, str] | None = None
) -> Patients:
    """Say which cases are of one patient.

    Args:
        cases: The cases.
        listed: The patients that a list of cases names, by case id.
        pattern: A regular expression whose first group, found in a case's id, is the patient.

    Raises:
        UserError: The pattern is no regular expression with a group, or finds no patient in some id.
    """
    if pattern is not None:
        return _patients(cases, _by_pattern(cases, pattern), "by --patient")
    if listed:
        return _patients(cases, listed, "by the list's column patient")
    ids = {case.id: found for case in cases if (found := _patient_id(case))}
    if len(set(ids.values())) > 1 or len(ids) == len(cases) == 1:
        return _patients(cases, ids, "by DICOM's PatientID")
    formed = _by_form(cases)
    if ids and not formed.known:
        return replace(formed, how=f"DICOM's PatientID is the same in all {len(ids)} series")
    return formed


def _patients(cases: Sequence[Case], patients: Mapping[str, str], how: str) -> Patients:
    """Return what a patient's name for each case, or for some of them, says."""
    groups: dict[str, list[str]] = {}
    for case in cases:
        if case.id in patients:
            groups.setdefault(patients[case.id], []).append(case.id)
    if alone := len(cases) - len(patients):
        how += f"; {alone} without one taken as {'its' if alone == 1 else 'their'} own"
    joined = sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)
    return Patients(True, how, len(cases), tuple(joined))


def _by_pattern(cases: Sequence[Case], pattern: str) -> dict[str, str]:
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--patient {pattern!r}: no regular expression ({error})") from None
    if not expression.groups:
        raise UserError(
            f"--patient {pattern!r}: no group, expected one around the patient, such as '(patient[0-9]+)_'"
        )
    found = {case.id: match[1] for case in cases if (match := expression.search(case.id)) and match[1]}
    if missing := [case.id for case in cases if case.id not in found]:
        raise UserError(
            f"--patient {pattern!r}: finds no patient in {len(missing)} of {len(cases)} case ids, such as "
            f"{', '.join(missing[:3])} (expected one in each; '|' joins alternatives)"
        )
    return found


def _patient_id(case: Case) -> str:
    """Return the PatientID of a DICOM case, "" if there is none. It is for comparing, and is written nowhere."""
    path = case.images[0]
    if not is_folder(path) and path.suffix.lower() not in (".dcm", ".ima"):
        return ""
    try:
        files = dicom.slice_files(path) if is_folder(path) else [path]
    except OSError:
        return ""  # reading says what is wrong with it
    found = _header_id(files[0]) if files else ""
    return "" if _NO_ID.fullmatch(found) else found


def _header_id(path: Path) -> str:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return ""  # reading says what is wrong with it
    return str(reader.GetMetaData(_PATIENT_ID)).strip("\0 ") if reader.HasMetaDataKey(_PATIENT_ID) else ""


def _by_form(cases: Sequence[Case]) -> Patients:
    """Return what the ids say by the first form that explains them; else that nothing is known."""
    for form in _FORMS:
        found = {case.id: match[1].casefold() for case in cases if (match := form.pattern.fullmatch(case.id))}
        counts = Counter(found.values())
        explains = 2 * len(found) > len(cases) and (len(counts) > 1 or len(found) == 1)
        if explains and not (form.limited and max(counts.values()) > MOST_VISITS):
            return _patients(cases, found, f"by the ids' pattern {form.shown}")
    return _by_ending(cases) or Patients(False, "", len(cases))


def _by_ending(cases: Sequence[Case]) -> Patients | None:
    """Return what endings of ids that say which of a patient's scans it is, such as _ED or _visit2, say.

    `case_t1` and `case_t2` may be two cases of a study, which is called `case`: there must be several patients, with
    numbers in their names or no more scans than patients.
    """
    patients: dict[str, str] = {}
    endings: set[str] = set()
    limited = False
    for case in cases:
        rest = case.id
        while match := _ENDING.fullmatch(rest):
            endings.add(re.sub(r"\d+", "N", rest[len(match["rest"]) :]))
            limited |= match["part"] is None
            rest = match["rest"]
        patients[case.id] = rest.casefold()
    counts = Counter(patients.values())
    most = max(counts.values(), default=0)
    if min(most, len(counts)) < 2 or (limited and most > MOST_VISITS):
        return None
    if most > len(counts) and not all(re.search(r"\d", name) for name, n in counts.items() if n > 1):
        return None
    shown = ", ".join(sorted(endings)[:4]) + (", …" if len(endings) > 4 else "")
    return _patients(cases, patients, f"by the ids' endings {shown}")
