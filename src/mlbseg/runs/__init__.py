"""The run folder: what training leaves behind, and all that prediction needs besides scans."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor, device, nn

from mlbseg.config import Config, load_run_config
from mlbseg.core.directional import forked_random, seed_random
from mlbseg.data.augment import AUGMENTATIONS, Augmentation
from mlbseg.data.cases import AS_DRAWN, Dataset, LabelOptions, find_cases
from mlbseg.data.inputs import INPUTS, Inputs
from mlbseg.data.plan import Plan
from mlbseg.data.records import PathText, read_as
from mlbseg.data.splits import Split
from mlbseg.data.unlike import FINGERPRINT, Usual
from mlbseg.errors import UserError, nearest, printable
from mlbseg.memory import free_memory
from mlbseg.methods import LOSSES, Context, Method, find_method
from mlbseg.methods.supervised import Supervised
from mlbseg.networks import make_network
from mlbseg.runs.plugins import require_plugins
from mlbseg.runs.weights import WEIGHTS, load_weights, require_numbers
from mlbseg.types import Case

CONFIG = "config.yaml"
ENVIRONMENT = "env.json"


@dataclass(frozen=True)
class DataRecord:
    """What data.json says: the folder or list of scans, the cache, the cases that were left out, what labels mean."""

    root: PathText
    cache: PathText
    skipped: tuple[str, ...] = ()
    labels: LabelOptions = AS_DRAWN


@dataclass(frozen=True)
class ResultRecord:
    """What result.json says; see `mlbseg.training.stages.TrainResult`."""

    steps: int
    selection: str
    validation_dice: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seconds_per_step: Annotated[float, Field(allow_inf_nan=False)] | None = None
    peak_memory_bytes: Annotated[float, Field(ge=0, le=2**63)] | None = None
    warnings: tuple[str, ...] = ()


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
        require_plugins(root / ENVIRONMENT)
        return cls(
            root,
            load_run_config(root / CONFIG),
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

    def find_cases(self, data: Path | None = None) -> Dataset:
        """Return the cases where the run's scans are, or in another folder, with labels that mean what they meant.

        Raises:
            UserError: as `mlbseg.data.cases.find_cases`.
        """
        return find_cases(self.scans if data is None else data, self.data.labels)

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

    @property
    def usual(self) -> Usual | None:
        """What its training scans look like; None if that was not recorded, as of runs of a bench.

        Raises:
            UserError: if the record is damaged.
        """
        path = self.root / FINGERPRINT
        return Usual.read(path) if path.exists() else None

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
            weights = load_weights(path)
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
        require_numbers(path, groups[chosen], network.state_dict())
        try:
            network.load_state_dict(groups[chosen])
        except RuntimeError:
            raise UserError(f"{path}: does not fit plan.json's network ({self.plan.network})") from None
        return network.eval()


def make_student(plan: Plan, config: Config) -> nn.Module:
    """Return an untrained network as the plan wants it, drawn from the configuration's seed.

    Raises:
        UserError: if it cannot be built, or its weights are more than the memory that is free.
    """
    _require_room(plan)
    cpu = device("cpu")
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
            options=plan.network_options,
            deep=config.train.deep_supervision,
        )


def _require_room(plan: Plan) -> None:
    if (needed := 4 * plan.count_weights()) > (free := free_memory()):
        raise UserError(
            f"plan.network_channels: found {list(plan.network_channels)}, with which {plan.network} takes "
            f"{needed / 2**30:.3g} GiB, expected at most the {free / 2**30:.3g} GiB of memory that are free"
        )


def make_method(student: nn.Module, run: Run) -> Method:
    """Return the method of a run around a network, with the settings of its section.

    Raises:
        UserError: for settings that the method refuses.
    """
    name = run.config.method
    return find_method(name)(student, run.config.of(name), context_of(run))


def make_initialiser(student: nn.Module, run: Run) -> Method:
    """Return what trains stage 1 of a run: `Supervised`, or what its method has in place of it."""
    settings = run.config.of(run.config.method)
    own = find_method(run.config.method).stage1(settings)
    if own is None:
        return Supervised(student, context=context_of(run))
    return own(student, settings, context_of(run))


def augmentation_of(run: Run) -> Augmentation:
    """Return the random changes of a run's patches.

    Raises:
        UserError: there is no such augmentation.
    """
    name, plan = run.config.train.augmentation, run.plan
    return AUGMENTATIONS.find(name)(plan.ndim, run.config.of(name), flip_axes=plan.flip_axes)


def context_of(run: Run) -> Context:
    """Return what a run tells its methods.

    Raises:
        UserError: there is no such loss.
    """
    loss = LOSSES.find(run.config.train.loss)
    return Context(
        flip_axes=run.plan.flip_axes,
        noisy=bool(run.split.noisy),
        loss=loss,
        crf=run.config.train.crf,
        started=run.config.train.init is not None,
    )
