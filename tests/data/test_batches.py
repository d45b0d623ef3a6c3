"""What a training step sees: drawn again bit for bit, cut from the right place, with the right label."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blocks import UNCHANGED
from mlbseg.core.ranks import Ranks
from mlbseg.data.augment import Augment
from mlbseg.data.batches import StepDataset
from mlbseg.data.cache import Cache
from mlbseg.data.plan import Plan
from mlbseg.data.readers import write_image, write_label
from mlbseg.errors import ReadError
from mlbseg.types import ALL_KNOWN, EITHER, IGNORE, UNLABELLED, Batch, Case, Geometry, Known, Role

PLAN = Plan(
    ndim=3,
    scan_ndim=3,
    channels=1,
    label_values=(0, 1, 2),
    class_names=("background", "a", "b"),
    spacing=(1.0, 1.0, 1.0),
    patch_size=(8, 8, 8),
    normalisation=("zscore",),
    intensity=(),
    crop=False,
    network="unet",
    network_channels=(4, 8),
    batch_size=2,
    unlabelled_batch_size=3,
    steps=10,
    flip_axes=(),
)
SHAPE = (12, 14, 10)
STILL = Augment.make(3, **UNCHANGED)
LIVELY = Augment.make(3, affine=1, intensity=1, gamma=1, noise=1, flip_axes=(0, 1, 2))


def pattern(shape: tuple[int, ...], shift: int) -> np.ndarray:
    """Return a label in diagonal stripes, so that a cut in the wrong place shows."""
    return (np.indices(shape).sum(0) // 2 + shift) % 3


def make_case(
    root: Path, name: str, role: Role, shape: tuple[int, ...] = SHAPE, label: np.ndarray | None = None
) -> Case:
    """Write a scan in which every voxel has its own value; a label is written for clean and noisy cases.

    What stands where an unlabelled case's hidden label would be is no scan at all.
    """
    geometry = Geometry.identity(shape[::-1])
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + len(name)
    write_image(root / f"{name}.nii.gz", image, geometry)
    path = root / f"{name}_label.nii.gz"
    if role is Role.UNLABELLED:
        path.write_bytes(b"hidden: whoever reads this fails")
    else:
        write_label(path, pattern(shape, len(name)) if label is None else label, geometry)
    return Case(name, (root / f"{name}.nii.gz",), path, role)


class World:
    """Cases of every role, their cache and their initial labels."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clean = [make_case(root, f"clean{i}", Role.CLEAN) for i in range(3)]
        self.others = [make_case(root, f"free{i}", Role.UNLABELLED) for i in range(4)]
        self.others.append(make_case(root, "noisy", Role.NOISY))
        self.initial = {}
        for i, case in enumerate(self.others[:4]):
            self.initial[case.id] = root / f"{case.id}.npy"
            np.save(self.initial[case.id], pattern(SHAPE, i).astype(np.uint8))
        self.cache = Cache(root / "cache", PLAN)

    def dataset(self, **changes: Any) -> StepDataset:
        settings: dict[str, Any] = {
            "initial_labels": self.initial, "patch_size": (8, 8, 8), "batch_size": 2,
            "unlabelled_batch_size": 3, "steps": 40, "seed": 1, "stage": 2, "foreground": 0.5, "augment": STILL,
        }  # fmt: skip
        settings |= changes
        clean, others = settings.pop("clean", self.clean), settings.pop("others", self.others)
        return StepDataset(settings.pop("cache", self.cache), clean, others, **settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def same(one: Batch, other: Batch) -> bool:
    tensors = ("clean_image", "clean_label", "image", "weak", "initial_label")
    return (one.case_ids, one.seed) == (other.case_ids, other.seed) and all(
        torch.equal(getattr(one, n), getattr(other, n)) for n in tensors
    )


def place_in(volume: np.ndarray, value: float) -> tuple[int, ...]:
    """Return where a voxel's value, of which there is one only, stands."""
    (place,) = np.argwhere(volume == np.float32(value))
    return tuple(int(i) for i in place)


def window(volume: np.ndarray, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    return volume[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]


@pytest.mark.parametrize("augment", [STILL, LIVELY], ids=["still", "lively"])
def test_a_step_is_the_same_whenever_it_is_drawn(world: World, augment: Augment) -> None:
    forward = world.dataset(augment=augment)
    first = [forward[t] for t in range(5)]
    again = world.dataset(augment=augment, cache=Cache(world.root / "cache", PLAN))
    for t in (4, 0, 3, 1, 2, 4):
        np.random.seed(t)
        assert same(again[t], first[t])
    assert len(forward) == 40


@pytest.mark.parametrize("change", [{"seed": 2}, {"stage": 1}])
def test_another_seed_or_stage_draws_otherwise(world: World, change: dict[str, int]) -> None:
    mine, other = world.dataset(), world.dataset(**change)
    for t in range(3):
        assert not torch.equal(mine[t].clean_image, other[t].clean_image)
        assert not torch.equal(mine[t].image, other[t].image)
        assert mine[t].seed != other[t].seed


def test_steps_differ_and_so_do_their_seeds(world: World) -> None:
    dataset = world.dataset()
    batches = [dataset[t] for t in range(20)]
    assert len({b.seed for b in batches}) == 20
    assert len({b.clean_image.numpy().tobytes() for b in batches}) == 20
    # Two patches of one step are two draws, even of one case.
    alone = world.dataset(clean=world.clean[:1], foreground=0.0)
    assert not torch.equal(alone[0].clean_image[0], alone[0].clean_image[1])


def test_every_case_comes_once_before_any_comes_again(world: World) -> None:
    dataset = world.dataset()
    clean = [i for t in range(30) for i in dataset[t].case_ids[:2]]
    others = [i for t in range(30) for i in dataset[t].case_ids[2:]]
    for drawn, cases in ((clean, world.clean), (others, world.others)):
        ids = {c.id for c in cases}
        turns = [tuple(drawn[k : k + len(ids)]) for k in range(0, len(drawn) - len(ids) + 1, len(ids))]
        assert len(turns) > 10
        assert all(set(turn) == ids for turn in turns)
        assert len(set(turns)) > 3  # in an order of its own each time


def test_patches_and_labels_are_cut_from_the_same_place(world: World) -> None:
    dataset = world.dataset()
    cases = {c.id: c for c in (*world.clean, *world.others)}
    starts = set()
    for t in range(10):
        batch = dataset[t]
        assert batch.clean_image.shape == (2, 1, 8, 8, 8)
        assert batch.clean_label.shape == (2, 8, 8, 8)
        assert batch.image.shape == (3, 1, 8, 8, 8)
        assert batch.initial_label.shape == (3, 8, 8, 8)
        images = torch.cat([batch.clean_image, batch.image])
        labels = torch.cat([batch.clean_label, batch.initial_label])
        for name, image, label in zip(batch.case_ids, images, labels, strict=True):
            case = cases[name]
            whole = world.cache.image(case).array[0]
            start = place_in(whole, image[0, 0, 0, 0])
            assert np.array_equal(image[0].numpy(), window(whole, start, (8, 8, 8)))
            if case.role is Role.UNLABELLED:  # the frozen prediction of stage 1
                source = np.load(world.initial[name])
            else:  # clean and noisy ones bring their own
                source = world.cache.label(case)[:]
            assert np.array_equal(label.numpy(), window(source, start, (8, 8, 8)))
            starts.add(start)
    assert len(starts) > 20
    assert "noisy" in {name for t in range(10) for name in dataset[t].case_ids[2:]}


def test_tensors_are_plain_and_of_the_types_that_methods_expect(world: World) -> None:
    for augment in (STILL, LIVELY):
        batch = world.dataset(augment=augment)[0]
        for tensor in (batch.clean_image, batch.image):
            assert type(tensor) is torch.Tensor
            assert tensor.dtype == torch.float32
        for tensor in (batch.clean_label, batch.initial_label):
            assert type(tensor) is torch.Tensor
            assert tensor.dtype == torch.int64


def test_augmentation_moves_image_and_label_of_a_batch_alike(tmp_path: Path) -> None:
    shape = (24, 24, 24)
    ball = (np.square(np.indices(shape) - 12).sum(0) < 60).astype(np.int64)
    case = make_case(tmp_path, "ball", Role.CLEAN, shape, ball)
    write_image(case.images[0], 10 * ball.astype(np.float32) + 1, Geometry.identity(shape))
    dataset = StepDataset(
        Cache(tmp_path / "cache", PLAN), [case], patch_size=(16, 16, 16), batch_size=2,
        unlabelled_batch_size=0, steps=5, seed=0, stage=1, foreground=1.0,
        augment=Augment.make(3, **UNCHANGED | {"affine": 1}, flip_axes=(0, 1, 2)),
    )  # fmt: skip
    for t in range(5):
        image, label = dataset[t].clean_image[:, 0], dataset[t].clean_label
        bright = image > (image.amax() + image.amin()) / 2
        assert (bright == (label == 1)).float().mean() > 0.98
        assert 0.02 < float(bright.float().mean()) < 0.98


def test_the_weak_image_is_moved_with_the_other_and_keeps_its_grey_values(world: World) -> None:
    settings = {**UNCHANGED, "affine": 1.0}
    loud = world.dataset(augment=Augment.make(3, flip_axes=(0, 1, 2), **{**settings, "noise": 1.0}))
    quiet = world.dataset(augment=Augment.make(3, flip_axes=(0, 1, 2), **settings))
    for step in (0, 7):
        one, other = loud[step], quiet[step]
        assert one.image is not None
        assert one.weak is not None
        assert torch.equal(one.weak, other.image)  # type: ignore[arg-type]
        assert torch.equal(other.weak, other.image)  # type: ignore[arg-type]
        assert (one.image - one.weak).std() > 0.01
        assert torch.equal(one.initial_label, other.initial_label)  # type: ignore[arg-type]


def test_a_hidden_label_changes_nothing(world: World) -> None:
    # The files hold no scan: reading one would fail. Without any label the batches are the same.
    assert all(b"hidden" in c.label.read_bytes() for c in world.others[:4])
    nameless = [replace(c, label=None) if c.role is Role.UNLABELLED else c for c in world.others]
    with_files, without = world.dataset(), world.dataset(others=nameless)
    for t in range(5):
        assert same(with_files[t], without[t])


def test_without_other_cases_a_batch_is_the_clean_patches(world: World) -> None:
    mine, alone = world.dataset()[3], world.dataset(others=())[3]
    assert alone.image is None
    assert alone.initial_label is None
    assert alone.case_ids == mine.case_ids[:2]
    assert torch.equal(alone.clean_image, mine.clean_image)


SPARSE = (20, 24, 22)


def sparse_case(root: Path) -> Case:
    label = np.zeros(SPARSE, np.int64)
    label[15:18, 18:22, 15:20] = 1
    label[2, 3, 4] = 2  # a class of one voxel, in the far corner
    return make_case(root, "sparse", Role.CLEAN, SPARSE, label)


def shares(root: Path, foreground: float, patch: tuple[int, ...]) -> dict[int, float]:
    """Return the share of 200 patches that hold each class."""
    augment = Augment.make(len(patch), **UNCHANGED)
    dataset = StepDataset(
        Cache(root / "cache", PLAN), [sparse_case(root)], patch_size=patch, batch_size=2,
        unlabelled_batch_size=0, steps=100, seed=0, stage=1, foreground=foreground, augment=augment,
    )  # fmt: skip
    labels = torch.cat([dataset[t].clean_label for t in range(100)]).flatten(1)
    return {
        0: float((labels <= 0).all(1).float().mean()),
        1: float((labels == 1).any(1).float().mean()),
        2: float((labels == 2).any(1).float().mean()),
    }


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8), (2, 3, 5)])
def test_the_foreground_share_is_kept_and_classes_count_alike(tmp_path: Path, patch: tuple[int, ...]) -> None:
    always, half, never = (shares(tmp_path, f, patch) for f in (1.0, 0.5, 0.0))
    assert always[0] == 0  # a patch meant to hold a structure holds it, be it one slice thick
    assert 0.4 < always[2] < 0.6
    assert 0.4 < always[1] < 0.6
    assert always[0] < half[0] < never[0]
    assert abs(half[0] - never[0] / 2) < 0.1


