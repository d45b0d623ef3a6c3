"""Weights from elsewhere: what fits is loaded, the rest is said, and nothing that is opened can run code."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from blocks import TINY, write_blocks
from conftest import Command
from mlbseg import train
from mlbseg.errors import UserError
from mlbseg.networks import make_network
from mlbseg.networks.fitting import Fitted, fit
from mlbseg.runs import Run, checkpoints
from mlbseg.runs.starting import INIT, StartRecord, read_start

CHANNELS = (4, 6, 8)
SIDES = {2: (4, 8), 3: (4, 4, 8)}


def network(
    ndim: int = 3, *, name: str = "unet", channels: int = 1, classes: int = 3, seed: int = 0, **more: Any
) -> nn.Module:
    torch.manual_seed(seed)
    return make_network(name, ndim=ndim, in_channels=channels, num_classes=classes, channels=CHANNELS, **more)


def fitted(
    target: nn.Module,
    found: dict[str, torch.Tensor],
    ndim: int = 3,
    channels: int = 1,
    classes: int = 3,
    **more: Any,
) -> Fitted:
    return fit(target, found, ndim=ndim, in_channels=channels, num_classes=classes, sides=SIDES[ndim], **more)


# --- fitting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "state.backbone.", "module.net.encoder."])
def test_the_same_network_is_loaded_whole_under_any_prefix(prefix: str) -> None:
    source, target = network(seed=1), network(seed=2)
    result = fitted(target, {prefix + name: value for name, value in source.state_dict().items()})
    assert set(result.loaded) == set(target.state_dict())
    assert not result.adapted
    assert not result.drawn
    assert not result.left
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_an_encoder_alone_finds_its_place() -> None:
    source, target = network(name="resenc", seed=1), network(name="resenc", seed=2)
    theirs = {
        n.removeprefix("encoder."): v for n, v in source.state_dict().items() if n.startswith("encoder.")
    }
    before = {name: value.clone() for name, value in target.state_dict().items()}
    result = fitted(target, theirs)
    assert set(result.loaded) == {name for name in before if name.startswith("encoder.")}
    assert set(result.drawn) == {name for name in before if name.startswith("decoder.")}
    assert all(torch.equal(before[name], target.state_dict()[name]) for name in result.drawn)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (2, 4), (4, 1)])
def test_a_first_layer_for_other_channels_answers_alike_to_a_grey_image(theirs: int, ours: int) -> None:
    source, target = (
        network(name="nnunet", channels=theirs, seed=1),
        network(name="nnunet", channels=ours, seed=2),
    )
    result = fitted(target, dict(source.state_dict()), channels=ours)
    assert len(result.adapted) == 1
    assert "first layer" in next(iter(result.adapted.values()))
    grey = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = source(grey.expand(-1, theirs, -1, -1, -1))
    # Instance norm follows, so the answers agree up to rounding, whatever the scale.
    torch.testing.assert_close(target(grey.expand(-1, ours, -1, -1, -1)), expected, rtol=1e-4, atol=1e-4)


def test_a_head_for_other_classes_is_drawn_anew() -> None:
    source, target = network(name="nnunet", classes=5, seed=1), network(name="nnunet", seed=2)
    before = target.state_dict()["decoder.seg_layers.1.weight"].clone()
    result = fitted(target, dict(source.state_dict()))
    assert set(result.drawn) == {"decoder.seg_layers.1.weight", "decoder.seg_layers.1.bias"}
    assert torch.equal(target.state_dict()["decoder.seg_layers.1.weight"], before)
    again = fitted(
        network(name="nnunet", seed=2), dict(network(name="nnunet").state_dict()), same_classes=False
    )
    assert set(again.drawn) == set(result.drawn)
    transposed = fitted(
        network(seed=2), dict(network(classes=7).state_dict())
    )  # unet's last layers all have classes
    assert set(transposed.drawn.values()) == {"a head for other classes"}


def test_norms_keep_scale_and_shift_over_a_change_of_kind() -> None:
    source = network(name="nnunet", norm="batch", seed=1)
    with torch.no_grad():
        for module in source.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.weight.fill_(7)
    target = network(name="nnunet", seed=2)
    result = fitted(target, dict(source.state_dict()))
    assert all((m.weight == 7).all() for m in target.modules() if isinstance(m, nn.InstanceNorm3d))
    assert {name.rpartition(".")[2] for name in result.left} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_weights_of_other_dimensions_are_refused() -> None:
    with pytest.raises(UserError, match=r"weights of a 2D network, expected those of a 3D one .*plan.ndim=2"):
        fitted(network(3), dict(network(2).state_dict()))


def test_too_little_of_the_encoder_is_refused_with_names_of_both_sides() -> None:
    with pytest.raises(
        UserError,
        match=r"0 of the encoder's \d+ kernels fit.*\n.*found other\.0\.weight 4×1×3×3×3.*\n.*model\.0",
    ):
        fitted(network(), {"other.0.weight": torch.zeros(4, 1, 3, 3, 3)})
    part = {n: v for n, v in network(name="nnunet").state_dict().items() if n.startswith("encoder.stages.0")}
    with pytest.raises(UserError, match=r"2 of the encoder's 6 kernels fit, expected half"):
        fitted(network(name="nnunet"), part)


def test_weights_that_are_no_numbers_are_refused() -> None:
    theirs = dict(network().state_dict())
    theirs["model.0.conv.unit0.conv.weight"] = torch.full_like(
        theirs["model.0.conv.unit0.conv.weight"], torch.nan
    )
    with pytest.raises(
        UserError, match=r"weight 'model\.0\.conv\.unit0\.conv\.weight' holds values that are no finite"
    ):
        fitted(network(), theirs)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [(), ("state_dict",), ("model", "state_dict"), ("network_weights",), ("epoch", "net")]
)
def test_wrappers_are_seen_through(keys: tuple[str, ...], tmp_path: Path) -> None:
    weights = OrderedDict(network().state_dict())
    content: Any = weights
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimiser": {"state": {}, "lr": 0.1}}
    torch.save(content, tmp_path / "w.pt")
    if "epoch" in keys:  # under a name that says nothing
        with pytest.raises(UserError, match="expected weights by name"):
            read_start(str(tmp_path / "w.pt"))
        return
    assert set(read_start(str(tmp_path / "w.pt")).tensors) == set(weights)


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_file_is_refused_and_nothing_of_it_is_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for old in (False, True):
        torch.save(
            {"state_dict": network().state_dict(), "x": Harmful(trap)},
            tmp_path / "w.pth",
            _use_new_zipfile_serialization=not old,
        )
        with pytest.raises(UserError, match=r"w\.pth: holds more than tensors.*could run code"):
            read_start(str(tmp_path / "w.pth"))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", b"no weights at all", "no file of weights, or a damaged one"),
        ("w.safetensors", b"no weights at all", "no safetensors file, or a damaged one"),
        ("w.pt", None, "there is no such file or folder"),
        ("w.nii.gz", b"\x1f\x8b", "no file of weights"),
    ],
)
def test_a_wrong_file_is_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_start(str(tmp_path / name))


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a run folder, a MONAI bundle nor a folder of nnU-Net"):
        read_start(str(tmp_path))


# --- runs that start from them ----------------------------------------------------------------------------


def first_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights before the first step: of a run that a checkpoint of step 0 is left of."""
    return safetensors.torch.load_file(run / INIT)


