"""Scoring that computes once what candidates share: everything before the first module that differs.

A sensitivity scan, or a round of NetAdapt before it tunes, cuts one decision at a time: most of what is in front of
the cut is the same for all candidates of that decision. What the rest of the network reads of it is kept for all
images, and moves on from front to back with the scan. What differs is found by comparing tensors, never by
assumption: a repair may have changed anything.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from amc_env.evaluator import Scorer, accuracy
from amc_env.precision import FLOAT32, arithmetic

log = logging.getLogger(__name__)

ROOM = 2**30
"""Bytes of kept values."""

_State = Mapping[fx.Node, tuple[Tensor, ...]]
"""What each operation reads from the network itself: parameters, buffers, sizes."""
_Values = dict[fx.Node, Any]
"""What operations gave for one batch."""


class PrefixScorer(Scorer):
    """`Scorer`, with what a candidate shares with the uncut network or with the last candidate computed once.

    The same operations run on the same batches, so accuracies are those of `Scorer`. A candidate costs at most what
    it costs there and the comparison of its tensors. A network that cannot be traced is scored as there.

    Args:
        model: The uncut network, in eval mode.
        images: Normalised images of the search split, [N, C, H, W].
        labels: Their labels, int64 [N].
        batch_size: As there.
        channels_last: As there.
        precision: As there.
        room: Bytes for kept values; images beyond are run from the first layer on.
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
        room: int = ROOM,
    ):
        super().__init__(
            model, images, labels, batch_size=batch_size, channels_last=channels_last, precision=precision
        )
        network = self.folder(model)
        reason = self.folder.reason
        if isinstance(network, fx.GraphModule) and not reason:
            reason = _obstacle(network.graph)
        self._shared: _Shared | None = None
        if isinstance(network, fx.GraphModule) and not reason:
            self._shared = _Shared(network, torch.split(self.images, self._batch_size), room)
        else:
            _say_that_nothing_is_shared(reason)

    def __call__(self, model: nn.Module) -> float:
        """Accuracy of a cut network, in [0, 1]."""
        network = self.folder(model)
        with arithmetic(self._precision):
            logits = None if self._shared is None else self._shared()
        if logits is not None:
            return accuracy(nn.Identity(), logits, self._labels, len(logits))
        if self._shared is not None:
            self._shared = None
            _say_that_nothing_is_shared("values that are read again are overwritten in place")
        return self._accuracy(network)


def _say_that_nothing_is_shared(reason: str) -> None:
    log.info("every candidate is run from the first layer on: %s", reason)


def _obstacle(graph: fx.Graph) -> str:
    """Why a part of the network cannot be left out when it is run, or nothing."""
    idle = [node for node in graph.nodes if not node.users and node.op not in ("output", "placeholder")]
    return f"{idle[0]} is run, perhaps for a side effect, and nothing reads what it gives" if idle else ""