def test_a_clean_case_without_foreground_is_drawn_all_the_same(tmp_path: Path) -> None:
    case = make_case(tmp_path, "empty", Role.CLEAN, SHAPE, np.zeros(SHAPE, np.int64))
    dataset = StepDataset(
        Cache(tmp_path / "cache", PLAN), [case], patch_size=(8, 8, 8), batch_size=2,
        unlabelled_batch_size=0, steps=2, seed=0, stage=1, foreground=1.0, augment=STILL,
    )  # fmt: skip
    assert (dataset[0].clean_label == 0).all()


def test_a_case_without_an_initial_label_is_unlabelled_inside_and_ignored_outside(tmp_path: Path) -> None:
    clean, free = (make_case(tmp_path, name, role, (5, 14, 8)) for name, role in
                   (("clean", Role.CLEAN), ("free", Role.UNLABELLED)))  # fmt: skip
    for labels, values in (({}, {UNLABELLED, IGNORE}), (None, None)):
        batch = StepDataset(
            Cache(tmp_path / "cache", PLAN), [clean], [free], initial_labels=labels, patch_size=(8, 8, 8),
            batch_size=1, unlabelled_batch_size=1, steps=1, seed=0, stage=2, foreground=0.5, augment=STILL,
        )[0]  # fmt: skip
        assert int(batch.inside.sum()) == 5 * 8 * 8
        if values is None:
            assert batch.initial_label is None
        else:
            assert set(batch.initial_label.unique().tolist()) == values
            assert int((batch.initial_label == UNLABELLED).sum()) == 5 * 8 * 8


