"""What people type and edit by hand: every setting and every record at its extremes ends in a true error, or works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from conftest import Command
from mlbseg import train
from mlbseg.apps.audit import _audited
from mlbseg.apps.bench.cell import OUTCOME, outcome
from mlbseg.apps.bench.record import Setup
from mlbseg.apps.bench.report import markdown, page, tables
from mlbseg.apps.bench.results import gather
from mlbseg.apps.report.page import render_page, write_page
from mlbseg.apps.report.runs import _subtitle
from mlbseg.apps.report.sections import audit_section, data_section, machine_section, plan_section
from mlbseg.cli.arguments import count_or_ids, label_values, part_of
from mlbseg.config import Config, _keys, config_of, load_config, parse_yaml
from mlbseg.data.cases import find_cases
from mlbseg.data.fingerprint import fingerprint
from mlbseg.data.plan import Fingerprint, Plan, make_plan
from mlbseg.data.readers import read_scan
from mlbseg.data.splits import apply_split, make_split
from mlbseg.errors import UserError, brief
from mlbseg.networks import NETWORKS, count_weights, make_network
from mlbseg.runs import CONFIG, Run, checkpoints, make_method, make_student
from mlbseg.training.prepare import require_cases, require_shares, views_of
from mlbseg.types import Role

KEYS = list(_keys())
EXTREMES: list[Any] = [
    None, 0, -1, 1, 10**6, 10**20, 10**400, -(10**20), -0.0, 0.5, 1e-300, 1e300, float("nan"), float("inf"),
    -float("inf"), True, "", "x", "x" * 2000, "\ud800", "\x00", [], [0], [1e300], [float("nan")], [-1], ["x"], [""],
    [[]], [None], 256, 1000, 4096, [4096] * 2, [4096] * 10, 10**9, 1e-9, 1e-6, 1e-3, 0.999999, 1e4, 1e12,
    [10**20] * 3, [1] * 5000, ["x"] * 5000, [1, 1, 1], {}, {"x": 1},
    {"lower": 0, "upper": 1, "mean": 0, "std": 1e-300}, [{}],
]  # fmt: skip
MEMORY = 4 << 30


@pytest.fixture(scope="module")
def facts(scans: Path) -> Fingerprint:
    cases = find_cases(scans).cases
    return fingerprint(apply_split(cases, make_split(cases)))


# --- settings ---------------------------------------------------------------------------------------------


class Desk:
    """Decides and refuses as `prepare_run` does, of scans that are known; builds network and method, each once."""

    def __init__(self, root: Path, facts: Fingerprint) -> None:
        self.root, self.facts = root, facts
        self.split = make_split(find_cases(root).cases)
        self.built: dict[str, tuple[Plan, torch.nn.Module]] = {}

    def prepare(self, config: Config) -> None:
        require_cases(self.root, config, self.split)
        plan, student = self._student(config)
        require_shares(plan, config, 2)
        make_method(student, Run(self.root, config, plan, self.split))

    def _student(self, config: Config) -> tuple[Plan, torch.nn.Module]:
        overrides, views = config.plan.model_dump(exclude_none=True), views_of(config)
        key = repr((overrides, views, config.seed, config.train.norm, config.train.dropout))
        if key not in self.built:
            plan = make_plan(self.facts, memory_bytes=MEMORY, views=views, overrides=overrides)
            assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
            self.built[key] = plan, make_student(plan, config)
        return self.built[key]


@pytest.fixture(scope="module")
def desk(scans: Path, facts: Fingerprint) -> Desk:
    return Desk(scans, facts)


def record_with(key: str, value: object) -> dict[str, Any]:
    """Return settings with a small network and one at an extreme; its method is the one that reads it."""
    record: dict[str, Any] = {"plan": {"network": "unet", "network_channels": [2, 4], "patch_size": 16}}
    section, _, name = key.rpartition(".")
    (record.setdefault(section, {}) if section else record)[name] = value
    method = section.replace("_", "-")
    record.setdefault("method", "mlb" if section in ("", "plan", "train", "augment") else method)
    return record


@pytest.mark.parametrize("key", KEYS)
def test_every_setting_at_its_extremes_is_refused_or_works(key: str, desk: Desk, tmp_path: Path) -> None:
    said = []
    for value in EXTREMES:
        try:
            config = config_of(record_with(key, value))
            asked = config.model_dump(mode="json", exclude_defaults=True)  # YAML is slow with all of them
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
            assert load_config(tmp_path / "config.yaml") == config
            desk.prepare(config)
        except UserError as error:
            said.append(str(error))
    assert said
    assert all(10 < len(message) < 3000 for message in said)


@pytest.mark.parametrize("key", KEYS)
def test_what_is_typed_for_a_setting_is_refused_or_taken(key: str) -> None:
    said = []
    for text in ("0", "-1", ".nan", ".inf", "1e300", "1" + "0" * 20, "9" * 5000, "0x" + "f" * 9000, "'",
                 "[" * 500, "[1,", "&a [*a]", "\x1b[31m", '"\\ud800"', "2001-99-99", ",".join("1" * 9000), "*a",
                 "!!python/x y", ""):  # fmt: skip
        try:
            load_config(overrides=[f"{key}={text}"])
        except UserError as error:
            said.append(str(error))
    assert said
    assert all(len(message) < 2000 and "\x1b" not in message for message in said)


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_are_counted_without_a_network(network: str) -> None:
    channels = (24,) if network == "swin-unetr" else (4, 8, 8, 12, 12)
    arguments: dict[str, Any] = {"ndim": 2, "in_channels": 1, "num_classes": 3, "channels": channels}
    before = torch.random.get_rng_state()
    found = count_weights(network, **arguments)
    assert torch.equal(torch.random.get_rng_state(), before)
    built = sum(tensor.numel() for tensor in make_network(network, **arguments).parameters())
    assert found == pytest.approx(built, rel=0.1 if network == "swin-unetr" else 0)


BEYOND = {
    "unet": [4096, 4096], "unet++": [4096] * 5, "vnet": [4096], "vnet3": [4096], "dynunet": [4096] * 10,
    "nested-unet": [4096] * 5, "nnunet": [4096] * 10, "resenc": [4096] * 10, "swin-unetr": [4092],
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_that_no_memory_holds_is_refused_before_it_is_built(
    network: str, facts: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"network": network, "network_channels": BEYOND[network], "patch_size": 512}
    message = r"plan\.network_channels: found \[409\d.*\], of which the weights of .* take .* GiB, expected at most 4"
    with pytest.raises(UserError, match=message):
        make_plan(facts, memory_bytes=MEMORY, overrides=record)
    # In a plan that somebody edited, on a machine of the day.
    plan = Plan.from_dict(
        {
            **make_plan(facts, memory_bytes=MEMORY).as_dict(),
            **record,
            "patch_size": [512] * 3,
            "network_strides": [],
        }
    )
    monkeypatch.setattr("mlbseg.runs.free_memory", lambda: 2 << 30)
    with pytest.raises(
        UserError, match=r"plan\.network_channels: .* expected at most the 2 GiB of memory that are"
    ):
        make_student(plan, load_config())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.spacing=1e-6"], r"plan.spacing: found .* mm, at which a scan has .* voxels and takes .* GiB"),
        (["plan.spacing=1e-300"], r"plan.spacing: found .1e-300., .*expected 0, which .* or 1e-09 or more"),
        (["plan.steps=100000000000000000000"], r"plan.steps: found 10{20}, .*less than or equal to"),
        (["plan.network_channels=1000000"], r"network_channels: found 1000000, .*less than or equal to 4096"),
        (["plan.patch_size=4096"], r"patch_size: found 4096×4096×4096.*the feature maps alone take"),
        (["plan.batch_size=4096", "plan.patch_size=512"], r"patch_size: found .*batch_size 4096"),
    ],
)  # fmt: skip
def test_numbers_that_no_machine_computes_are_refused(
    overrides: list[str], message: str, scans: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(scans, tmp_path / "run", overrides=overrides, device="cpu")
    assert not (tmp_path / "run").exists()


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
    "null characters": '{"labels": {"a\\u0000": "b"}, "cases": [{"image": "a\\u0000b.nii.gz", "label": "\\u0000"}]}',
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


def leaves(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    parts = (
        record.items()
        if isinstance(record, dict)
        else enumerate(record[:1])
        if isinstance(record, list)
        else ()
    )
    for key, value in parts:
        yield from leaves(value, (*path, key))


def edited(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with the value at a path replaced; removed where it is `...`."""
    if not path:
        return value
    made = dict(record) if isinstance(record, dict) else list(record)
    if value is ... and len(path) == 1:
        del made[path[0]]
    else:
        made[path[0]] = edited(made[path[0]], path[1:], value)
    return made


