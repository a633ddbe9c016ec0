"""Activations: how many elements a network's operations give, and the most bytes of them that live at once.

An operation gives as many elements as channels are kept, so the number is linear in the counts removed; cutting one
unit of each group in turn shows how. The most that lives at once is the largest "operator breadth" of Pisarchyk and
Lee, "Efficient Memory Management for Deep Neural Net Inference", arXiv 2001.03288: no runtime that runs one
operation after the other needs less. The network's input and output count here, too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from amc_env.costs.base import BudgetSettings, CostInputs, Kind, NetworkCost, size
from amc_env.errors import UserError, first_line
from amc_env.graph.layers import LayerGraph
from amc_env.graph.topology import values_of
from amc_env.inputs import Inputs, each, take
from amc_env.pruning.candidate import Candidates
from amc_env.space import Grid

Ints = NDArray[np.int64]


class Activations:
    """What the operations of a network give, as ``sizes - per_unit @ removed``: for one example, in eval mode.

    Operations are those of the symbolic trace (torch.fx): what a module of torch.nn does within itself is one, and
    ``a += b`` is ``a = a + b``.
    Found on the network with one unit of each group cut in turn, and verified on it cut at random and at the most.

    A buffer is a storage that holds no weight; a view, and what is written in place, lie in the buffer of their input.

    Args:
        model: The uncut network, in eval mode; it is copied, not changed.
        graph: Its layers, one channel group a decision.
        grids: The decisions.
        example: Inputs on the network's device; one is run.

    Attributes:
        operations: Names of the trace's nodes (``fx.Node.name``), in the order they run.
        buffers: Bytes of each buffer of the uncut network, int64 [buffers].
        buffers_per_unit: Bytes that one removed unit of each group takes away, int64 [buffers, groups].
        live: Whether a buffer is needed while an operation runs: it holds an input or the output, or what a later
            operation reads; bool [operations, buffers].

    Raises:
        UserError: The network cannot be traced or run, or what an operation gives is not linear in the counts
            removed.
    """

    def __init__(self, model: nn.Module, graph: LayerGraph, grids: Sequence[Grid], example: Inputs):
        candidates = Candidates(model, graph, [torch.arange(group.total) for group in graph.groups])
        topology = graph.topology
        if topology.graph is None:
            raise _uncounted(topology.reason)
        nodes = list(topology.graph.nodes)
        self.operations = tuple(node.name for node in nodes)
        unpruned = _run(candidates, topology.graph, example, [0] * len(grids))
        per_unit = np.zeros((len(unpruned.counts), len(grids)), dtype=np.int64)
        for g, grid in enumerate(grids):
            if grid.size > 1:
                one = _run(candidates, topology.graph, example, [int(i == g) for i in range(len(grids))])
                _check(unpruned, one)
                per_unit[:, g] = unpruned.counts - one.counts
        for removed in _samples(grids):
            cut = _run(candidates, topology.graph, example, removed)
            _check(unpruned, cut, unpruned.counts - per_unit @ removed)
        self._elements, self.buffers = np.split(unpruned.counts, [len(nodes)])
        self._elements_per_unit, self.buffers_per_unit = np.split(per_unit, [len(nodes)])
        self.live = _live(nodes, unpruned)

    def elements(self, removed: Sequence[int], *, inside: Collection[str] = ()) -> int:
        """Elements that all operations together give: those of new tensors, and those written in place.

        The network's input, weights, and mere views (flatten, slices, dropout in eval mode) give none.

        Args:
            removed: Units removed from each group.
            inside: Names of operations that are left out, such as those that the units of a latency table hold.
        """
        rows = [row for row, name in enumerate(self.operations) if name not in inside]
        gone = self._elements_per_unit[rows].sum(axis=0) @ np.asarray(removed, dtype=np.int64)
        return int(self._elements[rows].sum() - gone)


class Memory(NetworkCost):
    """Peak memory of one example's activations in inference, in the type that the network runs in (fp32).

    An operation's inputs and output live together, and a value dies when its last reader has run. What shares
    storage counts once. Batch norms and activations are operations of their own here, as PyTorch runs them;
    what an operation needs within itself, weights, and what an allocator rounds up are left out.

    Args:
        activations: Those of the network.
    """

    name: ClassVar[str] = "memory"
    title: ClassVar[str] = "peak memory"
    unit: ClassVar[str] = "bytes"
    granularities: ClassVar[tuple[Kind, ...]] = ("channel",)

    def __init__(self, activations: Activations):
        self._sizes = activations.live @ activations.buffers
        self._per_unit = activations.live @ activations.buffers_per_unit

    @classmethod
    def build(cls, problem: CostInputs, settings: BudgetSettings) -> Self:
        """Counts the activations that live at once.

        Raises:
            UserError: They cannot be counted.
        """
        return cls(problem.activations)

    def __call__(self, removed: Sequence[int]) -> float:
        """Bytes at the peak of the cut network."""
        return float(self._living(removed).max())

    @classmethod
    def format(cls, value: float) -> str:
        """Bytes, like '590.00 kB'."""
        return size(value)

    def _living(self, removed: Sequence[int]) -> Ints:
        living: Ints = self._sizes - self._per_unit @ np.asarray(removed, dtype=np.int64)
        return living


class _Recorder:
    """Records, operation by operation, how much a run gives and where that lies; see `values_of`.

    Attributes:
        elements: Elements that each operation gives.
        holds: For each operation the buffers that its result lies in.
        sizes: Bytes of each buffer, in the order of appearance.
    """

    def __init__(self, graph: fx.Graph):
        self.elements: list[int] = []
        self.holds: list[set[int]] = []
        self.sizes: list[int] = []
        self._born: list[str] = []
        self._operations = [node.name for node in graph.nodes]
        self._buffers: dict[int, int] = {}  # by the storage's address
        self._versions: dict[int, int] = {}  # of every storage's content; writing in place raises it

    @property
    def names(self) -> list[str]:
        """The operation behind every entry of `counts`: a buffer's is the one that it came with."""
        return [*self._operations, *self._born]

    @property
    def counts(self) -> Ints:
        """Elements of all operations, then bytes of all buffers."""
        return np.array([*self.elements, *self.sizes], dtype=np.int64)

    def __call__(self, n: fx.Node, result: Any) -> None:
        """Record an operation that has just run."""
        given, holds = 0, set[int]()
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            place, version = storage.data_ptr(), tensor._version
            if place not in self._versions and n.op != "get_attr":
                self._buffers[place] = len(self.sizes)
                self.sizes.append(storage.nbytes())
                self._born.append(n.name)
            given += 0 if self._versions.get(place) == version else tensor.numel()
            self._versions[place] = version
            if place in self._buffers:
                holds.add(self._buffers[place])
        self.elements.append(given if n.op.startswith("call_") else 0)
        self.holds.append(holds)


