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

from mlbseg.data.budget import step_bytes
from mlbseg.data.plan import CaseFacts, Fingerprint, Intensity, Plan, fingerprint, make_plan
from mlbseg.data.readers import write_image, write_label
from mlbseg.data.structures import COARSER, Structure
from mlbseg.errors import UserError
from mlbseg.networks import make_network, side_multiples
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
    extent: tuple[float, ...] | None = None,
    kept: tuple[float, ...] = (0.999, 0.998, 0.997, 0.996, 0.995),
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
        structures=() if extent is None else (structure(extent, min(spacing), kept),),
    )
    plain = replace(one, role=Role.UNLABELLED, foreground=(), label_voxels={}, structures=())
    return Fingerprint((one,) * count + (plain,) * unlabelled)


def structure(extent: tuple[float, ...], finest: float, kept: tuple[float, ...]) -> Structure:
    """A structure of this extent (mm) that keeps these Dices at the coarser spacings."""
    coarser = [(finest * factor, dice) for factor, dice in zip(COARSER, kept, strict=True)]
    return Structure(1, extent, (0.5,) * len(extent), 1, ((finest, 1.0), *coarser))


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
    (shown,) = found.structures
    assert (shown.value, shown.extent) == (4, (6.0, 4.0, 8.0))
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


def test_only_some_of_many_clean_labels_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlbseg.data.fingerprint.MEASURED", 3)
    image = np.random.default_rng(0).random((8, 8, 8))
    case = write_case(tmp_path, "a", image, image > 0.5)
    cases = [replace(case, id=str(i), role=Role.UNLABELLED if i == 4 else Role.CLEAN) for i in range(8)]
    found = fingerprint(cases)
    assert [c.id for c in found.cases if c.structures] == ["0", "2", "5"]
    extent = found.extent()
    assert extent is not None
    assert extent.tolist() == [8, 8, 8]
    assert found.kept(1.0) == 1 > found.kept(3.0)
    assert Fingerprint(found.cases[4:5]).extent() is None
    assert Fingerprint(found.cases[4:5]).kept(1.0) == 0


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
    assert plan.patch_size == (224, 256)
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
    assert plan.patch_size == (224, 256)


def test_a_coarse_axis_takes_the_tenth_percentile() -> None:
    thin, thick = (facts(1, spacing=(s, 1.0, 1.0), unlabelled=0).cases[0] for s in (2.0, 3.2))
    plan = plan_for(Fingerprint((thin, thin, *(thick,) * 8)))
    assert plan.ndim == 3
    assert plan.spacing == (2.0, 1.0, 1.0)


def test_2d_scans() -> None:
    plan = plan_for(facts(size=(144, 200), spacing=(1.0, 1.0)))
    assert (plan.ndim, plan.scan_ndim, plan.spacing) == (2, 2, (1.0, 1.0))
    assert plan.flip_axes == (0, 1)
    assert plan.patch_size == (160, 224)


def images_with(*centres: dict[int, tuple[float, float]]) -> Fingerprint:
    """Facts of 2D images whose structures lie at these places, as shares of the sides."""
    kept = (0.999,) * len(COARSER)
    cases = tuple(
        replace(
            facts(1, size=(200, 200), spacing=(1.0, 1.0), unlabelled=0).cases[0],
            structures=tuple(
                replace(structure((50.0, 50.0), 1.0, kept), value=value, centre=place)
                for value, place in structures.items()
            ),
        )
        for structures in centres
    )
    return Fingerprint(cases)


def test_masks_keep_one_component_of_what_every_clean_label_shows_in_one_piece() -> None:
    cases = images_with(*({1: (0.5, 0.5), 2: (0.4, 0.4)},) * 3).cases
    whole = Fingerprint(tuple(replace(case, label_voxels={0: 9, 1: 9, 2: 9}) for case in cases))
    plan = plan_for(whole)
    assert plan.largest_component == (1, 2)
    assert "every clean label: 1, 2." in plan.reasons["largest_component"]
    first, *others = whole.cases
    halves = replace(first, structures=(first.structures[0], replace(first.structures[1], largest=0.94)))
    assert plan_for(Fingerprint((halves, *others))).largest_component == (1,)
    assert plan_for(Fingerprint(whole.cases[:2])).largest_component == ()  # two labels are too few to say so
    assert plan_for(whole, overrides={"largest_component": []}).largest_component == ()
    with pytest.raises(
        UserError, match=r"plan.largest_component: found \(7,\), expected values of structures"
    ):
        plan_for(whole, overrides={"largest_component": 7})


