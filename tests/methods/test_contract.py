"""What every method must do, over the METHODS table: a new method is covered by its line there.

Only the golden losses ask for more: run the test, look at the values it prints, and enter them in `GOLDEN`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlbseg.config import load_config
from mlbseg.errors import UserError
from mlbseg.methods import METHODS, Method, find_method
from mlbseg.networks import make_network
from mlbseg.types import EITHER, IGNORE, UNLABELLED, Batch

# What a method's defaults ask of a network that `conv_net` has not: confident predictions.
NEEDED: dict[str, dict[str, Any]] = {
    "fixmatch": {"threshold": 0.6},
    "unimatch": {"threshold": 0.6},
}
# Every method with its own defaults, as far as may be, then further settings worth the whole suite.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, NEEDED.get(name, {})) for name in METHODS),
    ("mlb", {"mode": "paper"}),
    ("mlb", {"weighting": "residual", "decides": "everywhere", "chunk": 1}),
    ("mlb", {"jitter": 0.3, "pseudo_from": "teacher", "views": ()}),
    (
        "mlb",
        {
            "clean_views": True,
            "weighting": "softmax",
            "decides": "everywhere",
            "per_source": True,
            "per_image": True,
            "chunk": 2,
        },
    ),
    ("mlb", {"weighting": "uniform", "sources": ("pseudo",)}),
    ("mlb", {"mode": "paper", "weighting": "uniform"}),
    ("mlb", {"chunk": 2, "pseudo_from": "student"}),
    (
        "mlb",
        {
            "sources": ("initial", "pseudo"),
            "decides": "everywhere",
            "mix": 0.0,
            "ple_weight": 10.0,
            "teacher_weight": 10.0,
        },
    ),
    ("mlb", {"sources": ("initial", "pseudo"), "direction": "random"}),
    ("pseudo-label", {"rounds": 2, "strength": 0.6}),
]
# With their defaults these draw nothing at random.
UNDRAWN: list[tuple[str, dict[str, Any]]] = [("cps", {}), ("entropy", {}), ("pseudo-label", {})]
SHAPES = {2: (9, 6), 3: (5, 6, 4)}
EVEN_SHAPES = {2: (10, 14), 3: (6, 10, 8)}  # multiples of what the small U-Net below needs, no more

methods = pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=lambda v: str(v) if v else "defaults")
dimensions = pytest.mark.parametrize("ndim", [2, 3])
class_counts = pytest.mark.parametrize("classes", [2, 4])


def conv_net(ndim: int, classes: int) -> nn.Module:
    """Return two convolutions whose weights are waves: the same whatever the library's initialisation."""
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    net = nn.Sequential(
        conv(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), conv(4, classes, 3, padding=1)
    )
    with torch.no_grad():
        for index, p in enumerate(net.parameters()):
            p.copy_(wave(p.shape, 0.7 + index) * 0.4 + (p.ndim == 1) * 0.5)
    return net


def wave(shape: tuple[int, ...] | torch.Size, phase: float) -> Tensor:
    count = int(torch.Size(shape).numel())
    return torch.sin(phase + 1.7 * torch.arange(count, dtype=torch.float64)).reshape(shape).float()


def make_batch(shape: tuple[int, ...], classes: int, seed: int = 7) -> Batch:
    """Return images of waves, with labels that the images tell in part, some unknown."""
    clean, image = wave((2, 2, *shape), 0.3), wave((3, 2, *shape), 1.1)

    def label(x: Tensor) -> Tensor:
        classes_of = ((x[:, 0] + 1) / 2 * classes).long().clamp(max=classes - 1)
        return torch.where(x[:, 1] > 0.98, -1, classes_of)

    return Batch(clean, label(clean), image, label(-image.roll(1, -1)), case_ids=tuple("abcde"), seed=seed)


def make_method(name: str, settings: dict[str, Any], student: nn.Module, lr: float = 0.1) -> Method:
    method = find_method(name).make(student, **settings)
    method.optimiser = torch.optim.SGD(method.trained(), lr=lr, momentum=0.9)
    return method.train()


def take_step(method: Method, batch: Batch, step: int) -> list[dict[str, float]]:
    """Do what training does in one step; return the losses of each optimiser step."""
    optimiser = method.optimiser
    assert optimiser is not None
    values = []
    for losses in method.losses(batch, step):
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
        values.append({key: float(term.detach()) for key, term in losses.items()})
    method.after_step(step)
    return values


