"""Weights that a run starts from: read from a run, a file of weights, nnU-Net or a MONAI bundle, and fitted.

Nothing that is read here can run code: safetensors, or torch files with ``weights_only``. The run keeps the fitted
weights, so that it can be resumed where their source is gone.
"""

from __future__ import annotations

import codecs
import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor, nn

from mlbseg.config import Config
from mlbseg.data.plan import ARCHITECTURE, Plan
from mlbseg.data.records import read_as, write_record
from mlbseg.errors import UserError, brief
from mlbseg.files import write_atomic
from mlbseg.memory import free_memory
from mlbseg.networks import side_multiples
from mlbseg.networks.fitting import Fitted, fit
from mlbseg.runs import CONFIG, Run, make_student
from mlbseg.runs.checkpoints import UNREADABLE
from mlbseg.runs.foreign import Proposal, bundle_proposal, nnunet_proposal
from mlbseg.runs.weights import WEIGHTS

INIT = "init.safetensors"
"""The weights that a run starts from, in its folder."""
RECORD = "init.json"
WRAPPERS = (
    "network_weights", "state_dict", "model_state_dict", "model_state", "model", "method", "network", "net", "module",
    "weights", "params", "student", "teacher", "encoder", "backbone",
)  # fmt: skip
"""Keys under which files hold the weights, the likeliest first."""
_DEEPEST = 4


@dataclass(frozen=True)
class Start:
    """Weights that a run is to start from, as they were found.

    Attributes:
        source: As the user named it.
        kind: ``run``, ``weights``, ``nnU-Net checkpoint`` or ``MONAI bundle``.
        file: What was read.
        sha256: Of that file.
        tensors: The weights by name.
        proposal: What their network was, and how its scans were prepared.
        run: The run that they are of, if of one.
    """

    source: str
    kind: str
    file: Path
    sha256: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    proposal: Proposal = field(default_factory=Proposal)
    run: Run | None = None

    def of(self, data: Path) -> bool:
        """Return whether they are of a run on these scans."""
        return self.run is not None and Path(self.run.data.root).resolve() == data.resolve()


@dataclass(frozen=True)
class StartRecord:
    """What init.json says: where the weights came from, and what became of them; see `Fitted`."""

    source: str
    kind: str
    file: str
    sha256: str
    loaded: tuple[str, ...]
    adapted: dict[str, str]
    drawn: dict[str, str]
    left: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, root: Path) -> StartRecord | None:
        """Return the record of a run; None of one that started from nothing.

        Raises:
            UserError: it is damaged.
        """
        path = root / RECORD
        return read_as(TypeAdapter(cls), path, "the starting weights of a run") if path.is_file() else None

    @property
    def fitted(self) -> Fitted:
        """What became of the weights."""
        return Fitted(self.loaded, self.adapted, self.drawn, self.left)


def read_start(source: str) -> Start:
    """Read weights to start from.

    Args:
        source: A run folder, ``RUN:teacher`` for another of its networks than the one that predicts, a file of weights
            (safetensors or torch), a checkpoint or a trained folder of nnU-Net v2, or a folder of a MONAI bundle.

    Raises:
        UserError: it is none of these, or holds something else than weights.
    """
    path, which = Path(source), None
    if not path.exists() and ":" in path.name:
        path, _, which = path.parent / path.name.rpartition(":")[0], None, path.name.rpartition(":")[2]
    if not path.exists():
        raise UserError(
            f"--init {brief(source)}: there is no such file or folder, expected a run folder, a file of weights, a "
            "checkpoint of nnU-Net or a MONAI bundle"
        )
    if path.is_dir() and (path / CONFIG).is_file():
        run = Run.open(path)
        tensors = run.network(which).state_dict()
        file = path / WEIGHTS
        return Start(source, "run", file, _sha256(file), tensors, _of_run(run), run)
    if which is not None:
        raise UserError(f"--init {brief(source)}: {path} is no run folder, expected one before :{which}")
    if path.is_dir() and (path / "configs").is_dir():
        weights = path / "models" / "model.pt"
        if not weights.is_file():
            raise UserError(f"{path}: a MONAI bundle without models/model.pt, expected weights there")
        content = _torch_file(weights)
        return Start(
            source, "MONAI bundle", weights, _sha256(weights), _state_dict(weights, content),
            bundle_proposal(path / "configs"),
        )  # fmt: skip
    if path.is_dir():
        path = _checkpoint_of(path)
    if path.suffix == ".safetensors":
        try:
            return Start(source, "weights", path, _sha256(path), safetensors.torch.load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: no safetensors file, or a damaged one ({error})") from None
    content = _torch_file(path)
    tensors, proposal = _state_dict(path, content), nnunet_proposal(content)
    kind = "weights" if proposal is None else "nnU-Net checkpoint"
    return Start(source, kind, path, _sha256(path), tensors, proposal or Proposal())


@dataclass(frozen=True)
class Started:
    """A network with the weights that a run starts from.

    Attributes:
        student: The network.
        record: Where its weights came from.
    """

    student: nn.Module = field(repr=False)
    record: StartRecord

    def write(self, folder: Path) -> None:
        """Write the weights, and the record of them, into a run folder.

        Raises:
            UserError: they cannot be written.
        """
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.student.state_dict().items()}
        write_atomic(folder / INIT, safetensors.torch.save(tensors))
        write_record(folder / RECORD, asdict(self.record))


