"""What every network of the factory must do, and what it must refuse."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.autograd.forward_ad as fwd
from torch import nn
from torch.func import functional_call

from mlbseg.errors import UserError
from mlbseg.networks import NETWORKS, NORMS, _set_norm, make_network, required_multiple, side_multiples

# The least that each accepts, so that the suite is quick.
TINY = {
    "unet": (4, 6, 8),
    "unet++": (4, 4, 4, 4, 4),
    "nested-unet": (4, 4, 4, 4, 4),
    "vnet": (3,),
    "vnet3": (3,),
    "dynunet": (4, 5, 6),
    "nnunet": (4, 5, 6),
    "resenc": (4, 5, 6),
    "swin-unetr": (12,),
}
needs_einops = pytest.mark.skipif(
    find_spec("einops") is None, reason="einops is missing: pip install -e .[dev]"
)
ANISOTROPIC = [name for name, builder in NETWORKS.items() if builder.anisotropic]
runnable = [pytest.param(n, marks=needs_einops if n == "swin-unetr" else ()) for n in NETWORKS]
every_network = pytest.mark.parametrize("name", runnable)
every_ndim = pytest.mark.parametrize("ndim", [2, 3])
in_2d_and_3d = pytest.mark.parametrize(
    ("name", "ndim"),
    [
        pytest.param(
            name, ndim, marks=[needs_einops, pytest.mark.slow] if (name, ndim) == ("swin-unetr", 3) else ()
        )
        for name in NETWORKS
        for ndim in (2, 3)
    ],
)

Tensors = dict[str, torch.Tensor]


def build(name: str, ndim: int, seed: int = 0, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    arguments = {"in_channels": 3, "num_classes": 5, "channels": TINY[name], **changes}
    return make_network(name, ndim=ndim, **arguments)  # type: ignore[arg-type]


def scan(name: str, ndim: int, channels: int = 3) -> torch.Tensor:
    """Images of the least size with more than one voxel at the lowest level."""
    batch = 4 - ndim
    multiple = required_multiple(name, TINY[name])
    sides = (2 * multiple, multiple, multiple)[:ndim]
    return torch.randn(batch, channels, *sides, generator=torch.Generator().manual_seed(1))


def drawn_like(parameters: Tensors, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in parameters.items()}


def tangent_of(network: nn.Module, direction: Tensors, image: torch.Tensor) -> torch.Tensor:
    parameters = {k: p.detach() for k, p in network.named_parameters()}
    with torch.no_grad(), fwd.dual_level():
        duals = {k: fwd.make_dual(p, direction[k]) for k, p in parameters.items()}
        tangent = fwd.unpack_dual(functional_call(network, duals, (image,))).tangent
    assert tangent is not None
    return tangent


def test_the_table_and_this_suite_know_the_same_networks() -> None:
    assert set(TINY) == set(NETWORKS)


@in_2d_and_3d
@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (3, 5)])
def test_logits_have_the_size_of_the_image(name: str, ndim: int, channels: int, classes: int) -> None:
    image = scan(name, ndim, channels)
    network = build(name, ndim, in_channels=channels, num_classes=classes)
    for training in (True, False):
        logits = network.train(training)(image)
        assert logits.shape == (len(image), classes, *image.shape[2:])
        assert torch.isfinite(logits).all()
        assert logits.std() > 0


@in_2d_and_3d
def test_gradient_reaches_every_parameter(name: str, ndim: int) -> None:
    network = build(name, ndim)
    with torch.no_grad():
        for p in (
            network.parameters()
        ):  # a residual branch that begins at zero passes nothing back in its first step
            p += 0.1 * (not p.any())
    network(scan(name, ndim)).pow(3).mean().backward()
    assert [k for k, p in network.named_parameters() if p.grad is None] == []
    # A norm undoes the bias before it, so only the weights must feel something.
    weights = {k: p.grad for k, p in network.named_parameters() if p.ndim > 1}
    assert weights
    assert [k for k, grad in weights.items() if not grad.abs().sum() > 0] == []


@every_network
@pytest.mark.parametrize("norm", NORMS)
def test_forward_mode_agrees_with_reverse_mode(name: str, norm: str) -> None:
    network = build(name, 2, norm=norm).double()
    image = scan(name, 2).double()
    parameters = dict(network.named_parameters())
    direction = drawn_like(parameters, seed=2)
    tangent = tangent_of(network, direction, image)

    logits = network(image)
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = torch.autograd.grad(logits, list(parameters.values()), cotangent)
    backward = sum((g * direction[k]).sum() for k, g in zip(parameters, gradients, strict=True))
    forward = (cotangent * tangent).sum()
    scale = cotangent.norm() * tangent.norm()
    assert abs(forward - backward) < 1e-10 * scale


@in_2d_and_3d
def test_forward_mode_agrees_with_a_finite_difference(name: str, ndim: int) -> None:
    # Batch norm in evaluation mode is linear: over so few voxels the others bend too much to be differenced.
    network = build(name, ndim, norm="batch").double().eval()
    image = scan(name, ndim).double()
    parameters = {k: p.detach() for k, p in network.named_parameters()}
    direction = drawn_like(parameters, seed=2)
    step = 1e-9

    def at(t: float) -> torch.Tensor:
        moved = {k: p + t * direction[k] for k, p in parameters.items()}
        with torch.no_grad():
            return functional_call(network, moved, (image,))

    difference = (at(step) - at(-step)) / (2 * step)
    tangent = tangent_of(network, direction, image)
    assert (difference - tangent).norm() < 1e-5 * tangent.norm()


@pytest.mark.parametrize(
    ("ndim", "side", "depth"), [(3, 8, 2), (3, 4, 4), (3, 3, 3), (3, 2, 2), (3, 8, 8), (2, 8, 1), (2, 4, 4)]
)
def test_convolutions_of_thin_maps_have_right_gradients_in_bfloat16(ndim: int, side: int, depth: int) -> None:
    """torch's own are wrong or infinite there; V-Net's kernels are of 5 voxels to a side."""
    network = build("vnet", ndim, in_channels=1, channels=(32,))
    kernels = [m for m in network.modules() if getattr(m, "kernel_size", None) == (5,) * ndim]
    convolution = next(m for m in kernels if m.in_channels >= 128)
    x = torch.randn(2, convolution.in_channels, *(depth, side, side)[:ndim], requires_grad=True)
    cotangent = torch.randn_like(convolution(x))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = convolution(x)
        found.append(torch.autograd.grad(y, [convolution.weight, x], cotangent.to(y.dtype)))
    for exact, fast in zip(*found, strict=True):
        assert torch.cosine_similarity(exact.flatten(), fast.flatten(), dim=0) > 0.999


@every_ndim
def test_vnet3_is_a_v_net_with_kernels_of_3(ndim: int) -> None:
    shapes = [
        {name: tuple(p.shape) for name, p in build(network, ndim, channels=(6,)).named_parameters()}
        for network in ("vnet", "vnet3")
    ]
    five, three = (5,) * ndim, (3,) * ndim
    assert any(shape[2:] == five for shape in shapes[0].values())
    assert shapes[1] == {
        name: shape[:2] + three if shape[2:] == five else shape for name, shape in shapes[0].items()
    }


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "swin-unetr"])
def test_forward_mode_does_not_mind_the_memory_layout(name: str, norm: str) -> None:
    network = build(name, 3, norm=norm).double()
    image = scan(name, 3).double()
    direction = drawn_like(dict(network.named_parameters()), seed=2)
    expected = tangent_of(network, direction, image)
    network.to(memory_format=torch.channels_last_3d)
    found = tangent_of(network, direction, image.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
@every_ndim
def test_nothing_works_in_place(name: str, ndim: int) -> None:
    network = build(name, ndim, dropout=0.1)
    assert [m for m in network.modules() if getattr(m, "inplace", False)] == []
    assert any(hasattr(m, "inplace") for m in network.modules()) or name == "unet"


@every_network
def test_weights_survive_a_file_that_allows_no_aliases(name: str, tmp_path: Path) -> None:
    saved, other = build(name, 2, seed=1), build(name, 2, seed=2)
    image = scan(name, 2)
    assert not torch.equal(saved(image), other(image))
    safetensors.torch.save_file(saved.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(saved(image), other(image))
    assert torch.equal(copy.deepcopy(saved)(image), saved(image))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_seed_decides_the_weights(name: str) -> None:
    first, again, other = (list(build(name, 2, seed=s).state_dict().values()) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("norm", "wanted"), [("instance", nn.InstanceNorm2d), ("group", nn.GroupNorm), ("batch", nn.BatchNorm2d)]
)
def test_every_norm_is_the_one_asked_for_and_learns(name: str, norm: str, wanted: type[nn.Module]) -> None:
    kinds = (nn.InstanceNorm2d, nn.GroupNorm, nn.BatchNorm2d)
    norms = [m for m in build(name, 2, norm=norm).modules() if isinstance(m, kinds)]
    assert norms
    assert all(isinstance(m, wanted) and m.weight is not None and m.bias is not None for m in norms)


@every_network
def test_dropout_acts_in_training_only_and_never_on_the_logits(name: str) -> None:
    network = build(name, 2, dropout=0.2)  # few channels: none may lose all of them
    image = scan(name, 2)
    torch.manual_seed(0)
    assert not torch.equal(network(image), network(image))
    assert (network(image) != 0).all()
    network.eval()
    assert torch.equal(network(image), network(image))


@pytest.mark.parametrize(
    ("name", "channels", "multiple"),
    [
        ("unet", (8, 16), 2),
        ("unet", (8, 16, 32, 64), 8),
        ("unet++", (64, 128, 256, 512, 1024), 16),
        ("vnet", (16,), 16),
        ("dynunet", (32, 64, 128, 256), 8),
        ("swin-unetr", (24, 48), 32),
    ],
)
def test_required_multiple(name: str, channels: Sequence[int], multiple: int) -> None:
    assert required_multiple(name, channels) == multiple


@pytest.mark.parametrize("name", ANISOTROPIC)
def test_strides_may_differ_between_axes(name: str) -> None:
    strides = ((1, 2, 2), (2, 2, 1))
    network = build(name, 3, channels=(4, 5, 6), strides=strides)
    assert side_multiples(name, 3, (4, 5, 6), strides) == (2, 4, 2)
    assert required_multiple(name, (4, 5, 6), strides) == 4
    image = torch.randn(1, 3, 6, 8, 10, generator=torch.Generator().manual_seed(1))
    logits = network(image)
    assert logits.shape == (1, 5, 6, 8, 10)
    logits.pow(3).mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    deepest = [m for m in network.modules() if isinstance(m, nn.Conv3d) and m.out_channels == 6]
    seen: list[torch.Size] = []
    deepest[-1].register_forward_hook(lambda _, __, out: seen.append(out.shape[2:]))
    network(image)
    assert seen == [(3, 2, 5)]


@pytest.mark.parametrize("name", ANISOTROPIC)
@every_ndim
def test_strides_of_2_are_what_a_network_has_without_any(name: str, ndim: int) -> None:
    image = scan(name, ndim)
    strides = ((2,) * ndim,) * (len(TINY[name]) - 1)
    assert torch.equal(build(name, ndim)(image), build(name, ndim, strides=strides)(image))
    assert side_multiples(name, ndim, TINY[name], strides) == side_multiples(name, ndim, TINY[name])


@pytest.mark.parametrize("name", ANISOTROPIC)
def test_forward_mode_takes_strides_that_differ(name: str) -> None:
    network = build(name, 3, channels=(4, 5, 6), strides=((1, 2, 2), (2, 2, 2))).double()
    image = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameters = dict(network.named_parameters())
    direction = drawn_like(parameters, seed=2)
    tangent = tangent_of(network, direction, image)
    cotangent = torch.randn(tangent.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = torch.autograd.grad(network(image), list(parameters.values()), cotangent)
    backward = sum((g * direction[k]).sum() for k, g in zip(parameters, gradients, strict=True))
    assert abs((cotangent * tangent).sum() - backward) < 1e-10 * cotangent.norm() * tangent.norm()


@pytest.mark.parametrize(
    ("name", "strides", "options"),
    [
        ("nnunet", ((2, 2, 2), (2, 2, 2)), {}),
        (
            "nnunet",
            ((1, 2, 2), (2, 2, 2)),
            {"kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "blocks": [1, 2, 3]},
        ),
        ("resenc", ((2, 2, 2), (2, 2, 2)), {}),
        ("resenc", ((1, 2, 2), (2, 2, 2)), {"decoder_blocks": [2, 1], "blocks": [1, 2, 2]}),
    ],
)
def test_nnunets_networks_give_the_logits_of_its_own_library(
    name: str, strides: tuple[tuple[int, ...], ...], options: dict[str, Any]
) -> None:
    from dynamic_network_architectures.architectures import unet

    depth = (
        {"blocks": [2, 2, 2], "decoder_blocks": [2, 2]}
        if name == "nnunet"
        else {"blocks": [1, 3, 4], "decoder_blocks": [1, 1]}
    )
    depth |= {key: value for key, value in options.items() if key in depth}
    kind, blocks = (
        (unet.PlainConvUNet, "n_conv_per_stage")
        if name == "nnunet"
        else (unet.ResidualEncoderUNet, "n_blocks_per_stage")
    )
    torch.manual_seed(3)
    theirs = kind(
        2, 3, [4, 6, 8], nn.Conv3d, options.get("kernels", 3), [[1, 1, 1], *strides], num_classes=4, conv_bias=True,
        n_conv_per_stage_decoder=depth["decoder_blocks"], norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        **{blocks: depth["blocks"]},
    )  # fmt: skip
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    ours = build(name, 3, in_channels=2, num_classes=4, channels=(4, 6, 8), strides=strides, options=options)
    names = set(ours.state_dict())
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if key in names})
    image = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    assert (ours(image) - theirs(image)).abs().max() < 1e-5


@pytest.mark.parametrize("norm", NORMS)
def test_scale_and_shift_survive_a_change_of_the_norm(norm: str) -> None:
    network = nn.Sequential(nn.BatchNorm2d(8, eps=1e-3), nn.InstanceNorm2d(8))
    nn.init.constant_(network[0].weight, 7)  # type: ignore[arg-type]
    nn.init.constant_(network[0].bias, -2)  # type: ignore[arg-type]
    _set_norm(network, norm, 2)
    assert (network[0].weight == 7).all()
    assert (network[0].bias == -2).all()
    assert network[0].eps == 1e-3
    assert (network[1].weight == 1).all()


def test_the_papers_network_can_be_built() -> None:
    with torch.device("meta"):
        network = make_network(
            "nested-unet",
            ndim=2,
            in_channels=1,
            num_classes=2,
            channels=(64, 128, 256, 512, 1024),
            patch_size=(144, 144),
        )
    widths = {m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)}
    assert widths == {1, 64, 128, 256, 512, 1024}


def test_two_classes_have_one_output_in_the_papers_network() -> None:
    image = scan("nested-unet", 2)
    logits = build("nested-unet", 2, num_classes=2)(image)
    assert logits.shape == (len(image), 2, *image.shape[2:])
    assert (logits[:, 0] == 0).all()
    assert logits[:, 1].std() > 0


REFUSED = [
    ("unett", {}, "unknown network 'unett': did you mean 'unet'"),
    ("unet", {"norm": "batsh"}, "unknown norm 'batsh': did you mean 'batch'"),
    ("unet", {"ndim": 4}, "4 spatial dimensions, expected 2 or 3"),
    ("unet", {"num_classes": 0}, "0 classes, expected 1 or more"),
    ("unet", {"in_channels": 0}, "0 image channels, 2 classes"),
    ("unet", {"dropout": 1.0}, "dropout 1, expected a probability"),
    ("unet", {"channels": (8,)}, "1 levels of channels, expected at least 2"),
    ("unet", {"channels": (8, 0)}, r"channels \[8, 0\], expected positive"),
    ("unet++", {"channels": (8, 16, 32)}, "3 levels of channels, expected 5"),
    ("dynunet", {"channels": (8, 16)}, "2 levels of channels, expected at least 3"),
    ("vnet", {"in_channels": 3, "channels": (16,)}, "16 channels .* image of 3 .* multiple of 3"),
    ("swin-unetr", {"channels": (16,)}, "16 channels .* multiple of 12"),
    ("unet", {"patch_size": (16, 16)}, "patch 16×16, expected 3 sides"),
    ("unet", {"patch_size": (16, 18, 16)}, "patch 16×18×16, .* multiples of 4, such as 16×20×16"),
    ("unet", {"patch_size": (0, 8, 8)}, "such as 4×8×8"),
    ("swin-unetr", {"channels": (12,), "patch_size": (48, 48, 48)}, "multiples of 32, such as 64×64×64"),
    (
        "vnet",
        {"strides": ((1, 2, 2),) * 2},
        "halves every axis alike, .* choose unet or dynunet or nnunet or resenc",
    ),
    ("unet", {"strides": ((1, 2, 2),)}, r"strides \[\[1, 2, 2\]\], expected 2 times 3 numbers, each 1 or 2"),
    ("unet", {"strides": ((2, 2), (2, 2))}, "expected 2 times 3 numbers"),
    ("unet", {"strides": ((3, 2, 2), (2, 2, 2))}, "expected 2 times 3 numbers, each 1 or 2"),
    (
        "unet",
        {"strides": ((1, 2, 2), (1, 2, 2)), "patch_size": (5, 6, 8)},
        "multiples of 1×4×4, such as 5×8×8",
    ),
    (
        "unet",
        {"strides": ((1, 2, 2), (1, 2, 2)), "patch_size": (1, 4, 4)},
        "one voxel at the lowest level, .* a side of 8 or more",
    ),
    ("resenc", {"options": {"block": 1}}, "unknown option 'block': did you mean 'blocks'"),
    ("nnunet", {"options": {"blocks": [1, 2]}}, "found 2 values of n_conv_per_stage, expected 3"),
    ("unet", {"options": {"blocks": [1, 2]}}, "unknown option 'blocks'"),
    ("unet", {"patch_size": (4, 4, 4)}, "one voxel at the lowest level, .* a side of 8 or more"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_the_impossible_is_refused_with_what_is_needed(
    name: str, changes: dict[str, object], message: str
) -> None:
    arguments: dict[str, object] = {"ndim": 3, "in_channels": 1, "num_classes": 2, "channels": (4, 8, 8)}
    with pytest.raises(UserError, match=message):
        make_network(name, **(arguments | changes))  # type: ignore[arg-type]


def test_required_multiple_of_an_unknown_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown network 'v-net': did you mean 'vnet'"):
        required_multiple("v-net", (16,))


def test_one_voxel_at_the_lowest_level_is_no_fault_for_group_norm() -> None:
    network = make_network(
        "unet", ndim=2, in_channels=1, num_classes=2, channels=(16, 32), patch_size=(2, 2), norm="group"
    )
    assert network(torch.randn(1, 1, 2, 2)).shape == (1, 2, 2, 2)
