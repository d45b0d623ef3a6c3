"""The two stages of a run, continued from wherever its checkpoints stand."""

from __future__ import annotations

import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console

from mlbseg import processes
from mlbseg.core.directional import forked_random
from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.data.batches import StepDataset
from mlbseg.data.cache import Cache
from mlbseg.data.inputs import INPUTS, Inputs
from mlbseg.data.known import hidden
from mlbseg.data.preprocess import UNKNOWN
from mlbseg.data.reading import Reading
from mlbseg.data.records import write_record
from mlbseg.data.splits import apply_split
from mlbseg.device import autocast, peak_memory
from mlbseg.errors import UserError, out_of_memory
from mlbseg.methods import Method, find_method
from mlbseg.metrics import dice
from mlbseg.progress import StepProgress
from mlbseg.runs import Run, augmentation_of, checkpoints, make_initialiser, make_method
from mlbseg.runs.starting import starting_student
from mlbseg.runs.weights import WEIGHTS, save_weights
from mlbseg.training import guard
from mlbseg.training.drawing import drawer_lost
from mlbseg.training.loop import Loop
from mlbseg.training.prepare import first_steps, second_steps
from mlbseg.training.scan_labels import check_label, write_label
from mlbseg.training.signals import Interrupted, StopSignals
from mlbseg.types import Case, Role
from mlbseg.windows import predict_grid

T = TypeVar("T")
INITIAL_LABELS = "initial_labels"
RESULT = "result.json"
PSEUDO_LABELS = "pseudo_labels"  # in the run folder, while stage 2 goes on
LOOKS = "looks"  # likewise: what each stage made of a few scans, which the guard compares


@dataclass(frozen=True)
class TrainResult:
    """What training left behind.

    Attributes:
        run: The run folder.
        steps: Optimiser steps of all stages.
        validation_dice: Of the kept weights; None without validation cases.
        selection: The rule by which the weights were chosen.
        seconds_per_step: Of the last stage, checkpoints, validation and labelling of scans included, in the process
            that finished it; None if that had no step left to do.
        warnings: Warnings that need no test label; see `mlbseg.training.guard`.
    """

    run: Path
    steps: int
    validation_dice: float | None
    selection: str
    seconds_per_step: float | None = None
    warnings: tuple[str, ...] = ()


