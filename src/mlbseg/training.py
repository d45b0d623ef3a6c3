"""Training: a Lightning loop around a method, its checkpoints, and the two stages of MLB."""

from __future__ import annotations

import csv
import io
import logging
import math
import shlex
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from mlbseg import checkpoints
from mlbseg.config import Config, load_config
from mlbseg.data.augment import Augment
from mlbseg.data.batches import StepDataset
from mlbseg.data.cache import Cache, default_cache_root
from mlbseg.data.cases import find_cases
from mlbseg.data.check import check, without_bad
from mlbseg.data.fingerprint import fingerprint
from mlbseg.data.plan import make_plan
from mlbseg.data.records import read_record
from mlbseg.data.splits import apply_split, make_split
from mlbseg.errors import FaultsError, UserError
from mlbseg.inference import predict_grid
from mlbseg.methods import Method, find_method
from mlbseg.methods.supervised import Supervised
from mlbseg.metrics import dice
from mlbseg.progress import StepProgress
from mlbseg.run import (
    Run,
    autocast,
    available_memory,
    environment,
    make_student,
    out_of_memory,
    pick_device,
    save_weights,
    use_bf16,
    write_atomic,
    write_json,
)
from mlbseg.types import Batch, Case, Losses, Role

# Lightning's hints and device notes would drown the progress; its warnings still come through.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

LOG_EVERY = 10  # steps between rows of log.csv


class Interrupted(UserError):
    """Training was asked to stop by a signal; the last step that was done is in a checkpoint.

    The exit code is 128 + the signal's number, as shells have it.
    """

    def __init__(self, root: Path, number: int, where: str = "") -> None:
        super().__init__(f"stopped{where}; continue with: mlbseg train --resume {shlex.quote(str(root))}")
        self.exit_code = 128 + number


@dataclass(frozen=True)
class TrainResult:
    """What training left behind.

    Attributes:
        run: The run folder.
        steps: Optimiser steps of all stages.
        validation_dice: Of the kept weights; None without validation cases.
        selection: The rule by which the weights were chosen.
    """

    run: Path
    steps: int
    validation_dice: float | None
    selection: str


