"""Scoring that computes once what candidates share: everything before the first module that differs.

A sensitivity scan, or a round of NetAdapt before it tunes, cuts one decision at a time: most of what is in front of
the cut is the same for all candidates of that decision. A policy that has found its way takes the same first decisions
again and again. Where a candidate leaves the way of an earlier one, what the rest of the network reads there is kept
for all images, as far as there is room. What differs is found by digests of the tensors, never by assumption: a
repair may have changed anything.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn

from amc_env.evaluation.precision import FLOAT32, arithmetic
from amc_env.evaluation.scorer import Scorer
from amc_env.graph.topology import Topology, placed, values_of
from amc_env.inputs import Inputs, call, count, take
from amc_env.system import in_lanes, in_turn, release_heap
from amc_env.tasks.base import TalliedTask, Task

log = logging.getLogger(__name__)


ROOM = 2**29
"""Bytes of kept values: with them a search of a CIFAR network stays below 3 GB."""


_SEEN = 2**16  # operations of earlier candidates that are remembered: some hundred candidates


_WORTH = 128  # multiply-accumulates that a number must spare to be kept: writing it down takes about as long as half


_Token = bytes
"""A digest of all that an operation's result depends on but the images."""


_Values = dict[fx.Node, Any]
"""What operations gave for one batch."""


class PrefixScorer(Scorer):
    """`Scorer`, with what a candidate shares with earlier ones or the uncut network computed once.

    The same operations run on the same batches, so accuracies are those of `Scorer`. A candidate costs at most what
    it costs there and the digests of its tensors. A network that cannot be traced is scored as there.

    Args:
        model: The uncut network, in eval mode.
        topology: Its topology.
        inputs: As there.
        targets: As there.
        task: As there.
        batch_size: As there.
        channels_last: As there.
        precision: As there.
        room: Bytes for kept values; images beyond are run from the first layer on.
    """

    _shared: _Shared | None = None

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        inputs: Inputs,
        targets: Inputs,
        task: Task | None = None,
        *,
        batch_size: int | None = None,
        channels_last: bool = True,
        precision: str = FLOAT32,
        room: int = ROOM,
    ):
        super().__init__(
            model,
            topology,
            inputs,
            targets,
            task,
            batch_size=batch_size,
            channels_last=channels_last,
            precision=precision,
        )
        network = self.folder(model)
        reason = self.folder.reason
        if isinstance(network, fx.GraphModule) and not reason:
            reason = _obstacle(network.graph)
        if not isinstance(self.task, TalliedTask):
            reason = "the task runs networks itself"
        if isinstance(network, fx.GraphModule) and not reason:
            self._shared = _Shared(network, self._batches, room, side_by_side=self._side_by_side)
        else:
            _say_that_nothing_is_shared(reason)

    def _divide(self, batch_size: int) -> None:
        super()._divide(batch_size)
        if self._shared is not None:
            self._shared = self._shared.with_batches(self._batches)

    def outputs(self, network: nn.Module) -> Generator[tuple[Any, Any]]:
        """Outputs and targets of one batch after another; see `Scorer.outputs`."""
        first = 0
        if self._shared is not None:
            with arithmetic(self._precision), closing(self._shared()) as found:
                for outputs, targets in zip(found, self._targets, strict=False):
                    yield self.task.read(outputs), targets
                    first += 1
        if first < len(self._batches):
            if self._shared is not None:
                self._shared = None
                _say_that_nothing_is_shared("values that are read again are overwritten in place")
            yield from self._outputs_from(first, network)

    def forget(self) -> None:
        """Free what is kept for later candidates."""
        if self._shared is not None:
            self._shared.forget()
            release_heap()


def _say_that_nothing_is_shared(reason: str) -> None:
    log.info("every candidate is run from the first layer on: %s", reason)


def _obstacle(graph: fx.Graph) -> str:
    """Why a part of the network cannot be left out when it is run, or nothing."""
    idle = [node for node in graph.nodes if not node.users and node.op not in ("output", "placeholder")]
    return f"{idle[0]} is run, perhaps for a side effect, and nothing reads what it gives" if idle else ""


