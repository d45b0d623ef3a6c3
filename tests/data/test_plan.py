from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlbseg.data.plan import CaseFacts, Fingerprint, Intensity, Plan, fingerprint, make_plan
from mlbseg.data.readers import write_image, write_label
from mlbseg.data.rules import step_bytes
from mlbseg.errors import UserError
from mlbseg.nets import make_network, required_multiple
from mlbseg.types import Case, Geometry, Role

GIB = 2**30
TISSUE = Intensity(low=5, median=50, high=200, mean=60, std=20)


def facts(
    count: int = 4,
    *,
    size: tuple[int, ...] = (88, 140, 190),
    spacing: tuple[float, ...] = (0.625, 0.625, 0.625),
    box: tuple[int, ...] | None = None,
    minimum: float = 0,
    unlabelled: int = 20,
    channels: int = 1,
) -> Fingerprint:
    one = CaseFacts(
        id="c",
        role=Role.CLEAN,
        size=size,
        spacing=spacing,
        box_size=box or size,
        channels=channels,
        minimum=(minimum,) * channels,
        integers=(True,) * channels,
        content=(TISSUE,) * channels,
        foreground=(replace(TISSUE, mean=100, low=20),) * channels,
        label_voxels={0: 1000, 1: 50},
    )
    plain = replace(one, role=Role.UNLABELLED, foreground=(), label_voxels={})
    return Fingerprint((one,) * count + (plain,) * unlabelled)


def plan_for(data: Fingerprint, **arguments: Any) -> Plan:
    return make_plan(data, **{"memory_bytes": 24 * GIB, **arguments})


def write_case(
    folder: Path,
    name: str,
    array: np.ndarray,
    label: np.ndarray | None = None,
    *,
    role: Role = Role.CLEAN,
    direction: tuple[float, ...] | None = None,
    spacing: tuple[float, ...] | None = None,
) -> Case:
    geometry = Geometry.identity(
        tuple(reversed(array.shape[-3:] if array.ndim > 2 else array.shape)), spacing
    )
    if direction is not None:
        geometry = replace(geometry, direction=direction)
    write_image(folder / f"{name}.nii.gz", array.astype(np.float32), geometry)
    path = None
    if label is not None:
        path = folder / f"{name}_label.nii.gz"
        write_label(path, label, geometry)
    return Case(name, (folder / f"{name}.nii.gz",), path, role)


# --- facts ------------------------------------------------------------------------------------------------


def test_facts_are_what_was_drawn(tmp_path: Path) -> None:
    image = np.zeros((20, 30, 40))
    image[6:14, 8:20, 10:30] = np.random.default_rng(0).integers(100, 200, (8, 12, 20))
    label = np.zeros(image.shape, np.int32)
    label[8:10, 10:12, 12:20] = 4
    image[label == 4] = 150
    case = write_case(tmp_path, "a", image, label, spacing=(1.0, 2.0, 3.0))
    (found,) = fingerprint([case]).cases
    assert found.size == (20, 30, 40)
    assert found.spacing == (3.0, 2.0, 1.0)
    assert found.box_size == (16, 20, 28)  # with four voxels around
    assert found.label_voxels == {0: image.size - 32, 4: 32}
    assert found.foreground == (Intensity(150, 150, 150, 150, 0),)
    assert found.minimum == (0,)
    assert found.integers == (True,)
    content = found.content[0]
    assert content is not None
    assert content.mean == pytest.approx(image[image > 0].mean())
    assert content.std == pytest.approx(image[image > 0].std())
    assert 100 <= content.low < content.median < content.high < 200


def test_axes_are_noted_as_they_lie_in_the_patient(tmp_path: Path) -> None:
    sagittal = (0.0, 0, -1, 1, 0, 0, 0, -1, 0)  # x to P, y to I, z to R
    image = np.random.default_rng(0).random((5, 6, 7))
    case = write_case(tmp_path, "a", image, image > 0.5, direction=sagittal, spacing=(1.0, 2.0, 4.0))
    (found,) = fingerprint([case]).cases
    assert found.size == (6, 7, 5)
    assert found.spacing == (2.0, 1.0, 4.0)