def train(
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    resume: str | Path | None = None,
    method: str | None = None,
    labelled: int | Sequence[str] | None = None,
    test: int | Sequence[str] | None = None,
    validation: int | Sequence[str] = 0,
    labels: Sequence[int] | None = None,
    seed: int | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    skip_bad: bool = False,
    device: str = "auto",
    cache: str | Path | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train a model from a folder of scans of which some are labelled.

    Args:
        data: The folder (or datalist); see `mlbseg.data.cases.find_cases` for the layouts.
        out: The run folder to make; it must not exist or be empty.
        resume: Continue this run folder instead; nothing else but `device` may be given.
        method: A name in `mlbseg.methods.METHODS`; ``mlb`` when None.
        labelled: Hide labels for an experiment: keep those of the first K cases, or of the named ones.
        test: Set cases apart that training never sees: the last N, or the named ones.
        validation: Clean cases taken out of training to choose the checkpoint by: the last N, or the named ones.
        labels: The label values to expect; those that the data declares, or that occur, when None.
        seed: Of everything random.
        preset: A name in `mlbseg.config.PRESETS`.
        config: A YAML file of settings.
        overrides: ``key=value`` settings, such as ``train.lr=0.01``.
        skip_bad: Leave faulty cases out instead of stopping.
        device: ``auto``, ``cpu``, ``cuda`` ...
        cache: Where preprocessed scans are kept; the user's cache folder when None.
        console: Where progress is shown; silent when None.

    Raises:
        UserError: for faults of data, settings or machine.
        Interrupted: on SIGINT or SIGTERM, after a checkpoint.
    """
    if resume is not None:
        root = Path(resume)
        choices = {
            "data": data, "out": out, "method": method, "labelled": labelled, "test": test, "labels": labels,
            "validation": validation or None, "seed": seed, "preset": preset, "config": config,
            "override": overrides or None, "skip_bad": skip_bad or None, "cache": cache,
        }  # fmt: skip
        if given := [name for name, value in choices.items() if value is not None]:
            raise UserError(f"--resume continues {root} as it was begun, found also: {', '.join(given)}")
    elif data is None or out is None:
        raise UserError("training needs a data folder and --out RUN (or --resume RUN)")
    else:
        root = Path(out)
        settings = load_config(
            None if config is None else Path(config),
            preset=preset,
            overrides=overrides,
            method=method,
            seed=seed,
        )
        _prepare(
            Path(data), root, settings, labelled=labelled, test=test, validation=validation, labels=labels,
            skip_bad=skip_bad, device=device, cache=cache, console=console,
        )  # fmt: skip
    return _Training(Run.open(root), pick_device(device), console).run_stages()


def _prepare(
    data: Path,
    root: Path,
    config: Config,
    *,
    labelled: int | Sequence[str] | None,
    test: int | Sequence[str] | None,
    validation: int | Sequence[str],
    labels: Sequence[int] | None,
    skip_bad: bool,
    device: str,
    cache: str | Path | None,
    console: Console | None,
) -> None:
    """Check the data, split, plan, and write all decisions into a new run folder."""
    method = find_method(config.method)
    target = pick_device(device)
    _require_free(root)
    dataset = find_cases(data)
    with StepProgress(console, "checking the scans", len(dataset.cases)) as progress:
        result = check(dataset, labels=labels, progress=lambda done, _: progress.update(done))
    if result.faults and not skip_bad:
        raise FaultsError(result.faults, str(data), "fix them, or pass --skip-bad to leave these cases out")
    dataset = without_bad(result)
    skipped = sorted({fault.case_id for fault in result.faults if fault.case_id is not None})
    if console is not None:
        for fault in result.warnings:
            console.print(f"note: {fault}", markup=False, highlight=False)
        if skipped:
            console.print(f"left out: {', '.join(skipped)}", markup=False, highlight=False)
    split = make_split(
        dataset.cases,
        order=dataset.order,
        labelled=labelled,
        test=test,
        validation=validation,
        seed=config.seed,
    )
    cases = {c.id: c for c in apply_split(dataset.cases, split)}
    training = [cases[i] for i in (*split.clean, *split.noisy, *split.unlabelled)]
    if method.uses_unlabelled and not (split.noisy or split.unlabelled):
        raise UserError(
            f"{data}: every case is labelled, and method {config.method!r} learns from unlabelled ones too "
            "(add scans without a label, or use --method supervised)"
        )
    with StepProgress(console, "measuring the scans", len(training)) as progress:
        facts = fingerprint(training, progress=lambda done, _: progress.update(done))
    names = dataset.class_names or ({} if labels is None else {value: f"class {value}" for value in labels})
    plan = make_plan(
        facts,
        class_names=names,
        memory_bytes=available_memory(target),
        device=target.type,
        overrides=config.plan.model_dump(exclude_none=True),
    )
    if method.needs_initial_labels and plan.steps < 2:
        raise UserError(f"plan.steps: found {plan.steps}, expected at least 2, one for each stage")
    make_student(plan, config)  # a network that cannot be built must fail before there is a run folder
    with _all_or_nothing(root):
        (root / "checkpoints").mkdir(parents=True, exist_ok=True)
        split.write(root / "split.json")
        plan.write(root / "plan.json")
        write_json(
            root / "env.json",
            {**environment(), "device": str(target), "bf16": use_bf16(config.train.precision, target)},
        )
        write_json(
            root / "data.json",
            {
                "root": str(data.resolve()),
                "cache": str(Path(cache if cache is not None else default_cache_root()).resolve()),
                "skipped": skipped,
            },
        )
        config.write(root / "config.yaml")  # last: its presence makes the folder a run


def _require_free(root: Path) -> None:
    """Refuse a run folder that is in use."""
    try:
        free = not root.exists() or (root.is_dir() and not any(root.iterdir()))
    except OSError as error:
        raise UserError(f"{root}: cannot be looked into: {error.strerror}") from None
    if not free:
        hint = f", or continue it with --resume {root}" if (root / "config.yaml").is_file() else ""
        raise UserError(f"{root}: exists already and is not empty (choose another --out{hint})")


@contextmanager
def _all_or_nothing(root: Path) -> Iterator[None]:
    """Take back all that was written into a new folder if anything goes wrong."""
    existed = root.is_dir()
    try:
        yield
    except BaseException as error:
        for path in root.iterdir() if root.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if root.is_dir() and not existed:
            root.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{root}: cannot be made a run folder: {error.strerror or error}") from None
        raise


class _Training:
    """The stages of one run, from wherever its checkpoints stand."""

    def __init__(self, run: Run, device: torch.device, console: Console | None) -> None:
        self.run = run
        self.device = device
        self.console = console
        record = read_record(run.root / "data.json", "the data of a run")
        dataset = find_cases(Path(str(record["root"])))
        cases = {c.id: c for c in apply_split(dataset.cases, run.split)}
        self.clean = [cases[i] for i in run.split.clean]
        self.others = [cases[i] for i in (*run.split.noisy, *run.split.unlabelled)]
        self.validation = [cases[i] for i in run.split.validation]
        self.cache = Cache(Path(str(record["cache"])), run.plan)
        self.folder = run.root / "checkpoints"
        self.stepping = False  # while the loop runs
        self.stopped_by = 0  # the signal that asked the loop to stop

    def run_stages(self) -> TrainResult:
        """Do what is left to do, and write the final weights.

        Raises:
            UserError: if the machine runs out of memory or disk, or a file cannot be used.
            Interrupted: on SIGINT or SIGTERM.
        """
        try:
            with self._stoppable():
                return self._stages()
        except (RuntimeError, MemoryError, OSError) as error:
            if out_of_memory(error):
                found = "not enough memory"
                remedy = "train anew with a smaller plan.patch_size, plan.batch_size or mlb.chunk"
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

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Obey SIGINT and SIGTERM: the loop after its step, all else at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread handle signals
            return
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if not self.stepping:
            raise Interrupted(self.run.root, number)
        self.stopped_by = number

    def _stages(self) -> TrainResult:
        kind = find_method(self.run.config.method)
        self._fill_cache(with_others=kind.uses_unlabelled)
        train, steps = self.run.config.train, self.run.plan.steps
        student = make_student(self.run.plan, self.run.config)
        if not kind.needs_initial_labels:
            method = self._build(kind, student)
            best = self._fit(1, self.run.config.method, method, steps, train.lr)
        else:
            first = min(max(1, round(steps * train.stage1_share)), steps - 1)
            initialiser = Supervised(student)
            self._fit(1, "stage 1, clean labels", initialiser, first, train.lr)
            labels = self._initial_labels(initialiser)
            method = self._build(kind, initialiser.student)
            best = self._fit(2, "stage 2, bootstrap", method, steps - first, train.lr_bootstrap, labels)
        save_weights(self.run.root, method.networks())
        selection = (
            f"the weights with the best Dice on {len(self.validation)} validation case(s)"
            if self.validation
            else "the weights of the last step; no case chose anything"
        )
        result = TrainResult(self.run.root, steps, best, selection)
        write_json(
            self.run.root / "result.json",
            {"steps": steps, "validation_dice": best, "selection": selection},
        )
        return result

    def _build(self, kind: type[Method], student: torch.nn.Module) -> Method:
        """Return the method with the settings of the section of its name, if there is one."""
        settings: dict[str, Any] = {}
        section = getattr(self.run.config, self.run.config.method, None)
        if section is not None:
            settings = section.model_dump()
            settings["flip_axes"] = self.run.plan.flip_axes or None
        return kind(student, **settings)

    def _fill_cache(self, *, with_others: bool) -> None:
        cases = [*self.clean, *self.validation, *(self.others if with_others else ())]
        with StepProgress(self.console, "preprocessing", len(cases)) as progress:
            for number, case in enumerate(cases, start=1):
                self.cache.image(case)
                if case.role in (Role.CLEAN, Role.NOISY):
                    self.cache.label(case)
                progress.update(number, {"case": case.id})

    def _dataset(self, number: int, steps: int, labels: Mapping[str, Path] | None) -> StepDataset:
        plan, config = self.run.plan, self.run.config
        return StepDataset(
            self.cache,
            self.clean,
            () if labels is None else self.others,
            initial_labels=labels,
            patch_size=plan.patch_size,
            batch_size=plan.batch_size,
            unlabelled_batch_size=plan.unlabelled_batch_size,
            steps=steps,
            seed=config.seed,
            stage=number,
            foreground=config.train.foreground,
            augment=Augment(plan.ndim, flip_axes=plan.flip_axes, **config.augment.model_dump()),
        )

    def _initial_labels(self, stage1: Method) -> dict[str, Path]:
        """Predict every unlabelled case once; these labels stay frozen through stage 2."""
        folder = self.run.root / "initial_labels"
        folder.mkdir(exist_ok=True)
        network = stage1.predictor().to(self.device).eval()
        todo = [case for case in self.others if case.role is Role.UNLABELLED]
        paths = {}
        with StepProgress(self.console, "initial labels", len(todo)) as progress:
            for number, case in enumerate(todo, start=1):
                path = paths[case.id] = folder / f"{case.id}.npy"
                if not path.exists():
                    label = self._predict(network, case).argmax(0).astype(np.uint8)
                    content = io.BytesIO()
                    np.save(content, label, allow_pickle=False)
                    write_atomic(path, content.getvalue())
                progress.update(number)
        return paths

    def _predict(self, network: torch.nn.Module, case: Case) -> np.ndarray:
        image = np.asarray(self.cache.image(case).array[...])
        with autocast(self.run.config.train.precision, self.device):
            return predict_grid(network, image, patch_size=self.run.plan.patch_size, device=self.device)

    def validate(self, method: Method) -> float:
        """Return the mean Dice over validation cases and foreground classes, on the prepared grid."""
        network = method.predictor()
        was_training = network.training
        network.eval()
        scores = []
        for case in self.validation:
            predicted = self._predict(network, case).argmax(0)
            label = np.asarray(self.cache.label(case)[...])
            scores += [dice(predicted == k, label == k) for k in range(1, self.run.plan.num_classes)]
        network.train(was_training)
        return float(np.mean(scores))

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
        loop = _Loop(self, number, method, dataset, lr)
        found = [c for c in checkpoints.find(self.folder) if c.stage == number]
        if found:
            loop.restore(found[-1])
        if loop.step < steps:
            self.stepping = True
            try:
                loop.fit(title)
            finally:
                self.stepping = False
            if self.stopped_by:
                raise Interrupted(self.run.root, self.stopped_by, f" at step {loop.step} of stage {number}")
        if self.validation and loop.best_weights:
            method.load_state_dict(loop.best_weights)
        return loop.best if self.validation else None


class _Loop(pl.LightningModule):
    """Manual optimisation: whatever the method yields is one optimiser step."""

    def __init__(
        self, training: _Training, stage: int, method: Method, dataset: StepDataset, lr: float
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.training_run = training
        self.stage = stage
        self.method = method
        self.dataset = dataset
        self.base_lr = lr
        self.settings = training.run.config.train
        self.step = 0
        self.saved = 0
        self.best = -1.0
        self.best_weights: dict[str, Tensor] = {}
        self.progress: StepProgress | None = None
        self.values: dict[str, float] = {}  # of the last step, for the log
        self.shown: dict[str, float | str] = {}
        self.sgd = torch.optim.SGD(
            [p for p in method.student.parameters() if p.requires_grad],
            lr=lr,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )
        method.optimiser = self.sgd

    # --- state -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on; random numbers depend on the step alone."""
        return {
            "method": self.method.state_dict(),
            "optimiser": self.sgd.state_dict(),
            "best": self.best,
            "best_weights": self.best_weights,
        }

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: if it is damaged, or of other networks.
        """
        content = checkpoint.load(self.training_run.device)
        self.method.to(self.training_run.device)
        try:
            self.method.load_state_dict(content["method"])
            self.sgd.load_state_dict(content["optimiser"])
            self.best, self.best_weights = content["best"], content["best_weights"]
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise UserError(
                f"{checkpoint.path}: does not fit this run (undo the change of config.yaml or plan.json, "
                "or train anew)"
            ) from None
        self.step = self.saved = checkpoint.step

    def save(self) -> None:
        """Write a checkpoint of the state after `step` steps."""
        final = self.step == len(self.dataset)
        checkpoints.save(self.training_run.folder, self.stage, self.step, self.state(), final=final)
        self.saved = self.step

    # --- the loop ----------------------------------------------------------------------------------------

    def fit(self, title: str) -> None:
        """Train to the last step."""
        run, device = self.training_run.run, self.training_run.device
        # Weights before the first step, so that an early end can be resumed too.
        if self.step == 0:
            self.save()
        _cut_log(run.root / "log.csv", self.stage, self.step)
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1 if device.index is None else [device.index],
            max_epochs=1,
            logger=TensorBoardLogger(
                str(run.root), "tensorboard", version=f"stage{self.stage}", purge_step=self.step + 1
            ),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,  # `_report` chooses the steps; Lightning warns of stages shorter than this
            num_sanity_val_steps=0,
            default_root_dir=str(run.root),
        )
        loader = DataLoader(self.dataset, batch_size=None, sampler=range(self.step, len(self.dataset)))
        with (
            StepProgress(self.training_run.console, title, len(self.dataset), self.step) as self.progress,
            warnings.catch_warnings(),
        ):
            # Steps are drawn in the main process on purpose: their order is the resume's contract.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # Lightning's own use of torch, and its surprise at a network that just predicted.
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
            trainer.fit(self, loader)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the one optimiser."""
        return self.sgd

    def on_train_start(self) -> None:
        """Take SIGTERM back from Lightning, which would stop without a checkpoint."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.training_run.stop)

    def training_step(self, batch: Batch, index: int) -> None:
        """Take the optimiser steps of one training step."""
        method, step = self.method, self.step
        torch.manual_seed(batch.seed)  # dropout
        for group in self.sgd.param_groups:
            group["lr"] = self.base_lr * self._lr_factor(step)
        method.train()
        values: dict[str, float] = {}
        for losses in self._losses(batch):
            total = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(total):
                raise UserError(self._nan_message(losses, batch))
            self.sgd.zero_grad(set_to_none=True)
            self.manual_backward(total)
            norm = torch.nn.utils.clip_grad_norm_(method.student.parameters(), self.settings.clip)
            if not torch.isfinite(norm):  # a step along it would spoil the weights, and the next checkpoint
                raise UserError(self._nan_message({**losses, "gradient": norm}, batch))
            self.optimizers().step()
            values |= {name: float(term.detach()) for name, term in losses.items()}
        method.after_step(step)
        self.step += 1
        self.values = values

    def _losses(self, batch: Batch) -> Iterator[Losses]:
        """Draw the method's losses one by one, each computed under autocast, none of the stepping."""
        losses = self.method.losses(batch, self.step)
        while True:
            # Leaving the context drops autocast's copies of the weights, which the step makes stale.
            with autocast(self.settings.precision, self.training_run.device):
                terms = next(losses, None)
            if terms is None:
                return
            yield terms

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Validate, save, and obey a signal, between two steps."""
        last = self.step == len(self.dataset)
        if self.training_run.validation and (self.step % self.settings.validate_every == 0 or last):
            score = self.values["validation_dice"] = self.training_run.validate(self.method)
            if score > self.best:
                self.best = score
                self.best_weights = {k: v.detach().cpu().clone() for k, v in self.method.state_dict().items()}
        self._report(self.values)
        stopping = bool(self.training_run.stopped_by)
        if self.step % self.settings.checkpoint_every == 0 or last or stopping:
            self.save()
        if stopping:
            self.trainer.should_stop = True
            self.trainer.limit_train_batches = 0

    def _lr_factor(self, step: int) -> float:
        if self.settings.schedule == "poly":
            return (1 - step / len(self.dataset)) ** 0.9
        if self.settings.schedule == "paper":
            per_step = self.dataset.unlabelled_batch_size if self.dataset.others else self.dataset.batch_size
            epoch = step * per_step // max(len(self.dataset.others or self.dataset.clean), 1)
            return 20 / (epoch + 20)
        return 1.0

    def _report(self, values: dict[str, float]) -> None:
        values |= {name: float(value) for name, value in self.method.monitors.items()}
        self.shown |= {k: v if "kept" not in k else f"{v:.0%}" for k, v in values.items() if "mass" not in k}
        if self.progress is not None:
            self.progress.update(self.step, self.shown)
        if self.step % LOG_EVERY and self.step != len(self.dataset) and "validation_dice" not in values:
            return
        # Not `self.log_dict`: Lightning counts steps anew in a resumed run.
        for logger in self.loggers:
            logger.log_metrics(values, step=self.step)
        row = {"stage": self.stage, "step": self.step, "lr": self.sgd.param_groups[0]["lr"], **values}
        _append_row(self.training_run.run.root / "log.csv", row)

    def _nan_message(self, losses: Losses, batch: Batch) -> str:
        bad = ", ".join(name for name, term in losses.items() if not math.isfinite(float(term.detach())))
        return (
            f"the loss ({bad}) is no longer a number at step {self.step} of stage {self.stage}, "
            f"cases {', '.join(batch.case_ids)}; the last good checkpoint is step {self.saved} in "
            f"{self.training_run.folder} (train anew with a lower train.lr or train.lr_bootstrap, "
            "or look at these cases)"
        )


_COLUMNS = (
    "stage", "step", "lr", "clean", "initial", "pseudo", "teacher", "views", "clean_teacher", "clean_views",
    "kept_initial", "kept_pseudo", "mass_initial", "mass_pseudo", "validation_dice",
)  # fmt: skip


def _append_row(path: Path, row: Mapping[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _cut_log(path: Path, stage: int, step: int) -> None:
    """Keep the rows up to this step: those after it are of steps that will be done again."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = [row for row in text.splitlines() if (place := _place(row)) and place <= (stage, step)]
    kept = "".join(f"{line}\n" for line in (",".join(_COLUMNS), *rows))
    if kept != text:
        write_atomic(path, kept.encode())


def _place(row: str) -> tuple[int, int] | None:
    """Return stage and step of a row of the log; None of the header, and of a row that a kill cut off."""
    cells = row.split(",")
    whole = len(cells) == len(_COLUMNS) and cells[0].isdecimal() and cells[1].isdecimal()
    return (int(cells[0]), int(cells[1])) if whole else None