def test_images_are_flipped_only_along_axes_without_a_pose() -> None:
    anywhere = [{1: (0.5, 0.6)}, {1: (0.4, 0.5)}, {1: (0.6, 0.45)}]
    assert plan_for(images_with(*anywhere)).flip_axes == (0, 1)
    above = [{1: (0.20, 0.6)}, {1: (0.25, 0.5)}, {1: (0.3, 0.45)}]
    assert plan_for(images_with(*above)).flip_axes == (1,)
    # Either is anywhere, and yet the second is always at the first one's right.
    beside = [{1: (0.5, x), 2: (0.5, x + 0.2 + 0.1 * x)} for x in (0.1, 0.5, 0.7)]
    plan = plan_for(images_with(*beside))
    assert plan.flip_axes == (0,)
    assert "along axis 1 of the images" in plan.reasons["flip_axes"]
    assert plan_for(images_with(*above[:2])).flip_axes == (0, 1)  # two labels show no pose
    assert plan_for(images_with({1: (0.2, 0.5)}, {1: (0.2, 0.5)}, {2: (0.3, 0.5)})).flip_axes == (0, 1)


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
    assert gpu.network_channels == (32, 64, 128, 256, 512, 512)


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
    part=st.none() | st.floats(0.01, 1),
    loss=st.floats(0, 0.5),
    network=st.sampled_from(["unet", "unet++", "vnet", "dynunet", "swin-unetr"]),
)
@settings(deadline=None, max_examples=150)
def test_any_data_get_a_plan_that_its_network_takes(
    size: tuple[int, ...],
    spacing: tuple[float, ...],
    memory: int,
    device: str,
    part: float | None,
    loss: float,
    network: str,
) -> None:
    extent = None if part is None else tuple(part * n * mm for n, mm in zip(size, spacing, strict=True))
    data = facts(size=size, spacing=spacing, extent=extent, kept=tuple(1 - loss * k / 5 for k in range(1, 6)))
    plan = plan_for(data, memory_bytes=memory, device=device, overrides={"network": network})
    multiples = side_multiples(plan.network, plan.ndim, plan.network_channels, plan.network_strides)
    deepest = [side / step for side, step in zip(plan.patch_size, multiples, strict=True)]
    assert all(side.is_integer() for side in deepest)
    assert max(deepest) >= 2
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


# --- field of view, depth and batch ------------------------------------------------------------------------


def test_a_structure_that_fills_a_large_image_is_seen_whole() -> None:
    plan = plan_for(facts(size=(540, 800), spacing=(1.0, 1.0), extent=(300, 320)))
    assert plan.spacing == pytest.approx((3.14, 3.14), abs=0.05)
    assert plan.patch_size == (192, 256)
    assert plan.network_channels == (16, 32, 64, 128, 256, 256)
    assert plan.batch_size == plan.unlabelled_batch_size == 4
    reason = plan.reasons["spacing"]
    assert "a patch holds a whole scan (the largest structure has 300×320 mm)" in reason
    assert "keep a Dice of 0.997" in reason


def test_small_structures_in_a_large_image_keep_their_detail() -> None:
    plan = plan_for(facts(size=(1024, 1360), spacing=(1.0, 1.0), extent=(40, 40), kept=(0.9,) * 5))
    assert plan.spacing == (1.0, 1.0)
    assert math.prod(plan.patch_size) <= 224 * 256
    assert "a patch holds the largest structure (40×40 mm) and its surroundings" in plan.reasons["spacing"]


def test_thin_structures_across_a_large_image_keep_their_detail() -> None:
    plan = plan_for(facts(size=(540, 800), spacing=(1.0, 1.0), extent=(500, 700), kept=(0.8, 0.6, 0, 0, 0)))
    assert plan.spacing == (1.0, 1.0)
    assert "would keep the clean labels at a Dice below 0.975" in plan.reasons["spacing"]


def test_where_a_whole_scan_is_too_coarse_the_structure_decides() -> None:
    kept = (0.99, 0.985, 0.972, 0.8, 0.7)
    plan = plan_for(facts(size=(1000, 1000), spacing=(1.0, 1.0), extent=(300, 300), kept=kept))
    assert 1.5 < plan.spacing[0] < 2.2
    assert "the largest structure and its surroundings" in plan.reasons["spacing"]


