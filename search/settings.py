"""The settings of a run as dataclasses: the same for the command line and for Python."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from agents.base import Agent
from agents.baselines import Uniform
from agents.sensitivity import RATIOS, Ratios
from agents.surrogate import Surrogate
from amc_env.costs.base import BudgetSettings
from amc_env.costs.latency import RuntimeName
from amc_env.costs.latency.cost import LatencyBudget as LatencyBudget  # exported: users name it here
from amc_env.errors import UserError, out_of_range
from amc_env.evaluation.precision import Precision, TrainingPrecision
from amc_env.pruning.criteria import Criterion, Norm, check_fits
from amc_env.pruning.granularity import Channel, Granularity
from amc_env.pruning.regularization import NoRegularization, Regularization
from amc_env.pruning.schedule import Schedule
from amc_env.rewards import Error, RewardFunction
from amc_env.tasks import Classification, Task
from amc_env.validation import (
    BatchSize,
    Count,
    Fraction,
    FractionOrZero,
    Listed,
    Natural,
    NotNegative,
    Positive,
    Share,
    ShareOrZero,
    Threads,
    TrainingBatch,
    settings,
)

LATENCY_TABLE = "latency.json"
"""The file of a latency table in a run folder."""
SHORT_TERM = "short_term"
"""What a repair and steps of training after it are called in evaluations."""
_SHORT_TERM_STEPS = 50
_TEACHER_SHARE = 0.5
BUDGETS = "search.budgets"
"""What configurations call `Settings.ratios`."""
SAFE_LR = 0.01
"""Taken for the original learning rate where that is not known."""
RepairName = Literal["none", "least_squares", "batch_norm", "both", "sequential"]
Baseline = Literal["uniform", "random"]
REPAIRS: tuple[str, ...] = get_args(RepairName)
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def channel_multiple(budgets: Iterable[BudgetSettings]) -> int:
    """What is kept of a layer is a multiple of this many channels, unless something else is asked for."""
    asked = (budget.channel_multiple for budget in budgets)
    return max((multiple for multiple in asked if multiple is not None), default=Channel.multiple)


@settings
class RepairSettings:
    """How pruned networks are repaired before they are scored.

    Attributes:
        name: What repairs them.
        images: Training images that least squares is calibrated on. ``sequential`` runs every candidate on them.
        per_image: Output positions sampled from each.
        norm_images: Training images that batch norms are re-estimated on.
        ridge: Ridge of the least squares, relative to the mean variance of a layer's inputs.
        mask_ridge: The same where weights are masked; it pulls towards the trained weights.
    """

    name: RepairName = "sequential"
    images: Count = 500
    per_image: Count = 64
    norm_images: Annotated[int, Field(ge=2)] = 500
    ridge: Positive = 1e-6
    mask_ridge: Positive = 1e-3


@settings
class FinalistSettings:
    """The best strategies of a search are scored once more, by a more expensive repair, and delivered as scored then.

    A search that scores by that repair has no finalists.

    Attributes:
        count: How many; 0 delivers the best as the search scored it.
        repair: What repairs them.
    """

    count: Natural = 8
    repair: RepairName = "sequential"


@settings
class FinetuneSettings:
    """Fine-tuning of the pruned network: SGD, warm-up and cosine schedule, the last epoch is kept.

    Attributes:
        epochs: 0 leaves it out.
        lr_fraction: Learning rate as a fraction of the original training's. Often 1/100 to 1/10 is advised; docs/results.md
            compares rates.
        batch_size: Images a step.
        momentum: Of SGD, Nesterov's.
        weight_decay: L2 weight decay.
        distillation: Share of the loss that follows the original network's outputs, in [0, 1]; 0: none (Hinton et
            al., arXiv 1503.02531). None: 0.5, and 0 for a task without a loss for it and with `from_scratch`.
        temperature: At which they are compared.
        from_scratch: Forget the weights and train the pruned network from new ones, the baseline of width multipliers
            (Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019); set lr_fraction to 1 with it.
        warmup: Share of the epochs in which the learning rate rises linearly.
        clip: Largest norm of the gradient; None: 1 for networks without batch norms, no limit for others.
        precision: What the network computes in; weights and losses stay in float32. None: float16 on CUDA, elsewhere
            float32. Processors with AMX train ResNets twice as fast in bfloat16, vision transformers 1.5 times, and
            MobileNet-V1 more slowly.
        keep: ``better`` delivers the network without fine-tuning where fine-tuning lowered its score on the search split
            by more than two standard errors; ``last`` always delivers the fine-tuned one.
    """

    epochs: Natural = 10
    lr_fraction: Share = 0.3
    batch_size: TrainingBatch = 128
    momentum: FractionOrZero = 0.9
    weight_decay: NotNegative = 5e-4
    distillation: ShareOrZero | None = None
    temperature: Positive = 4.0
    from_scratch: bool = False
    warmup: FractionOrZero = 0.05
    clip: Positive | None = None
    precision: TrainingPrecision | None = None
    keep: Literal["better", "last"] = "better"

    def teacher_share(self, task: Task) -> float:
        """The teacher's share of the loss, in [0, 1]."""
        if self.distillation is not None:
            return self.distillation
        return 0.0 if self.from_scratch or not task.distils else _TEACHER_SHARE


