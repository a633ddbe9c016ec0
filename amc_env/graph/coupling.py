"""Which entries of which parameters can only be removed together, read off one run of a network.

The run is watched operation by operation (`torch.utils._python_dispatch`), whatever Python code led there, and each
operation's rule says how labels pass through it. The idea of grouping by dependencies is that of Fang et al.,
"DepGraph: Towards Any Structural Pruning", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amc_env.graph.labels import Axis, Dim, Labels
from amc_env.graph.rules import RULES, pointwise, split
from amc_env.inputs import Inputs, call, tensors_of

_OUTPUT = "its channels are the network's output"
_INPUT = "its channels are the network's input"


def labelled_run(model: nn.Module, inputs: Inputs, *, through_norms: bool = False) -> Labels:
    """The labels of all parameters' entries after a run without gradients.

    A second run follows where the first one found attention: its heads can only be told from other reshapes by what
    is done with them.

    Args:
        model: The network, in eval mode.
        inputs: A batch of one example.
        through_norms: Whether channels may be cut that a norm normalises together.
    """
    labels = _run(model, inputs, frozenset(), through_norms)
    return _run(model, inputs, frozenset(labels.heads), through_norms) if labels.heads else labels


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def _run(model: nn.Module, inputs: Inputs, heads: frozenset[Axis], through_norms: bool) -> Labels:
    labels = Labels([*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())], heads)
    for tensor in tensors_of(inputs):
        if tensor.is_floating_point() and tensor.ndim > 1:
            dims = [Dim() for _ in tensor.shape]
            for place in {1, tensor.ndim - 1}:
                dims[place] = Dim(labels.fixed(tensor.shape[place], _INPUT))
            labels.label(tensor, dims)
    with torch.no_grad(), _modules_named(model, labels, through_norms), _Recorder(labels):
        outputs = call(model, inputs)
    for output in tree_leaves(outputs):
        for dim in labels.dims(output) if isinstance(output, Tensor) else ():
            labels.fix(dim, _OUTPUT)
    return labels


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes labels through every operation."""

    def __init__(self, labels: Labels):
        super().__init__()  # type: ignore[no-untyped-call]
        self._labels = labels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._labels.operation += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(self._labels.labelled(tensor) for tensor in tensors):
            names = [argument.name for argument in func._schema.arguments]
            self._record(func, {**dict(zip(names, args, strict=False)), **(kwargs or {})}, tensors, out)
        return out

    def _record(self, func: Any, arguments: dict[str, Any], tensors: list[Tensor], out: Any) -> None:
        """Label what an operation gives; fix the labels of its inputs where no rule knows it, or its case."""
        name = func._schema.name.removeprefix("aten::")
        try:
            known = self._labelled(name, torch.Tag.pointwise in func.tags, arguments, tensors, out)
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
            known = False
        if not known:
            for dim in (dim for tensor in tensors for dim in self._labels.dims(tensor)):
                self._labels.fix(
                    dim, f"its channels pass through {name} in {self._labels.module or 'the network'}"
                )

    def _labelled(
        self, name: str, by_element: bool, arguments: dict[str, Any], tensors: list[Tensor], out: Any
    ) -> bool:
        """Label what an operation gives by its rule; whether there is one."""
        labels = self._labels
        weight = all(labels.is_weight(tensor) for tensor in tensors)
        if name in ("split", "split_with_sizes", "chunk"):
            dim = arguments.get("dim", 0)
            made = split(labels, arguments["self"], dim, [piece.shape[dim] for piece in out])
            for piece, dims in zip(out, made, strict=True):
                labels.label(piece, dims, weight)
            return True
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        apply = RULES.get(name, pointwise if by_element else None)
        if not results or apply is None:
            return not results
        dims = list(apply(labels, arguments, results[0]))
        for result in results:
            if result.shape == results[0].shape:
                labels.label(result, dims, weight)
        return True


@contextmanager
def _modules_named(model: nn.Module, labels: Labels, through_norms: bool) -> Iterator[None]:
    """Keep the name of the module that runs in ``labels.module``, and in ``labels.in_norm`` whether it is a norm."""
    running: list[tuple[str, bool]] = [("", False)]
    handles = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            running.append((name, through_norms and is_norm(module)))
            labels.module, labels.in_norm = running[-1]

        return hook

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        running.pop()
        labels.module, labels.in_norm = running[-1]

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