def begun(
    scans: Path, out: Path, init: str | Path, *more: str, method: str = "supervised", **options: Any
) -> Path:
    settings = [*(s for s in TINY if not s.startswith("stage1")), "steps=2", *more]
    return train(
        str(scans), str(out), method=method, init=init, overrides=settings, device="cpu", **options
    ).run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supervised", "mlb", "cps"])
def test_a_run_starts_from_another_and_can_be_resumed_without_it(
    method: str, scans: Path, supervised_run: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(supervised_run, tmp_path / "a")
    run = begun(scans, tmp_path / "b", source, method=method, test=["case_3"])
    record = StartRecord.read(run)
    assert record is not None
    assert (record.source, record.kind, record.file) == ("a", "run", "model.safetensors")
    assert len(record.sha256) == 64
    assert set(record.loaded) == set(first_weights(run))
    expected = Run.open(source).network().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in first_weights(run).items())
    assert Run.open(run).config.train.init == str(source)
    shutil.rmtree(source)
    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    before = first_weights(run)
    assert train(resume=run, device="cpu").steps == 2
    last = checkpoints.find(run / "checkpoints")[-1].load(torch.device("cpu"))["method"]
    moved = max(float((last[f"student.{n}"] - value).abs().max()) for n, value in before.items())
    assert 0 < moved < 0.1  # two steps away from the starting weights, not from others