def test_detail_bounds_how_coarse_a_scan_becomes() -> None:
    kept = (0.98, 0.97, 0.95, 0.9, 0.8)
    plan = plan_for(facts(extent=(50.0, 80.0, 110.0), kept=kept))
    assert plan.spacing == pytest.approx((1.09,) * 3, abs=0.02)  # 1.75 times 0.625, where 0.975 is kept
    assert "a patch holds more of the largest structure" in plan.reasons["spacing"]


def test_a_whole_scan_is_no_reason_for_far_coarser_voxels() -> None:
    plan = plan_for(facts(size=(2000, 2000), spacing=(1.0, 1.0), extent=(300, 300)))
    assert 1.5 < plan.spacing[0] < 2.2
    assert plan.patch_size == (224, 224)


def test_labels_that_lose_too_much_at_any_spacing_keep_the_scans_own() -> None:
    usual = facts(size=(540, 800), spacing=(1.0, 1.0), extent=(500, 700))
    fine = facts(size=(2160, 3200), spacing=(0.25, 0.25), extent=(500, 700), kept=(0.8, 0.7, 0.6, 0.5, 0.4))
    unlabelled = tuple(case for case in usual.cases if not case.structures)
    assert plan_for(Fingerprint(fine.cases[:4] + unlabelled)).spacing == (1.0, 1.0)


def test_the_structure_that_loses_most_decides() -> None:
    data = facts(size=(540, 800), spacing=(1.0, 1.0), extent=(300, 320))
    thin = replace(structure((300, 10), 1.0, (0.7, 0.5, 0.3, 0.2, 0.1)), value=2)
    both = tuple(replace(c, structures=(*c.structures, thin) if c.structures else ()) for c in data.cases)
    assert plan_for(Fingerprint(both)).spacing == (1.0, 1.0)


def test_one_odd_label_does_not_decide_how_large_structures_are() -> None:
    usual = facts(4, size=(540, 800), spacing=(1.0, 1.0), extent=(50, 50), unlabelled=0)
    odd = facts(1, size=(540, 800), spacing=(1.0, 1.0), extent=(540, 800), unlabelled=0)
    assert plan_for(Fingerprint(usual.cases + odd.cases)).spacing == (1.0, 1.0)


def test_only_axes_that_are_finer_become_coarser() -> None:
    plan = plan_for(facts(size=(30, 150, 150), spacing=(2.0, 0.8, 0.8), extent=(50.0, 100.0, 100.0)))
    assert plan.spacing[0] == 2.0
    assert 0.8 < plan.spacing[1] == plan.spacing[2] <= 2.0
    slices = plan_for(facts(size=(12, 512, 512), spacing=(8.0, 0.5, 0.5), extent=(60.0, 200.0, 200.0)))
    assert slices.spacing[0] == 0.0
    assert slices.spacing[1] > 0.5


def test_the_longest_side_is_cut_where_it_is_longer_than_the_structure() -> None:
    spine = plan_for(facts(size=(100, 300, 100), spacing=(1.0,) * 3, extent=(20.0, 130.0, 20.0)))
    assert spine.spacing == (1.0,) * 3
    assert all(side > 1.4 * mm for side, mm in zip(spine.patch_size, (20, 130, 20), strict=True))