@pytest.mark.parametrize("augment", [STILL, LIVELY], ids=["still", "lively"])
def test_pseudo_labels_move_with_their_patch_and_may_be_replaced(world: World, augment: Augment) -> None:
    plain, dataset = world.dataset(augment=augment), world.dataset(augment=augment)
    paths = {case.id: world.initial.get(case.id, world.root / "pseudo.npy") for case in world.others}
    np.save(paths["noisy"], np.asarray(world.cache.label(world.others[-1])[...]).astype(np.uint8))
    other = {case.id: world.root / "other.npy" for case in world.others}
    np.save(world.root / "other.npy", np.full(SHAPE, 1, np.uint8))
    for t in range(4):
        dataset.pseudo_labels = paths
        assert plain[t].pseudo_label is None
        assert same(plain[t], dataset[t])
        assert torch.equal(dataset[t].pseudo_label, dataset[t].initial_label)
        dataset.pseudo_labels = other
        assert same(plain[t], dataset[t])
        assert set(dataset[t].pseudo_label.unique().tolist()) <= {1, IGNORE}
        assert torch.equal(dataset[t].pseudo_label == IGNORE, dataset[t].initial_label == IGNORE)


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (np.zeros((3, 4, 5), np.uint8), "uint8 of shape (3, 4, 5)"),
        (np.zeros(SHAPE, np.float32), "float32 of shape"),
        (b"", "EOF"),
        (b"no array", "the magic string is not correct"),
    ],
)
@pytest.mark.parametrize("kind", ["initial_labels", "pseudo_labels"])
def test_a_label_of_a_whole_scan_that_is_damaged_meanwhile_is_named(
    kind: str, label: Any, found: str, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.npy"
    if isinstance(label, bytes):
        path.write_bytes(label)
    else:
        np.save(path, label)
    dataset = world.dataset(**{kind: {case.id: path for case in world.others}})
    with pytest.raises(ReadError, match=re.escape(str(path))) as raised:
        dataset[0]
    assert found in str(raised.value)
    assert "delete it, and continue the run with --resume" in str(raised.value)


@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 8, 16)])
def test_small_scans_are_continued_by_their_edge_and_labelled_unknown(
    tmp_path: Path, patch: tuple[int, ...]
) -> None:
    shape = (5, 14, 8)
    clean = make_case(tmp_path, "small", Role.CLEAN, shape)
    free = make_case(tmp_path, "free", Role.UNLABELLED, shape)
    np.save(tmp_path / "free.npy", pattern(shape, 1).astype(np.uint8))
    cache = Cache(tmp_path / "cache", PLAN)
    dataset = StepDataset(
        cache, [clean], [free], initial_labels={"free": tmp_path / "free.npy"}, patch_size=patch,
        batch_size=1, unlabelled_batch_size=1, steps=20, seed=0, stage=2, foreground=0.5, augment=STILL,
    )  # fmt: skip
    margins = set()
    for t in range(20):
        batch = dataset[t]
        for case, image, label, source in (
            (clean, batch.clean_image[0, 0], batch.clean_label[0], cache.label(clean)[:]),
            (free, batch.image[0, 0], batch.initial_label[0], pattern(shape, 1)),
        ):
            known = np.argwhere(label.numpy() != IGNORE)
            low, high = known.min(0), known.max(0) + 1
            # What is known is a box, as large as scan and patch allow.
            assert tuple(high - low) == tuple(np.minimum(shape, patch))
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            assert (label[box] != IGNORE).all()
            whole = cache.image(case).array[0]
            inner = image[box].numpy()
            start = place_in(whole, inner[0, 0, 0])
            assert np.array_equal(inner, window(whole, start, inner.shape))
            assert np.array_equal(label[box].numpy(), window(source, start, inner.shape))
            around = [(int(a), int(n - b)) for a, b, n in zip(low, high, patch, strict=True)]
            assert np.array_equal(image.numpy(), np.pad(inner, around, mode="edge"))
            margins.add(around[0][0])
        assert torch.equal(batch.inside, batch.initial_label != IGNORE)
    assert len(margins) > 1  # the scan does not always lie in the same corner