@pytest.mark.slow
def test_a_run_is_gone_on_with_when_labels_are_added(tmp_path: Path, command: Command) -> None:
    scans = write_blocks(tmp_path / "scans", labelled=3)
    tiny = [*TINY, "steps=4", "plan.spacing=0.9"]
    train(str(scans), str(tmp_path / "a"), method="supervised", test=1, seed=5, overrides=tiny, device="cpu")
    more = write_blocks(tmp_path / "more", labelled=5)
    for path in (more / "labels").iterdir():
        if not (scans / "labels" / path.name).exists():
            shutil.copy(path, scans / "labels" / path.name)
    shown = command(
        "train",
        scans,
        "--init",
        tmp_path / "a",
        "--out",
        tmp_path / "b",
        "--method",
        "supervised",
        "--steps",
        2,
        "--no-report",
    )
    assert shown.code == 0, shown.err
    a, b = Run.open(tmp_path / "a"), Run.open(tmp_path / "b")
    assert b.split.test == a.split.test
    assert b.split.seed == 5
    assert len(b.split.clean) == 4
    assert set(a.split.clean) < set(b.split.clean)
    for name in ("spacing", "patch_size", "network", "network_channels", "intensity", "orientation"):
        assert getattr(b.plan, name) == getattr(a.plan, name)
    assert "As the run a has it" in b.plan.reasons["network_channels"]
    assert (b.plan.steps, b.plan.reasons["steps"]) == (2, "Set by the user.")
    assert b.data.cache == a.data.cache
    said = " ".join(shown.err.split())
    assert "careful labels: 4, of which 2 are new" in said
    assert "test cases: the 1 of that run" in said
    assert "loaded" in said
    record = StartRecord.read(tmp_path / "b")
    assert record is not None
    assert not record.drawn

    known = command(
        "train",
        scans,
        "--init",
        tmp_path / "a",
        "--out",
        tmp_path / "c",
        "--method",
        "supervised",
        "--steps",
        2,
        "--test",
        ",".join(a.split.clean[:1]),
        "--no-report",
    )
    assert "WARNING: the starting weights have learned from 1 of the test cases" in " ".join(
        known.err.split()
    )
    elsewhere = Path(shutil.copytree(scans, tmp_path / "copy"))
    small = ["--method", "supervised", "--steps", 2, "--no-report"]
    copied = command("train", elsewhere, "--init", tmp_path / "a", "--out", tmp_path / "d", *small)
    warned = f"WARNING: 1 cases are named as test cases of that run, such as {a.split.test[0]}"
    assert warned in " ".join(copied.err.split())


def test_a_file_of_weights_of_another_network_is_refused_and_no_run_is_left(
    scans: Path, tmp_path: Path, command: Command
) -> None:
    torch.save(network(2).state_dict(), tmp_path / "w.pt")
    small = [part for setting in TINY for part in ("-o", setting)]
    refused = command("train", scans, "--out", tmp_path / "run", "--init", tmp_path / "w.pt", *small)
    assert refused.code == 2
    assert "weights of a 2D network, expected those of a 3D one" in refused.err
    assert not (tmp_path / "run").exists()