class _Shared:
    """Runs a network whose tensors change between calls, and keeps what calls have in common.

    Args:
        network: The traced network; its tensors are the original's now.
        batches: Its inputs.
        room: Bytes for kept values.
        side_by_side: Whether to run batches in lanes.
    """

    def __init__(self, network: fx.GraphModule, batches: Sequence[Inputs], room: int, *, side_by_side: bool):
        self._network = network
        self._nodes: list[fx.Node] = list(network.graph.nodes)
        self._modules = dict(network.named_modules())
        self._batches = batches
        self._arguments = [placed(network.graph, batch) for batch in batches]
        self._side_by_side = side_by_side
        self._run = in_lanes if side_by_side else in_turn
        self._work, self._sizes = _measured(network, take(batches[0], slice(2)))
        self._kept = _Kept(room)
        self._seen: dict[_Token, None] = {}
        self._remember(_tokens(network))
        self._told = False

    def __call__(self) -> Generator[Any]:
        """Outputs of one batch after another for the network as it is now; ends where kept values were overwritten."""
        tokens = _tokens(self._network)
        kept = {node: self._kept.batches(token) for node, token in tokens.items() if token in self._kept}
        front = self._front(tokens, kept)
        self._remember(tokens)
        plans = _Plans(self._nodes, front)
        known = [[node for node, those in kept.items() if i in those] for i in range(len(self._batches))]
        self._kept.use(tokens[node] for there in known for node in plans.given(there).start)
        with closing(self._run(lambda i: self._one(i, plans.given(known[i]), tokens), len(known))) as results:
            for index, (output, values) in enumerate(results):
                if output is None:
                    return
                for token, value in values.items():
                    self._keep(token, index, value)
                yield output

    def with_batches(self, batches: Sequence[Inputs]) -> _Shared:
        """The same for other batches; nothing is kept yet."""
        return _Shared(self._network, batches, self._kept.room, side_by_side=self._side_by_side)

    def forget(self) -> None:
        """Free the values kept."""
        self._kept = _Kept(self._kept.room)

    def _remember(self, tokens: Mapping[fx.Node, _Token]) -> None:
        for token in tokens.values():
            self._seen.pop(token, None)
            self._seen[token] = None
        for token in list(islice(self._seen, max(0, len(self._seen) - _SEEN))):
            del self._seen[token]

    def _front(self, tokens: Mapping[fx.Node, _Token], kept: Collection[fx.Node]) -> list[fx.Node]:
        """Where this candidate leaves the way of earlier ones, if it is worth keeping; the images are there anyway."""
        old = {node for node in self._nodes if tokens[node] in self._seen and node.op != "placeholder"}
        front = [node for node in self._nodes if node in old and any(user not in old for user in node.users)]
        spared = sum(self._work[node] for node in _needed(front, kept))
        held = sum(self._sizes[node] for node in front if node not in kept)
        return front if spared >= _WORTH * held else []

    @torch.no_grad()
    def _one(
        self, index: int, plan: _Plan, tokens: Mapping[fx.Node, _Token]
    ) -> tuple[Any, dict[_Token, Any]]:
        """Outputs of one batch, None where values were overwritten, and what its front computed again."""
        if not plan.start and not plan.front:
            return call(self._network, self._batches[index]), {}
        held = {node: self._kept.value(tokens[node], index) for node in plan.start}
        written = {node: _writes(value) for node, value in held.items()}
        values = dict(held)
        output = None
        for node in plan.nodes:
            output = values[node] = self._value(node, values, index)
            if node in plan.front:
                held[node], written[node] = output, _writes(output)
            for done in plan.over[node]:
                values.pop(done, None)
        if any(_writes(value) != written[node] for node, value in held.items()):
            return None, {}
        return output, {tokens[node]: value for node, value in held.items() if node not in plan.start}

    def _value(self, node: fx.Node, values: _Values, index: int) -> Any:
        """What an operation gives; fx.Interpreter takes several times as long to come to it."""
        args: Any = fx.map_arg(node.args, values.__getitem__)
        options: Any = fx.map_arg(node.kwargs, values.__getitem__)
        match node.op:
            case "placeholder":
                return self._arguments[index][str(node.target)]
            case "get_attr":
                return _attribute(self._network, str(node.target))
            case "call_module":
                return self._modules[str(node.target)](*args, **options)
            case "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **options)
            case "output":
                return args[0]
        return node.target(*args, **options)  # type: ignore[operator]

    def _keep(self, token: _Token, index: int, value: Any) -> None:
        if not self._kept.add(token, index, value) and not self._told:
            self._told = True
            log.info(
                "what candidates share fills %d MiB: some of the %d search images are run from the first layer on",
                self._kept.room // 2**20,
                sum(map(count, self._batches)),
            )