@pytest.mark.parametrize("shape", [SHAPE, (14, 10)])
def test_2d_patches_of_scans_in_both_dimensions(tmp_path: Path, shape: tuple[int, ...]) -> None:
    case = make_case(tmp_path, "a", Role.CLEAN, shape)
    ndim = len(shape)
    plan = replace(PLAN, ndim=2, scan_ndim=ndim, spacing=(1.0,) * ndim, patch_size=(8, 16))
    cache = Cache(tmp_path / "cache", plan)
    dataset = StepDataset(
        cache, [case], patch_size=(8, 16), batch_size=2, unlabelled_batch_size=0, steps=20, seed=0, stage=1,
        foreground=0.3, augment=Augment.make(2, **UNCHANGED),
    )  # fmt: skip
    whole, labels = cache.image(case).array[0], cache.label(case)[:]
    slices = set()
    for t in range(20):
        batch = dataset[t]
        assert batch.clean_image.shape == (2, 1, 8, 16)
        for image, label in zip(batch.clean_image[:, 0].numpy(), batch.clean_label.numpy(), strict=True):
            columns = np.flatnonzero((label != IGNORE).all(0))
            assert len(columns) == 10  # the scan's whole width, the rest unknown
            start = place_in(whole, image[0, columns[0]])
            size = (1,) * (ndim - 2) + (8, 10)
            assert np.array_equal(image[:, columns], window(whole, start, size).reshape(8, 10))
            assert np.array_equal(label[:, columns], window(labels, start, size).reshape(8, 10))
            slices.add(start[:-2])
    assert len(slices) > 6 if ndim == 3 else len(slices) == 1


