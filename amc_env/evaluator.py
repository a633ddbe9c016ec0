"""The evaluator: strategies in, outcomes out. Every policy is judged here and nowhere else."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from amc_env.budget import Problem
from amc_env.errors import UserError, first_line
from amc_env.lanes import in_lanes, in_turn
from amc_env.latency.runtimes import using_threads
from amc_env.precision import FLOAT32, INT8, arithmetic, dtype_of
from amc_env.pruning.candidate import Builder, Keeps, Masks
from amc_env.pruning.folding import Folder
from amc_env.pruning.quantization import Int8Folder
from amc_env.pruning.repair import FrontToBack, Repair
from amc_env.strategy import Strategy

log = logging.getLogger(__name__)

ORIGINAL = "original"
"""The start of a search that begins with the uncut network's weights."""

Removed = tuple[int, ...]
"""Units removed from every decision."""


@dataclass(frozen=True)
class Outcome:
    """What a strategy is worth.

    Attributes:
        strategy: The strategy.
        accuracy: On the search split, in [0, 1].
        costs: All costs by name.
        met: Whether every budget holds.
        repair: Name of the repair that it was scored with.
        start: Name of the weights that it was cut from.
    """

    strategy: Strategy
    accuracy: float
    costs: Mapping[str, float]
    met: bool
    repair: str
    start: str = ORIGINAL


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network of its own.

    Attributes:
        network: The network, in eval mode.
        keeps: What stayed of the uncut network's channels.
        masks: The weights that stayed of layers that are masked.
        units: The units that stayed of every channel group, int64, in any order; none where weights are masked.
    """

    network: nn.Module
    keeps: Keeps
    masks: Masks
    units: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Key:
    """What identifies an evaluation."""

    start: str
    repair: str
    removed: tuple[int, ...]


_BATCH_PIXELS = {"cpu": 2**16, "cuda": 2**20}
_SMALLEST_BATCH = 4


def batch_size_for(images: Tensor, device: torch.device, precision: str = FLOAT32) -> int:
    """How many images [N, ...] to score at a time: on a processor what its caches hold, else what fills the device.

    It depends on the size of an image, the kind of device and the precision alone, and not on a timing: two runs of one
    seed must round alike. docs/performance.md has the measurements.
    """
    room = _BATCH_PIXELS.get(device.type, _BATCH_PIXELS["cuda"]) * (2 if precision == INT8 else 1)
    pixels = images[0, 0].numel() if images.ndim > 2 else images[0].numel()
    return max(_SMALLEST_BATCH, room // pixels)


def accuracy(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    batch_size: int | None = None,
    precision: str = FLOAT32,
) -> float:
    """Share of images [N, ...] whose largest logit is their label [N], in [0, 1].

    The model is scored in the mode it is in; put it in eval mode first. It is given the images batch by batch, as they
    are; its logits are where the labels are.

    Args:
        model: Images to logits.
        images: As the model takes them.
        labels: int64.
        batch_size: By default that of `batch_size_for`.
        precision: Of products on graphics processors; images and weights are taken as they are.

    Raises:
        UserError: A logit is not a number.
    """
    batch_size = batch_size or batch_size_for(images, labels.device)
    tally = _Tally(labels.device)
    with torch.inference_mode(), arithmetic(precision):
        for batch, wanted in zip(
            torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
        ):
            tally.add(model(batch), wanted)
    return tally.accuracy


class _Tally:
    """Counts hits without waiting for a GPU until the result is read.

    Attributes:
        images: Images counted.
    """

    def __init__(self, device: torch.device):
        self.images = 0
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        self._broken = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: logits [N, classes] whose largest is the label, int64 [N]."""
        self._hits += (logits.argmax(1) == labels).sum()
        self._broken |= logits.isnan().any()
        self.images += len(labels)

    @property
    def accuracy(self) -> float:
        """Share of hits, in [0, 1].

        Raises:
            UserError: A logit is not a number.
        """
        if self._broken:
            raise UserError(
                "the network's outputs are not numbers (NaN): look for NaN in its weights and in the data"
            )
        return int(self._hits) / self.images