@settings
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

    steps: Natural | None = None
    winner_only: bool = False
    lr_fraction: Share = 0.01
    batch_size: TrainingBatch = 128
    momentum: FractionOrZero = 0.9
    weight_decay: NotNegative = 1e-4


@settings
class ScoringSettings:
    """How candidates are run for scoring; batch size and memory layout move logits by rounding only.

    Attributes:
        batch_size: Images of a batch; None: see `amc_env.evaluation.scorer.batch_size_for`.
        channels_last: Memory format of images and convolution weights.
        precision: One of `amc_env.evaluation.precision.PRECISIONS`.
        threads: Of torch for a candidate; None: the run's.
        actors: Processes of Ray that score candidates side by side; 0: this process scores them.
        address: Of a Ray cluster to join, ``auto`` for one that runs here; None: a Ray is started for the run. Neither
            changes a score.
    """

    batch_size: BatchSize | None = None
    channels_last: bool = True
    precision: Precision = "float32"
    threads: Threads | None = field(default=None, metadata={"identity": False})
    actors: Natural = field(default=0, metadata={"identity": False})
    address: str | None = field(default=None, metadata={"identity": False})


@settings
class LatencySettings:
    """How latency is measured at the end: medians of interleaved passes.

    Attributes:
        batch: Images of the batch.
        repeats: Timed passes of each network; 0 leaves the measurement out.
        runtime: What runs the networks; see `amc_env.costs.latency.runtimes`.
        threads: Of the processor for a pass; None: the run's own.
    """

    batch: BatchSize = 1
    repeats: Natural = 50
    runtime: RuntimeName = "eager"
    threads: Threads | None = None


@settings
class SensitivitySettings:
    """What a sensitivity scan scores and picks.

    Attributes:
        ratios: Shares removed, each in (0, 1); the nearest feasible counts are scored.
        threshold: Accuracy that may be given up at once, in [0, 1); more where the budget asks for it. None without a
            budget: nothing is picked.
    """

    ratios: Ratios = RATIOS
    threshold: FractionOrZero | None = None


@settings
class CheckSettings:
    """Networks cut at random that a latency table is checked by.

    Attributes:
        networks: How many.
        seed: Of the cuts.
    """

    networks: Annotated[int, Field(ge=3)] = 30
    seed: Seed = 1


