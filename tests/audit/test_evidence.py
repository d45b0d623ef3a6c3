"""What judges say: probabilities as in prediction, alignments as gradients say one voxel at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from blocks import blocks
from mlbseg.apps.audit.evidence import Judge, clean_direction, gather, networks
from mlbseg.core.losses import cross_entropy_map, supervised_loss
from mlbseg.data.plan import Plan
from mlbseg.errors import UserError
from mlbseg.runs import Run, checkpoints
from mlbseg.types import Batch
from mlbseg.windows import predict_grid

CPU = torch.device("cpu")


def network(ndim: int, classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv3d if ndim == 3 else nn.Conv2d
    return nn.Sequential(conv(1, 4, 3, padding=1), nn.SiLU(), conv(4, classes, 3, padding=1)).eval()


def plan(patch: tuple[int, ...], flip_axes: tuple[int, ...] = ()) -> Plan:
    n = len(patch)
    return Plan(
        ndim=n, scan_ndim=3, channels=1, label_values=(0, 1, 2), class_names=("background", "a", "b"),
        spacing=(1.0,) * 3, patch_size=patch, normalisation=("zscore",), intensity=({},), crop=False, network="unet",
        network_channels=(4, 8), batch_size=1, unlabelled_batch_size=1, steps=2, flip_axes=flip_axes,
    )  # fmt: skip


def scan() -> tuple[np.ndarray, np.ndarray]:
    image, label = blocks(0)
    return ((image - image.mean()) / image.std())[None].astype(np.float32), label


def direction(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8)], ids=["3D", "slices"])
def test_without_views_the_probability_is_that_of_prediction(patch: tuple[int, ...]) -> None:
    image, label = scan()
    model = network(len(patch))
    evidence = gather(image, label, [Judge(model)], plan(patch), CPU, "32", in_views=False)
    expected = predict_grid(model, image, patch_size=patch, device=CPU)
    np.testing.assert_allclose(evidence.probability, expected, atol=1e-6)
    assert not evidence.alignment.any()


def test_the_alignment_is_each_voxels_own_gradient_along_v() -> None:
    image, label = scan()
    image, label = image[:, :4, :5, :6], label[:4, :5, :6]
    model = network(3)
    v = direction(model)
    evidence = gather(image, label, [Judge(model, v)], plan((4, 5, 6)), CPU, "32", in_views=False)
    cost = cross_entropy_map(
        model(torch.from_numpy(image)[None]), torch.from_numpy(label.astype(np.int64))[None]
    )
    for place in ((0, 0, 0), (2, 3, 4), (3, 4, 5)):
        grads = torch.autograd.grad(cost[0][place], list(model.parameters()), retain_graph=True)
        expected = sum(
            float((g * v[n]).sum()) for g, (n, _) in zip(grads, model.named_parameters(), strict=True)
        )
        assert evidence.alignment[place] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_judges_and_views_are_averaged_and_probabilities_stay_such() -> None:
    image, label = scan()
    one, other = network(3), network(3)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-0.5)
    judges = [Judge(one, direction(one)), Judge(other, direction(other))]
    shape = plan((16, 16, 16), (2,))
    both = gather(image, label, judges, shape, CPU, "32", in_views=True)
    each = [gather(image, label, [judge], shape, CPU, "32", in_views=True) for judge in judges]
    np.testing.assert_allclose(both.probability, np.mean([e.probability for e in each], 0), atol=1e-6)
    np.testing.assert_allclose(both.alignment, np.mean([e.alignment for e in each], 0), atol=1e-5)
    np.testing.assert_allclose(both.probability.sum(0), 1, atol=1e-4)
    alone = gather(image, label, judges[:1], shape, CPU, "32", in_views=False)
    assert np.abs(alone.probability - each[0].probability).max() > 1e-3  # the views are really looked at


class _Batches:
    """Two batches."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, step: int) -> Batch:
        image, label = blocks(step, (8, 8, 8))
        return Batch(
            torch.from_numpy(image / 100)[None, None], torch.from_numpy(label.astype(np.int64))[None]
        )


def test_v_is_the_mean_gradient_of_length_one() -> None:
    model, batches = network(3), _Batches()
    found = clean_direction(model, batches, CPU, "32")  # type: ignore[arg-type]
    assert float(sum(t.square().sum() for t in found.values())) == pytest.approx(1, rel=1e-5)
    loss = sum(supervised_loss(model(batches[i].clean_image), batches[i].clean_label) for i in range(2))
    grads = torch.autograd.grad(loss, list(model.parameters()))  # type: ignore[arg-type]
    flat, expected = (torch.cat([t.flatten() for t in ts]) for ts in (found.values(), grads))
    assert float(torch.cosine_similarity(flat, expected, 0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_an_ensemble_is_the_model_and_the_students_of_its_checkpoints(mlb_run: Path) -> None:
    run = Run.open(mlb_run)
    alone, ensemble = (list(networks(run, CPU, ensemble=choice)) for choice in (False, True))
    kept = checkpoints.find(mlb_run / "checkpoints")
    assert len(alone) == 1
    assert len(ensemble) == 1 + len(kept) >= 3
    last = run.network("student").state_dict()
    for name, tensor in ensemble[-1].state_dict().items():
        assert torch.equal(tensor, last[name])


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_named(mlb_run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(mlb_run, tmp_path / "run")
    path = checkpoints.find(tmp_path / "run" / "checkpoints")[-1].path
    torch.save({"method": {"student.x": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=f"{path.name}: does not fit plan.json's network"):
        list(networks(Run.open(tmp_path / "run"), CPU, ensemble=True))