class _Shared:
    """Runs a network whose tensors change between calls, and keeps what the next call may share.

    Args:
        network: The traced network; its tensors are the original's now.
        batches: Its inputs.
        room: Bytes for kept values.
    """

    def __init__(self, network: fx.GraphModule, batches: Sequence[Tensor], room: int):
        self._network = network
        self._lane = fx.Interpreter(network, garbage_collect_values=False)
        self._nodes: list[fx.Node] = list(network.graph.nodes)
        self._batches = batches
        self._room = room
        self._told = False
        self._original = _copied(_state(network))
        self._last: _State | None = None
        self._kept_of = self._original
        self._kept: list[_Values] = [{} for _ in batches]

    @torch.no_grad()
    def __call__(self) -> Tensor | None:
        """Logits of all images for the network as it is now; None where kept values were overwritten."""
        state = _state(self._network)
        changed, base = self._difference(state)
        front = self._front(changed)
        if base is not self._original or not front:  # the next candidate may be more like this one
            self._last = _copied(state)
        if not front:
            return torch.cat([self._network(batch) for batch in self._batches])
        self._forget(self._changed(state, self._kept_of))
        self._kept_of = base
        plans = _Plans(self._nodes, front, changed)
        outputs = [self._one(index, plans) for index in range(len(self._batches))]
        logits = [output for output in outputs if output is not None]
        return torch.cat(logits) if len(logits) == len(outputs) else None

    def _difference(self, state: _State) -> tuple[set[fx.Node], _State]:
        """What depends on tensors that differ from the original's, or from the last candidate's if that is less."""
        bases = [self._original] if self._last is None else [self._original, self._last]
        return min(((self._changed(state, base), base) for base in bases), key=lambda found: len(found[0]))

    def _changed(self, state: _State, base: _State) -> set[fx.Node]:
        changed: set[fx.Node] = set()
        for node in self._nodes:
            reads_changed = any(need in changed for need in node.all_input_nodes)
            if reads_changed or node.op == "output" or not _same(state[node], base[node]):
                changed.add(node)
        return changed

    def _front(self, changed: set[fx.Node]) -> list[fx.Node]:
        """The unchanged operations whose values changed ones read; the images themselves are there anyway."""
        unchanged = [node for node in self._nodes if node not in changed and node.op != "placeholder"]
        return [node for node in unchanged if any(user in changed for user in node.users)]

    def _forget(self, stale: set[fx.Node]) -> None:
        self._kept = [{n: v for n, v in values.items() if n not in stale} for values in self._kept]

    def _one(self, index: int, plans: _Plans) -> Tensor | None:
        """Logits of one batch; what its front gave is kept where there is room."""
        lane, kept = self._lane, self._kept[index]
        written = {node: _writes(value) for node, value in kept.items()}
        plan = plans.given(kept)
        lane.args_iter = iter([self._batches[index]])
        lane.env = dict(kept)
        output = None
        for node in plan.nodes:
            output = lane.env[node] = lane.run_node(node)
            if node in plans.front:
                kept[node], written[node] = output, _writes(output)
            for done in plan.over[node]:
                lane.env.pop(done, None)
        lane.env = {}
        kept = {node: kept[node] for node in plans.front}
        self._keep(index, kept)
        overwritten = any(_writes(value) != written[node] for node, value in kept.items())
        return None if overwritten else output

    def _keep(self, index: int, values: _Values) -> None:
        self._kept[index] = values
        if sum(tensor.nbytes for kept in self._kept for tensor in _tensors(kept)) <= self._room:
            return
        self._kept[index] = {}
        if not self._told:
            self._told = True
            log.info(
                "what candidates share fills %d MiB: some of the %d search images are run from the first layer on",
                self._room // 2**20,
                sum(len(batch) for batch in self._batches),
            )


@dataclass(frozen=True)
class _Plan:
    """Operations in the network's order, and after each of them what nothing reads any more."""

    nodes: list[fx.Node]
    over: dict[fx.Node, list[fx.Node]]


class _Plans:
    """What to run on a batch for the front's values and all that changed, by what is known of it already."""

    def __init__(self, nodes: Sequence[fx.Node], front: Iterable[fx.Node], changed: Iterable[fx.Node]):
        self.front = dict.fromkeys(front)
        self._nodes = nodes
        self._changed = changed
        self._made: dict[frozenset[fx.Node], _Plan] = {}

    def given(self, known: Iterable[fx.Node]) -> _Plan:
        """The plan where the values of ``known`` are there."""
        key = frozenset(known)
        if key not in self._made:
            self._made[key] = self._plan(key)
        return self._made[key]

    def _plan(self, known: frozenset[fx.Node]) -> _Plan:
        wanted: set[fx.Node] = set()
        stack = [*self.front, *self._changed]
        while stack:
            node = stack.pop()
            if node not in wanted and node not in known:
                wanted.add(node)
                stack.extend(node.all_input_nodes)
        nodes = [node for node in self._nodes if node in wanted or node.op == "placeholder"]
        last = {need: node for node in nodes for need in node.all_input_nodes}
        over: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
        for need, node in last.items():
            over[node].append(need)
        return _Plan(nodes, over)


def _state(network: fx.GraphModule) -> _State:
    return {node: tuple(_read(network, node)) for node in network.graph.nodes}


def _read(network: fx.GraphModule, node: fx.Node) -> Iterator[Tensor]:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        yield from module.parameters()
        yield from module.buffers()
        if isinstance(module, nn.Conv2d):
            yield torch.tensor(module.groups)  # the one size that a forward pass reads
    elif node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        yield from _tensors(getattr(network.get_submodule(owner), name))


def _copied(state: _State) -> _State:
    """A state that changes in place do not reach."""
    return {node: tuple(tensor.detach().clone() for tensor in tensors) for node, tensors in state.items()}


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what an operation gave, which may be a tuple or hold none."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _writes(value: Any) -> list[int]:
    """How often the tensors were written to; a view counts what is done to the tensor that it is a view of."""
    return [tensor._version for tensor in _tensors(value)]