@settings
class LatencyStudySettings:
    """What amc-latency measures.

    Attributes:
        do: The task.
        table: File of the latency table; None: latency.json in the run folder.
        tolerance: What interpolation may miss, as a share of the network's latency divided by its layers.
        points: The most that refining may time.
        seed: Of the random weights, the order of passes and the networks that the table is corrected by.
        device: Where networks run, as torch names it.
    """

    do: Literal["show", "build", "check"] = "show"
    table: str | None = None
    tolerance: Fraction = 0.05
    points: Natural = 1500
    seed: Seed = 0
    device: str = "cpu"
    granularity: Granularity = field(default_factory=Channel)
    latency: LatencySettings = field(default_factory=LatencySettings)
    check: CheckSettings = field(default_factory=CheckSettings)

    def __post_init__(self) -> None:
        if self.granularity.masked:
            raise UserError(
                f"granularity={self.granularity.name} sets weights to zero, which makes no network faster in dense "
                "runtimes: use granularity=channel",
                field="granularity",
                code="does_not_fit",
            )
        if self.latency.repeats < 1:
            raise out_of_range("latency.repeats", self.latency.repeats, "at least 1")
        if self.check.seed == self.seed:
            allowed = f"another one than seed={self.seed}, which corrects the table"
            raise out_of_range("check.seed", self.check.seed, allowed)
        if self.do == "show" and self.table is not None:
            raise UserError(
                f"{{field}}={self.table} is for amc-latency build and amc-latency check; show measures alone",
                field="table",
                code="conflict",
            )


