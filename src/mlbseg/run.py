"""The run folder: what training leaves behind, and all that prediction needs besides scans."""

from __future__ import annotations

import contextlib
import io
import platform
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor, nn

from mlbseg.config import Config, MLBSettings, load_config
from mlbseg.core.directional import forked_random, seed_random
from mlbseg.data.inputs import INPUTS, Inputs
from mlbseg.data.plan import Plan
from mlbseg.data.records import PathText, read_as
from mlbseg.data.splits import Split
from mlbseg.errors import Fault, ReadError, UserError, nearest, printable
from mlbseg.files import write_atomic
from mlbseg.memory import free_memory
from mlbseg.methods import Method, find_method
from mlbseg.methods.weighing import Weighing
from mlbseg.nets import make_network
from mlbseg.types import Case

WEIGHTS = "model.safetensors"
_SUM = "crc32"  # in the metadata of the file
CONFIG = "config.yaml"
_PACKAGES = (
    "mlbseg",
    "torch",
    "monai",
    "lightning",
    "numpy",
    "scipy",
    "SimpleITK",
    "zarr",
    "h5py",
    "safetensors",
)


@dataclass(frozen=True)
class DataRecord:
    """What data.json says: the folder or list of scans, the cache, and the cases that were left out."""

    root: PathText
    cache: PathText
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResultRecord:
    """What result.json says; see `mlbseg.training.stages.TrainResult`."""

    steps: int
    selection: str
    validation_dice: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seconds_per_step: Annotated[float, Field(allow_inf_nan=False)] | None = None
    peak_memory_bytes: Annotated[float, Field(ge=0, le=2**63)] | None = None


_DATA, _RESULT = TypeAdapter(DataRecord), TypeAdapter(ResultRecord)