def test_no_label_of_another_role_and_no_test_case_is_opened(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((8, 8, 8))
    case = write_case(tmp_path, "a", image, (image > 0.5) * 2)
    noisy = replace(write_case(tmp_path, "n", image, (image > 0.7) * 3), role=Role.NOISY)
    hidden = replace(case, id="u", label=tmp_path / "gone.nii.gz", role=Role.UNLABELLED)
    tested = Case("t", (tmp_path / "gone.nii.gz",), tmp_path / "gone.nii.gz", Role.TEST)
    seen: list[tuple[int, int]] = []
    found = fingerprint(
        [case, noisy, hidden, tested], progress=lambda done, total: seen.append((done, total))
    )
    assert [c.id for c in found.cases] == ["a", "n", "u"]
    assert found.cases[2].label_voxels == {}
    assert found.cases[1].foreground == ()
    assert found.label_values() == (0, 2)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_noisy_labels_tell_the_values_only_where_no_label_is_clean(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((8, 8, 8))
    noisy = write_case(tmp_path, "n", image, (image > 0.7) * 3, role=Role.NOISY)
    assert fingerprint([noisy]).label_values() == (0, 3)


def test_mixed_scans_are_refused(tmp_path: Path) -> None:
    a = write_case(tmp_path, "a", np.random.default_rng(0).random((8, 8, 8)))
    b = write_case(tmp_path, "b", np.random.default_rng(0).random((2, 8, 8, 8)))
    with pytest.raises(UserError, match="b: 3D with 2 channels, expected 3D with 1"):
        fingerprint([a, b])
    with pytest.raises(UserError, match="no case to train on"):
        fingerprint([a.with_role(Role.TEST)])


def test_a_label_of_another_size_is_refused(tmp_path: Path) -> None:
    a = write_case(tmp_path, "a", np.random.default_rng(0).random((8, 8, 8)))
    b = write_case(tmp_path, "b", np.random.default_rng(0).random((8, 8, 9)), np.ones((8, 8, 9)))
    with pytest.raises(UserError, match="size 9×8×8, expected 8×8×8 as its image"):
        fingerprint([replace(a, label=b.label, role=Role.CLEAN)])


def test_a_constant_scan_has_no_content(tmp_path: Path) -> None:
    case = write_case(tmp_path, "a", np.full((4, 4, 4), 3), np.ones((4, 4, 4)))
    (found,) = fingerprint([case]).cases
    assert found.content == (None,)
    assert found.box_size == (4, 4, 4)


# --- decisions --------------------------------------------------------------------------------------------


def test_every_field_has_a_reason() -> None:
    plan = plan_for(facts())
    assert set(plan.reasons) == set(plan.as_dict()) - {"reasons"}
    assert all(reason.endswith((".", ")")) and len(reason) > 10 for reason in plan.reasons.values())


def test_the_atrium_gets_a_3d_network_at_its_own_spacing() -> None:
    plan = plan_for(facts())
    assert (plan.ndim, plan.scan_ndim, plan.spacing) == (3, 3, (0.625,) * 3)
    assert plan.normalisation == ("zscore",)
    assert plan.network_channels == (16, 32, 64, 128)
    assert math.prod(plan.patch_size) <= 64 * 64 * 48
    assert plan.label_values == (0, 1)
    assert plan.num_classes == 2
    assert plan.flip_axes == ()
    assert not plan.crop


def test_thick_slices_get_a_2d_network_that_keeps_them() -> None:
    plan = plan_for(facts(size=(24, 320, 320), spacing=(3.6, 0.6, 0.6)))
    assert (plan.ndim, plan.scan_ndim) == (2, 3)
    assert plan.spacing == (0.0, 0.6, 0.6)
    assert plan.patch_size == (256, 256)
    assert plan.orientation == "LPS"


@pytest.mark.parametrize(
    ("size", "spacing", "orientation"),
    [
        ((300, 300, 20), (0.6, 0.6, 4.0), "PSL"),
        ((300, 20, 300), (0.6, 4.0, 0.6), "LSP"),
        ((300, 300, 5), (1.0, 1.0, 1.0), "PSL"),
    ],
)
def test_slices_across_another_axis_come_first(
    size: tuple[int, ...], spacing: tuple[float, ...], orientation: str
) -> None:
    plan = plan_for(facts(size=size, spacing=spacing))
    assert plan.ndim == 2
    assert plan.orientation == orientation
    assert plan.spacing[0] == 0.0
    assert plan.patch_size == (256, 256)


def test_a_coarse_axis_takes_the_tenth_percentile() -> None:
    thin, thick = (facts(1, spacing=(s, 1.0, 1.0), unlabelled=0).cases[0] for s in (2.0, 3.2))
    plan = plan_for(Fingerprint((thin, thin, *(thick,) * 8)))
    assert plan.ndim == 3
    assert plan.spacing == (2.0, 1.0, 1.0)


def test_2d_scans() -> None:
    plan = plan_for(facts(size=(144, 200), spacing=(1.0, 1.0)))
    assert (plan.ndim, plan.scan_ndim, plan.spacing) == (2, 2, (1.0, 1.0))
    assert plan.flip_axes == (0, 1)
    assert plan.patch_size == (144, 200)


def test_small_scans_are_trained_on_whole() -> None:
    plan = plan_for(facts(size=(35, 50, 36), spacing=(1.0, 1.0, 1.0)))
    assert plan.patch_size == (40, 56, 40)
    assert plan.batch_size == plan.unlabelled_batch_size == 2


def test_tiny_patches_come_in_fours() -> None:
    plan = plan_for(facts(size=(24, 24, 24), spacing=(1.0, 1.0, 1.0)))
    assert plan.batch_size == 4


def test_hounsfield_units_are_windowed_by_the_clean_labels() -> None:
    plan = plan_for(facts(minimum=-1024, channels=2))
    assert plan.normalisation == ("ct", "ct")
    assert plan.intensity[0]["lower"] == 20
    assert plan.intensity[0]["mean"] == 100
    unlabelled = Fingerprint(tuple(replace(c, foreground=()) for c in facts(minimum=-1024).cases))
    assert plan_for(unlabelled).intensity[0]["lower"] == 5
    assert plan.reasons["intensity"].endswith("mean and SD under the clean labels.")
    assert plan_for(unlabelled).reasons["intensity"].endswith("no clean label has this channel's).")
    phase = Fingerprint(tuple(replace(c, minimum=(-4096.0,)) for c in facts().cases))
    assert plan_for(phase).normalisation == ("zscore",)
    fractions = Fingerprint(tuple(replace(c, integers=(False,)) for c in facts(minimum=-1024).cases))
    assert plan_for(fractions).normalisation == ("zscore",)


def test_each_channel_is_normalised_in_its_own_way() -> None:
    mixed = Fingerprint(tuple(replace(c, minimum=(-1000.0, 0.0)) for c in facts(channels=2).cases))
    plan = plan_for(mixed)
    assert plan.normalisation == ("ct", "zscore")
    assert set(plan.intensity[0]) == {"lower", "upper", "mean", "std"}
    assert plan.intensity[1] == {}


def test_a_window_without_any_content_is_refused() -> None:
    empty = Fingerprint(tuple(replace(c, foreground=(), content=(None,)) for c in facts().cases))
    with pytest.raises(UserError, match="constant in every scan"):
        plan_for(empty, overrides={"normalisation": "ct"})


def test_the_window_of_mixed_scans_covers_their_spread() -> None:
    low, high = replace(TISSUE, mean=0, std=3), replace(TISSUE, mean=8, std=3)
    one = facts(1, minimum=-1000, unlabelled=0).cases[0]
    data = Fingerprint((replace(one, foreground=(low,)), replace(one, foreground=(high,))))
    assert plan_for(data).intensity[0]["std"] == pytest.approx(5)  # sqrt(3² + 4²)


def test_empty_surroundings_are_cropped() -> None:
    plan = plan_for(facts(size=(64, 64, 64), box=(32, 40, 48), spacing=(1.0,) * 3))
    assert plan.crop
    assert plan.patch_size == (32, 40, 48)


def test_named_classes_decide_the_values() -> None:
    plan = plan_for(facts(), class_names={0: "background", 1: "liver", 2: "tumour"})
    assert plan.label_values == (0, 1, 2)
    assert plan.class_names == ("background", "liver", "tumour")


def test_nothing_labelled_is_explained() -> None:
    empty = Fingerprint(tuple(replace(c, label_voxels={0: 9}) for c in facts().cases))
    with pytest.raises(UserError, match="no case has a label with anything in it"):
        plan_for(empty)
    assert plan_for(empty, overrides={"label_values": [0, 4]}).class_names == ("background", "label 4")


def test_two_classes_of_one_name_are_told_apart() -> None:
    plan = plan_for(facts(), class_names={0: "background", 1: "organ", 2: "organ"})
    assert plan.class_names == ("background", "organ", "organ (2)")


def test_without_a_pool_there_is_no_unlabelled_batch() -> None:
    assert plan_for(facts(unlabelled=0)).unlabelled_batch_size == 0


def test_steps_grow_with_the_cases_within_bounds() -> None:
    steps = [plan_for(facts(count, unlabelled=0)).steps for count in (1, 20, 50, 100, 5000)]
    assert steps == sorted(steps)
    assert (steps[0], steps[2], steps[-1]) == (1500, 2000, 3000)
    assert plan_for(facts(50, unlabelled=0), device="cuda").steps == 20_000


def test_a_gpu_gets_larger_patches_and_more_features() -> None:
    cpu, gpu = plan_for(facts()), plan_for(facts(), device="cuda", memory_bytes=80 * GIB)
    assert math.prod(gpu.patch_size) > 4 * math.prod(cpu.patch_size)
    assert gpu.network_channels == (32, 64, 128, 256, 512)


def test_little_memory_shrinks_patch_then_batch() -> None:
    roomy, tight, tiny = (plan_for(facts(), memory_bytes=m) for m in (24 * GIB, GIB // 4, GIB // 256))
    assert math.prod(tight.patch_size) < math.prod(roomy.patch_size)
    assert tight.batch_size == 2
    assert "GiB" in tight.reasons["patch_size"]
    assert tiny.batch_size == tiny.unlabelled_batch_size == 1


def test_more_views_of_each_patch_leave_room_for_smaller_ones() -> None:
    voxels = [math.prod(plan_for(facts(), device="cuda", views=v).patch_size) for v in (0, 2, 5)]
    assert voxels == sorted(voxels, reverse=True)
    assert voxels[0] > voxels[2]
    assert plan_for(facts(), device="cuda") == plan_for(facts(), device="cuda", views=5)


@pytest.mark.parametrize(
    ("size", "spacing"), [((34, 50, 35), (1.0, 1.0, 1.0)), ((88, 140, 190), (0.625, 0.625, 0.625))]
)
def test_on_a_cpu_the_cap_on_voxels_decides_whatever_the_views(
    size: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    plans = [plan_for(facts(size=size, spacing=spacing), memory_bytes=10 * GIB, views=v) for v in (0, 2, 5)]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("network", ["unet", "unet++", "vnet", "vnet3", "dynunet"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_the_memory_estimate_follows_what_autograd_saves(network: str, ndim: int) -> None:
    channels = (8, 16, 32, 64, 128) if network in ("unet++", "vnet", "vnet3") else (8, 16, 32, 64)
    patch = (32,) * ndim if ndim == 3 else (64,) * ndim
    net = make_network(network, ndim=ndim, in_channels=1, num_classes=2, channels=channels)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        net(torch.randn(1, 1, *patch)).square().mean()
    held = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights)
    estimate = step_bytes(network, patch, channels, 1, views=0) / 2
    assert 0.5 < estimate / held < 2


@given(
    size=st.tuples(*[st.integers(1, 400)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 6)] * 3),
    memory=st.integers(2**26, 2**38),
    device=st.sampled_from(["cpu", "cuda"]),
    network=st.sampled_from(["unet", "unet++", "vnet", "dynunet", "swin-unetr"]),
)
@settings(deadline=None, max_examples=150)
def test_any_data_get_a_plan_that_its_network_takes(
    size: tuple[int, ...], spacing: tuple[float, ...], memory: int, device: str, network: str
) -> None:
    plan = plan_for(
        facts(size=size, spacing=spacing), memory_bytes=memory, device=device, overrides={"network": network}
    )
    multiple = required_multiple(plan.network, plan.network_channels)
    assert len(plan.patch_size) == plan.ndim
    assert all(side % multiple == 0 for side in plan.patch_size)
    assert max(plan.patch_size) >= 2 * multiple
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


# --- overrides --------------------------------------------------------------------------------------------


def test_an_override_counts_for_what_depends_on_it() -> None:
    plan = plan_for(facts(size=(88, 88, 88)), overrides={"spacing": 1.25, "steps": None})
    assert plan.spacing == (1.25,) * 3
    assert plan.patch_size == (48, 48, 48)
    assert plan.reasons["spacing"] == "Set by the user."
    assert plan.reasons["patch_size"] != "Set by the user."


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        ({"patch_size": 32}, "patch_size", (32, 32, 32)),
        ({"patch_size": [32, 48, 64]}, "patch_size", (32, 48, 64)),
        ({"ndim": 2}, "patch_size", (224, 280)),
        ({"flip_axes": 2}, "flip_axes", (2,)),
        ({"flip_axes": [0, 2]}, "flip_axes", (0, 2)),
        ({"normalisation": "ct"}, "normalisation", ("ct",)),
        ({"network_channels": [8, 16]}, "network_channels", (8, 16)),
        ({"network": "unet++"}, "network_channels", (16, 32, 64, 128, 256)),
        ({"network": "swin-unetr"}, "network_channels", (24, 48, 96, 192, 384)),
        ({"crop": True}, "crop", True),
        ({"orientation": "RAS"}, "orientation", "RAS"),
        ({"class_names": ["background", "atrium"]}, "class_names", ("background", "atrium")),
        ({"steps": "500"}, "steps", 500),
    ],
)
def test_overrides_are_taken(overrides: dict[str, object], field: str, value: object) -> None:
    data = facts(size=(100, 220, 280), spacing=(1.0, 1.0, 1.0))
    assert getattr(plan_for(data, overrides=overrides), field) == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"spacng": 1}, r"plan\.spacng: no such field, did you mean 'spacing'"),
        ({"channels": 2}, r"plan\.channels: is a fact"),
        ({"spacing": "wide"}, r"plan\.spacing\.0: .*number.*\(found 'wide'\)"),
        ({"spacing": -1}, r"plan\.spacing\.0: .*greater than or equal to 0.*\(found -1\)"),
        ({"spacing": float("nan")}, r"plan\.spacing\.0: .*finite"),
        ({"spacing": [1, 1]}, r"plan\.spacing: found 2 values"),
        ({"patch_size": 50}, r"plan\.patch_size: found \(50, 50, 50\), expected multiples of 8.*56, 56, 56"),
        ({"patch_size": [32, 32]}, r"plan\.patch_size: found 2 values, expected one or 3"),
        ({"ndim": 4}, r"plan\.ndim: Input should be 2 or 3"),
        ({"steps": 0}, r"plan\.steps: .*greater than 0"),
        ({"network": "unett"}, r"unknown network 'unett': did you mean 'unet'"),
        ({"flip_axes": [3]}, r"plan\.flip_axes: found \(3,\), expected axes below 3"),
        ({"normalisation": "minmax"}, r"plan\.normalisation\.0: .*'zscore' or 'ct'"),
        ({"normalisation": ["ct", "ct"]}, r"plan\.normalisation: found 2 values, expected one or 1"),
        ({"normalisation": "ct", "intensity": [{}]}, r"plan\.intensity"),
        ({"normalisation": "ct", "intensity": {"lower": 3}}, r"plan\.intensity"),
        (
            {"normalisation": "ct", "intensity": {"lower": 3, "upper": 1, "mean": 0, "std": 1}},
            r"lower at most upper",
        ),
        ({"label_values": [1, 2]}, r"plan\.label_values: .*expected 0 first"),
        ({"label_values": [0, 2, 2]}, r"plan\.label_values: .*each once"),
        ({"label_values": list(range(300))}, r"plan\.label_values"),
        ({"class_names": ["background"]}, r"plan\.class_names: .*expected 2 names"),
        ({"orientation": "LPL"}, r"plan\.orientation: .*such as LPS"),
        ({"network_channels": []}, r"plan\.network_channels: .*at least 1 item"),
    ],
)
def test_impossible_overrides_are_explained(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_for(facts(), overrides=overrides)


def test_2d_scans_take_no_3d_network() -> None:
    with pytest.raises(UserError, match=r"plan\.ndim: found 3, expected 2"):
        plan_for(facts(size=(64, 64), spacing=(1.0, 1.0)), overrides={"ndim": 3})


# --- files ------------------------------------------------------------------------------------------------


def test_a_plan_survives_the_disk(tmp_path: Path) -> None:
    plan = plan_for(facts(minimum=-1024), class_names={1: "Vorhof – links"})
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert "Vorhof – links" in (tmp_path / "plan.json").read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        ("[1]", "holds a list"),
        ("{}", r"plan\.json\.ndim: Field required"),
    ],
)
def test_garbage_is_no_plan(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        Plan.read(path)


def test_a_plan_edited_wrongly_is_refused(tmp_path: Path) -> None:
    record = plan_for(facts()).as_dict()
    with pytest.raises(UserError, match=r"plan\.extra: .*Unexpected"):
        Plan.from_dict({**record, "extra": 1})
    with pytest.raises(UserError, match=r"plan\.patch_size"):
        Plan.from_dict({**record, "patch_size": [30, 30, 30]})
    for field, value in (
        ("spacing", [1, 1]),
        ("patch_size", [32, 32]),
        ("normalisation", ["ct"] * 2),
        ("network", "x"),
    ):
        with pytest.raises(UserError, match=rf"plan\.{field}"):
            Plan.from_dict({**record, field: value})
    with pytest.raises(UserError, match="cannot be read"):
        Plan.read(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid JSON"):
        Plan.read(tmp_path / "binary.json")


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    plan = plan_for(facts())
    with pytest.raises(UserError, match="cannot be written"):
        plan.write(tmp_path / "missing" / "plan.json")
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        plan.write(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.realdata
def test_real_hippocampi_are_planned_whole(realdata: Path) -> None:
    folder = realdata / "hippocampus"
    images = sorted((folder / "imagesTr").glob("*.nii.gz"))[:8]
    cases = [Case(p.name, (p,), folder / "labelsTr" / p.name, Role.CLEAN) for p in images[:4]]
    cases += [Case(p.name, (p,)) for p in images[4:]]
    plan = plan_for(fingerprint(cases))
    assert plan.label_values == (0, 1, 2)
    assert plan.spacing == (1.0, 1.0, 1.0)
    assert plan.normalisation == ("zscore",)
    assert all(side >= 32 for side in plan.patch_size)
