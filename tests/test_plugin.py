"""A package of one's own goes through every command; without it a run says what is missing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from blocks import TINY
from conftest import REPOSITORY

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


class Installed:
    """mlbseg in processes that have the package, or have it not."""

    def __init__(self, packages: Path, cache: Path) -> None:
        self.packages = packages
        self.cache = cache

    def run(self, *arguments: object, plugin: bool = True, code: int = 0) -> str:
        source = [str(REPOSITORY / "src"), *([str(self.packages)] if plugin else [])]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(source), "MLBSEG_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "mlbseg", *map(str, arguments)],
            capture_output=True, text=True, env=environment, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr


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
    installed.run(
        "train", scans, "--out", out, "--method", "half", "--test", "case_3", "--device", "cpu", *options
    )
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


def test_its_terms_and_monitors_are_logged_and_reported(installed: Installed, run: Path) -> None:
    with (run / "log.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["pale"]) >= 0
    assert float(last["paleness"]) >= 0
    installed.run("report", run, "--overwrite", "--quiet")
    page = (run / "report.html").read_text()
    assert "pale" in page
    assert "paleness" in page


def test_it_predicts_on_several_devices_as_on_one(
    installed: Installed, run: Path, scans: Path, tmp_path: Path
) -> None:
    installed.run("predict", run, scans, "--out", tmp_path / "one", "--only", "test", "--device", "cpu")
    installed.run(
        "predict",
        run,
        scans,
        "--out",
        tmp_path / "two",
        "--only",
        "test",
        "--accelerator",
        "cpu",
        "--devices",
        2,
    )
    assert (tmp_path / "one/case_3.nii.gz").read_bytes() == (tmp_path / "two/case_3.nii.gz").read_bytes()


def test_it_is_audited_and_exported(installed: Installed, run: Path, tmp_path: Path) -> None:
    installed.run("audit", run, "--out", tmp_path / "audit", "--quiet")
    assert (tmp_path / "audit/cases.csv").is_file()
    installed.run("export", run, tmp_path / "half", "--format", "onnx")
    assert (tmp_path / "half/model.onnx").is_file()
    said = installed.run("export", run, tmp_path / "bundle", "--format", "bundle", code=2)
    assert "'plain' comes from mlbseg-example 0.1.0" in said
    assert not (tmp_path / "bundle").exists()


def test_it_is_a_row_of_a_bench(installed: Installed, scans: Path, tmp_path: Path) -> None:
    options = [part for item in SETTINGS for part in ("-o", item)]
    installed.run(
        "bench", scans, "--out", tmp_path / "bench", "--methods", "supervised,half", "--labelled", 2,
        "--test", "case_3", "--variant", "pale=half half.strength=0.1", "--no-upper", "--jobs", 1,
        "--device", "cpu", "--quiet", *options,
    )  # fmt: skip
    table = (tmp_path / "bench/table.md").read_text()
    assert all(name in table for name in ("supervised", "half", "pale"))


def test_without_the_package_the_run_says_what_is_missing(
    installed: Installed, run: Path, tmp_path: Path
) -> None:
    predict = ["predict", run, tmp_path, "--out", tmp_path / "masks"]
    for command in (predict, ["report", run], ["train", "--resume", run]):
        said = installed.run(*command, plugin=False, code=2)
        assert "method 'half' of mlbseg-example 0.1.0, which is not installed here" in said


def test_a_run_that_does_not_use_it_needs_it_not(installed: Installed, scans: Path, tmp_path: Path) -> None:
    options = [part for item in (*TINY, "steps=4") for part in ("-o", item)]
    out = tmp_path / "run"
    installed.run(
        "train", scans, "--out", out, "--method", "supervised", "--device", "cpu", "--no-report", *options
    )
    installed.run("predict", out, scans, "--out", tmp_path / "masks", "--device", "cpu", plugin=False)
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 8