def first_gradient(method: Method, batch: Batch) -> dict[str, Tensor]:
    losses = next(iter(method.losses(batch, 3)))
    method.student.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    return {n: p.grad for n, p in method.student.named_parameters() if p.grad is not None}


def resting(method: Method) -> dict[str, nn.Module]:
    """Return the networks that the optimiser does not move."""
    trained = {id(p) for p in method.trained()}
    return {k: n for k, n in method.networks().items() if not any(id(p) in trained for p in n.parameters())}


@methods
@dimensions
def test_what_lies_beyond_the_scans_is_not_learnt(name: str, settings: dict[str, Any], ndim: int) -> None:
    if name == "mlb":  # views would move what lies beyond; test_mlb has those
        settings = settings | {"views": (), "ple_weight": 0.0, "teacher_weight": 1.0, "chunk": None}
    batch = make_batch(SHAPES[ndim], 3)
    assert batch.image is not None
    assert batch.initial_label is not None
    beyond = torch.zeros(SHAPES[ndim], dtype=torch.bool)
    beyond[..., -2:] = True
    batch.clean_label[:, beyond] = batch.initial_label[:, beyond] = IGNORE
    batch.inside = ~beyond.expand(3, *SHAPES[ndim])
    method = make_method(name, settings, conv_net(ndim, 3))
    outputs: list[Tensor] = []

    def watch(module: nn.Module, inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            outputs.append(output)

    for network in {id(n): n for n in method.networks().values()}.values():
        network.register_forward_hook(watch)
    for losses in method.losses(batch, 3):
        torch.stack(list(losses.values())).sum().backward()
    grads = [output.grad for output in outputs if output.grad is not None]
    assert any((grad[..., ~beyond] != 0).any() for grad in grads)
    assert all((grad[..., beyond] == 0).all() for grad in grads)


@methods
@dimensions
def test_unknown_voxels_of_a_clean_scan_reach_the_student_by_the_unlabelled_loss(
    name: str, settings: dict[str, Any], ndim: int
) -> None:
    """A clean scan that is known in places is drawn as an unlabelled one too (`StepDataset`)."""
    batch = make_batch(SHAPES[ndim], 3, seed=10)
    assert batch.image is not None
    known = torch.zeros(SHAPES[ndim], dtype=torch.bool)
    known[..., :2] = True
    batch.clean_label[:, ~known] = IGNORE
    batch.image = torch.cat([batch.clean_image, batch.image[:1]])
    batch.initial_label = torch.full((3, *SHAPES[ndim]), UNLABELLED)
    batch.initial_label[:2, known] = IGNORE
    batch.inside = batch.initial_label != IGNORE
    other = batch.image.clone()
    other[:2, :, ~known] = other[:2, :, ~known].flip(-1) * 1.3
    method = make_method(name, settings, conv_net(ndim, 3))
    before, after = first_gradient(method, batch), first_gradient(method, replace(batch, image=other))
    assert all(torch.isfinite(grad).all() for grad in before.values())
    moved = max(float((before[n] - after[n]).abs().max()) for n in before)
    assert (moved > 0) == METHODS[name].uses_unlabelled


@methods
@dimensions
def test_background_that_may_hide_a_class_counts_as_either(
    name: str, settings: dict[str, Any], ndim: int
) -> None:
    batch = make_batch(SHAPES[ndim], 3)
    gradients = []
    for value in (0, EITHER, IGNORE):
        method = make_method(name, settings, conv_net(ndim, 3))
        method.sets = torch.tensor([[True, False, True]])
        label = torch.where(batch.clean_label == 0, value, batch.clean_label)
        for losses in method.losses(replace(batch, clean_label=label), 3):
            torch.stack(list(losses.values())).sum().backward()
        gradients.append({n: p.grad for n, p in method.student.named_parameters() if p.grad is not None})
    background, either, ignored = gradients
    assert all(torch.isfinite(grad).all() for grad in either.values())
    for other in (background, ignored):
        assert any(not torch.allclose(either[n], other[n]) for n in either)


@methods
@dimensions
@class_counts
def test_losses_are_scalars_whose_gradient_reaches_every_parameter(
    name: str, settings: dict[str, Any], ndim: int, classes: int
) -> None:
    method = make_method(name, settings, conv_net(ndim, classes))
    batch = make_batch(SHAPES[ndim], classes)
    optimiser = method.optimiser
    assert optimiser is not None
    count = 0
    for losses in method.losses(batch, 0):
        count += 1
        assert losses
        assert all(key.replace("_", "").isalnum() for key in losses)  # a column of log.csv each
        for term in losses.values():
            assert term.shape == ()
            assert term.dtype == torch.float32
            assert torch.isfinite(term)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        for key, p in method.student.named_parameters():
            assert p.grad is not None, key
            assert torch.isfinite(p.grad).all(), key
            assert (p.grad != 0).any(), key
        for other in resting(method).values():
            assert all(p.grad is None for p in other.parameters())
        optimiser.step()
    assert count >= 1
    for key, value in method.monitors.items():
        assert key.replace("_", "").isalnum()
        assert value.shape == (), key
        assert torch.isfinite(value), key
        assert not value.requires_grad, key


@methods
@dimensions
def test_real_networks_train(name: str, settings: dict[str, Any], ndim: int) -> None:
    torch.manual_seed(0)
    network = make_network(
        "unet", ndim=ndim, in_channels=2, num_classes=3, channels=(4, 8), patch_size=EVEN_SHAPES[ndim]
    )
    method = make_method(name, settings, network, lr=0.05)
    batch = make_batch(EVEN_SHAPES[ndim], 3)
    before = copy.deepcopy(method.student.state_dict())
    first = take_step(method, batch, 0)
    for step in range(1, 8):
        last = take_step(method, batch, step)
    assert last[0].keys() == first[0].keys()
    # What is learnt from the careful labels is learnt, whatever else the method adds.
    assert last[-1]["clean"] < first[-1]["clean"]
    # A bias before instance norm changes nothing, and moves by rounding only; all else must move.
    weights = {k: v for k, v in method.student.state_dict().items() if v.ndim > 1}
    assert all(not torch.equal(before[k], v) for k, v in weights.items())
    output = method.predictor().eval()(batch.clean_image)
    assert output.shape == (2, 3, *EVEN_SHAPES[ndim])


@methods
@dimensions
@pytest.mark.parametrize(
    ("needs", "change"),
    [
        ("uses_unlabelled", lambda b: replace(b, image=b.image.flip(2) * 1.3)),
        ("needs_initial_labels", lambda b: replace(b, initial_label=1 - b.initial_label.clamp(0, 1))),
    ],
    ids=["image", "initial label"],
)
def test_what_a_method_asks_for_reaches_the_student_and_nothing_else_does(
    name: str, settings: dict[str, Any], ndim: int, needs: str, change: Callable[[Batch], Batch]
) -> None:
    batch = make_batch(SHAPES[ndim], 2, seed=10)  # with which ICT does not draw next to nothing of one image
    method = make_method(name, settings, conv_net(ndim, 2))
    before, after = first_gradient(method, batch), first_gradient(method, change(batch))
    moved = [float((before[n] - after[n]).abs().max() / before[n].abs().max()) for n in before]
    if getattr(METHODS[name], needs):
        assert max(moved) > 1e-3
    else:
        assert max(moved) == 0
        unused = {} if METHODS[name].uses_unlabelled else {"image": None}
        bare = replace(batch, initial_label=None, **unused)
        alone = first_gradient(method, bare)
        assert all(torch.equal(before[n], alone[n]) for n in before)


@pytest.mark.parametrize("name", METHODS)
def test_teachers_see_the_grey_values_of_the_scan(name: str) -> None:
    batch, settings = make_batch(SHAPES[2], 2, seed=10), NEEDED.get(name, {})
    assert batch.image is not None
    before, same, after = (
        first_gradient(make_method(name, settings, conv_net(2, 2)), replace(batch, weak=weak))
        for weak in (None, batch.image.clone(), batch.image.flip(2) * 1.3)
    )
    assert all(torch.equal(before[n], same[n]) for n in before)
    moved = max(float((before[n] - after[n]).abs().max() / before[n].abs().max()) for n in before)
    # What the others ask of the student, they ask of the very image that it learns from.
    asks = name not in ("supervised", "cct", "cps", "entropy", "pseudo-label")
    assert (moved > 1e-3) == asks


@methods
def test_only_after_step_moves_the_networks_that_are_not_trained(name: str, settings: dict[str, Any]) -> None:
    method = make_method(name, settings, conv_net(2, 2))
    batch = make_batch(SHAPES[2], 2)
    take_step(method, batch, 0)
    others = resting(method)
    for step in (1, 2, 500):
        before = {k: copy.deepcopy(n.state_dict()) for k, n in others.items()}
        student = copy.deepcopy(method.student.state_dict())
        optimiser = method.optimiser
        assert optimiser is not None
        for losses in method.losses(batch, step):
            optimiser.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            optimiser.step()
        for key, network in others.items():
            assert all(torch.equal(before[key][n], v) for n, v in network.state_dict().items())
        assert any(not torch.equal(student[n], v) for n, v in method.student.state_dict().items())
        method.after_step(step)
        for key, network in others.items():
            assert any(not torch.equal(before[key][n], v) for n, v in network.state_dict().items())


@methods
@dimensions
def test_a_saved_method_predicts_the_same(name: str, settings: dict[str, Any], ndim: int) -> None:
    batch = make_batch(SHAPES[ndim], 3)
    method = make_method(name, settings, conv_net(ndim, 3))
    for step in range(3):
        take_step(method, batch, step)
    torch.manual_seed(99)
    blank = conv_net(ndim, 3)
    with torch.no_grad():
        for p in blank.parameters():
            p.normal_()
    loaded = make_method(name, settings, blank)
    loaded.load_state_dict(method.state_dict())
    assert loaded.networks().keys() == method.networks().keys()
    assert method.predictor() is method.networks()[method.predicts]
    for key, network in method.networks().items():
        with torch.no_grad():
            assert torch.equal(network(batch.clean_image), loaded.networks()[key](batch.clean_image))


@methods
@dimensions
def test_a_step_depends_on_the_batch_alone(name: str, settings: dict[str, Any], ndim: int) -> None:
    batch = make_batch(SHAPES[ndim], 2)
    runs = []
    for noise in (0, 1):
        torch.manual_seed(noise)  # the global stream must not matter
        method = make_method(name, settings, conv_net(ndim, 2))
        runs.append([take_step(method, batch, step) for step in range(2)])
    assert runs[0] == runs[1]
    if METHODS[name].uses_unlabelled:
        method = make_method(name, settings, conv_net(ndim, 2))
        same = take_step(method, replace(batch, seed=8), 0) == runs[0][0]
        assert same == ((name, settings) in UNDRAWN)


@methods
@dimensions
def test_bfloat16_autocast_is_near_float32(name: str, settings: dict[str, Any], ndim: int) -> None:
    batch = make_batch(SHAPES[ndim], 3)
    exact = first_gradient(make_method(name, settings, conv_net(ndim, 3)), batch)
    method = make_method(name, settings, conv_net(ndim, 3))
    with torch.autocast("cpu", torch.bfloat16):
        losses = next(iter(method.losses(batch, 3)))
    assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    found = torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None])
    expected = torch.cat([g.flatten() for g in exact.values()])
    assert torch.cosine_similarity(found, expected, dim=0) > 0.98


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_is_missing_from_its_batch(name: str) -> None:
    method = make_method(name, {}, conv_net(2, 2))
    bare = replace(make_batch(SHAPES[2], 2), image=None, initial_label=None)
    if METHODS[name].uses_unlabelled:
        with pytest.raises(ValueError, match="unlabelled"):
            next(iter(method.losses(bare, 0)))
    else:
        assert next(iter(method.losses(bare, 0)))


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_is_explained_and_has_a_section(name: str) -> None:
    fields = METHODS[name].Settings.model_fields
    assert [key for key, field in fields.items() if not field.description] == []
    assert load_config().of(name) == METHODS[name].Settings()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_by_its_name(name: str) -> None:
    assert find_method(name) is METHODS[name]
    assert issubclass(METHODS[name], Method)


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown method 'mlbb': did you mean 'mlb'") as caught:
        find_method("mlbb")
    assert all(name in str(caught.value) for name in METHODS)