@dataclass(frozen=True)
class Run:
    """A run folder that can predict.

    Attributes:
        root: The folder.
        config: What was asked for.
        plan: How scans are prepared, and the network.
        split: Which case played which part.
    """

    root: Path
    config: Config
    plan: Plan
    split: Split

    @classmethod
    def open(cls, root: Path) -> Run:
        """Open a run folder.

        Raises:
            UserError: if it is not one, or a file in it is damaged.
        """
        if not (root / CONFIG).is_file():
            raise UserError(f"{root}: not a run folder, expected one that `mlbseg train --out` made")
        return cls(
            root,
            load_config(root / CONFIG),
            Plan.read(root / "plan.json"),
            Split.read(root / "split.json"),
        )

    @property
    def scans(self) -> Path:
        """Where the scans were when the run was begun: a folder or a list.

        Raises:
            UserError: if the run's record of it is missing or damaged.
        """
        return Path(self.data.root)

    @property
    def data(self) -> DataRecord:
        """What the run knows of its data.

        Raises:
            UserError: if the record is missing or damaged.
        """
        return read_as(_DATA, self.root / "data.json", "the data of a run")

    @property
    def result(self) -> ResultRecord:
        """What training ended with.

        Raises:
            UserError: if the record is missing or damaged.
        """
        return read_as(_RESULT, self.root / "result.json", "the result of a run")

    @property
    def inputs(self) -> Inputs | None:
        """What the files of its training and validation cases held when it began; None if that was not recorded.

        Raises:
            UserError: if the record is damaged.
        """
        path = self.root / INPUTS
        return Inputs.read(path) if path.exists() else None

    def changed(self, cases: Iterable[Case]) -> str:
        """Say which files of training and validation cases hold something else than when the run began.

        Returns:
            A sentence; empty if none does.

        Raises:
            UserError: if the run's record is damaged.
        """
        inputs = self.inputs
        files = [] if inputs is None else [f.where for case in cases for f in inputs.readable_changes(case)]
        if not files:
            return ""
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return (
            f"{', '.join(files[:3])}{more}: changed since the run began; what is said here is of the scans and labels "
            "as they are now, not of those that the run learned from."
        )

    def warn_of_changes(self, cases: Iterable[Case]) -> None:
        """Warn of what `changed` says, if it says anything."""
        if words := self.changed(cases):
            warnings.warn(printable(words), stacklevel=3)

    @property
    def moved_scans(self) -> str:
        """What to do where the scans are no longer in their place."""
        return f"put the scans back, or correct root in {self.root / 'data.json'}"

    def network(self, which: str | None = None) -> nn.Module:
        """Return a trained network in evaluation mode.

        Args:
            which: ``student`` or ``teacher``; the one that the method prefers when None.

        Raises:
            UserError: if training has not finished, the file is damaged, or the method has no such network.
        """
        path = self.root / WEIGHTS
        if not path.is_file():
            raise UserError(
                f"{self.root}: training has not finished ({WEIGHTS} is missing); "
                f"continue it with `mlbseg train --resume {self.root}`"
            )
        try:
            weights = _load_weights(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged ({error})") from None
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights.items():
            group, _, key = name.partition(".")
            groups.setdefault(group, {})[key] = tensor
        chosen = which or find_method(self.config.method).predicts
        if chosen not in groups:
            raise UserError(f"{path} has no {chosen!r} network: {nearest(chosen, groups)}")
        network = make_student(self.plan, self.config)
        _require_numbers(path, groups[chosen], network.state_dict())
        try:
            network.load_state_dict(groups[chosen])
        except RuntimeError:
            raise UserError(f"{path}: does not fit plan.json's network ({self.plan.network})") from None
        return network.eval()


def _require_numbers(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse weights that would be loaded without a word, and predict nothing.

    Raises:
        UserError: naming the weight.
    """
    for name, tensor in found.items():
        if name in expected and tensor.is_floating_point() != expected[name].is_floating_point():
            kinds = [str(t.dtype).removeprefix("torch.") for t in (tensor, expected[name])]
            raise UserError(
                f"{path}: weight {name!r} is of type {kinds[0]}, expected {kinds[1]} as training wrote it"
            )
        if not tensor.isfinite().all():
            raise UserError(
                f"{path}: weight {name!r} holds values that are no finite numbers (copy the file again, or train anew)"
            )


def make_student(plan: Plan, config: Config) -> nn.Module:
    """Return an untrained network as the plan wants it, drawn from the configuration's seed.

    Raises:
        UserError: if it cannot be built, or its weights are more than the memory that is free.
    """
    _require_room(plan)
    cpu = torch.device("cpu")
    with forked_random(cpu):
        seed_random(config.seed, cpu)
        return make_network(
            plan.network,
            ndim=plan.ndim,
            in_channels=plan.channels,
            num_classes=plan.num_classes,
            channels=plan.network_channels,
            strides=plan.network_strides,
            patch_size=plan.patch_size,
            norm=config.train.norm,
            dropout=config.train.dropout,
        )


def _require_room(plan: Plan) -> None:
    if (needed := 4 * plan.count_weights()) > (free := free_memory()):
        raise UserError(
            f"plan.network_channels: found {list(plan.network_channels)}, with which {plan.network} takes "
            f"{needed / 2**30:.3g} GiB, expected at most the {free / 2**30:.3g} GiB of memory that are free"
        )


def make_method(student: nn.Module, run: Run) -> Method:
    """Return the method of a run around a network, with the settings of the section of its name, if there is one.

    Raises:
        UserError: for settings that the method refuses.
    """
    section = getattr(run.config, run.config.method.replace("-", "_"), None)
    settings: dict[str, Any] = {} if section is None else section.model_dump()
    if isinstance(section, MLBSettings):
        sources = section.weighed(noisy=bool(run.split.noisy))
        settings |= {"flip_axes": run.plan.flip_axes, "sources": sources}
    return find_method(run.config.method)(student, **settings)


def weighing(settings: MLBSettings, *, noisy: bool) -> Weighing:
    """Return how MLB will weigh pixels.

    Args:
        settings: Of MLB.
        noisy: Whether labels that nobody trusts come with cases.
    """
    return Weighing(
        settings.weighed(noisy=noisy),
        settings.weighting,
        settings.decides,
        settings.per_source,
        settings.per_image,
    )


def save_weights(root: Path, networks: Mapping[str, nn.Module]) -> None:
    """Write the networks' weights to `WEIGHTS`."""
    tensors = {
        f"{which}.{key}": tensor.detach().cpu().contiguous().clone()
        for which, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    metadata = {_SUM: _sum(tensors)}
    write_atomic(root / WEIGHTS, safetensors.torch.save(tensors, metadata))


def _load_weights(path: Path) -> dict[str, Tensor]:
    """Return what `save_weights` wrote.

    Raises:
        SafetensorError: if it is damaged.
    """
    weights = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        known = (file.metadata() or {}).get(_SUM)  # earlier versions wrote none
    if known is not None and known != _sum(weights):
        raise SafetensorError("it holds other weights than were written")
    return weights


def _sum(weights: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of weights with their names, types and shapes."""
    return f"{zlib.crc32(safetensors.torch.save(dict(weights))):08x}"


def dump_tensors(content: Mapping[str, Any]) -> bytes:
    """Return what `torch.save` would write, so that a full disk is met by `write_atomic` and not by torch."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says, in any of the libraries' ways, that memory ran out."""
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        return any(words in str(error) for words in ("allocate memory", "out of memory", "not enough memory"))
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def why_case_failed(error: BaseException, what: str = "scan") -> str:
    """Return the reason of a fault for an error that stops one case and no other.

    Args:
        error: What was raised: a user's fault, or the machine's limits.
        what: What there was not enough memory for.

    Raises:
        RuntimeError: the error itself, if it is a fault of ours.
    """
    if out_of_memory(error):
        return f"not enough memory for this {what}"
    if isinstance(error, RuntimeError):
        raise error
    return str(error)


@contextlib.contextmanager
def one_case(case_id: str, faults: list[Fault], kind: str, what: str = "scan") -> Iterator[None]:
    """Let what the user can mend in one case be a fault, and go on with the next case.

    Args:
        case_id: The case.
        faults: Gets a fault if the case fails.
        kind: Of that fault.
        what: What there was not enough memory for.

    Raises:
        RuntimeError: a fault of ours.
    """
    try:
        yield
    except (UserError, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, ReadError) and error.fault.case_id == case_id:
            faults.append(error.fault)  # names file and case already
        else:
            faults.append(Fault(case_id, why_case_failed(error, what), case_id=case_id, kind=kind))


def environment() -> dict[str, Any]:
    """Return what a reader needs to repeat the run: versions, machine, threads, command."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "versions": versions,
        "machine": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
    }


def has_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16 by itself; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def device_name(device: str, accelerator: str | None = None, devices: int = 1) -> str:
    """Return the name of a device by either way of saying it.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        accelerator: ``auto``, ``cpu`` or ``gpu``, in place of it.
        devices: Number of them.

    Raises:
        UserError: if they contradict each other, or the machine does not have as many.
    """
    kinds = {"auto": "auto", "cpu": "cpu", "gpu": "cuda"}
    if accelerator is not None:
        if accelerator not in kinds:
            raise UserError(f"unknown accelerator {accelerator!r}: {nearest(accelerator, kinds)}")
        if device not in ("auto", kinds[accelerator]):
            raise UserError(
                f"found --device {device} and --accelerator {accelerator} (leave one of them out)"
            )
        device = kinds[accelerator]
    if devices < 1:
        raise UserError(f"--devices: found {devices}, expected a whole number from 1")
    if devices > 1:
        chosen = pick_device(device)
        if chosen.index is not None:
            raise UserError(
                f"found --device {device} and --devices {devices} (use --accelerator gpu, and choose among "
                "the GPUs with the environment variable CUDA_VISIBLE_DEVICES)"
            )
        if chosen.type == "cuda" and (count := torch.cuda.device_count()) < devices:
            raise UserError(f"--devices: found {count} GPU(s), expected {devices} (use --devices {count})")
    return device


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; the first GPU, else the CPU, for ``auto``.

    Raises:
        UserError: if it does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r}: not on this machine (use auto, cpu or cuda)") from None
    return device


def use_bf16(precision: str, device: torch.device) -> bool:
    """Return whether to compute in bfloat16: asked for, or ``auto`` and the device has it."""
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


@contextlib.contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in bfloat16 where asked for or, with ``auto``, where the device has it."""
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device)):
        yield


def available_memory(device: torch.device, *, system: Path = Path("/")) -> int:
    """Return the memory that is free on the device, bytes; of the CPU's, what a control group grants.

    Args:
        device: The device.
        system: The folder with ``proc`` and ``sys``.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory(system)


def peak_memory(device: torch.device) -> int:
    """Return the most memory that was in use since this process began, bytes.

    The GPU's, as torch counts it; on a CPU all that this process held resident.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # only Unix has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