class Scorer:
    """Scores cut networks on fixed images: batch norms folded, in one memory layout, batch size and precision.

    On a processor batches of a network that can be traced are run side by side, see `amc_env.lanes`.

    Args:
        model: The uncut network, in eval mode.
        images: Normalised images of the search split, [N, C, H, W].
        labels: Their labels, int64 [N].
        batch_size: Images of a batch; by default that of `batch_size_for`.
        channels_last: Memory format of images and weights, where the network runs in it. It may move logits by
            rounding only.
        precision: One of PRECISIONS.

    Raises:
        UserError: The network, or this processor, does not run in that precision; an image holds NaN or infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int | None = None,
        channels_last: bool = True,
        precision: str = FLOAT32,
    ):
        if not images.isfinite().all():
            raise UserError(
                "the search images hold values that are infinite or not numbers (NaN): look for them in the data, and "
                "for zeros in the standard deviations that it is normalised by"
            )
        channels_last = channels_last and images.ndim == 4 and _runs_channels_last(model, images[:4])
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.images = images.to(dtype_of(precision)).contiguous(memory_format=layout)
        self._precision = precision
        self.channels_last = channels_last
        batch_size = batch_size or batch_size_for(images, labels.device, precision)
        self.folder = _folder(model, self.images, channels_last, precision, batch_size)
        network = _checked(self.folder, model, self.images[:2], precision)
        # a network that cannot be traced may keep things between its layers: one batch at a time
        self._side_by_side = labels.device.type == "cpu" and isinstance(network, fx.GraphModule)
        self._batches = torch.split(self.images, batch_size)
        self._labels = torch.split(labels, batch_size)

    def __call__(self, model: nn.Module) -> float:
        """Accuracy of a cut network, in [0, 1]."""
        tally = _Tally(self.images.device)
        with closing(self.outputs(self.fold(model))) as batches:
            for logits, labels in batches:
                tally.add(logits, labels)
        return tally.accuracy

    def fold(self, model: nn.Module) -> nn.Module:
        """What is scored in place of a cut network; valid until the next one."""
        return self.folder(model)

    def outputs(self, network: nn.Module) -> Generator[tuple[Tensor, Tensor]]:
        """Logits and labels of one batch after another; close it where it may not be read to its end.

        Until it ends torch's products are in this precision everywhere: do not begin another meanwhile.

        Args:
            network: What `fold` gave.
        """
        return self._outputs_from(0, network)

    def _outputs_from(self, first: int, network: nn.Module) -> Generator[tuple[Tensor, Tensor]]:
        @torch.no_grad()
        def logits(index: int) -> Tensor:
            found: Tensor = network(self._batches[first + index])
            return found

        run = in_lanes if self._side_by_side else in_turn
        with arithmetic(self._precision), closing(run(logits, len(self._batches) - first)) as found:
            yield from zip(found, self._labels[first:], strict=True)

    def forget(self) -> None:
        """Lets go of what is kept for candidates to come, where anything is."""


def _folder(model: nn.Module, images: Tensor, channels_last: bool, precision: str, batch_size: int) -> Folder:
    if precision == INT8:
        return Int8Folder(model, images, channels_last=channels_last, batch_size=batch_size)
    example = images[:4].float()
    return Folder(model, example, channels_last=channels_last, dtype=dtype_of(precision))


def _checked(folder: Folder, model: nn.Module, images: Tensor, precision: str) -> nn.Module:
    """The network that is scored in place of the model; it runs."""
    try:
        network = folder(model)
        with torch.inference_mode():
            network(images)
        return network
    except RuntimeError as error:
        if precision == FLOAT32:
            raise
        raise UserError(
            f"evaluator.precision={precision} does not work for this network ({first_line(error)}); use float32"
        ) from error


def _runs_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Whether a network takes channels-last images: one that calls ``view`` on feature maps does not."""
    try:
        with torch.inference_mode():
            copy.deepcopy(model).to(memory_format=torch.channels_last)(  # type: ignore[call-overload]
                images.contiguous(memory_format=torch.channels_last)
            )
    except RuntimeError as error:
        log.info(
            "images are scored contiguous: the network does not run channels-last (%s)", first_line(error)
        )
        return False
    return True


@dataclass(frozen=True, eq=False)
class Start:
    """A state of the weights that strategies are cut from.

    Calibration, rankings and memory belong to a start. Its strategies are counted from the uncut network, whatever
    the weights are.

    Attributes:
        name: What identifies it in keys, outcomes and the journal.
        candidates: Builds networks from these weights.
        repairs: How to make each repair for these weights, by name; they are made when first asked for.
        removed: What is gone from these weights already: a strategy that removes no more needs no repair.
    """

    name: str
    candidates: Builder
    repairs: Mapping[str, Callable[[], Repair]]
    removed: tuple[int, ...] = ()


class Bench:
    """Cuts, mends and scores candidates, one after another.

    Repairs are calibrated once while candidates come from one start; those of the start before are forgotten.

    Args:
        scorer: Accuracy of a cut network.
        threads: Of torch meanwhile; None leaves them as they are.
    """

    def __init__(self, scorer: Callable[[nn.Module], float], threads: int | None = None):
        self.scorer = scorer
        self._threads = threads
        self._start: Start | None = None
        self._repairs: dict[str, Repair] = {}

    def score(self, start: Start, repair: str, removed: Removed) -> float:
        """Score of a candidate, in [0, 1]."""
        with using_threads(self._threads):
            model, _ = self._mended(start, repair, removed)
            return self.scorer(model)

    def pruned(self, start: Start, repair: str, removed: Removed) -> Pruned:
        """The candidate that `score` scores, as a network of its own."""
        with using_threads(self._threads):
            model, keeps = self._mended(start, repair, removed)
        builder = start.candidates
        return Pruned(_own(model), keeps, builder.masks(removed), builder.units(removed))

    def _mended(self, start: Start, repair: str, removed: Removed) -> tuple[nn.Module, Keeps]:
        keeps = start.candidates.keeps(removed)
        model = start.candidates.cut(removed, keeps)
        if any(removed) and removed != start.removed:
            mend = self._repair(start, repair)
            if isinstance(mend, FrontToBack):  # it needs the room, and takes several times as long as scoring
                self._forget()
            with arithmetic(FLOAT32):
                mend(model, removed, keeps)
        return model, keeps

    def _repair(self, start: Start, name: str) -> Repair:
        if name not in start.repairs:
            raise UserError(f"unknown repair {name!r}; there are {', '.join(start.repairs)}")
        if start is not self._start:
            self._start, self._repairs = start, {}
        if name not in self._repairs:
            self._forget()  # a calibration needs the room
            self._repairs[name] = start.repairs[name]()
        return self._repairs[name]

    def _forget(self) -> None:
        if isinstance(self.scorer, Scorer):
            self.scorer.forget()


