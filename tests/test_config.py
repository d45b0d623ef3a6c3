"""Settings: where they come from, and what is said about those that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlbseg.config import PRESETS, load_config, parse_override
from mlbseg.errors import UserError


def test_a_written_configuration_reads_back_as_it_was(tmp_path: Path) -> None:
    config = load_config(
        overrides=["plan.spacing=1.25,1.25,2", "mlb.mode=paper"], method="supervised", seed=3
    )
    config.write(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.plan.spacing == [1.25, 1.25, 2]


def test_each_source_overrides_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("method: supervised\ntrain: {lr: 0.3, clip: 3}\n")
    assert load_config().train.rate(1) == 0.05
    assert load_config(preset="paper").train.clip == 0.2
    both = load_config(path, preset="paper", overrides=["train.lr=0.4"], seed=9, method=None)
    assert (both.train.clip, both.train.lr, both.seed, both.method) == (3, 0.4, 9, "supervised")
    assert both.train.schedule == "paper"  # of the preset, as nothing later names it
    assert load_config(path, method="mlb").method == "mlb"


def test_a_rate_that_nothing_sets_is_the_optimisers(tmp_path: Path) -> None:
    path = tmp_path / "pinned.yaml"
    load_config(overrides=["train.lr_bootstrap=0.2"]).write(
        path
    )  # as a bench writes down what all rows share
    sgd, adamw = load_config(path).train, load_config(path, overrides=["train.optimiser=adamw"]).train
    assert (sgd.rate(1), sgd.rate(2)) == (0.05, 0.2)
    assert (adamw.rate(1), adamw.rate(2)) == (0.001, 0.2)
    assert adamw.decided()["lr"] == 0.001
    assert "workers" not in adamw.decided()


def test_loading_leaves_the_presets_alone() -> None:
    before = {name: repr(value) for name, value in PRESETS.items()}
    load_config(preset="paper", overrides=["mlb.mode=joint", "train.clip=7", "patch_size=16"])
    assert {name: repr(value) for name, value in PRESETS.items()} == before


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name: str) -> None:
    assert load_config(preset=name) != load_config()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=0.01", ("train.lr", 0.01)),
        ("lr=0.01", ("train.lr", 0.01)),  # bare: only one section has it
        ("patch_size=16", ("plan.patch_size", 16)),
        ("patch_size=[16, 32]", ("plan.patch_size", [16, 32])),
        ("patch_size=16,32", ("plan.patch_size", [16, 32])),
        ("views=flip,zoom-in", ("mlb.views", ["flip", "zoom-in"])),
        ("crop=yes", ("plan.crop", True)),
        ("chunk=", ("mlb.chunk", None)),
        (" seed = 4", ("seed", 4)),
    ],
)
def test_overrides(text: str, expected: tuple[str, object]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr", "expected key=value"),
        ("train.learning=1", "did you mean 'train."),
        ("plan.patchsize=16", "did you mean 'plan.patch_size'"),
        ("patch_sise=16", "did you mean"),
        ("zzz=1", "none of the "),
        ("entropy.zzzzzzzzzzz=1", "known: entropy.entropy_weight, entropy.ramp"),
        ("=3", "unknown override key ''"),
        ("lr=[1", "not valid YAML"),
        ("lr=1,{b", "not valid YAML"),
        ("lr=2001-99-99", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named_with_the_nearest_key(text: str, message: str) -> None:
    with pytest.raises(UserError, match="override") as caught:
        load_config(overrides=[text])
    assert message in str(caught.value)


def test_a_bare_key_of_two_sections_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlbseg.config._keys", lambda: iter(["train.noise", "augment.noise", "seed"]))
    with pytest.raises(UserError, match=r"several sections: say train\.noise or augment\.noise"):
        parse_override("noise=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lr=fast"], "setting train.lr: found 'fast'"),
        (["train.lr=0"], "setting train.lr: found 0, input should be greater than 0"),
        (["train.lr=.inf"], "finite number"),
        (["train.lr=.nan"], "setting train.lr"),
        (["train.schedule=sine"], "'poly', 'cosine', 'paper' or 'constant'"),
        (["plan.ndim=4"], "setting plan.ndim: found 4"),
        (["mlb.views=turn"], "setting mlb.views"),
        (["plan.spacing=thin"], "setting plan.spacing: found 'thin'"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(overrides=overrides)
    assert message in str(caught.value)


def test_all_wrong_settings_are_reported_together() -> None:
    with pytest.raises(UserError) as caught:
        load_config(overrides=["train.lr=fast", "seed=-1"])
    assert len(str(caught.value).splitlines()) == 2


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'paper'"):
        load_config(preset="papers")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: {lrr: 1}", "unknown setting 'train.lrr': did you mean 'train.lr'"),
        (b"nonsense: 1", "unknown setting 'nonsense'"),
        (b"train: 3", "setting train: found 3"),
        (b"- a\n- b\n", "found list, expected a mapping"),
        (b"", "found NoneType, expected a mapping"),
        (b"a: [1", "not a YAML file"),
        (b"\xff\xfe\x00", "not a YAML file"),
        (b"a: !!python/object/apply:os.getcwd []", "not a YAML file"),
        (b"a: 2001-99-99", "not a YAML file"),
        (b"[" * 1500, "not a YAML file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "none.yaml")


def test_one_name_or_number_stands_for_the_list_of_it() -> None:
    config = load_config(overrides=["mlb.views=flip", "network_channels=16"])
    assert (config.mlb.views, config.plan.network_channels) == (["flip"], [16])


def test_precision_is_set_from_the_command_line_as_help_names_it() -> None:
    for text in ("auto", "32", "bf16"):
        assert load_config(overrides=[f"train.precision={text}"]).train.precision == text
