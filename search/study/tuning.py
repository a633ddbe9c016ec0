"""Training within a run: of the pruned network, between rounds and stages, and before anything is cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from amc_env.errors import UserError, first_line
from amc_env.evaluation.evaluator import Evaluator
from amc_env.evaluation.pruner import Pruned
from amc_env.graph.copying import module_copy
from amc_env.pruning.candidate import widen
from amc_env.pruning.granularity import traced
from amc_env.pruning.regularization import GroupLasso, LossTerm
from amc_env.space import Strategy, Trial
from search.study.evaluation import start_of
from search.study.identity import describe, weights_fingerprint
from search.study.problem import PruningProblem, builder_of
from search.training.batches import Batches, FirstBatches, training_batches
from search.training.finetune import OnEpoch, finetune, forget_weights
from search.training.training_file import TrainingFile

TRAINING_FOLDER = "training"
"""Of the state of each training after its last epoch, in the run folder, until the run is over."""


class Tuner:
    """Fine-tunes networks of a run as its settings say, and counts the epochs of all of them.

    Attributes:
        done: Epochs so far.

    Args:
        problem: The run.
        on_epoch: Called with (epoch of the whole run from 1, mean loss, learning rate, score on the search split).
        folder: The run folder, where the state after each epoch is kept; None: it is not kept.
    """

    def __init__(
        self,
        problem: PruningProblem,
        on_epoch: Callable[[int, float, float, float], None],
        folder: Path | None = None,
    ):
        self._problem = problem
        self._on_epoch = on_epoch
        self._folder = folder
        self.done = 0
        self._beside = 0  # epochs of networks that were trained beside the one at hand, not before it

    def __call__(
        self,
        network: nn.Module,
        epochs: int,
        masks: Mapping[str, Tensor] | None = None,
        *,
        regularized: bool,
    ) -> nn.Module:
        """Tunes ``network`` in place and gives it back, in eval mode.

        Args:
            network: The network.
            epochs: How long.
            masks: Weights that stay, by layer; the others are held at zero.
            regularized: Whether the regulariser's loss term is added.
        """
        before = self.done

        def on_epoch(epoch: int, loss: float, lr: float, seconds: float) -> None:
            self._on_epoch(before + epoch, loss, lr, self._score(network))

        file = self._file(network, epochs) if self._folder else None
        self._train(network, self._batches(), epochs, masks, regularized, on_epoch, file)
        self.done += epochs
        return network.eval()

    def try_step(self, network: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        """Trains ``network`` for one step, which shows whether fine-tuning works at all.

        Raises:
            UserError: It does not: the loader's batches do not fit, nothing can be trained, or the network fails in train
                mode.
        """
        regularized = self._problem.settings.regularization.during
        try:
            self._train(network, FirstBatches(self._batches(), 1), 1, masks, regularized, None)
        except UserError:
            raise
        except Exception as error:  # whatever a user's network and loader do not agree on
            raise UserError(
                f"a pruned network cannot be trained: {type(error).__name__}: {first_line(error)}; does it work in train "
                "mode, and do the batches fit it? Else set {field}=0",
                code="cannot_train",
                field="finetune.epochs",
            ) from error

    def _file(self, network: nn.Module, epochs: int) -> TrainingFile:
        """Of the training that begins now: known by its place in the run, the weights and the settings."""
        assert self._folder is not None
        settings = self._problem.settings
        named = (
            settings.finetune,
            settings.regularization,
            settings.original_lr,
            settings.seed,
            settings.device,
        )
        key = {
            "weights": weights_fingerprint(network),
            "data": self._problem.data.fingerprint,
            "epochs": [self.done, epochs],
            "threads": torch.get_num_threads(),
            "settings": describe(named),
        }
        return TrainingFile(self._folder / TRAINING_FOLDER / f"{self.done}.pt", json.dumps(key))

    def forget(self) -> None:
        """Remove the state of trainings that are over."""
        if self._folder is not None:
            shutil.rmtree(self._folder / TRAINING_FOLDER, ignore_errors=True)

    def _score(self, network: nn.Module) -> float:
        """Its score on the search split; of a copy, so that nothing of the training changes."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            return self._problem.score(module_copy(network).eval(), self._problem.data.search)

    def _batches(self) -> Batches:
        settings, size = self._problem.settings, self._problem.settings.finetune.batch_size
        return training_batches(
            self._problem.data, size, settings.seed + self.done - self._beside, settings.device
        )

    def _train(
        self,
        network: nn.Module,
        batches: Batches,
        epochs: int,
        masks: Mapping[str, Tensor] | None,
        regularized: bool,
        on_epoch: OnEpoch | None,
        file: TrainingFile | None = None,
    ) -> None:
        settings, chosen = self._problem.settings, self._problem.settings.finetune
        share = chosen.teacher_share(settings.task)
        try:
            finetune(
                network,
                batches,
                epochs=epochs,
                lr=chosen.lr_fraction * settings.original_lr,
                momentum=chosen.momentum,
                weight_decay=chosen.weight_decay,
                warmup_epochs=chosen.warmup * epochs,
                clip=chosen.clip,
                seed=settings.seed,
                device=settings.device,
                on_epoch=on_epoch,
                penalty=penalty_of(self._problem, network) if regularized else None,
                teacher=self._problem.model if share else None,
                distillation=share,
                temperature=chosen.temperature,
                masks=masks or None,
                file=file,
                task=settings.task,
                precision=chosen.precision,
            )
        except UserError as error:
            raise error.renamed(self._path) from error

    def _path(self, field: str) -> str:
        """Where the user sets what training calls ``field``."""
        own = field == "batch_size" and self._problem.data.loader is not None
        return f"train_loader.{field}" if own else f"finetune.{field}"

    def next_network(self, after: int) -> None:
        """Train the next network as if only so many epochs of the run were done, whatever others were trained for."""
        self._beside = self.done - after

    def skip(self, epochs: int) -> None:
        """Counts epochs that an earlier session of the run has trained."""
        self.done += epochs