def _run(candidates: Candidates, graph: fx.Graph, example: Inputs, removed: Sequence[int]) -> _Recorder:
    recorder = _Recorder(graph)
    try:  # on a storage of its own, of one example
        one = each(take(example, slice(1)), torch.clone)
        values_of(candidates.cut(removed), graph, one, recorder)
    except Exception as error:  # a user's network may raise anything
        raise _uncounted(f"it does not run operation by operation: {first_line(error)}") from error
    return recorder


def _check(unpruned: _Recorder, cut: _Recorder, counts: Ints | None = None) -> None:
    """Compares a cut network's run with that of the unpruned one, and with the ``counts`` predicted for it.

    Raises:
        UserError: Results lie in other buffers, are larger than the unpruned network's, or not as predicted.
    """
    wrong = [before != after for before, after in zip(unpruned.holds, cut.holds, strict=True)]
    if not any(wrong):
        wrong = list(cut.counts > unpruned.counts if counts is None else cut.counts != counts)
    if any(wrong):
        name = unpruned.names[wrong.index(True)]
        raise _uncounted(f"what {name} gives does not shrink in step with the channels removed")


def _samples(grids: Sequence[Grid]) -> list[list[int]]:
    """A strategy drawn at random, and the one that removes the most."""
    generator = np.random.default_rng(0)
    drawn = [grid.count(int(generator.integers(grid.size))) for grid in grids]
    return [drawn, [grid.count(grid.size - 1) for grid in grids]]


def _live(nodes: Sequence[fx.Node], run: _Recorder) -> NDArray[np.bool_]:
    steps = {node: step for step, node in enumerate(nodes)}
    live = np.zeros((len(nodes), len(run.sizes)), dtype=bool)
    first: dict[int, int] = {}
    for node, held in zip(nodes, run.holds, strict=True):
        last = max((steps[user] for user in node.users), default=steps[node])
        for buffer in held:
            live[first.setdefault(buffer, steps[node]) : last + 1, buffer] = True
    return live


def _uncounted(reason: str) -> UserError:
    return UserError(
        f"the activations of this network cannot be counted: {reason}; take a budget that needs no count of them, such "
        "as budget=flops or budget=params",
        code="unsupported",
        field="budget",
    )