@given(size=st.tuples(*[st.integers(8, 400)] * 3), spacing=st.tuples(*[st.floats(0.5, 1.5)] * 3))
@settings(deadline=None, max_examples=100)
def test_halving_goes_on_until_four_to_eight_voxels_are_left(
    size: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    filled = tuple(n * mm for n, mm in zip(size, spacing, strict=True))
    data = facts(size=size, spacing=spacing, extent=filled, kept=(0.0,) * 5)
    plan = plan_for(data, overrides={"ndim": 3})
    multiples = side_multiples(plan.network, 3, plan.network_channels, plan.network_strides)
    deepest = [side / step for side, step in zip(plan.patch_size, multiples, strict=True)]
    if max(plan.patch_size) >= 32:  # a voxel or two off, where the patch is shortened by whole multiples
        assert all(3 <= side <= 10 for side in deepest), (plan.patch_size, plan.network_strides)


def test_a_2d_patch_on_a_cpu_is_a_structure_with_its_surroundings() -> None:
    def patch(extent: float, **arguments: Any) -> tuple[int, ...]:
        data = facts(size=(12, 256, 216), spacing=(8.0, 1.5, 1.5), extent=(80.0, extent, extent))
        return plan_for(data, **arguments).patch_size

    assert patch(70.0) == (96, 96)  # 70 pixels with the surroundings, and at least 96
    assert patch(120.0) == (128, 128)
    assert patch(180.0) == (256, 224)  # most of a slice: all of it
    assert patch(70.0, device="cuda") == (256, 224)
    plan = plan_for(facts(size=(12, 256, 216), spacing=(8.0, 1.5, 1.5), extent=(80.0, 70.0, 70.0)))
    assert plan.batch_size == 20
    assert plan.network_channels == (16, 32, 64, 128, 256)
    assert "Of 256×216 the largest structure" in plan.reasons["patch_size"]
    narrow = plan_for(facts(size=(12, 256, 64), spacing=(8.0, 1.5, 1.5), extent=(80.0, 40.0, 20.0)))
    assert narrow.patch_size == (96, 64)  # no wider than the slice


def test_coarse_axes_are_halved_later() -> None:
    slices = facts(size=(24, 320, 320), spacing=(3.6, 0.6, 0.6), extent=(80.0, 190.0, 190.0), kept=(0.9,) * 5)
    plan = plan_for(slices, overrides={"ndim": 3})
    first, second, third, *_ = plan.network_strides
    assert first == second == (1, 2, 2)
    assert third == (2, 2, 2)
    assert len(plan.network_channels) == len(plan.network_strides) + 1
    assert max(plan.network_channels) == 256
    assert plan.patch_size[0] == 24  # of which 4 to 8 are left, so it is not padded


def test_a_patch_of_the_users_is_halved_no_more_often_than_it_can_be() -> None:
    plan = plan_for(
        facts(size=(72, 144, 56), spacing=(1.0,) * 3, extent=(72.0, 144.0, 56.0)),
        overrides={"spacing": 1.0, "patch_size": [72, 144, 56]},
    )
    assert plan.patch_size == (72, 144, 56)
    multiples = side_multiples(plan.network, 3, plan.network_channels, plan.network_strides)
    assert multiples == (8, 16, 8)


def test_levels_of_the_users_halve_every_axis() -> None:
    plan = plan_for(facts(), overrides={"network_channels": [8, 16, 32]})
    assert plan.network_strides == ()
    assert all(side % 4 == 0 for side in plan.patch_size)


def test_strides_of_the_users_decide_the_levels() -> None:
    plan = plan_for(facts(), overrides={"network_strides": [[1, 2, 2], [2, 2, 2]]})
    assert plan.network_strides == ((1, 2, 2), (2, 2, 2))
    assert plan.network_channels == (16, 32, 64)
    with pytest.raises(UserError, match=r"network vnet: halves every axis alike"):
        plan_for(facts(), overrides={"network": "vnet", "network_strides": [[1, 2, 2]] * 4})
    with pytest.raises(UserError, match=r"network unet: .* expected 1 times 3 numbers, each 1 or 2"):
        plan_for(facts(), overrides={"network_channels": [8, 16], "network_strides": [[2, 2]]})


def test_a_step_holds_many_small_images_and_few_large_ones() -> None:
    sides = (64, 128, 190, 300)
    counts = [plan_for(facts(size=(n, n), spacing=(1.0, 1.0))).batch_size for n in sides]
    assert counts == [20, 14, 6, 4]
    assert plan_for(facts(size=(320, 320), spacing=(1.0, 1.0)), device="cuda").batch_size > 8


def test_a_step_of_a_small_memory_holds_fewer_images() -> None:
    data = facts(size=(192, 256), spacing=(1.0, 1.0))
    roomy, tight = (plan_for(data, memory_bytes=memory) for memory in (24 * GIB, 2 * GIB))
    assert tight.patch_size == roomy.patch_size
    assert 2 <= tight.batch_size < roomy.batch_size
    assert tight.reasons["batch_size"].endswith("as memory allows.")


def test_the_plan_states_how_long_training_takes_on_a_cpu() -> None:
    assert "minutes of a core for supervised training" in plan_for(facts()).reasons["steps"]
    assert "minutes" not in plan_for(facts(), device="cuda").reasons["steps"]


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
        ({"ndim": 2}, "patch_size", (224, 256)),
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


def test_a_plan_of_an_older_version_halves_every_axis(tmp_path: Path) -> None:
    record = plan_for(facts(), overrides={"network_channels": [16, 32, 64, 128]}).as_dict()
    del record["network_strides"], record["reasons"]["network_strides"]
    (tmp_path / "plan.json").write_text(json.dumps(record))
    plan = Plan.read(tmp_path / "plan.json")
    assert side_multiples(plan.network, 3, plan.network_channels, plan.network_strides) == (8, 8, 8)


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