def penalty_of(problem: PruningProblem, network: nn.Module) -> LossTerm | None:
    """The regulariser's loss term for a network of this run.

    Raises:
        UserError: The network has nothing that the term could be taken of.
    """
    regularization = problem.settings.regularization
    graph = None
    if isinstance(regularization, GroupLasso):  # a cut network has groups of its own sizes
        graph = traced(network, problem.inputs(problem.data.search, 2), problem.settings.granularity)
    return regularization.penalty(network, graph)


def finetuned(problem: PruningProblem, evaluator: Evaluator, trial: Trial, tune: Tuner) -> Pruned:
    """The strategy of a trial, applied and fine-tuned over the schedule's rounds.

    Args:
        problem: The run.
        evaluator: The one that scored the trial.
        trial: What is to be reached.
        tune: Fine-tunes.
    """
    settings = problem.settings
    shares = settings.schedule.shares
    start = trial.start
    for number, share in enumerate(shares, start=1):
        strategy = part_of(problem, trial.strategy, share)
        pruned = evaluator.apply(strategy, start=start, repair=trial.repair)
        if settings.finetune.from_scratch:
            forget_weights(pruned.network, settings.seed)
        epochs = settings.finetune.epochs * number // len(shares)
        epochs -= settings.finetune.epochs * (number - 1) // len(shares)
        tune(pruned.network, epochs, pruned.masks, regularized=settings.regularization.during)
        if number < len(shares):
            start = f"{trial.start}, round {number}"
            wide = widen(pruned.network, pruned.keeps, problem.model)
            evaluator.add(start_of(problem, start, builder_of(problem, wide, pruned.units)))
    return pruned


def part_of(problem: PruningProblem, strategy: Strategy, share: float) -> Strategy:
    """The strategy with this share of its pruning ratios, as feasible counts; all of it for 1."""
    if share == 1.0:
        return strategy
    counts = problem.space.snap([share * ratio for ratio in strategy.ratios])
    return problem.space.strategy([min(*pair) for pair in zip(counts, strategy.removed, strict=True)])