def test_several_channels_are_cut_alike(tmp_path: Path) -> None:
    first, second = (make_case(tmp_path, name, Role.CLEAN) for name in ("a", "bb"))
    case = replace(first, images=(*first.images, *second.images))
    plan = replace(PLAN, channels=2, normalisation=("zscore", "zscore"))
    dataset = StepDataset(
        Cache(tmp_path / "cache", plan), [case], patch_size=(8, 8, 8), batch_size=2,
        unlabelled_batch_size=0, steps=2, seed=0, stage=1, foreground=0.5, augment=STILL,
    )  # fmt: skip
    image = dataset[1].clean_image
    assert image.shape == (2, 2, 8, 8, 8)
    # The second channel is the first plus a constant, which normalisation takes away.
    torch.testing.assert_close(image[:, 0], image[:, 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_slices_of_ranks_joined_are_the_batch_of_one(world: World, count: int) -> None:
    sizes: dict[str, Any] = {
        "clean": world.clean[:2], "meta": world.clean[2:], "batch_size": 4, "unlabelled_batch_size": 8,
        "augment": LIVELY,
    }  # fmt: skip
    whole = world.dataset(**sizes)
    parts = [world.dataset(**sizes, ranks=Ranks(index, count)) for index in range(count)]
    for step in (0, 7):
        batch, drawn = whole[step], [part[step] for part in parts]
        for name in ("clean_image", "clean_label", "image", "initial_label", "meta_image", "meta_label"):
            assert torch.equal(torch.cat([getattr(part, name) for part in drawn]), getattr(batch, name))
        assert {part.seed for part in drawn} == {batch.seed}


def test_a_batch_that_ranks_cannot_share_evenly_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="2 ranks cannot share 2 and 3 patches"):
        world.dataset(ranks=Ranks(0, 2))
    world.dataset(ranks=Ranks(0, 2), others=())


def test_cases_set_apart_are_a_part_of_their_own(world: World) -> None:
    plain = world.dataset(clean=world.clean[:2])
    apart = world.dataset(clean=world.clean[:2], meta=world.clean[2:])
    for step in range(4):
        batch, other = apart[step], plain[step]
        assert batch.case_ids == (*other.case_ids, "clean2", "clean2")
        assert torch.equal(batch.clean_image, other.clean_image)  # the others' draws are as they were
        assert batch.meta_image is not None
        assert batch.meta_image.shape == batch.clean_image.shape
        assert batch.meta_label is not None
        assert batch.meta_label.shape == batch.clean_label.shape
        assert other.meta_image is None


def partly_known(root: Path, name: str, known: Known = ALL_KNOWN) -> Case:
    """Write a case of which every 4th slice is drawn, the rest 0."""
    label = pattern(SHAPE, 1) + 1
    label[label == 3] = 0
    label[np.arange(SHAPE[0]) % 4 != 1] = 0
    return replace(make_case(root, name, Role.CLEAN, label=label), known=known)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_clean_label_leaves_open_is_drawn_as_unlabelled(
    world: World, tmp_path: Path, frozen: bool
) -> None:
    """The two streams complement each other: each voxel of the scan is of one of them, and of one alone."""
    case = partly_known(tmp_path, "sparse", Known(sparse=True))
    path = tmp_path / "initial.npy"
    np.save(path, np.full(SHAPE, 2, np.uint8))
    dataset = world.dataset(
        clean=[case], others=[case], initial_labels={case.id: path} if frozen else {}, patch_size=SHAPE,
        unlabelled_batch_size=1, batch_size=1, foreground=0.0,
    )  # fmt: skip
    batch = dataset[0]
    assert batch.image is not None
    assert batch.inside is not None
    assert batch.initial_label is not None
    assert torch.equal(batch.image, batch.clean_image)
    known = batch.clean_label != IGNORE
    drawn = torch.arange(SHAPE[0]) % 4 == 1
    assert torch.equal(known[0], drawn.view(-1, 1, 1).expand(SHAPE))
    assert torch.equal(batch.inside, ~known)
    assert set(batch.initial_label[known].tolist()) == {IGNORE}
    assert set(batch.initial_label[~known].tolist()) == {2 if frozen else UNLABELLED}
    assert world.cache.is_partly_known(case)
    assert not world.cache.is_partly_known(world.clean[0])


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_patches_of_a_partly_known_label_show_known_voxels(
    world: World, tmp_path: Path, foreground: float
) -> None:
    case = partly_known(tmp_path, "sparse", Known(sparse=True))
    dataset = world.dataset(clean=[case], others=(), patch_size=(6, 6), foreground=foreground)
    for step in range(20):  # in 2D, 3 of 4 slices have none
        assert (dataset[step].clean_label >= 0).all()


def test_background_of_a_case_without_all_classes_names_what_may_hide_there(
    world: World, tmp_path: Path
) -> None:
    label = pattern(SHAPE, 0)
    label[label == 2] = 0
    one = replace(make_case(tmp_path, "one", Role.CLEAN, label=label), known=Known(classes=(1,)))
    none = replace(
        make_case(tmp_path, "none", Role.CLEAN, label=np.zeros(SHAPE, int)), known=Known(classes=())
    )
    dataset = world.dataset(
        clean=[one, none, world.clean[0]], others=[one], batch_size=3, unlabelled_batch_size=1,
        patch_size=SHAPE, initial_labels={},
    )  # fmt: skip
    assert dataset.sets is not None
    assert dataset.sets.tolist() == [[True, True, True], [True, False, True]]
    batch = dataset[0]
    found = {
        name: set(label.unique().tolist())
        for name, label in zip(batch.case_ids[:3], batch.clean_label, strict=True)
    }
    assert found == {"one": {1, EITHER - 1}, "none": {EITHER}, "clean0": {0, 1, 2}}
    assert batch.inside is not None
    assert np.array_equal(batch.inside[0].numpy(), label != 1)
    assert world.dataset().sets is None