def start_from(
    start: Start, plan: Plan, config: Config, *, data: Path, notes: tuple[str, ...] = ()
) -> Started:
    """Return the network of a plan with the weights that fit.

    Args:
        start: The weights.
        plan: Of the run.
        config: Of the run.
        data: Its scans.
        notes: What else the user should know.

    Raises:
        UserError: less than half of the encoder's weights fit, or the network cannot be built.
    """
    student = make_student(plan, config)
    *others, last = side_multiples(plan.network, plan.ndim, plan.network_channels, plan.network_strides)
    fitted = fit(
        student,
        start.tensors,
        ndim=plan.ndim,
        in_channels=plan.channels,
        num_classes=plan.num_classes,
        sides=(*others, 2 * last),  # one voxel at the lowest level could not be normalised
        same_classes=_same_classes(start, plan, data),
        where=str(start.file),
    )
    said = (*start.proposal.notes, *notes)
    if start.run is not None and (norm := start.run.config.train.norm) != config.train.norm:
        now = config.train.norm
        said = (
            *said,
            f"they were trained with {norm} norm, and go on with {now} norm (-o train.norm={norm})",
        )
    record = StartRecord(
        Path(start.source).name, start.kind, start.file.name, start.sha256, fitted.loaded, fitted.adapted, fitted.drawn,
        fitted.left, said,
    )  # fmt: skip
    return Started(student, record)


def _same_classes(start: Start, plan: Plan, data: Path) -> bool:
    """Return whether a head is for the classes of a plan, as far as is known."""
    if start.run is None:
        names = start.proposal.class_names
        return names is None or names == plan.class_names
    theirs = start.run.plan
    if (theirs.label_values, theirs.class_names) != (plan.label_values, plan.class_names):
        return False
    told = any(name != f"label {value}" for value, name in plan.structures.items())
    return told or start.of(data)


def starting_student(run: Run) -> nn.Module:
    """Return the network that a run begins with: drawn from its seed, or with the weights that it was given.

    Raises:
        UserError: the weights that it was given are missing or damaged, or the network cannot be built.
    """
    student = make_student(run.plan, run.config)
    if run.config.train.init is None:
        return student
    path = run.root / INIT
    try:
        student.load_state_dict(safetensors.torch.load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: the weights that the run starts from are missing or damaged ({why}): train anew from "
            f"{brief(run.config.train.init)}"
        ) from None
    return student


def _of_run(run: Run) -> Proposal:
    plan = run.plan
    return Proposal({name: getattr(plan, name) for name in ARCHITECTURE}, what=f"the run {run.root.name}")


def _checkpoint_of(folder: Path) -> Path:
    """Return the checkpoint of a folder that nnU-Net has trained, the plans above its folds."""
    found = sorted(folder.glob("fold_*/checkpoint_final.pth")) or sorted(folder.glob("checkpoint_final.pth"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{folder}: found {len(found)} folds, expected the checkpoint of one (--init {found[0]})"
        )
    raise UserError(
        f"{folder}: neither a run folder, a MONAI bundle nor a folder of nnU-Net with fold_X/checkpoint_final.pth "
        "(name the file of weights itself)"
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


# Numbers that nnU-Net's log holds beside the weights: values, and no code.
_NUMBERS: list[Any] = [
    np.dtype, codecs.encode, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # type: ignore[attr-defined]
]  # fmt: skip


def _torch_file(path: Path) -> Any:
    """Return what a torch file holds; nothing in it is ever run.

    Raises:
        UserError: it holds something else than tensors and numbers, or is none.
    """
    if not path.is_file():
        raise UserError(f"{path}: is no file, expected one of weights")
    if (size := path.stat().st_size) > (free := free_memory()):
        raise UserError(
            f"{path}: found {size / 2**30:.3g} GiB, expected at most the {free / 2**30:.3g} GiB that are free"
        )
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        with path.open("rb") as file:
            begin = file.read(4)
        if begin.startswith((b"PK", b"\x80")) and isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{path}: holds more than tensors, numbers and texts, so it is not opened: what else there is could "
                "run code (in a program that you trust, save its state_dict() alone, best as safetensors)"
            ) from None
        raise UserError(
            f"{path}: no file of weights, or a damaged one (expected safetensors, or what torch.save writes)"
        ) from None


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """Return the weights in a file's content, seen through what is usually around them.

    Raises:
        UserError: there are none.
    """
    if (found := _unwrapped(content, _DEEPEST)) is not None:
        return found
    holds = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
    raise UserError(f"{path}: found {brief(holds)}, expected weights by name (a state_dict)")


def _unwrapped(content: Any, depth: int) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping) or depth == 0:
        return None
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if any(tensor.ndim > 1 for tensor in tensors.values()):
        return tensors
    for name in WRAPPERS:
        if (found := _unwrapped(content.get(name), depth - 1)) is not None:
            return found
    return None
