"""The loop: one stage of training around a method, with its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
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
from mlbseg.training.journal import LOG_EVERY, Journal
from mlbseg.training.optimising import lr_factor, make_optimiser, require_fitting
from mlbseg.training.signals import StopSignals
from mlbseg.training.watching import Watch
from mlbseg.training.weights import WeightKeeper, kept_steps
from mlbseg.types import Batch, Losses


class Loop:
    """One stage: whatever the method yields is one optimiser step.

    Ranks that train together go through it in step. All of them end a step alike, whichever of them met a signal or
    a loss that is no number; rank 0 alone shows and writes.

    Args:
        run: The run folder.
        stage: 1 or 2.
        method: What is trained.
        dataset: Its batches, a step each.
        lr: Learning rate of the stage, before its schedule.
        device: Where to train.
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
        device: torch.device,
        signals: StopSignals,
        score: Callable[[Method], float] | None,
        console: Console | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.run = run
        self.folder = run.root / "checkpoints"
        self.stage = stage
        self.method = method
        self.dataset = dataset
        self.lr = lr
        self.device = device
        self.signals = signals
        self.score = score
        self.console = console
        self.ranks = ranks
        self.settings = run.config.train
        self.step = 0
        self.best = -1.0
        self.best_weights: dict[str, Tensor] = {}
        self.watch = Watch(stage, self.folder, ranks, at_once=self.looks_each_step)
        self.keeper: WeightKeeper | None = None
        if stage == 2 and ranks.index == 0:
            self.keeper = WeightKeeper(run.root, dataset, run.split.noisy, self.settings.precision, device)
        self.optimiser = make_optimiser(method.trained(), self.settings, lr)
        method.optimiser = self.optimiser
        method.ranks = ranks
        method.length, method.epoch = len(dataset), dataset.epoch

    @property
    def looks_each_step(self) -> bool:
        """Whether values are looked at in every step: on a GPU each look would wait for all that it has to do."""
        return self.device.type == "cpu"

    # --- state -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on; random numbers depend on the step alone."""
        return {
            "method": self.method.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": self.best,
            "best_weights": self.best_weights,
        }

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: if it is damaged, or of other networks.
        """
        content = checkpoint.load(self.device)
        self.method.to(self.device)
        try:
            self.method.load_state_dict(content["method"])
            self.optimiser.load_state_dict(content["optimiser"])
            self.best, self.best_weights = float(content["best"]), dict(content["best_weights"])
            require_fitting(self.optimiser)
            shapes = {name: tensor.shape for name, tensor in self.method.state_dict().items()}
            if self.best_weights and {n: t.shape for n, t in self.best_weights.items()} != shapes:
                raise ValueError
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            if out_of_memory(error):
                raise
            raise UserError(
                f"{checkpoint.path}: does not fit this run (undo the change of config.yaml or plan.json, "
                "or train anew)"
            ) from None
        self.step = self.watch.saved = checkpoint.step

    def save(self) -> None:
        """Write a checkpoint of the state after `step` steps.

        Raises:
            UserError: if a value since the last one, or a weight, is no number.
        """
        weights = [w for w in self.method.state_dict().values() if w.is_floating_point() and w.numel()]
        largest = torch.stack([w.detach().abs().amax().double() for w in weights]).amax()  # or NaN, if any is
        self.watch.see(self.step, largest, {"weights": largest})
        self.watch.look()
        if self.ranks.index == 0:
            final = self.step == len(self.dataset)
            checkpoints.save(self.folder, self.stage, self.step, self.state(), final=final)
        self.watch.saved = self.step

    # --- the loop ----------------------------------------------------------------------------------------

    def fit(self, title: str, until: int) -> None:
        """Train until so many steps are done, or a signal comes, and save.

        Raises:
            UserError: if a batch cannot be drawn, or a loss is no number.
            OSError: if a file of a batch cannot be read.
        """
        # Weights before the first step, so that an early end can be resumed too.
        if self.step == 0:
            self.save()
        loader = make_loader(
            self.dataset,
            range(self.step, until),
            workers=self.settings.workers,
            device=self.device,
            channels=self.run.plan.channels,
            ranks=1 if self.ranks.count == 1 else processes.nodes()[0],
        )
        writes = self.ranks.index == 0
        with (
            StepProgress(self.console, title, len(self.dataset), self.step) as progress,
            closing(Journal(self.run.root, self.stage, self.step, writes=writes)) as journal,
        ):
            for batch in loader:
                if isinstance(batch, Exception):
                    raise batch
                values = self.take_step(batch.to(self.device))
                values |= self._validated()
                self._note(values, journal)
                progress.update(self.step, journal.shown)
                stopped_by = int(self.ranks.max(torch.tensor(self.signals.stopped_by)))
                if self.step % self.settings.checkpoint_every == 0 or self.step == until or stopped_by:
                    self.save()
                if stopped_by:
                    self.signals.stopped_by = stopped_by
                    return

    def take_step(self, batch: Batch) -> dict[str, Tensor | float]:
        """Take the optimiser steps of one training step, and return its values.

        Raises:
            UserError: if a loss is no number.
        """
        method = self.method
        seed_random(batch.seed + self.ranks.index, self.device)  # dropout
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * lr_factor(self.step, self.settings, self.dataset)
        method.train()
        values: dict[str, Tensor | float] = {}
        for losses in self._losses(batch):
            total = torch.stack(list(losses.values())).sum()
            self.watch.see(self.step, total, losses, batch.case_ids)
            self.optimiser.zero_grad(set_to_none=True)
            total.backward()
            self._sum_gradients()
            norms = [torch.nn.utils.clip_grad_norm_(own, self.settings.clip) for own in method.clipped()]
            norm = torch.stack(norms).amax()  # or NaN, if any is
            # A step along it would spoil the weights, and the next checkpoint.
            self.watch.see(self.step, norm, {**losses, "gradient": norm}, batch.case_ids)
            self.optimiser.step()
            values |= {name: term.detach() for name, term in losses.items()}
        method.after_step(self.step)
        self.step += 1
        return values

    def _losses(self, batch: Batch) -> Iterator[Losses]:
        """Draw the method's losses one by one, each computed under autocast, none of the stepping."""
        losses = self.method.losses(batch, self.step)
        while True:
            # Leaving the context drops autocast's copies of the weights, which the step makes stale.
            with autocast(self.settings.precision, self.device):
                terms = next(losses, None)
            if terms is None:
                return
            yield terms

    def _sum_gradients(self) -> None:
        """Add up the gradients of all ranks: a loss is that of the whole batch, its gradient that of a rank's part."""
        if self.ranks.count == 1:
            return
        held = {str(i): p for i, p in enumerate(self.method.trained()) if p.grad is not None}
        summed = self.ranks.sum_all({name: p.grad for name, p in held.items() if p.grad is not None})
        for name, p in held.items():
            p.grad = summed[name]

    def _validated(self) -> dict[str, Tensor | float]:
        """Validate where it is time to; keep the best weights."""
        last = self.step == len(self.dataset)
        if self.score is None or not (self.step % self.settings.validate_every == 0 or last):
            return {}
        self.watch.look()
        score = self.score(self.method)
        if score > self.best:
            self.best = score
            self.best_weights = {k: v.detach().cpu().clone() for k, v in self.method.state_dict().items()}
        return {"validation_dice": score}

    def _note(self, values: dict[str, Tensor | float], journal: Journal) -> None:
        """Write down the values of a step, and the weights of a patch, where it is time to."""
        last = self.step == len(self.dataset)
        written = self.step % LOG_EVERY == 0 or last or "validation_dice" in values
        if written or self.looks_each_step:
            self.watch.look()
            fetched = {name: float(value) for name, value in {**values, **self.method.monitors}.items()}
            journal.show(fetched)
            if written:
                journal.write(self.step, self.optimiser.param_groups[0]["lr"], fetched)
        if self.keeper is not None and self.step in kept_steps(len(self.dataset)):
            self.keeper.keep(self.method, self.step)