def _own(model: nn.Module) -> nn.Module:
    """A copy whose tensors are no parts of larger ones, as solutions are that a repair took its weights from."""
    network = copy.deepcopy(model)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return network


class Evaluator:
    """Turns strategies into outcomes; the same one is never scored twice.

    Scoring is a pure function of (start, repair, strategy): it does not touch the global random state.

    Args:
        start: The weights that a search begins with.
        problem: Costs and budgets.
        scorer: Accuracy of a cut network.
        repair: Name of the repair that strategies are scored with by default.
        memo: Accuracies known already; a journal keeps them across runs.
        threads: Of torch while candidates are cut, mended and scored; None leaves them as they are.
    """

    def __init__(
        self,
        start: Start,
        problem: Problem,
        scorer: Callable[[nn.Module], float],
        repair: str,
        memo: MutableMapping[Key, Outcome] | None = None,
        *,
        threads: int | None = None,
    ):
        self.problem = problem
        self.repair = repair
        self.start = start.name
        self.hits = 0
        self.evaluations = 0
        self._bench = Bench(scorer, threads)
        self._starts = {start.name: start}
        self._memo: MutableMapping[Key, Outcome] = {} if memo is None else memo

    def begin(self, start: Start) -> None:
        """Makes further weights known, for example those that an earlier outcome was tuned to.

        Raises:
            ValueError: There is a start of that name already; its outcomes would be taken for this one's.
        """
        if start.name in self._starts:
            raise ValueError(
                f"a start named {start.name!r} is known already; give each state of the weights its own name"
            )
        self._starts[start.name] = start

    def move(self, start: Start) -> None:
        """Goes on from further weights: strategies are cut from them by default, and those before are forgotten.

        Raises:
            ValueError: There is a start of that name already.
        """
        self.begin(start)
        left, self.start = self.start, start.name
        del self._starts[left]

    def builder(self, start: str) -> Builder:
        """What builds candidates from these weights."""
        return self._known_start(start).candidates

    def evaluate(
        self, strategies: Sequence[Strategy], *, start: str | None = None, repair: str | None = None
    ) -> list[Outcome]:
        """The `outcomes` of strategies, all of them."""
        return list(self.outcomes(strategies, start=start, repair=repair))

    def outcomes(
        self,
        strategies: Sequence[Strategy],
        *,
        start: str | None = None,
        repair: str | None = None,
    ) -> Iterator[Outcome]:
        """Scores strategies and gives each as soon as it and those before it are known; from memory where they are.

        Args:
            strategies: What to score.
            start: Name of the weights that they are cut from; by default those that the search began with.
            repair: Name of the repair; by default the search's.

        Raises:
            UserError: A candidate's outputs are not numbers, or the repair is unknown.
            ValueError: The start is unknown.
        """
        begun, mend = self._known_start(start or self.start), repair or self.repair
        for strategy in strategies:
            key = Key(begun.name, mend, strategy.removed)
            outcome = self._memo.get(key)
            if outcome is None:
                outcome = self._outcome(key, strategy, self._bench.score(begun, mend, strategy.removed))
                self._memo[key] = outcome
                self.evaluations += 1
            else:
                self.hits += 1
            yield outcome

    def _known_start(self, name: str) -> Start:
        if name not in self._starts:
            raise ValueError(f"unknown start {name!r}; there are {', '.join(self._starts)}")
        return self._starts[name]

    def _outcome(self, key: Key, strategy: Strategy, accuracy: float) -> Outcome:
        costs, met = self.problem.cost(strategy.removed), self.problem.met(strategy.removed)
        return Outcome(strategy, accuracy, costs, met, key.repair, key.start)

    def apply(self, strategy: Strategy, *, start: str | None = None, repair: str | None = None) -> Pruned:
        """Prunes and mends without scoring.

        Args:
            strategy: What to remove.
            start: As in `evaluate`.
            repair: As in `evaluate`.
        """
        return self._bench.pruned(
            self._known_start(start or self.start), repair or self.repair, strategy.removed
        )

    def network(self, outcome: Outcome) -> Pruned:
        """The network that was scored, bit for bit."""
        return self.apply(outcome.strategy, start=outcome.start, repair=outcome.repair)
