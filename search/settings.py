"""What a run is told, as plain dataclasses: the same for the command line and for Python."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from agents.base import Agent
from agents.baselines import Uniform
from amc_env.costs.base import BudgetSettings
from amc_env.costs.latency import RUNTIMES
from amc_env.costs.latency.cost import LatencyBudget as LatencyBudget  # exported: users name it here
from amc_env.errors import UserError, require
from amc_env.evaluation.precision import FLOAT32, PRECISIONS
from amc_env.pruning.criteria import Criterion, Norm, check_fits
from amc_env.pruning.granularity import Channel, Granularity
from amc_env.pruning.regularization import NoRegularization, Regularization
from amc_env.pruning.schedule import Schedule
from amc_env.rewards import Error, RewardFunction

LATENCY_TABLE = "latency.json"
"""The file of a latency table in a run folder."""
SHORT_TERM = "short_term"
"""What a repair and steps of training after it are called in evaluations."""
_SHORT_TERM_STEPS = 50
REPAIRS = ("none", "least_squares", "batch_norm", "both", "sequential")


def channel_multiple(budgets: Iterable[BudgetSettings]) -> int:
    """What is kept of a layer is a multiple of this many channels, unless something else is asked for."""
    asked = (budget.channel_multiple for budget in budgets)
    return max((multiple for multiple in asked if multiple is not None), default=Channel.multiple)


@dataclass(frozen=True)
class RepairSettings:
    """How cut networks are mended before they are scored.

    Attributes:
        name: One of REPAIRS.
        images: Training images that least squares is calibrated on.
        per_image: Output positions sampled from each.
        norm_images: Training images that batch norms are re-estimated on.
        ridge: Ridge of the least squares, relative to the mean variance of a layer's inputs.
        mask_ridge: The same where weights are masked; it pulls towards the trained weights.
    """

    name: str = "least_squares"
    images: int = 2000
    per_image: int = 16
    norm_images: int = 500
    ridge: float = 1e-6
    mask_ridge: float = 1e-3

    def __post_init__(self) -> None:
        require(
            {
                "repair.name": (self.name in REPAIRS, self.name, f"one of {', '.join(REPAIRS)}"),
                "repair.images": (self.images >= 1, self.images, "at least 1"),
                "repair.per_image": (self.per_image >= 1, self.per_image, "at least 1"),
                "repair.norm_images": (self.norm_images >= 2, self.norm_images, "at least 2"),
                "repair.ridge": (self.ridge > 0, self.ridge, "above 0"),
                "repair.mask_ridge": (self.mask_ridge > 0, self.mask_ridge, "above 0"),
            }
        )


@dataclass(frozen=True)
class FinalistSettings:
    """The best strategies of a search are scored once more, by a dearer repair, and delivered as scored then.

    Attributes:
        count: How many; 0 delivers the best as the search scored it.
        repair: One of REPAIRS.
    """

    count: int = 8
    repair: str = "sequential"

    def __post_init__(self) -> None:
        require(
            {
                "finalists.count": (self.count >= 0, self.count, "at least 0"),
                "finalists.repair": (self.repair in REPAIRS, self.repair, f"one of {', '.join(REPAIRS)}"),
            }
        )


@dataclass(frozen=True)
class FinetuneSettings:
    """Fine-tuning of the pruned network: SGD, cosine schedule, the last epoch is kept.

    Attributes:
        epochs: 0 leaves it out.
        lr_fraction: Learning rate as a fraction of the original training's (the lecture: 1/100 to 1/10).
        batch_size: Images a step.
        momentum: Of SGD, Nesterov's.
        weight_decay: L2 weight decay.
        distillation: Share of the loss that follows the original network's outputs, in [0, 1]; 0: none (Hinton et
            al., arXiv 1503.02531).
        temperature: At which they are compared.
        from_scratch: Forget the weights and train the pruned network from new ones, the baseline of width multipliers
            (Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019); set lr_fraction to 1 with it.
    """

    epochs: int = 10
    lr_fraction: float = 0.1
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4
    distillation: float = 0.0
    temperature: float = 4.0
    from_scratch: bool = False

    def __post_init__(self) -> None:
        require(
            {
                "finetune.epochs": (self.epochs >= 0, self.epochs, "at least 0"),
                "finetune.lr_fraction": (0 < self.lr_fraction <= 1, self.lr_fraction, "in (0, 1]"),
                "finetune.batch_size": (self.batch_size >= 2, self.batch_size, "at least 2"),
                "finetune.momentum": (0 <= self.momentum < 1, self.momentum, "in [0, 1)"),
                "finetune.weight_decay": (self.weight_decay >= 0, self.weight_decay, "at least 0"),
                "finetune.distillation": (0 <= self.distillation <= 1, self.distillation, "in [0, 1]"),
                "finetune.temperature": (self.temperature > 0, self.temperature, "above 0"),
            }
        )


@dataclass(frozen=True)
class ShortTermSettings:
    """Short-term fine-tuning of candidates before they are scored; see `search.training.short_term`.

    Attributes:
        steps: Of SGD; 0 for none. None: 50 for an agent that adopts weights (netadapt), 0 for others.
        winner_only: Whether an agent that adopts weights has only the winner of a round tuned, and its proposals
            scored as they are repaired.
        lr_fraction: Learning rate as a fraction of the original training's (NetAdapt's release: 1e-3 for 0.1).
        batch_size: Images a step.
        momentum: Of SGD, Nesterov's.
        weight_decay: L2 weight decay.
    """

    steps: int | None = None
    winner_only: bool = False
    lr_fraction: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        require(
            {
                "short_term.steps": (self.steps is None or self.steps >= 0, self.steps, "at least 0"),
                "short_term.lr_fraction": (0 < self.lr_fraction <= 1, self.lr_fraction, "in (0, 1]"),
                "short_term.batch_size": (self.batch_size >= 2, self.batch_size, "at least 2"),
                "short_term.momentum": (0 <= self.momentum < 1, self.momentum, "in [0, 1)"),
                "short_term.weight_decay": (self.weight_decay >= 0, self.weight_decay, "at least 0"),
            }
        )


@dataclass(frozen=True)
class ScoringSettings:
    """How candidates are run for scoring; batch size and memory layout move logits by rounding only.

    Attributes:
        batch_size: Images of a batch; None: see `amc_env.evaluation.scorer.batch_size_for`.
        channels_last: Memory format of images and convolution weights.
        precision: One of `amc_env.evaluation.precision.PRECISIONS`.
        threads: Of torch for a candidate; None: the run's.
    """

    batch_size: int | None = None
    channels_last: bool = True
    precision: str = FLOAT32
    threads: int | None = None

    def __post_init__(self) -> None:
        require(
            {
                "evaluator.batch_size": (
                    self.batch_size is None or self.batch_size >= 1,
                    self.batch_size,
                    "at least 1, or null for one that suits the images and the device",
                ),
                "evaluator.precision": (
                    self.precision in PRECISIONS,
                    self.precision,
                    f"one of {', '.join(PRECISIONS)}",
                ),
                "evaluator.threads": (
                    self.threads is None or self.threads >= 1,
                    self.threads,
                    "at least 1, or null for the run's own",
                ),
            }
        )


@dataclass(frozen=True)
class LatencySettings:
    """How latency is measured at the end: medians of interleaved passes.

    Attributes:
        batch: Images of the batch.
        repeats: Timed passes of each network; 0 leaves the measurement out.
        runtime: What runs the networks; see `amc_env.costs.latency.runtimes`.
        threads: Of the processor for a pass; None: the run's own.
    """

    batch: int = 1
    repeats: int = 50
    runtime: str = "eager"
    threads: int | None = None

    def __post_init__(self) -> None:
        require(
            {
                "latency.batch": (self.batch >= 1, self.batch, "at least 1"),
                "latency.repeats": (self.repeats >= 0, self.repeats, "at least 0"),
                "latency.runtime": (self.runtime in RUNTIMES, self.runtime, f"one of {', '.join(RUNTIMES)}"),
                "latency.threads": (self.threads is None or self.threads >= 1, self.threads, "at least 1"),
            }
        )


@dataclass(frozen=True)
class Settings:
    """A whole run.

    Attributes:
        agent: Who decides.
        episodes: Episodes, or evaluations of agents that do not step.
        budgets: Limits that must hold; none for an accuracy-guaranteed search.
        stages: Shares of the first budget's cost, falling: one search each, from the network that the one before
            left, pruned and fine-tuned. Empty: one search.
        schedule: Rounds over which the strategy found is reached, fine-tuned after each.
        regularization: Loss term before and while channels or weights are cut.
        enforce_budget: Whether the environment raises actions to the bound.
        fill_budget: Whether the environment uses the budget up at an episode's end (not in AMC).
        seed: Of the agent, of calibration positions and of fine-tuning.
        device: Where networks run, as torch names it.
        export: Formats of the small network.
        original_lr: The original training's learning rate.
    """

    agent: Agent
    episodes: int
    budgets: tuple[BudgetSettings, ...] = (BudgetSettings("macs"),)
    stages: tuple[float, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)
    regularization: Regularization = field(default_factory=NoRegularization)
    granularity: Granularity = field(default_factory=Channel)
    criterion: Criterion = field(default_factory=Norm)
    repair: RepairSettings = field(default_factory=RepairSettings)
    finalists: FinalistSettings = field(default_factory=FinalistSettings)
    reward: RewardFunction = field(default_factory=Error)
    enforce_budget: bool = True
    fill_budget: bool = True
    short_term: ShortTermSettings = field(default_factory=ShortTermSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    latency: LatencySettings = field(default_factory=LatencySettings)
    export: tuple[str, ...] = ("safetensors", "pt2")
    original_lr: float = 0.1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        require(
            {
                "search.episodes": (self.episodes >= 1, self.episodes, "at least 1"),
                "seed": (0 <= self.seed < 2**32, self.seed, "in [0, 2**32)"),
            }
        )
        if self.enforce_budget and getattr(self.reward, "needs_bound_off", False):
            raise UserError(
                "this reward judges strategies that miss the budget, which the bound on the action lets none "
                "do: set enforce_budget=false, or take reward=error"
            )
        check_fits(self.criterion, self.granularity.name)
        self._check_budgets()
        self._check_training()
        if isinstance(self.agent, Uniform) and self.agent.ratio is None and not self.budgets:
            raise UserError(
                "agent=uniform needs a budget, or a ratio of its own: set agent.ratio, like agent.ratio=0.5"
            )

    def _check_budgets(self) -> None:
        """Refuses two budgets of one cost, and what would move a stored size after it was limited."""
        costs = [budget.cost for budget in self.budgets]
        twice = sorted({cost for cost in costs if costs.count(cost) > 1})
        if twice:
            raise UserError(f"there are two budgets of {', '.join(twice)}: leave one out, of budget and also")
        adapts, rounds = getattr(self.agent, "tunes", False), self.schedule.rounds
        if (rounds > 1 or adapts) and any(getattr(budget, "format", "") == "eie" for budget in self.budgets):
            what = f"agent={self.agent.name}" if adapts else f"schedule.rounds={rounds}"
            raise UserError(
                f"{what} ranks anew each round, and EIE's padding depends on where zeros lie, so the limit could be missed: "
                f"use budget.format=csr, or {'another agent' if adapts else 'schedule=one_shot'}"
            )

    def _check_training(self) -> None:
        """Refuses stages and rounds that there is nothing to train or no budget for."""
        rounds, epochs = self.schedule.rounds, self.finetune.epochs
        falling = all(a > b for a, b in pairwise(self.stages)) and all(0 < r <= 1 for r in self.stages)
        require(
            {
                "search.stages": (
                    falling,
                    list(self.stages),
                    "shares in (0, 1], each below the one before",
                ),
                "schedule.rounds": (
                    rounds == 1 or rounds <= epochs,
                    rounds,
                    f"at most finetune.epochs={epochs}: every round is fine-tuned",
                ),
            }
        )
        if getattr(self.agent, "tunes", False) and (self.stages or rounds > 1):
            raise UserError(
                f"agent={self.agent.name} goes in rounds of its own, fine-tuned each: leave search.stages=[] and "
                "schedule=one_shot"
            )
        if self.finetune.from_scratch and rounds > 1:
            raise UserError(
                f"finetune.from_scratch=true forgets what schedule.rounds={rounds} trained: use schedule=one_shot"
            )
        if self.stages and any(budget.limit for budget in self.budgets):
            raise UserError("search.stages are shares of the original cost: leave budget.limit=null")
        if self.stages and (len(self.budgets) != 1 or not epochs):
            raise UserError(
                f"search.stages={list(self.stages)} are shares of one budget's cost, fine-tuned between: set one "
                "budget (budget=params) and finetune.epochs above 0"
            )

    def in_folder(self, folder: Path) -> Settings:
        """The same, with a latency table that is built for the run kept in its folder."""
        tables = tuple(
            replace(budget, kept=folder / LATENCY_TABLE) if isinstance(budget, LatencyBudget) else budget
            for budget in self.budgets
        )
        return replace(self, budgets=tables)

    @property
    def short_term_steps(self) -> int:
        """Steps that candidates are tuned for before they are scored or adopted."""
        if self.short_term.steps is None:
            return _SHORT_TERM_STEPS if self.agent.tunes else 0
        return self.short_term.steps

    @property
    def scored_by(self) -> str:
        """The repair that candidates of the search are scored with."""
        if self.short_term_steps and not (self.agent.tunes and self.short_term.winner_only):
            return SHORT_TERM
        return self.repair.name

    @property
    def rescored(self) -> int:
        """How many of the best strategies are scored once more at the end, by a dearer repair.

        What was tuned is compared as it is: such a repair without the training would not be better.
        """
        return 0 if self.scored_by in (SHORT_TERM, self.finalists.repair) else self.finalists.count

    @property
    def trains_between(self) -> bool:
        """Whether weights that candidates are cut from are trained within the run."""
        return len(self.stages) > 1 or self.regularization.before_epochs > 0

    @property
    def all_epochs(self) -> int:
        """Epochs of all trainings of the run."""
        return self.regularization.before_epochs + self.finetune.epochs * max(1, len(self.stages))
