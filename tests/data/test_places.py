"""What lies beside the scans and is none: named, never opened, and never waited for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.broken import healthy, left_atrium
from mlbseg.data.cases import find_cases, find_scans
from mlbseg.data.check import check
from mlbseg.data.layouts import bare
from mlbseg.data.places import unusable
from mlbseg.errors import UserError
from mlbseg.evaluation import mask_files

NOBODY = 65534


@pytest.fixture(autouse=True)
def _ends_by_itself() -> Iterator[None]:
    """End a test that waits for a FIFO: it would wait for ever."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for what was opened"))
    signal.alarm(60)
    yield
    signal.alarm(0)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket has room for 107 bytes
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (a_fifo, "a FIFO"),
    "socket": (a_socket, "a socket"),
    "device": (a_device, "a device file"),
    "broken link": (a_broken_link, "a broken link"),
    "loop": (a_loop, "a loop of links"),
}
every_odd = pytest.mark.parametrize(("make", "what"), ODD.values(), ids=ODD)


def as_nobody(work: Callable[[], str]) -> str:
    """Return what a function returns to a user without rights; rights are not enforced on root."""
    if os.getuid() != 0:
        return work()
    ours, theirs = multiprocessing.Pipe()

    def child() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            theirs.send(work())
        except BaseException as error:
            theirs.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert ours.poll(), "no answer"
    return str(ours.recv())


def open_to_all(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)


@every_odd
def test_it_is_said_what_lies_at_a_path(make: Callable[[Path], None], what: str, tmp_path: Path) -> None:
    make(tmp_path / "odd")
    assert unusable(tmp_path / "odd") == what
    assert unusable(tmp_path) == unusable(Path(__file__)) == ""


@every_odd
@pytest.mark.parametrize("name", ["odd", "odd.nii.gz"])
def test_what_is_no_scan_is_one_note(
    make: Callable[[Path], None], what: str, name: str, tmp_path: Path
) -> None:
    healthy(tmp_path)
    make(tmp_path / "images" / name)
    found = check(find_cases(tmp_path))
    lost = name.endswith(".gz") and "link" in what
    said = found.faults if lost else found.warnings
    assert [str(note).partition(" (")[0] for note in said] == [
        f"images/{name}: " + ("cannot be opened" if lost else f"{what}, ignored")
    ]
    assert [case.id for case in find_scans(tmp_path).cases] == ["a", "b", "c", "d", *["odd"] * lost]
    assert [case.id for case in bare(tmp_path / "images").cases] == ["a", "b", "c", "d", *["odd"] * lost]


@pytest.mark.parametrize("make", [a_fifo, a_socket, a_device])
def test_a_label_that_is_no_file_does_not_make_its_case_unlabelled(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    healthy(tmp_path)
    (tmp_path / "labels/b.nii.gz").unlink()
    make(tmp_path / "labels/b.nii.gz")
    (fault,) = check(find_cases(tmp_path)).faults
    assert (fault.where, fault.case_id, fault.expected) == ("labels/b.nii.gz", "b", "a label file")


@every_odd
def test_odd_files_of_other_places(make: Callable[[Path], None], what: str, tmp_path: Path) -> None:
    root = healthy(tmp_path / "data")
    make(root / "train.list")
    with pytest.raises(UserError, match=f"train.list: {what}, expected a file with one case id a line"):
        find_cases(root)
    make(root / "labels" / "x.nii.gz")  # masks
    assert sorted(mask_files(root / "labels", "masks")[0]) == ["a", "b", "c"]
    make(tmp_path / "scan.nii.gz")
    with pytest.raises(UserError, match=r"scan.nii.gz: (a |cannot be opened)"):
        find_scans(tmp_path / "scan.nii.gz")
    (root / "cases.csv").write_text("id,image\na,images/a.nii.gz\nb,images/odd.nii.gz\n")
    make(root / "images/odd.nii.gz")
    (fault,) = find_cases(root / "cases.csv").faults
    assert what in fault.found or "no file" in fault.found
    msd = tmp_path / "msd"
    healthy(msd)
    (msd / "images").rename(msd / "imagesTr")
    (msd / "labels").rename(msd / "labelsTr")
    make(msd / "dataset.json")
    (fault,) = find_cases(msd).faults
    assert what in fault.found


def test_the_file_systems_own_folder_is_passed_over(tmp_path: Path) -> None:
    healthy(tmp_path)
    (tmp_path / "images" / "lost+found").mkdir()
    (note,) = check(find_cases(tmp_path)).warnings
    assert str(note) == "images/lost+found: the file system's own folder, ignored"


def test_folders_and_files_without_rights_are_passed_over(tmp_path: Path) -> None:
    healthy(tmp_path)
    open_to_all(tmp_path)
    for name in ("images/closed", "closed"):
        (tmp_path / name).mkdir(mode=0o000)
    (tmp_path / "images" / "notes").write_text("x")
    (tmp_path / "images" / "notes").chmod(0)

    def look() -> str:
        notes = [str(note) for note in check(find_cases(tmp_path)).warnings]
        count = len(find_scans(tmp_path / "images").cases)
        return f"{notes} {count} {len(mask_files(tmp_path / 'labels', 'masks')[0])}"

    note = "images/closed: a folder that cannot be listed (Permission denied), ignored"
    assert note in (said := as_nobody(look))
    assert "images/notes: not a scan, ignored" in said
    assert said.endswith(" 4 3")


def test_a_case_folder_without_rights_is_not_lost_without_a_word(tmp_path: Path) -> None:
    left_atrium(tmp_path)
    open_to_all(tmp_path)
    (tmp_path / "n2").chmod(0)
    said = as_nobody(lambda: str([str(note) for note in find_cases(tmp_path).warnings]))
    (tmp_path / "n2").chmod(0o755)
    assert "/n2: a folder that cannot be listed (Permission denied), ignored" in said
