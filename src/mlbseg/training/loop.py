"""The loop: a Lightning module around a method, with its log and its checkpoints."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich.console import Console
from torch import Tensor

from mlbseg import processes
from mlbseg.core.directional import seed_random
from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.data.batches import StepDataset
from mlbseg.device import autocast
from mlbseg.errors import UserError, out_of_memory
from mlbseg.methods import Method
from mlbseg.progress import StepProgress
from mlbseg.runs import Run, checkpoints
from mlbseg.training.drawing import make_loader
from mlbseg.training.log import append_row, cut_log
from mlbseg.training.signals import StopSignals
from mlbseg.training.weights import WeightKeeper, kept_steps
from mlbseg.types import Batch, Losses

LOG_EVERY = 10  # steps between rows of log.csv


@contextmanager
def _lightning_hushed() -> Iterator[None]:
    """Keep Lightning's hints and device notes from drowning the progress; its other warnings still come through."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # Lightning's own use of torch, and its surprise at a network that just predicted.
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
            yield
    finally:
        logger.setLevel(level)


class Loop(pl.LightningModule):
    """One stage, by manual optimisation: whatever the method yields is one optimiser step.

    Ranks that train together go through it in step. All of them end a step alike, whichever of them met a signal or
    a loss that is no number; rank 0 alone shows and writes.

    Args:
        run: The run folder.
        stage: 1 or 2.
        method: What is trained.
        dataset: Its batches, a step each.
        lr: Learning rate of the first step.
        target: The device to train on.
        signals: Obeyed after a step.
        score: Called now and then to validate; the weights with the highest score are kept. None keeps the last.
        console: Where progress is shown; silent when None.
        ranks: Those that train together.
    """

    def __init__(
        self,
        run: Run,
        stage: int,
        method: Method,
        dataset: StepDataset,
        lr: float,
        *,
        target: torch.device,
        signals: StopSignals,
        score: Callable[[Method], float] | None,
        console: Console | None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.run = run
        self.folder = run.root / "checkpoints"
        self.stage = stage
        self.method = method
        self.dataset = dataset
        self.base_lr = lr
        self.target = target  # Lightning has a `device` of its own
        self.signals = signals
        self.score = score
        self.console = console
        self.ranks = ranks
        self.settings = run.config.train
        self.step = 0
        self.until = len(dataset)
        self.saved = 0
        self.best = -1.0
        self.best_weights: dict[str, Tensor] = {}
        self.progress: StepProgress | None = None
        self.values: dict[str, Tensor | float] = {}  # of the last step, for the log
        self.keeper: WeightKeeper | None = None
        if stage == 2 and ranks.index == 0:
            self.keeper = WeightKeeper(run.root, dataset, run.split.noisy, self.settings.precision, target)
        self.unseen: list[tuple[int, Tensor, Losses, tuple[str, ...]]] = []  # see `_watch`
        self.shown: dict[str, float | str] = {}
        self.sgd = torch.optim.SGD(
            [p for p in method.trained() if p.requires_grad],
            lr=lr,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )
        method.optimiser = self.sgd
        method.ranks = ranks
        method.length = len(dataset)

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
        content = checkpoint.load(self.target)
        self.method.to(self.target)
        try:
            self.method.load_state_dict(content["method"])
            self.sgd.load_state_dict(content["optimiser"])
            self.best, self.best_weights = float(content["best"]), dict(content["best_weights"])
            self._require_fitting()
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            if out_of_memory(error):
                raise
            raise UserError(
                f"{checkpoint.path}: does not fit this run (undo the change of config.yaml or plan.json, "
                "or train anew)"
            ) from None
        self.step = self.saved = checkpoint.step

    def _require_fitting(self) -> None:
        """Raise ValueError for momenta and best weights of other shapes, which would fail in the middle of a step."""
        for parameter, state in self.sgd.state.items():
            momentum = state.get("momentum_buffer")
            if momentum is not None and momentum.shape != parameter.shape:
                raise ValueError
        shapes = {name: tensor.shape for name, tensor in self.method.state_dict().items()}
        if self.best_weights and {n: t.shape for n, t in self.best_weights.items()} != shapes:
            raise ValueError
        numbers = ("lr", "momentum", "dampening", "weight_decay")
        if any(
            not isinstance(group[name], int | float) for group in self.sgd.param_groups for name in numbers
        ):
            raise ValueError

    def save(self) -> None:
        """Write a checkpoint of the state after `step` steps.

        Raises:
            UserError: if a value since the last one, or a weight, is no number.
        """
        weights = [w for w in self.method.state_dict().values() if w.is_floating_point() and w.numel()]
        largest = torch.stack([w.detach().abs().amax().double() for w in weights]).amax()  # or NaN, if any is
        self._watch(largest, {"weights": largest}, ())
        self._look()
        final = self.step == len(self.dataset)
        if self.ranks.index == 0:
            checkpoints.save(self.folder, self.stage, self.step, self.state(), final=final)
        self.saved = self.step

    # --- the loop ----------------------------------------------------------------------------------------

    def fit(self, title: str, until: int) -> None:
        """Train until so many steps are done, and save."""
        # Weights before the first step, so that an early end can be resumed too.
        if self.step == 0:
            self.save()
        if self.ranks.index == 0:
            cut_log(self.run.root / "log.csv", self.stage, self.step)
        self.until = until
        loader = make_loader(
            self.dataset,
            range(self.step, until),
            workers=self.settings.workers,
            device=self.target,
            channels=self.run.plan.channels,
            ranks=1 if self.ranks.count == 1 else processes.nodes()[0],
        )
        with (
            StepProgress(self.console, title, len(self.dataset), self.step) as self.progress,
            _lightning_hushed(),
        ):
            self._make_trainer().fit(self, loader)

    def _make_trainer(self) -> pl.Trainer:
        """Return what takes the steps from here to the end of the stage."""
        root, device = str(self.run.root), self.target
        return pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            **self._placement(),
            use_distributed_sampler=False,  # the dataset draws this rank's slice itself
            max_epochs=1,
            logger=TensorBoardLogger(
                root, "tensorboard", version=f"stage{self.stage}", purge_step=self.step + 1
            ),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,  # `_report` chooses the steps; Lightning warns of stages shorter than this
            num_sanity_val_steps=0,
            default_root_dir=root,
        )

    def _placement(self) -> dict[str, Any]:
        """Return where Lightning is to train: on this device alone, or as one of the ranks that have been started."""
        if self.ranks.count == 1:
            return {"devices": 1 if self.target.index is None else [self.target.index]}
        strategy: Strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
        devices, machines = processes.nodes()
        return {"strategy": strategy, "devices": devices, "num_nodes": machines}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the one optimiser."""
        return self.sgd

    def on_train_start(self) -> None:
        """Take SIGTERM back from Lightning, which would stop without a checkpoint."""
        self.signals.take_back()

    def training_step(self, batch: Batch | UserError | OSError, index: int) -> None:
        """Take the optimiser steps of one training step.

        Raises:
            UserError: if the batch could not be drawn, or a loss is no number.
            OSError: if a file of the batch cannot be read.
        """
        if isinstance(batch, Exception):
            raise batch
        method, step = self.method, self.step
        seed_random(batch.seed + self.ranks.index, self.target)  # dropout
        for group in self.sgd.param_groups:
            group["lr"] = self.base_lr * self._lr_factor(step)
        method.train()
        values: dict[str, Tensor | float] = {}
        for losses in self._losses(batch):
            total = torch.stack(list(losses.values())).sum()
            self._watch(total, losses, batch.case_ids)
            self.sgd.zero_grad(set_to_none=True)
            # Lightning's DDP takes the mean over ranks, and each rank's gradient is one part of the sum.
            self.manual_backward(total * self.ranks.count)
            norm = torch.nn.utils.clip_grad_norm_(method.trained(), self.settings.clip)
            # A step along it would spoil the weights, and the next checkpoint.
            self._watch(norm, {**losses, "gradient": norm}, batch.case_ids)
            self.optimizers().step()
            values |= {name: term.detach() for name, term in losses.items()}
        method.after_step(step)
        self.step += 1
        self.values = values

    def _losses(self, batch: Batch) -> Iterator[Losses]:
        """Draw the method's losses one by one, each computed under autocast, none of the stepping."""
        losses = self.method.losses(batch, self.step)
        while True:
            # Leaving the context drops autocast's copies of the weights, which the step makes stale.
            with autocast(self.settings.precision, self.target):
                terms = next(losses, None)
            if terms is None:
                return
            yield terms

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Validate, save, and obey a signal, between two steps."""
        last = self.step == len(self.dataset)
        if self.score is not None and (self.step % self.settings.validate_every == 0 or last):
            self._look()
            score = self.values["validation_dice"] = self.score(self.method)
            if score > self.best:
                self.best = score
                self.best_weights = {k: v.detach().cpu().clone() for k, v in self.method.state_dict().items()}
        self._report(self.values)
        if self.keeper is not None and self.step in kept_steps(len(self.dataset)):
            self.keeper.keep(self.method, self.step)
        stopped_by = int(self.ranks.max(torch.tensor(self.signals.stopped_by)))
        stopping = bool(stopped_by)
        if self.step % self.settings.checkpoint_every == 0 or self.step == self.until or stopping:
            self.save()
        if stopping:
            self.signals.stopped_by = stopped_by
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

    def _report(self, values: dict[str, Tensor | float]) -> None:
        last = self.step == len(self.dataset)
        logged = self.step % LOG_EVERY == 0 or last or "validation_dice" in values
        fetched: dict[str, float] = {}
        if logged or self.looks_each_step:
            self._look()
            fetched = {name: float(value) for name, value in {**values, **self.method.monitors}.items()}
            self.shown |= {
                k: v if "kept" not in k else f"{v:.0%}" for k, v in fetched.items() if "mass" not in k
            }
        if self.progress is not None:
            self.progress.update(self.step, self.shown)
        if not logged or self.ranks.index > 0:
            return
        # Not `self.log_dict`: Lightning counts steps anew in a resumed run.
        for logger in self.loggers:
            logger.log_metrics(fetched, step=self.step)
        row = {"stage": self.stage, "step": self.step, "lr": self.sgd.param_groups[0]["lr"], **fetched}
        append_row(self.run.root / "log.csv", row)

    @property
    def looks_each_step(self) -> bool:
        """Whether values are looked at in every step: on a GPU each look would wait for all that it has to do."""
        return self.target.type == "cpu"

    def _watch(self, value: Tensor, terms: Losses, case_ids: tuple[str, ...]) -> None:
        """Have all ranks stop if a value, made of these terms, is no number: now on a CPU, else when one looks."""
        detached = {name: term.detach() for name, term in terms.items()}
        self.unseen.append((self.step, value.detach(), detached, case_ids))
        if self.looks_each_step:
            self._look()

    def _look(self) -> None:
        """Look at the values that `_watch` has been given since the last look.

        Raises:
            UserError: at the first on any rank that is no number.
        """
        if not self.unseen:
            return
        unseen, self.unseen = self.unseen, []
        fine = torch.isfinite(torch.stack([value.double() for _, value, _, _ in unseen])).tolist()
        left = len(fine) - fine.index(False) if False in fine else 0
        left = int(self.ranks.max(torch.tensor(left)))
        if left == 0:
            return
        step, _, terms, case_ids = unseen[-left]
        mine = [name for name, term in terms.items() if not math.isfinite(float(term))]
        found = processes.of_all(self.ranks, (mine, case_ids))
        bad = ", ".join(dict.fromkeys(name for names, _ in found for name in names))
        cases = ", ".join(name for _, names in found for name in names)
        error = UserError(
            f"the loss ({bad}) is no longer a number at step {step} of stage {self.stage}"
            f"{', cases ' if cases else ''}{cases}; "
            f"the last good checkpoint is step {self.saved} in {self.folder} (train anew with a lower train.lr or "
            "train.lr_bootstrap, or look at these cases)"
        )
        raise processes.same_on_all(self.ranks, error)