GOLDEN_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("supervised", {}),
    "entropy": ("entropy", {}),
    "ict": ("ict", {}),
    "mean-teacher": ("mean-teacher", {}),
    "pseudo-label": ("pseudo-label", {}),
    "pseudo-label, rounds": ("pseudo-label", {"rounds": 2, "strength": 0.6}),
    "ua-mt": ("ua-mt", {}),
    "bcp": ("bcp", {}),
    "cct": ("cct", {}),
    "cps": ("cps", {}),
    "fixmatch": ("fixmatch", NEEDED["fixmatch"]),
    "unimatch": ("unimatch", NEEDED["unimatch"]),
    "mlb": (
        "mlb",
        {
            "mode": "joint",
            "views": ("zoom-in", "zoom-out", "zoom-out", "flip"),
            "sources": ("initial", "pseudo"),
            "weighting": "share",
            "decides": "everywhere",
            "mix": 0.0,
            "jitter": 0.0,
            "pseudo_dice": False,
            "pseudo_from": "student",
            "teacher_decay": 0.99,
            "teacher_noise": 0.1,
            "pseudo_weight": 1.0,
            "ple_weight": 1.0,
            "teacher_weight": 1.0,
        },
    ),
}
GOLDEN_SETTINGS["mlb, paper mode"] = ("mlb", {**GOLDEN_SETTINGS["mlb"][1], "mode": "paper"})
GOLDEN: dict[tuple[str, int], list[float]] = {
    ("supervised", 2): [1.756778, 1.681886, 1.554298, 1.404231, 1.262853],
    ("supervised", 3): [4.444673, 4.157386, 3.653918, 3.029565, 2.390548],
    ("entropy", 2): [1.757231, 1.749599, 1.623089, 1.473291, 1.330234],
    ("entropy", 3): [4.444961, 4.203246, 3.708735, 3.097876, 2.474065],
    ("ict", 2): [1.756778, 1.702407, 1.556075, 1.428268, 1.332329],
    ("ict", 3): [4.444673, 4.159279, 3.657456, 3.068953, 2.536646],
    ("mean-teacher", 2): [1.75683, 1.692848, 1.569851, 1.436186, 1.339894],
    ("mean-teacher", 3): [4.444996, 4.210705, 3.712126, 3.12528, 2.549853],
    ("pseudo-label", 2): [1.759803, 2.228295, 2.232765, 2.056086, 1.900513],
    ("pseudo-label", 3): [4.44589, 4.350314, 3.878109, 3.313872, 2.759628],
    ("pseudo-label, rounds", 2): [1.759894, 2.536343, 2.230455, 1.940257, 1.825292],
    ("pseudo-label, rounds", 3): [4.446005, 4.843048, 4.123567, 3.542208, 3.190885],
    ("ua-mt", 2): [2.238656, 2.831659, 3.198492, 3.410416, 1.967509],
    ("ua-mt", 3): [4.776697, 6.579747, 6.381981, 4.203537, 4.336834],
    ("bcp", 2): [2.858377, 2.914575, 2.709858, 2.522312, 2.483336],
    ("bcp", 3): [4.952352, 4.65816, 4.277552, 3.689469, 3.107818],
    ("cct", 2): [1.761721, 2.579759, 3.035707, 2.395893, 2.339888],
    ("cct", 3): [4.453393, 5.61609, 4.653399, 4.156119, 3.293475],
    ("cps", 2): [3.521488, 4.555539, 4.29717, 3.976967, 3.62413],
    ("cps", 3): [8.894125, 9.079073, 8.245003, 7.312635, 6.405875],
    ("fixmatch", 2): [2.256483, 2.44071, 2.173917, 1.934759, 1.835146],
    ("fixmatch", 3): [4.787193, 4.969799, 4.269806, 3.587147, 3.000274],
    ("unimatch", 2): [2.457311, 2.44175, 2.181468, 2.093278, 1.746667],
    ("unimatch", 3): [5.164254, 5.048804, 4.295311, 3.754504, 2.973316],
    ("mlb", 2): [3.110662, 2.931418, 2.439206, 2.11824, 2.579386],
    ("mlb", 3): [10.120379, 9.316564, 5.727656, 3.076026, 3.385168],
    ("mlb, paper mode", 2): [3.403, 2.941717, 2.615923, 2.777824, 2.84795],
    ("mlb, paper mode", 3): [10.315811, 7.772595, 3.111692, 4.363145, 4.676457],
}
"""The sum of all losses of each of five steps, CPU, float32."""


def test_every_method_has_golden_losses() -> None:
    assert {name for name, _ in GOLDEN_SETTINGS.values()} == set(METHODS)
    assert GOLDEN.keys() == set(itertools.product(GOLDEN_SETTINGS, (2, 3)))


@dimensions
@pytest.mark.parametrize("golden", GOLDEN_SETTINGS)
def test_five_steps_give_the_golden_losses(golden: str, ndim: int) -> None:
    name, settings = GOLDEN_SETTINGS[golden]
    method = make_method(name, settings, conv_net(ndim, 3), lr=0.02)
    batch = make_batch(SHAPES[ndim], 3)
    found = []
    for step in range(5):
        parts = take_step(method, replace(batch, seed=100 + step), step)
        found.append(sum(sum(part.values()) for part in parts))
    expected = GOLDEN.get((golden, ndim), [])
    assert found == pytest.approx(expected, rel=1e-4), f"found {[round(v, 6) for v in found]}"