def test_minutes_decide_the_steps(scans: Path, command: Command) -> None:
    small = [part for setting in TINY for part in ("-o", setting)]
    planned = command("plan", scans, "--method", "supervised", "--minutes", "0.05", *small, "--json")
    assert planned.code == 0, planned.err
    plan, stages = planned.json["plan"], planned.json["stages"]
    assert "fit into 0.05 minutes" in plan["reasons"]["steps"]
    assert plan["steps"] == stages[0]["steps"] > 2
    both = command("plan", scans, "--minutes", "1", "--steps", "5", *small)
    assert (both.code, "--minutes: found 1 and --steps 5" in both.err) == (2, True)
    few = command("plan", scans, "--method", "supervised", "--minutes", "0.000001", *small)
    assert (few.code, "or more: a step takes" in few.err) == (2, True)


def test_the_report_names_the_source_and_no_folder_of_this_machine(
    scans: Path, supervised_run: Path, tmp_path: Path
) -> None:
    from mlbseg.apps.report.sections import machine_section, start_section

    small = [s for s in TINY if not s.startswith("stage1")]
    run = train(
        str(scans),
        str(tmp_path / "b"),
        method="supervised",
        test=["case_3"],
        init=f"{supervised_run}:student",
        overrides=[*small, "steps=1", "plan.label_values=[0,1,2]"],
        device="cpu",
    ).run
    opened = Run.open(run)
    section = start_section(opened)
    assert section is not None
    assert "supervised:student" in section.body
    assert "sha256" in section.body
    assert "drawn anew" in section.body
    settings = machine_section(opened).body
    assert "supervised:student" in settings
    assert str(supervised_run.parent) not in section.body + settings
    assert start_section(Run.open(supervised_run)) is None