EDITS: list[Any] = [
    ..., None, "text", "", "\x00", "\ud800", "../..", -1, 0, 1.5, 10**18, 10**400, 1e300, float("nan"), True, [], [[]],
    {}, {"a": 1}, {"a": {"b": [{"c": None}]}}, ["x"] * 3,
]  # fmt: skip
RECORDS = (
    "plan.json",
    "split.json",
    "data.json",
    "result.json",
    "inputs.json",
    "env.json",
    "fingerprint.json",
)


def look_at(root: Path, name: str) -> None:
    """Read the records of a run as its commands do, and use one of them."""
    run = Run.open(root)
    sections = [part(run) for part in (data_section, plan_section, machine_section)]
    write_page(root.parent / "page.html", render_page("Run", sections, subtitle=_subtitle(run, 5)))
    if name in ("data.json", "inputs.json"):
        cases = find_cases(run.scans).cases
        run.changed(cases)
        if run.inputs is not None:
            run.inputs.of([case for case in cases if case.role is Role.CLEAN])
    if name == "fingerprint.json" and run.usual is not None:
        run.usual.unlike(read_scan([run.scans / "images" / "case_0.nii.gz"]))
    if name == "plan.json":
        make_method(make_student(run.plan, run.config), run)
        require_shares(run.plan, run.config, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_was_edited_is_refused_or_works(
    name: str, supervised_run: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(supervised_run, root)
    record = yaml.safe_load((root / name).read_text())  # JSON is YAML
    look_at(root, name)
    said = []
    paths = list(leaves(record))
    if name == "inputs.json":  # one case is like another
        paths = [path for path in paths if path[:1] in ((), paths[1])]
    for path in paths:
        for value in EDITS if path else EDITS[1:]:
            changed = edited(record, path, value)
            (root / name).write_text(json.dumps(changed))
            try:
                look_at(root, name)
            except UserError as error:
                said.append(str(error))
    assert len(said) > 20 or name == "env.json"
    assert max(map(len, said)) < 5000


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RECORDS, CONFIG])
@pytest.mark.parametrize(
    "text", ["", "null", "[]", "5", '"text"', "[" * 5_000, '{"a": ' + "9" * 5000 + "}", "\x00", "{"]
)
def test_a_record_that_is_none_ends_every_command_with_exit_code_2(
    name: str, text: str, supervised_run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    root = tmp_path / "run"
    shutil.copytree(supervised_run, root)
    (root / name).write_text(text)
    # Only the report shows what the run was made with, and how it ended.
    commands = {
        "predict": [root, scans, "--out", tmp_path / "masks"],
        "audit": [root],
        "suggest": [root],
        "report": [root, "--overwrite"],
        "train": ["--resume", root],
    }
    needs = {
        "env.json": ["report"],
        "result.json": ["report"],
        "fingerprint.json": ["predict"],
        "inputs.json": ["report", "audit"],
        "data.json": ["audit", "suggest", "report"],
    }.get(name, list(commands))
    # All texts go one way, which every command takes: it is enough to see one text in each, and each in one.
    for word in needs if text == "{" else needs[-1:]:
        done = command(word, *commands[word])
        assert (done.code, "internal error" in done.err, str(root / name) in done.err) == (2, False, True), (
            done
        )
        assert len(done.err) < 2000


AUDITED = "rank,case,role,trust\n1,case_0,clean,0.5\n2,case_1,clean,0.6\n"


@pytest.mark.parametrize(
    "text",
    [
        "", "\n", "rank\n1\n", "rank,case\n1\n", AUDITED + "3\n", AUDITED + "3,a,b,c,d,e\n", "x" * 200_000,
        "a\x00b,case\n",
        'rank,case\n"1', *(AUDITED.replace("0.5", word) for word in ("nan", "inf", "9" * 5000, "²", "<b>", "-", "")),
    ],
)  # fmt: skip
def test_a_table_of_an_audit_that_was_edited_is_shown_or_called_damaged(text: str, tmp_path: Path) -> None:
    run = Run(tmp_path, load_config(), None, None)  # type: ignore[arg-type] - only the folder is looked at
    folder = tmp_path / "audit"
    folder.mkdir()
    (folder / "cases.csv").write_text(text, encoding="utf-8")
    section = audit_section(run)
    assert section is not None
    assert "damaged" in str(section.body) or "The first" in str(section.body)
    assert "<b>" not in str(section.body)
    assert _audited(folder) <= {"case_0", "case_1", "a", ""}
    (folder / "cases.csv").write_bytes(b"rank,case\n1,\xff\n")
    assert "damaged" in str(audit_section(run).body)  # type: ignore[union-attr]
    assert _audited(folder) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bench.json", "cell.json", "scores.csv"])
def test_a_bench_that_was_edited_is_refused_or_works(name: str, scans: Path, tmp_path: Path) -> None:
    row = {"label": "supervised", "method": "supervised", "overrides": []}
    plan = make_plan(
        fingerprint(apply_split(find_cases(scans).cases, make_split(find_cases(scans).cases))), memory_bytes=MEMORY
    )  # fmt: skip
    record: Any = {
        "data": str(scans), "cache": str(tmp_path), "split_seed": 0, "rule": "Along.", "clean": ["case_0"],
        "test": ["case_3"], "scored": ["case_3"], "asked": {}, "plan": plan.as_dict(), "rows": {"supervised": row},
        "cells": [{"row": "supervised", "budget": 1, "seed": 0}, {"row": "supervised", "budget": None, "seed": 0}],
        "commands": ["x"], "labels": [0, 1], "noisy": [], "unlabelled": [], "patients": None,
    }  # fmt: skip
    cell: Any = {
        "status": "done", "dice": 0.5, "jaccard": 0.4, "hd95_mm": None, "assd_mm": 1.0, "no_distance": 1, "steps": 4,
        "seconds": 1.0, "seconds_per_step": 0.1, "peak_memory_bytes": 9, "device": "cpu", "processor": "x",
        "threads": 1, "host": "h",
    }  # fmt: skip
    root = tmp_path / "runs" / "1-labelled" / "seed-0" / "supervised"
    root.mkdir(parents=True)
    scores = "case,class,name,dice,jaccard\ncase_3,1,a,0.5,0.4\n"

    def write(setup: Any = record, done: Any = cell, text: str = scores) -> None:
        (tmp_path / "bench.json").write_text(json.dumps(setup))
        (root / OUTCOME).write_text(json.dumps(done))
        (root / "scores.csv").write_text(text)

    def work() -> None:
        setup = Setup.read(tmp_path)
        for one in setup.cells:
            assert (tmp_path / "runs" / one.key).resolve().is_relative_to((tmp_path / "runs").resolve())
            outcome(tmp_path, one)
        results = gather(tmp_path, setup)
        tables(results), markdown(results), page(results, b"")
        for one in setup.cells:
            setup.split(one, find_cases(scans))
            setup.needs_stage1(one)

    write()
    work()
    said = []
    if name == "scores.csv":
        variants = [
            {"text": scores.replace("0.5", t)} for t in ("nan", "inf", "-1", "x", "9" * 400, "", "0.5,1,2,3")
        ]
    else:
        source = record if name == "bench.json" else cell
        key = "setup" if name == "bench.json" else "done"
        variants = [{key: edited(source, path, value)} for path in leaves(source) if len(path) < 3 or path[0] != "plan"
                    for value in EDITS if path or value is not ...]  # fmt: skip
    for variant in variants:
        write(**variant)
        try:
            work()
        except UserError as error:
            said.append(str(error))
    assert max(map(len, said)) < 5000
    assert len(said) > len(variants) // 4


# --- weights and checkpoints ------------------------------------------------------------------------------


WEIGHTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "NaN": (lambda w: torch.full_like(w, torch.nan), "holds values that are no finite numbers"),
    "one infinity": (
        lambda w: w.flatten().index_fill(0, torch.tensor([0]), torch.inf).reshape(w.shape),
        "holds values that are no finite numbers",
    ),
    "int8": (lambda w: w.to(torch.int8), "is of type int8, expected float32"),
    "empty": (lambda w: w[:0], "does not fit plan.json's network"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", WEIGHTS)
def test_weights_that_predict_nothing_are_refused_by_every_command(
    change: str, supervised_run: Path, tmp_path: Path, scans: Path, command: Command
) -> None:
    root = tmp_path / "run"
    shutil.copytree(supervised_run, root)
    (root / "report.html").unlink(missing_ok=True)
    path = root / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    name = next(name for name in weights if name.startswith("student.") and weights[name].is_floating_point())
    work, message = WEIGHTS[change]
    weights[name] = work(weights[name]).contiguous()
    safetensors.torch.save_file(weights, path)
    before = sorted(path for path in tmp_path.rglob("*") if ".lock" not in path.name)
    out = tmp_path / "out"
    for words in (
        ["predict", root, scans, "--out", out],
        ["report", root],
        ["audit", root, "--out", out],
        ["suggest", root],
        ["export", root, out, "--format", "bundle"],
        ["export", root, out, "--format", "onnx"],
        ["export", root, out, "--format", "nnunet", "--dataset", "Dataset501_Blocks"],
    ):
        done = command(*words)
        assert (done.code, message in done.err) == (2, True), (words, done.err)
        assert str(path) in done.err
        assert len(done.err) < 1000
    assert sorted(path for path in tmp_path.rglob("*") if ".lock" not in path.name) == before


def broken(content: dict[str, Any], change: str) -> Any:
    state = content["optimiser"]["state"]
    if change == "momentum":
        first = next(iter(state.values()))
        first["momentum_buffer"] = torch.zeros(3)
    elif change == "momentum is text":
        next(iter(state.values()))["momentum_buffer"] = "x"
    elif change == "lr is text":
        content["optimiser"]["param_groups"][0]["lr"] = "x"
    elif change == "best is text":
        content["best"] = "x"
    elif change == "best weights":
        content["best_weights"] = {"a": torch.zeros(2)}
    elif change == "no groups":
        content["optimiser"] = []
    elif change == "a list":
        return [content]
    elif change == "no method":
        content["method"] = 5
    return content


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    ["momentum", "momentum is text", "lr is text", "best is text", "best weights", "no groups", "a list", "no method"],
)  # fmt: skip
def test_a_checkpoint_of_other_content_does_not_fit(
    change: str, mlb_run: Path, tmp_path: Path, command: Command
) -> None:
    root = tmp_path / "run"
    shutil.copytree(mlb_run, root)
    (root / "model.safetensors").unlink()
    newest = checkpoints.find(root / "checkpoints")[-1]
    content = torch.load(newest.path, weights_only=True)
    torch.save(broken(content, change), newest.path)
    done = command("train", "--resume", root, "--no-report")
    assert done.code == 2, done.err
    assert f"{newest.path}: does not fit this run" in done.err


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