class Training:
    """The stages of one run, from wherever its checkpoints stand.

    Ranks go through them together: each prepares, predicts and validates its share of the cases, rank 0 writes.
    """

    def __init__(
        self,
        run: Run,
        device: torch.device,
        console: Console | None,
        ranks: Ranks = ALONE,
        *,
        processes: int | None = None,
    ) -> None:
        self.run = run
        self.device = device
        self.console = console
        self.ranks = ranks
        record = run.data
        dataset = run.find_cases()
        cases = {c.id: c for c in apply_split(dataset.cases, run.split, every=record.labels.every)}
        clean = [cases[i] for i in run.split.clean]
        trained = len(clean) - run.config.train.meta_cases
        self.clean, self.meta = clean[:trained], clean[trained:]
        self.others = [cases[i] for i in (*run.split.noisy, *run.split.unlabelled)]
        self.validation = [cases[i] for i in run.split.validation]
        self.inputs = run.inputs or Inputs()
        if run.inputs is None and ranks.index == 0:
            warnings.warn(
                f"{run.root / INPUTS}: is missing, so a scan that has changed since the run began goes unnoticed",
                stacklevel=3,
            )
        root = Path(record.cache)
        self.reading = Reading.of(processes, root).shared(ranks.count)
        self.inputs.remembered = self.reading.remembered
        self.cache = Cache(root, run.plan, self.inputs)
        self.folder = run.root / "checkpoints"
        self.signals = StopSignals(run.root)
        self.seconds_per_step: float | None = None

    def run_stages(self) -> TrainResult:
        """Do what is left to do, and write the final weights.

        Raises:
            UserError: if the machine runs out of memory or disk, or a file cannot be used.
            Interrupted: on SIGINT or SIGTERM.
        """
        return self._explained(self._stages)

    def run_first(self) -> None:
        """Do what is left to do of stage 1, and prepare the scans of stage 2 too, for all runs that will share it.

        Raises:
            UserError: as `run_stages`.
            Interrupted: as `run_stages`.
        """

        def first() -> None:
            self._fill_cache(with_others=True)
            self._first_stage()

        self._explained(first)

    def _explained(self, work: Callable[[], T]) -> T:
        """Do some work; say of an error of the machine what it means and what to do."""
        try:
            with forked_random(self.device), self.signals.handled():
                return work()
        except (RuntimeError, MemoryError, OSError) as error:
            if processes.lost(error):
                raise
            if out_of_memory(error):
                found = "not enough memory"
                remedy = "train anew with a smaller plan.patch_size, plan.batch_size or mlb.chunk"
            elif drawer_lost(error):
                found = "a process that draws batches was killed, or had no shared memory"
                remedy = (
                    f"give more memory, or set workers: 0 under train in {self.run.root / 'config.yaml'}; then "
                    f"continue with: mlbseg train --resume {shlex.quote(str(self.run.root))}"
                )
            elif isinstance(error, OSError):
                found = f"{error.filename or self.run.root}: {error.strerror or error}"
                remedy = f"mend it and continue with: mlbseg train --resume {shlex.quote(str(self.run.root))}"
            else:
                raise
            raise UserError(f"{found}; {self._last_checkpoint()} ({remedy})") from error

    def _last_checkpoint(self) -> str:
        found = checkpoints.find(self.folder)
        if not found:
            return "there is no checkpoint yet"
        return f"the last checkpoint is step {found[-1].step} of stage {found[-1].stage}"

    def _stages(self) -> TrainResult:
        kind = find_method(self.run.config.method)
        if processes.of_first(self.ranks, lambda: self._is_over(2 if kind.uses_unlabelled else 1)):
            return self._recorded()
        self._fill_cache(with_others=kind.uses_unlabelled)
        if kind.uses_unlabelled and not (self.others or self._partly_known):
            raise UserError(
                f"{self.run.scans}: on the prepared grid no voxel is left that is not labelled, which method "
                f"{self.run.config.method!r} needs (use --method supervised, or a finer plan.spacing)"
            )
        train, steps = self.run.config.train, self.run.plan.steps
        if not kind.uses_unlabelled:
            first = None
            method = make_method(starting_student(self.run), self.run)
            best = self._fit(1, self.run.config.method, method, steps, train.rate(1))
        else:
            initialiser, trained = self._first_stage()
            second = second_steps(self.run.plan, self.run.config)
            steps = self._first_steps + second
            first = self._look(1, initialiser.predictor()) if trained else None
            labels: dict[str, Path] | None = None
            if kind.needs_initial_labels:
                frozen = self._freezes_labels
                labels = self._initial_labels(initialiser.predictor()) if frozen else {}
            method = make_method(initialiser.student, self.run)
            method.begin(initialiser)
            title = f"stage 2, {self.run.config.method}"
            best = self._fit(2, title, method, second, train.rate(2), labels)
        selection = (
            f"the weights with the best Dice on {len(self.validation)} validation case(s)"
            if self.validation
            else "final weights (no validation set)"
        )
        last = self._look(2, method.predictor())
        found = guard.warnings_of(first, last, self.run.plan.class_names)
        result = TrainResult(self.run.root, steps, best, selection, self.seconds_per_step, tuple(found))
        if self.ranks.index == 0:
            save_weights(self.run.root, method.networks())
            write_record(
                self.run.root / RESULT,
                {
                    "steps": steps,
                    "validation_dice": best,
                    "selection": selection,
                    "seconds_per_step": self.seconds_per_step,
                    "peak_memory_bytes": peak_memory(self.device),
                    "warnings": found,
                },
            )
            shutil.rmtree(self.run.root / LOOKS, ignore_errors=True)
        processes.wait_for_all(self.ranks)
        return result

    def _is_over(self, last: int) -> bool:
        """Return whether nothing is left to do, although the checkpoints that would say so were deleted.

        Args:
            last: The last stage.
        """
        found = checkpoints.find(self.folder)
        over = (self.run.root / WEIGHTS).is_file() and (self.run.root / RESULT).is_file()
        if over and not any(checkpoint.stage == last for checkpoint in found):
            self._note("training has finished, nothing is left to do")
            return True
        if not found and (self.run.root / "log.csv").is_file():
            self._note("no checkpoint is there, so training starts from its first step")
        return False

    def _note(self, text: str) -> None:
        if self.console is not None:
            self.console.print(
                f"note: {self.run.root}: {text}", markup=False, highlight=False, soft_wrap=True
            )

    def _recorded(self) -> TrainResult:
        """Return what the run folder says of a training that has finished."""
        record = self.run.result
        return TrainResult(
            self.run.root,
            record.steps,
            record.validation_dice,
            record.selection,
            warnings=record.warnings,
        )

    @property
    def _first_steps(self) -> int:
        """Steps of stage 1."""
        return first_steps(self.run.plan, self.run.config)

    def _first_stage(self) -> tuple[Method, bool]:
        """Train on the clean cases alone, unless stage 2 has all that it needs.

        Returns:
            The method, and whether its network has been trained: its weights are gone where stage 2 goes on alone.
        """
        initialiser = make_initialiser(starting_student(self.run), self.run)
        idle = processes.of_first(self.ranks, self._first_is_idle)
        if not idle:
            rate = self.run.config.train.rate(1)
            self._fit(1, "stage 1, clean labels", initialiser, self._first_steps, rate)
        return initialiser, not idle

    def _first_is_idle(self) -> bool:
        """Return whether stage 1's checkpoints were deleted when stage 2 had its own, and all initial labels."""
        if {checkpoint.stage for checkpoint in checkpoints.find(self.folder)} != {2}:
            return False
        if not self._freezes_labels:
            return True
        return all(self._initial_label(case).is_file() for case in self._unlabelled)

    @property
    def _freezes_labels(self) -> bool:
        config = self.run.config
        return find_method(config.method).freezes_labels(config.of(config.method))

    @property
    def _partly_known(self) -> list[Case]:
        """The clean cases whose label leaves voxels open, which are unlabelled data."""
        return [case for case in self.clean if self.cache.is_partly_known(case)]

    @property
    def _unlabelled(self) -> list[Case]:
        return [*(case for case in self.others if case.role is Role.UNLABELLED), *self._partly_known]

    def _initial_label(self, case: Case) -> Path:
        return self.run.root / INITIAL_LABELS / f"{case.id}.npy"

    def _fill_cache(self, *, with_others: bool) -> None:
        cases = [*self.clean, *self.meta, *self.validation, *(self.others if with_others else ())]
        processes.of_first(self.ranks, lambda: self.inputs.require(cases))
        todo = self._share(cases)
        with StepProgress(self.console, "preprocessing", len(todo)) as progress:
            self.cache.fill(todo, reading=self.reading, progress=lambda done, _: progress.update(done))
        processes.wait_for_all(self.ranks)
        for case in cases:  # of other ranks too: processes that draw batches begin with what is open here
            self._open(case)

    def _open(self, case: Case) -> None:
        self.cache.image(case)
        if case.role in (Role.CLEAN, Role.NOISY):
            self.cache.label(case)

    def _share(self, cases: Sequence[T]) -> Sequence[T]:
        """Return every n-th case, which this one of n ranks is to see to."""
        return cases[self.ranks.index :: self.ranks.count]

    def _dataset(self, number: int, steps: int, labels: Mapping[str, Path] | None) -> StepDataset:
        plan, config = self.run.plan, self.run.config
        return StepDataset(
            self.cache,
            self.clean,
            [*self.others, *self._partly_known] if number == 2 else (),
            meta=self.meta if number == 2 else (),
            initial_labels=labels,
            patch_size=plan.patch_size,
            batch_size=plan.batch_size,
            unlabelled_batch_size=plan.unlabelled_batch_size,
            steps=steps,
            seed=config.seed,
            stage=number,
            foreground=config.train.foreground,
            augment=augmentation_of(self.run),
            ranks=self.ranks,
        )

    def _initial_labels(self, network: torch.nn.Module) -> dict[str, Path]:
        """Predict every unlabelled and partly known case once; these labels stay frozen through stage 2."""
        return self._label(self._unlabelled, network, self.run.root / INITIAL_LABELS, "initial labels")

    def _pseudo_labels(self, method: Method, turn: int, of: int) -> dict[str, Path]:
        """Predict all unlabelled, noisy and partly known cases whole, for the n-th time, unless that has been done.

        Those of the turn before stay, for a run that has to go back to a checkpoint before this turn. One that somebody
        deleted in the middle of a turn is predicted by the network as it has become.
        """
        folder = self.run.root / PSEUDO_LABELS
        if self.ranks.index == 0:
            shutil.rmtree(folder / str(turn - 2), ignore_errors=True)
        return self._label(
            [*self.others, *self._partly_known],
            method.scan_labeller(),
            folder / str(turn),
            f"pseudo labels {turn + 1}/{of}",
        )

    def _label(
        self, cases: Sequence[Case], network: torch.nn.Module, folder: Path, title: str = ""
    ) -> dict[str, Path]:
        """Write what a network predicts of cases, but for those whose file is there; return the files by case id.

        Progress is shown where there is a title.
        """
        folder.mkdir(parents=True, exist_ok=True)
        network.to(self.device).eval()
        paths = {case.id: folder / f"{case.id}.npy" for case in cases}
        todo = self._share(cases)
        with StepProgress(self.console if title else None, title, len(todo)) as progress:
            for number, case in enumerate(todo, start=1):
                path = paths[case.id]
                if path.exists():
                    check_label(path, self.cache.image(case).array.shape[1:], self.run.plan.num_classes)
                else:
                    write_label(path, self._predict(network, case).argmax(0).astype(np.uint8))
                progress.update(number)
        processes.wait_for_all(self.ranks)
        return paths

    def _predict(self, network: torch.nn.Module, case: Case) -> np.ndarray:
        image = np.asarray(self.cache.image(case).array[...])
        with autocast(self.run.config.train.precision, self.device):
            return predict_grid(network, image, patch_size=self.run.plan.patch_size, device=self.device)

    def _look(self, stage: int, network: torch.nn.Module) -> guard.Look:
        """Return what a stage's network makes of a few of the scans, which the ranks share among them.

        The masks stay in the run folder until training is over, so that a resumed run does not predict them anew.
        """
        was_training = network.training
        clean, others = guard.few(self.clean), []
        if find_method(self.run.config.method).uses_unlabelled:
            others = list(guard.few([*self.others, *self._partly_known]))
        cases = {
            case.id: case for case in (*clean, *others)
        }  # a case that is partly known may be one of both
        files = self._label(list(cases.values()), network, self.run.root / LOOKS / str(stage))
        network.train(was_training)
        masks = {name: np.load(path, allow_pickle=False) for name, path in files.items()}
        pairs = [(masks[case.id], np.asarray(self.cache.label(case)[...])) for case in clean]
        return guard.look(pairs, [masks[case.id] for case in others])

    def validate(self, method: Method) -> float:
        """Return the mean Dice over validation cases and foreground classes, on the prepared grid."""
        network = method.predictor()
        was_training = network.training
        network.eval()
        foreground = range(1, self.run.plan.num_classes)
        scores = np.zeros((len(self.validation), len(foreground)))
        # A class that was not drawn in a case has no score there.
        drawn = np.ones(scores.shape, bool)
        for row, case in zip(drawn, self.validation, strict=True):
            row[[k - 1 for k in hidden(case.known, self.run.plan.label_values)]] = False
        for index in self._share(range(len(self.validation))):
            case = self.validation[index]
            label = np.asarray(self.cache.label(case)[...])
            predicted = np.where(label == UNKNOWN, UNKNOWN, self._predict(network, case).argmax(0))
            scores[index] = [dice(predicted == k, label == k) for k in foreground]
        network.train(was_training)
        return float(np.mean(self.ranks.sum(torch.from_numpy(scores)).numpy()[drawn]))

    def _fit(
        self,
        number: int,
        title: str,
        method: Method,
        steps: int,
        lr: float,
        labels: Mapping[str, Path] | None = None,
    ) -> float | None:
        """Train one stage from its newest checkpoint; leave its chosen weights in `method`."""
        dataset = self._dataset(number, steps, labels)
        loop = Loop(
            self.run, number, method, dataset, lr, device=self.device, signals=self.signals,
            score=self.validate if self.validation else None, console=self.console,
            ranks=self.ranks,
        )  # fmt: skip
        # Rank 0 has looked for them before it writes the next.
        found = processes.of_first(
            self.ranks, lambda: [c for c in checkpoints.find(self.folder) if c.stage == number]
        )
        if found:
            loop.restore(found[-1])
        method.sets = dataset.sets
        method.to(self.device)
        self.seconds_per_step = None
        began, before = time.perf_counter(), loop.step
        turns = min(method.relabel, steps)
        ends = [round(steps * turn / turns) for turn in range(1, turns + 1)] or [steps]
        for turn, until in enumerate(ends):
            if loop.step >= until:
                continue
            if turns:
                dataset.pseudo_labels = self._pseudo_labels(method, turn, turns)
            with self.signals.stepping():
                loop.fit(title, until)
            self.seconds_per_step = (time.perf_counter() - began) / max(1, loop.step - before)
            if stopped_by := self.signals.stopped_by:
                stopped = Interrupted(self.run.root, stopped_by, f" at step {loop.step} of stage {number}")
                raise processes.same_on_all(self.ranks, stopped)
        if turns and self.ranks.index == 0:
            shutil.rmtree(self.run.root / PSEUDO_LABELS, ignore_errors=True)
        if self.validation and loop.best_weights:
            method.load_state_dict(loop.best_weights)
        return loop.best if self.validation else None