def test_bench_rows_start_from_weights_of_their_own(
    scans: Path, supervised_run: Path, tmp_path: Path
) -> None:
    import mlbseg.apps.bench.setup as setup
    from mlbseg.apps.bench import BenchRequest
    from mlbseg.apps.bench.cell import _run
    from mlbseg.apps.bench.cells import Cell

    def request(init: str | Path) -> BenchRequest:
        return BenchRequest(
            data=scans,
            methods=["supervised"],
            variants=[f"warm=supervised train.init={init}"],
            budgets=[2],
            test=["case_3"],
            overrides=[*TINY, "steps=2"],
            upper=False,
        )

    record = setup.begin(tmp_path / "bench", request(supervised_run), torch.device("cpu"), None)
    assert Cell("warm", 2, 0) in record.cells
    root = tmp_path / "bench" / "runs" / "cell"
    _run(tmp_path / "bench", Cell("warm", 2, 0), root, "cpu")
    assert StartRecord.read(root) is not None
    torch.save(network(2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="weights of a 2D network"):
        setup.begin(tmp_path / "other", request(tmp_path / "w.pt"), torch.device("cpu"), None)
    assert not (tmp_path / "other" / "bench.json").exists()


# --- of others --------------------------------------------------------------------------------------------

FEATURES, BLOCKS = [4, 6, 8], [1, 2, 2]


def nnunet_plans(kind: str, ndim: int = 3) -> dict[str, Any]:
    """Plans as nnU-Net v2 writes them, of a network that is tiny."""
    blocks = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    arch = {
        "n_stages": 3,
        "features_per_stage": FEATURES,
        "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
        "kernel_sizes": [[1, 3, 3][-ndim:], [3] * ndim, [3] * ndim],
        "strides": [[1] * ndim, [1, 2, 2][-ndim:], [2] * ndim],
        blocks: BLOCKS,
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = "3d_fullres" if ndim == 3 else "2d"
    seen = {"mean": 100.0, "std": 20.0, "percentile_00_5": 10.0, "percentile_99_5": 280.0}
    return {
        "dataset_name": "Dataset001_Blocks",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": seen},
        "configurations": {
            name: {
                "spacing": [2.0, 1.5, 1.5][-ndim:],
                "patch_size": [8, 16, 16][-ndim:],
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "batch_size": 2,
                "architecture": {
                    "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
                    "arch_kwargs": arch,
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            }
        },
    }


def nnunet_checkpoint(path: Path, kind: str, *, channels: int = 1, classes: int = 3) -> nn.Module:
    """Build a network by nnU-Net's own loader of plans, take a few steps, and save it as its trainer does."""
    import numpy as np

    pytest.importorskip("nnunetv2", reason="nnU-Net is installed by `make setup` only: see the Makefile")
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = nnunet_plans(kind)
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    torch.manual_seed(1)
    theirs = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        channels,
        classes,
        deep_supervision=True,
    )
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.99, nesterov=True)
    for _ in range(3):
        optimiser.zero_grad()
        image = torch.randn(1, channels, 4, 8, 8)
        logits = theirs(image)
        sum(torch.nn.functional.cross_entropy(z, torch.zeros_like(z[:, 0]).long()) for z in logits).backward()
        optimiser.step()
    theirs.decoder.deep_supervision = False
    labels = {"background": 0, "one": 1, "two": 2} if classes == 3 else {"background": 0, "one": 1}
    torch.save(
        {
            "network_weights": theirs.state_dict(),
            "optimizer_state": optimiser.state_dict(),
            "grad_scaler_state": None,
            "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.6)], "epoch_start_timestamps": [1.0]},
            "_best_ema": np.float64(0.6),
            "current_epoch": 1,
            "trainer_name": "nnUNetTrainer",
            "init_args": {
                "plans": plans,
                "configuration": "3d_fullres",
                "fold": 0,
                "dataset_json": {"labels": labels},
                "device": torch.device("cpu"),
            },
            "inference_allowed_mirroring_axes": (0, 1, 2),
        },
        path,
    )
    return theirs


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_a_checkpoint_of_nnunet_is_rebuilt_with_its_own_logits(
    kind: str, scans: Path, tmp_path: Path, command: Command
) -> None:
    theirs = nnunet_checkpoint(tmp_path / "checkpoint_final.pth", kind)
    start = read_start(str(tmp_path / "checkpoint_final.pth"))
    assert start.kind == "nnU-Net checkpoint"
    fields = start.proposal.of(3, 1)
    ours = make_network(
        fields["network"],
        ndim=3,
        in_channels=1,
        num_classes=3,
        channels=fields["network_channels"],
        strides=fields["network_strides"],
        options=fields["network_options"],
    )
    result = fitted(ours, dict(start.tensors))
    assert not result.drawn
    assert {name.rpartition(".")[0] for name in result.left} == {
        "decoder.seg_layers.0"
    }  # of deep supervision
    image = torch.randn(1, 1, 8, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (ours.eval()(image) - theirs.eval()(image)).abs().max() < 1e-5

    planned = command(
        "plan",
        scans,
        "--init",
        tmp_path / "checkpoint_final.pth",
        "--method",
        "supervised",
        "--steps",
        2,
        "--json",
    )
    assert planned.code == 0, planned.err
    plan = planned.json["plan"]
    assert plan["network"] == fields["network"]
    assert plan["spacing"] == [2.0, 1.5, 1.5]
    assert plan["normalisation"] == ["ct"]
    assert plan["intensity"] == [{"lower": 10.0, "upper": 280.0, "mean": 100.0, "std": 20.0}]
    assert plan["orientation"] == "LPS"
    assert plan["reasons"]["spacing"].startswith("As nnU-Net's plan nnUNetPlans, 3d_fullres has it")
    own = command(
        "plan",
        scans,
        "--init",
        tmp_path / "checkpoint_final.pth",
        "--steps",
        2,
        "-o",
        "plan.spacing=1",
        "--method",
        "supervised",
        "-o",
        "plan.normalisation=zscore",
        "--json",
    ).json["plan"]
    assert (own["spacing"], own["normalisation"], own["intensity"]) == ([1.0] * 3, ["zscore"], [])


@pytest.mark.slow
def test_a_run_starts_from_nnunet_with_other_channels_and_classes(scans: Path, tmp_path: Path) -> None:
    nnunet_checkpoint(tmp_path / "checkpoint_final.pth", "ResidualEncoderUNet", channels=2, classes=2)
    run = train(
        str(scans),
        str(tmp_path / "b"),
        method="supervised",
        test=1,
        init=tmp_path / "checkpoint_final.pth",
        steps=1,
        device="cpu",
    ).run
    record = StartRecord.read(run)
    assert record is not None
    assert list(record.adapted) == ["encoder.stem.convs.0.all_modules.0.weight"]
    assert set(record.drawn) == {"decoder.seg_layers.1.weight", "decoder.seg_layers.1.bias"}
    assert Run.open(run).plan.network == "resenc"


def test_a_folder_of_folds_asks_for_one_of_them(tmp_path: Path) -> None:
    for fold in (0, 1):
        (tmp_path / f"fold_{fold}").mkdir()
        torch.save(network().state_dict(), tmp_path / f"fold_{fold}" / "checkpoint_final.pth")
    with pytest.raises(UserError, match=r"found 2 folds, expected the checkpoint of one"):
        read_start(str(tmp_path))
    (tmp_path / "fold_1" / "checkpoint_final.pth").unlink()
    assert read_start(str(tmp_path)).file.parent.name == "fold_0"


def test_a_checkpoint_of_nnssl_names_its_network() -> None:
    from mlbseg.runs.foreign import nnunet_proposal

    for plan in ({"architecture_name": "ResEncL"}, {"architecture_plans": {"arch_class_name": "ResEncL"}}):
        found = nnunet_proposal({"network_weights": {}, "nnssl_adaptation_plan": plan})
        assert found is not None
        assert found.fields["network"] == "resenc"
        assert found.fields["network_channels"] == (32, 64, 128, 256, 320, 320)
    other = nnunet_proposal(
        {"network_weights": {}, "nnssl_adaptation_plan": {"architecture_name": "PrimusM"}}
    )
    assert other is not None
    assert not other.fields
    assert "cannot be rebuilt" in other.notes[0]


@pytest.mark.parametrize(
    "plans",
    [
        {},
        {"configurations": 3},
        {"configurations": {"3d": {"inherits_from": "3d"}}},
        {"configurations": {"3d": {"architecture": {"network_class_name": "os.system", "arch_kwargs": []}}}},
    ],
)
def test_plans_of_nonsense_propose_nothing(plans: dict[str, Any]) -> None:
    from mlbseg.runs.foreign import nnunet_proposal

    found = nnunet_proposal({"network_weights": {}, "init_args": {"plans": plans, "configuration": "3d"}})
    assert found is not None
    assert not found.of(3, 1)


def test_a_bundle_is_read_with_the_network_that_it_names(supervised_run: Path, tmp_path: Path) -> None:
    from monai.networks.nets.unet import UNet

    import mlbseg

    mlbseg.export(supervised_run, tmp_path / "ours", "bundle")
    start = read_start(str(tmp_path / "ours"))
    plan = Run.open(supervised_run).plan
    assert start.kind == "MONAI bundle"
    assert start.proposal.fields["network_channels"] == plan.network_channels
    expected = Run.open(supervised_run).network().state_dict()
    assert all(torch.equal(value, start.tensors[name]) for name, value in expected.items())

    theirs = UNet(3, 1, 3, channels=CHANNELS, strides=(2, 2), num_res_units=2, norm="batch")
    for folder in ("configs", "models"):
        (tmp_path / "theirs" / folder).mkdir(parents=True)
    torch.save({"model": theirs.state_dict()}, tmp_path / "theirs" / "models" / "model.pt")
    (tmp_path / "theirs" / "configs" / "inference.yaml").write_text(
        "network_def: {_target_: UNet, spatial_dims: 3, channels: [4, 6, 8], strides: [2, 2], num_res_units: 2}"
    )
    start = read_start(str(tmp_path / "theirs"))
    assert start.proposal.of(3, 1)["network_strides"] == ((2, 2, 2), (2, 2, 2))
    result = fitted(network(), dict(start.tensors))
    assert not result.drawn
    assert {name.rpartition(".")[2] for name in result.left} <= {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    (tmp_path / "theirs" / "models" / "model.pt").unlink()
    with pytest.raises(UserError, match=r"a MONAI bundle without models/model\.pt"):
        read_start(str(tmp_path / "theirs"))