@settings
class Settings:
    """All settings of a run.

    Attributes:
        agent: Who decides.
        episodes: Episodes, or evaluations of agents that do not step.
        baselines: Scored beside the agent for comparison, after the search: ``uniform``, and ``random`` at as many
            evaluations. None: uniform, and random as well where an evaluation takes less than 1e9 MACs.
        budgets: Limits that must hold; none for an accuracy-guaranteed search.
        stages: Shares of the first budget's cost, falling: one search each, from the network that the one before
            left, pruned and fine-tuned. Empty: one search.
        ratios: Shares of the budget's cost, falling: one search and one network each, all from the original weights and
            with shared scores. They replace the budget's ratio. Empty: one search.
        schedule: Rounds over which the strategy found is reached, fine-tuned after each.
        regularization: Loss term before and while channels or weights are cut.
        enforce_budget: Whether the environment raises actions to the bound.
        fill_budget: Whether the environment uses the budget up at an episode's end (not in AMC).
        keep: Layers that are not pruned: patterns of names, like ``stem.*``, or names of classes, like ``Linear``.
        seed: Of the agent, of calibration positions and of fine-tuning.
        device: Where networks run, as torch names it.
        export: Formats of the small network.
        original_lr: The original training's learning rate. The default is safe for networks that were trained by Adam, too.
        task: What the network is for: how its output is read, its loss and its score.
    """

    agent: Agent = field(default_factory=Surrogate)
    episodes: Count = 300
    baselines: Listed[Baseline] | None = None
    budgets: Listed[BudgetSettings] = (BudgetSettings("macs"),)
    stages: Listed[Share] = ()
    ratios: Listed[Fraction] = ()
    schedule: Schedule = field(default_factory=Schedule)
    regularization: Regularization = field(default_factory=NoRegularization)
    granularity: Granularity = field(default_factory=Channel)
    keep: Listed[str] = ()
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
    export: Listed[str] = ("safetensors", "pt2")
    original_lr: Positive = SAFE_LR
    seed: Seed = 0
    device: str = "cpu"
    task: Task = field(default_factory=Classification)

    def __post_init__(self) -> None:
        if self.enforce_budget and getattr(self.reward, "needs_bound_off", False):
            raise UserError(
                "this reward judges strategies that miss the budget, which the bound on the action lets none "
                "do: set enforce_budget=false, or take reward=error",
                code="conflict",
                field="reward",
            )
        check_fits(self.criterion, self.granularity.name)
        self._check_budgets()
        self._check_ratios()
        self._check_training()
        if isinstance(self.agent, Uniform) and self.agent.ratio is None and not self.budgets:
            raise UserError(
                "agent=uniform needs a budget, or a ratio of its own: set agent.ratio, like agent.ratio=0.5",
                code="missing",
                field="agent.ratio",
            )

    def _check_budgets(self) -> None:
        """Refuses two budgets of one cost, and what would move a stored size after it was limited."""
        costs = [budget.cost for budget in self.budgets]
        twice = sorted({cost for cost in costs if costs.count(cost) > 1})
        if twice:
            raise UserError(
                f"there are two budgets of {', '.join(twice)}: leave one out, of budget and also",
                code="conflict",
                field="budgets",
            )
        adapts, rounds = getattr(self.agent, "tunes", False), self.schedule.rounds
        if (rounds > 1 or adapts) and any(getattr(budget, "format", "") == "eie" for budget in self.budgets):
            what = f"agent={self.agent.name}" if adapts else f"schedule.rounds={rounds}"
            raise UserError(
                f"{what} ranks again each round, and EIE's padding depends on where zeros lie, so the limit could be missed: "
                f"use budget.format=csr, or {'another agent' if adapts else 'schedule=one_shot'}",
                code="conflict",
                field="budget.format",
            )

    def _check_ratios(self) -> None:
        """Refuses several budgets that are out of order, or together with what they replace."""
        if not self.ratios:
            return
        if not all(a > b for a, b in pairwise(self.ratios)):
            allowed = "shares in (0, 1), each below the one before"
            raise out_of_range(BUDGETS, list(self.ratios), allowed)
        if len(self.budgets) != 1:
            raise UserError(
                f"{{field}}={list(self.ratios)} are shares of one budget's cost: set one budget, like budget=flops, and "
                "nothing in also",
                code="conflict",
                field=BUDGETS,
            )
        budget, default = self.budgets[0], BudgetSettings("macs").ratio
        if budget.limit or budget.ratio not in (default, *self.ratios):
            given = f"budget.limit={budget.limit:g}" if budget.limit else f"budget.ratio={budget.ratio:g}"
            raise UserError(
                f"{{field}} takes the place of {given}: leave one out", code="conflict", field=BUDGETS
            )
        if self.stages:
            raise UserError(
                f"{{field}} are separate networks and search.stages={list(self.stages)} are steps to one: leave one out",
                code="conflict",
                field=BUDGETS,
            )

    def _check_training(self) -> None:
        """Refuses stages and rounds that there is nothing to train or no budget for."""
        rounds, epochs = self.schedule.rounds, self.finetune.epochs
        if not all(a > b for a, b in pairwise(self.stages)):
            allowed = "shares in (0, 1], each below the one before"
            raise out_of_range("search.stages", list(self.stages), allowed)
        if rounds > 1 and rounds > epochs:
            allowed = f"at most finetune.epochs={epochs}: every round is fine-tuned"
            raise out_of_range("schedule.rounds", rounds, allowed)
        if getattr(self.agent, "tunes", False) and (self.stages or rounds > 1):
            raise UserError(
                f"agent={self.agent.name} goes in rounds of its own, fine-tuned each: leave search.stages=[] and "
                "schedule=one_shot",
                code="conflict",
                field="agent",
            )
        if self.finetune.from_scratch and rounds > 1:
            raise UserError(
                f"finetune.from_scratch=true forgets what schedule.rounds={rounds} trained: use schedule=one_shot",
                code="conflict",
                field="finetune.from_scratch",
            )
        if self.stages and any(budget.limit for budget in self.budgets):
            raise UserError(
                "search.stages are shares of the original cost: leave budget.limit=null",
                code="conflict",
                field="search.stages",
            )
        if self.stages and (len(self.budgets) != 1 or not epochs):
            raise UserError(
                f"search.stages={list(self.stages)} are shares of one budget's cost, fine-tuned between: set one "
                "budget (budget=params) and finetune.epochs above 0",
                code="conflict",
                field="search.stages",
            )

    def at(self, ratio: float) -> Settings:
        """The same with this share of the first budget's cost."""
        return replace(self, budgets=(replace(self.budgets[0], ratio=ratio, limit=None), *self.budgets[1:]))

    @property
    def searches(self) -> tuple[float, ...]:
        """The shares of the first budget's cost that are searched for one after another; none for a single search."""
        return self.stages or self.ratios

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
        """How many of the best strategies are scored once more at the end, by a more expensive repair.

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
        return self.regularization.before_epochs + self.finetune.epochs * max(1, len(self.searches))
