"""What people type and edit by hand: every setting and every record at its extremes ends in a true error, or works."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import Command
from mlbseg.cli.arguments import count_or_ids, label_values, part_of
from mlbseg.config import config_of, load_config, parse_yaml
from mlbseg.data.cases import find_cases
from mlbseg.data.fingerprint import fingerprint
from mlbseg.data.plan import Fingerprint, Plan, make_plan
from mlbseg.data.splits import apply_split, make_split
from mlbseg.errors import UserError, brief

MEMORY = 4 << 30


@pytest.fixture(scope="module")
def facts(scans: Path) -> Fingerprint:
    cases = find_cases(scans).cases
    return fingerprint(apply_split(cases, make_split(cases)))


# --- YAML -------------------------------------------------------------------------------------------------


def laughs(depth: int, width: int = 9) -> str:
    lines = ['a0: &a0 ["lol"]']
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines)


YAML = {
    "billion laughs": (laughs(10), "more than 10000 values"),
    "many laughs": (laughs(200), "more than 10000 values"),
    "one that holds itself": ("plan: &a {spacing: [*a]}", "more than 10000 values"),
    "a long list": ("plan: {spacing: [" + "1," * 20_000 + "]}", "more than 10000 values"),
    "a large file": ("# " + "x" * 2_000_000, "expected at most 1000000"),
    "deep": ("[" * 50_000, "nested too deeply"),
    "many digits": ("seed: " + "9" * 5000, "a number or a date that cannot be"),
    "half a pair": ('method: "\\ud800"', "half of a surrogate pair"),
    "no alias": ("method: *x", "found undefined alias"),
    "a tag": ("!!python/object:os.system x", "could not determine a constructor"),
    "control": ("\x01", "special characters are not allowed"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_too_much_is_refused_in_one_short_line(
    name: str, scans: Path, tmp_path: Path, command: Command
) -> None:
    text, message = YAML[name]
    (tmp_path / "c.yaml").write_text(text)
    done = command("train", scans, "--out", tmp_path / "run", "--config", tmp_path / "c.yaml")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith(f"error: {tmp_path / 'c.yaml'}: not a YAML file (")
    assert message in done.err
    assert len(done.err) < 500


def test_aliases_of_bounded_size_are_taken(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "train: {lr: &lr 0.01, lr_bootstrap: *lr}\nict: &m {ramp: 0.2}\nmean_teacher: {<<: *m}"
    )
    config = load_config(tmp_path / "c.yaml")
    assert (config.train.lr_bootstrap, config.mean_teacher.ramp) == (0.01, 0.2)
    assert parse_yaml("") is None


def test_values_in_messages_are_short() -> None:
    assert brief(10**5000).startswith("<a number of some ")
    nested: Any = []
    for _ in range(50):
        nested = [nested] * 9
    assert len(brief(nested)) < 9000
    assert len(brief("x" * 10**6)) < 100
    assert brief([1, "a", None]) == "[1, 'a', None]"


# --- lists and descriptions of data -----------------------------------------------------------------------

DEEP = "[" * 990 + "]" * 990
JSON = {
    "too deep": "[" * 100_000,
    "deep": f'{{"labels": {DEEP}, "cases": {DEEP}}}',
    "deep values": f'{{"labels": {{"a": {DEEP}}}, "file_ending": {DEEP}, "cases": [{{"id": {DEEP}}}]}}',
    "deep ids": f'[{{"image": "images/case_0.nii.gz", "id": {DEEP}}}]',
    "half a pair": '{"labels": {"\\ud800": 1}, "file_ending": "\\udc00", "cases": [{"image": "\\ud800"}]}',
    "many digits": '{"labels": {"a": ' + "9" * 5000 + '}, "cases": [{"image": ' + "9" * 5000 + "}]}",
    "names of many digits": '{"labels": {"' + "9" * 5000 + '": "a"}, "cases": [{"image_' + "9" * 5000 + '": "a"}]}',
    "numbers": '{"labels": 5, "file_ending": 5, "cases": 5}',
    "ending": '{"labels": {"a": 1}, "file_ending": 5, "cases": [{"image": 5}]}',
    "lists": '{"labels": [1], "file_ending": [], "cases": [[1]]}',
    "large values": '{"labels": {"a": 99999999999, "b": -1}, "cases": [{"image": {}, "role": {}, "patient": []}]}',
    "fractions": '{"labels": {"a": 0.5}, "cases": [{"image": 0.5, "role": 0.5}]}',
    "null": "null",
    "null characters": '{"labels": {"a": null}, "cases": [{"image": "a\\u0000b.nii.gz", "label": "\\u0000"}]}',
    "long names": '{"cases": [{"image": "' + "x" * 99_999 + '.nii.gz"}], "labels": {"' + "y" * 99_999 + '": "z"}}',
    "words": '{"labels": {"a": "b"}, "cases": [{"role": "a"}]}',
}  # fmt: skip


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("where", ["dataset.json", "cases.json"])
def test_json_of_any_content_is_refused_with_a_short_line(
    name: str, where: str, scans: Path, tmp_path: Path, command: Command
) -> None:
    root = tmp_path / "data"
    shutil.copytree(scans / "images", root / "imagesTr")
    shutil.copytree(scans / "labels", root / "labelsTr")
    (root / where).write_text(JSON[name])
    done = command("check", root if where == "dataset.json" else root / where)
    assert done.code == 2, done
    assert "internal error" not in done.err
    assert 1 <= done.err.count("\n") <= 9
    assert len(done.err) < 6000
    machine = command("check", root if where == "dataset.json" else root / where, "--json")
    assert machine.code == 2
    assert machine.json


@pytest.mark.parametrize(
    "text",
    ["id,image_" + "9" * 5000 + "\na,b", "id,image\n" + "x" * 200_000 + ",y", 'id,image\n"a', "id,image\na\x00,b\x00",
     "id,image,image\na,b,c", "id,image\na," + "../" * 2000, "id\xa0,image\na," + "y" * 5000],
)  # fmt: skip
def test_a_csv_of_any_content_is_refused(text: str, tmp_path: Path, command: Command) -> None:
    (tmp_path / "cases.csv").write_text(text, encoding="utf-8")
    done = command("check", tmp_path / "cases.csv")
    assert (done.code, "internal" in done.err) == (2, False)


def test_counts_of_too_many_digits_are_names() -> None:
    assert count_or_ids("9" * 5000) == ["9" * 5000]
    with pytest.raises(UserError, match="--part"):
        part_of("1/" + "9" * 5000)
    with pytest.raises(UserError, match="--labels: found 2147483648"):
        label_values("0,2147483648")


# --- records that mlbseg wrote and somebody edited --------------------------------------------------------


# --- weights and checkpoints ------------------------------------------------------------------------------


def test_a_data_record_without_its_root_is_named(
    supervised_run: Path, tmp_path: Path, command: Command
) -> None:
    root = tmp_path / "run"
    shutil.copytree(supervised_run, root)
    (root / "data.json").write_text("{}")
    for words in (
        ["report", root, "--overwrite"],
        ["audit", root],
        ["suggest", root],
        ["train", "--resume", root],
    ):
        done = command(*words)
        assert (done.code, "data.json.root: Field required" in done.err) == (2, True), (words, done.err)


def test_the_bounds_of_settings_and_of_the_plan_agree(facts: Fingerprint) -> None:
    sides = {"patch_size": 4096, "batch_size": 4096, "unlabelled_batch_size": 4096, "steps": 10**9}
    for name, most in sides.items():
        assert config_of({"plan": {name: most}})
        with pytest.raises(UserError, match=name):
            config_of({"plan": {name: most + 1}})
        plan = make_plan(facts, memory_bytes=MEMORY).as_dict()
        plan[name] = [most] * 3 if name == "patch_size" else most
        assert Plan.from_dict(plan)
        plan[name] = [most + 8] * 3 if name == "patch_size" else most + 1
        with pytest.raises(UserError, match=name):
            Plan.from_dict(plan)