class _Kept:
    """Values of operations, by token and batch; the longest unused go first, those of this call never.

    Args:
        room: Bytes for them.
    """

    def __init__(self, room: int):
        self.room = room
        self._values: dict[_Token, dict[int, Any]] = {}  # the latest used last
        self._sizes: dict[_Token, int] = {}
        self._in_use: dict[_Token, None] = {}

    def __contains__(self, token: _Token) -> bool:
        return token in self._values

    def batches(self, token: _Token) -> frozenset[int]:
        """The batches for which a value is kept."""
        return frozenset(self._values[token])

    def value(self, token: _Token, index: int) -> Any:
        """What an operation gave for a batch."""
        return self._values[token][index]

    def use(self, tokens: Iterable[_Token]) -> None:
        """Begins a call, which starts from these."""
        self._in_use = dict.fromkeys(tokens)
        for token in self._in_use:
            self._values[token] = self._values.pop(token)

    def add(self, token: _Token, index: int, value: Any) -> bool:
        """Keeps a value if there is room, or can be made."""
        size = _bytes(value)
        if size + sum(self._sizes[used] for used in self._in_use) > self.room:
            return False
        while self.filled + size > self.room:
            oldest = next(token for token in self._values if token not in self._in_use)
            del self._values[oldest], self._sizes[oldest]
        self._values.setdefault(token, {})[index] = value
        self._sizes[token] = self._sizes.get(token, 0) + size
        self._in_use[token] = None
        return True

    @property
    def filled(self) -> int:
        """Bytes kept."""
        return sum(self._sizes.values())


@dataclass(frozen=True)
class _Plan:
    """What is known and read, operations in the network's order, those to keep, and what nothing reads after each."""

    start: list[fx.Node]
    front: Collection[fx.Node]
    nodes: list[fx.Node]
    over: dict[fx.Node, list[fx.Node]]


class _Plans:
    """What to run on a batch for the front's values and the output, by what is known of it already."""

    def __init__(self, nodes: Sequence[fx.Node], front: Iterable[fx.Node]):
        self._front = dict.fromkeys(front)
        self._nodes = nodes
        self._made: dict[frozenset[fx.Node], _Plan] = {}

    def given(self, known: Iterable[fx.Node]) -> _Plan:
        """The plan where the values of ``known`` are there."""
        key = frozenset(known)
        if key not in self._made:
            self._made[key] = self._plan(key)
        return self._made[key]

    def _plan(self, known: frozenset[fx.Node]) -> _Plan:
        wanted = _needed([*self._front, self._nodes[-1]], known)
        nodes = [node for node in self._nodes if node in wanted or node.op == "placeholder"]
        last = {need: node for node in nodes for need in node.all_input_nodes}
        over: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
        for need, node in last.items():
            over[node].append(need)
        start = [node for node in self._nodes if node in known and node in last]
        return _Plan(start, self._front, nodes, over)


def _needed(nodes: Iterable[fx.Node], known: Collection[fx.Node]) -> set[fx.Node]:
    """The operations that give these values, down to those that are known."""
    wanted: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in wanted and node not in known:
            wanted.add(node)
            stack.extend(node.all_input_nodes)
    return wanted


def _measured(network: fx.GraphModule, inputs: Inputs) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """Multiply-accumulates of each operation and numbers that it gives, for some inputs; layers alone count as work."""
    values = values_of(network, network.graph, inputs)
    sizes = {node: sum(tensor.numel() for tensor in _tensors(value)) for node, value in values.items()}
    work = dict.fromkeys(sizes, 0)
    for node in sizes:
        if node.op == "call_module":
            weight = getattr(network.get_submodule(str(node.target)), "weight", None)
            if isinstance(weight, Tensor) and weight.ndim > 1:
                work[node] = weight[0].numel() * sizes[node]
    return work, sizes


def _tokens(network: fx.GraphModule) -> dict[fx.Node, _Token]:
    """Of all operations, as the network is now."""
    tokens: dict[fx.Node, _Token] = {}
    for number, node in enumerate(network.graph.nodes):
        digest = hashlib.sha256(str(number).encode())
        for need in node.all_input_nodes:
            digest.update(tokens[need])
        for tensor in _read(network, node):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        tokens[node] = digest.digest()
    return tokens


def _read(network: fx.GraphModule, node: fx.Node) -> Iterator[Tensor]:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        yield from module.parameters()
        yield from module.buffers()
        if isinstance(module, nn.Conv2d):
            yield torch.tensor(module.groups)  # the one size that a forward pass reads
    elif node.op == "get_attr":
        yield from _tensors(_attribute(network, str(node.target)))


def _attribute(network: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(network.get_submodule(owner), name)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what an operation gave, which may be a tuple or hold none."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _bytes(value: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(value))  # a view holds all of it


def _writes(value: Any) -> list[int]:
    """How often the tensors were written to; a view counts what is done to the tensor that it is a view of."""
    return [tensor._version for tensor in _tensors(value)]
