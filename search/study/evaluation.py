"""How a run judges strategies: the weights they are cut from, their repairs, the evaluator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from amc_env.evaluation.evaluator import Evaluator
from amc_env.evaluation.on_ray import Actors, RayPruner
from amc_env.evaluation.precision import FLOAT32
from amc_env.evaluation.prefix import PrefixScorer
from amc_env.evaluation.pruner import ORIGINAL, BaseWeights, Pruner
from amc_env.evaluation.scorer import score
from amc_env.graph.layers import LayerGraph
from amc_env.inputs import to_device
from amc_env.pruning.candidate import Candidates, MaskedCandidates
from amc_env.pruning.repair.base import BatchNorm, Both, NoRepair, Repair
from amc_env.pruning.repair.errors import layer_errors
from amc_env.pruning.repair.least_squares import LeastSquares
from amc_env.pruning.repair.masked import MaskedLeastSquares, MaskedSequential
from amc_env.pruning.repair.sequential import Sequential
from amc_env.tasks import Classification
from search.settings import SHORT_TERM, RepairSettings
from search.study.journal import Journal
from search.study.problem import PruningProblem
from search.training.short_term import ShortTerm

log = logging.getLogger(__name__)

_CALIBRATION_BYTES = (
    2**30
)  # of one layer's activations over all calibration images; a few layers live at once


def start_of(
    problem: PruningProblem,
    name: str,
    candidates: Candidates | MaskedCandidates,
    removed: tuple[int, ...] = (),
) -> BaseWeights:
    """A state of the weights that strategies are cut from, with its repairs.

    Args:
        problem: The run.
        name: Of the start.
        candidates: Built from its weights.
        removed: What is gone from them, where a strategy that removes no more is not to be repaired.
    """
    repairs = _repairs(problem, candidates)
    settings, base = problem.settings, problem.settings.repair.name

    def short_term() -> Repair:
        return ShortTerm(repairs[base](), candidates, problem.data, settings, name)

    more = {SHORT_TERM: short_term} if settings.short_term_steps else {}
    return BaseWeights(name, candidates, {**repairs, **more}, removed)


def _repairs(
    problem: PruningProblem, candidates: Candidates | MaskedCandidates
) -> dict[str, Callable[[], Repair]]:
    """How to make each repair; made when first asked for, since calibration takes time."""
    settings: RepairSettings = problem.settings.repair
    train = problem.data.train
    images = _calibration_images(problem.graph, settings.images)
    makers: dict[str, Callable[..., Repair]]
    if isinstance(candidates, MaskedCandidates):
        decided = [problem.graph.layer(grid.name) for grid in problem.grids]
        ridge = settings.mask_ridge
        makers = {
            "least_squares": partial(MaskedLeastSquares, candidates.original, decided),
            "sequential": partial(MaskedSequential, candidates.original, decided),
        }
    else:
        ridge = settings.ridge
        makers = {
            "least_squares": partial(LeastSquares, candidates),
            "sequential": partial(Sequential, candidates),
        }

    def fitted(name: str) -> Repair:
        options = {"per_image": settings.per_image, "seed": problem.settings.seed, "ridge": ridge}
        return makers[name](problem.graph.topology, problem.inputs(train, images), **options)

    def norms() -> Repair:
        return BatchNorm(problem.inputs(train, settings.norm_images))

    return {
        "none": NoRepair,
        "least_squares": partial(fitted, "least_squares"),
        "batch_norm": norms,
        "both": lambda: Both("both", (fitted("least_squares"), norms())),
        "sequential": partial(fitted, "sequential"),
    }


def layer_errors_of(problem: PruningProblem, start: BaseWeights) -> Sequence[NDArray[np.float64]] | None:
    """The least-squares error of every decision alone, as `agents.base.SearchTask` has it; None of masked weights."""
    if not isinstance(start.candidates, Candidates):
        return None
    repair = problem.settings.repair
    images = problem.inputs(problem.data.train, _calibration_images(problem.graph, repair.images))
    return layer_errors(
        start.candidates,
        problem.grids,
        problem.graph.topology,
        images,
        per_image=repair.per_image,
        seed=problem.settings.seed,
        ridge=repair.ridge,
    )


def _calibration_images(graph: LayerGraph, wanted: int) -> int:
    """As many images as are wanted, or as the largest layer's activations leave room for."""
    largest = max(
        max(layer.in_channels * layer.in_size[0] * layer.in_size[1], layer.out_channels * layer.positions)
        for layer in graph.layers
    )
    room = max(1, _CALIBRATION_BYTES // (4 * largest))
    if room < wanted:
        log.info("repair is calibrated on %d images instead of %d: more would fill the memory", room, wanted)
    return min(room, wanted)


def scorer_of(problem: PruningProblem) -> Callable[[], PrefixScorer]:
    """Makes the score of cut networks on the search split."""
    search, scoring = problem.data.search, problem.settings.scoring
    return partial(
        PrefixScorer,
        problem.model,
        problem.graph.topology,
        problem.inputs(search),
        to_device(search.targets, problem.settings.device),
        problem.settings.task,
        batch_size=scoring.batch_size,
        channels_last=scoring.channels_last,
        precision=scoring.precision,
    )


def make_evaluator(
    problem: PruningProblem, memory: Journal | None = None, start: BaseWeights | None = None
) -> Evaluator:
    """The evaluator that judges every policy of this run.

    Args:
        problem: The run.
        memory: Keeps trials across runs.
        start: The weights that strategies are cut from; by default the network's own.
    """
    settings = problem.settings
    start = start or start_of(problem, ORIGINAL, problem.builder)
    make_scorer = scorer_of(problem)
    scorer = make_scorer()
    original = scorer(start.candidates.original)
    precision = settings.scoring.precision
    log.info(
        "%s %s on the %d search images: %.2f%%%s",
        "the original's" if start.name == ORIGINAL else f"{start.name}: the starting",
        settings.task.metric,
        len(problem.data.search),
        100 * original,
        ""
        if precision == FLOAT32
        else f" in {precision}, {100 * _in_float32(start, problem):.2f}% in {FLOAT32}",
    )
    classes = len(problem.data.classes) if isinstance(settings.task, Classification) else 0
    if near_chance(original, classes):
        log.warning("that is near chance: are the inputs scaled and normalised as in the network's training?")
    scoring = settings.scoring
    pruner = Pruner(scorer, scoring.threads)
    if scoring.actors:
        where = Actors(scoring.actors, scoring.address, settings.device.startswith("cuda"))
        pruner = RayPruner(scorer, make_scorer, where, scoring.threads)
    return Evaluator(start, problem.space, pruner, settings.scored_by, memory, reward=settings.reward)


def near_chance(score: float, classes: int) -> bool:
    """Whether a classifier is less than a tenth of the way from chance to 1; of other tasks (0 classes), whether at 0."""
    return score < 0.1 + 0.9 / classes if classes else score == 0


def _in_float32(start: BaseWeights, problem: PruningProblem) -> float:
    search = problem.data.search
    settings = problem.settings
    targets = to_device(search.targets, settings.device)
    return score(start.candidates.original, problem.inputs(search), targets, settings.task)
