"""A package of one's own goes through every command; without it a run says what is missing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from blocks import TINY
from conftest import HIDDEN, REPOSITORY

pytestmark = pytest.mark.slow
SETTINGS = [
    *(item for item in TINY if not item.startswith(("network", "plan.network"))),
    "plan.network=plain",
    "plan.network_channels=8,8",
    "train.loss=focal",
    "train.augmentation=stripes",
    "stripes.depth=0.1",
    "steps=12",
]


# Python starts once for several commands, and the libraries are imported once.
COMMANDS = """
import contextlib, io, json, sys
from mlbseg.cli import main

found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["mlbseg", *arguments]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    found.append((code, said.getvalue()[-500:]))
print(json.dumps(found))
"""


class Installed:
    """mlbseg in processes that have the package, or have it not."""

    def __init__(self, packages: Path, cache: Path) -> None:
        self.packages = packages
        self.cache = cache

    def run(self, *commands: Sequence[object], plugin: bool = True) -> list[tuple[int, str]]:
        """Give commands one after the other to one process; return the code and the last line of each."""
        source = [str(HIDDEN), str(REPOSITORY / "src"), *([str(self.packages)] if plugin else [])]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(source), "MLBSEG_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, json.dumps([[str(word) for word in each] for each in commands])],
            capture_output=True, text=True, env=environment, timeout=600, check=True,
        )  # fmt: skip
        return [(int(code), said) for code, said in json.loads(done.stdout.splitlines()[-1])]

    def succeed(self, *commands: Sequence[object]) -> None:
        found = self.run(*commands)
        assert [code for code, _ in found] == [0] * len(commands), found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    packages = tmp_path_factory.mktemp("packages")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
            "--target", packages, REPOSITORY / "examples" / "plugin",
        ],
        check=True,
    )  # fmt: skip
    return Installed(packages, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def run(installed: Installed, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "half"
    options = [part for item in (*SETTINGS, "half.strength=0.3") for part in ("-o", item)]
    plain = [part for item in (*TINY, "steps=4") for part in ("-o", item)]
    installed.succeed(
        ["train", scans, "--out", out, "--method", "half", "--test", "case_3", "--device", "cpu", *options],
        ["train", scans, "--out", out.with_name("plain"), "--method", "supervised", "--device", "cpu", "--no-report",
         *plain],
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def used(installed: Installed, run: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands make of the run."""
    out = tmp_path_factory.mktemp("used")
    *done, (code, said) = installed.run(
        ["report", run, "--overwrite", "--quiet"],
        ["audit", run, "--out", out / "audit", "--quiet"],
        ["export", run, out / "half", "--format", "onnx"],
        ["predict", run, scans, "--out", out / "one", "--only", "test", "--device", "cpu"],
        [
            "predict",
            run,
            scans,
            "--out",
            out / "two",
            "--only",
            "test",
            "--accelerator",
            "cpu",
            "--devices",
            2,
        ],
        ["export", run, out / "bundle", "--format", "bundle"],
    )
    assert [code for code, _ in done] == [0] * 5, done
    assert code == 2
    assert "'plain' comes from mlbseg-example 0.1.0" in said
    return out


def test_its_settings_are_settings(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["method"] == "half"
    assert settings["half"] == {"strength": 0.3, "pale_weight": 1.0}
    assert settings["stripes"] == {"depth": 0.1}
    assert json.loads((run / "plan.json").read_text())["network"] == "plain"


def test_the_run_knows_its_package(run: Path) -> None:
    plugins = json.loads((run / "env.json").read_text())["plugins"]
    assert {(entry["what"], entry["name"]) for entry in plugins} == {
        ("method", "half"), ("network", "plain"), ("loss", "focal"), ("augmentation", "stripes"),
    }  # fmt: skip
    assert {(entry["package"], entry["version"]) for entry in plugins} == {("mlbseg-example", "0.1.0")}


@pytest.mark.usefixtures("used")
def test_its_terms_and_monitors_are_logged_and_reported(run: Path) -> None:
    with (run / "log.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["pale"]) >= 0
    assert float(last["paleness"]) >= 0
    page = (run / "report.html").read_text()
    assert "pale" in page
    assert "paleness" in page


def test_it_predicts_on_several_devices_as_on_one(used: Path) -> None:
    assert (used / "one/case_3.nii.gz").read_bytes() == (used / "two/case_3.nii.gz").read_bytes()


def test_it_is_audited_and_exported(used: Path) -> None:
    assert (used / "audit/cases.csv").is_file()
    assert (used / "half/model.onnx").is_file()
    assert not (used / "bundle").exists()


def test_it_is_a_row_of_a_bench(installed: Installed, scans: Path, tmp_path: Path) -> None:
    options = [part for item in SETTINGS for part in ("-o", item)]
    installed.succeed(
        ["bench", scans, "--out", tmp_path / "bench", "--variant", "pale=half half.strength=0.1", "--labelled", 2,
         "--test", "case_3", "--no-upper", "--jobs", 1, "--device", "cpu", "--quiet", *options],
    )  # fmt: skip
    with (tmp_path / "bench/cells.csv").open(newline="") as file:
        assert [(row["row"], row["status"]) for row in csv.DictReader(file)] == [("pale", "done")]


def test_without_the_package_a_run_says_what_is_missing_if_it_uses_it(
    installed: Installed, run: Path, scans: Path, tmp_path: Path
) -> None:
    masks = tmp_path / "masks"
    *missing, plain = installed.run(
        ["predict", run, tmp_path, "--out", masks],
        ["report", run],
        ["train", "--resume", run],
        ["predict", run.with_name("plain"), scans, "--out", masks, "--device", "cpu"],
        plugin=False,
    )
    for code, said in missing:
        assert code == 2
        assert "method 'half' of mlbseg-example 0.1.0, which is not installed here" in said
    assert plain[0] == 0, plain
    assert len(list(masks.glob("*.nii.gz"))) == 8
