"""Labels for the entries of tensors, and which of them can only be removed together.

Every entry of a parameter's dimension has a label. Labels follow the entries through the operations of one run, and
labels that meet, as in an addition, are united: what they label can only be removed together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Ints = npt.NDArray[np.int64]
Axis = tuple[int, int]
"""A reshape, by the number of its operation, and the place among the dimensions that it made of one."""


@dataclass(frozen=True, eq=False)
class Dim:
    """What is known of one dimension of a tensor.

    Attributes:
        labels: The label of each entry; None where the dimension belongs to no parameter, like a batch.
        axes: The reshapes that made it.
        free: Whether its size follows that of what it is combined with, like an expanded dimension's.
    """

    labels: Ints | None = None
    axes: frozenset[Axis] = frozenset()
    free: bool = False


@dataclass(frozen=True, eq=False)
class Split:
    """A reshape or split of a dimension with labels: the module may know sizes of it as numbers.

    Attributes:
        module: The module whose forward pass did it.
        labels: Labels along the dimension that can be cut.
        size: Entries of the dimension where it is merged with others; those of one piece.
    """

    module: str
    labels: Ints
    size: int


@dataclass(frozen=True, eq=False)
class Product:
    """A product of two activations, as in attention.

    Attributes:
        macs: Multiply-accumulates for one example.
        labels: Labels of the dimension that they are in proportion to; None where it is fixed.
    """

    macs: int
    labels: Ints | None


class Labels:
    """The labels of a run: a union-find structure, and the dimensions of every tensor that is alive.

    Args:
        parameters: Tensors whose entries are labelled when they are first read.
        heads: Reshapes whose named dimension is the one that can be cut, found in a run before. By default it is the
            last dimension that a reshape makes.
    """

    def __init__(self, parameters: Sequence[Tensor], heads: frozenset[Axis] = frozenset()):
        self._parents: Ints = np.arange(1024, dtype=np.int64)
        self._why: Ints = np.zeros(1024, dtype=np.int64)
        self._count = 1  # label 0 is not used
        self._reasons: dict[str, int] = {"": 0}
        self._parameters = {id(parameter) for parameter in parameters}
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._weights: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._chosen = heads
        self.heads: set[Axis] = set()
        self.splits: list[Split] = []
        self.products: list[Product] = []
        self.macs = 0  # of all products with weights or activations
        self.in_norm = False  # whether a norm runs whose channels may be cut
        self.module = ""
        self.operation = 0

    def dims(self, tensor: Tensor) -> tuple[Dim, ...]:
        """What is known of a tensor's dimensions."""
        if tensor not in self._known:
            owned = id(tensor) in self._parameters
            dims = tuple(Dim(self.fresh(size) if owned and size > 1 else None) for size in tensor.shape)
            self.label(tensor, dims, weight=owned)
        found: tuple[Dim, ...] = self._known[tensor]
        return found

    def label(self, tensor: Tensor, dims: Sequence[Dim], weight: bool = False) -> None:
        """Remember a tensor's dimensions, and whether it was computed from parameters alone."""
        assert len(dims) == tensor.ndim
        self._known[tensor] = tuple(dims)
        self._weights[tensor] = weight

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from parameters alone."""
        self.dims(tensor)
        return bool(self._weights[tensor])

    def labelled(self, tensor: Tensor) -> bool:
        """Whether any dimension of a tensor has labels."""
        return any(dim.labels is not None for dim in self.dims(tensor))

    def fresh(self, count: int) -> Ints:
        """New labels."""
        first, self._count = self._count, self._count + count
        if self._count > len(self._parents):
            size = 2 * self._count
            self._parents = np.concatenate([self._parents, np.arange(len(self._parents), size)])
            self._why = np.concatenate([self._why, np.zeros(size - len(self._why), dtype=np.int64)])
        return np.arange(first, self._count, dtype=np.int64)

    def roots(self, labels: Ints) -> Ints:
        """One label for each class of united ones."""
        while True:
            parents = self._parents[labels]
            if (parents == labels).all():
                return labels
            labels = self._parents[parents]

    def unite(self, first: Ints, second: Ints) -> None:
        """Unite labels pair by pair."""
        while True:
            a, b = self.roots(first), self.roots(second)
            apart = a != b
            if not apart.any():
                return
            low, high = np.minimum(a[apart], b[apart]), np.maximum(a[apart], b[apart])
            np.minimum.at(self._parents, high, low)

    def fix(self, dim: Dim, reason: str) -> None:
        """Say why the entries of a dimension cannot be removed."""
        if dim.labels is None:
            return
        number = self._reasons.setdefault(reason, len(self._reasons))
        known = self._why[dim.labels]
        self._why[dim.labels] = np.where(known == 0, number, known)

    def fixed(self, count: int, reason: str) -> Ints:
        """New labels that cannot be removed."""
        labels = self.fresh(count)
        self.fix(Dim(labels), reason)
        return labels

    def reasons(self) -> Mapping[int, str]:
        """Root of each class that cannot be removed to the first reason that was found."""
        fixed = np.flatnonzero(self._why[: self._count])
        roots = self.roots(fixed.astype(np.int64))
        texts = list(self._reasons)
        found: dict[int, int] = {}
        for root, number in zip(roots.tolist(), self._why[fixed].tolist(), strict=True):
            found[root] = min(number, found.get(root, number))
        return {root: texts[number] for root, number in found.items()}

    def same(self, dims: Sequence[Dim]) -> Dim:
        """One dimension that several tensors of its size share: their labels are united."""
        labelled = [dim.labels for dim in dims if dim.labels is not None]
        axes = frozenset[Axis]().union(*(dim.axes for dim in dims))
        if not labelled:
            return Dim(None, axes, all(dim.free for dim in dims))
        for labels in labelled[1:]:
            if labels is not labelled[0]:
                self.unite(labelled[0], labels)
        found = Dim(labelled[0], axes)
        if len(labelled[0]) > 1 and any(dim.labels is None and not dim.free for dim in dims):
            self.fix(found, "its channels meet values whose number is fixed")
        return found

    def merge(self, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
        """The dimension that a reshape makes of several neighbours, the first one outermost."""
        axes = frozenset[Axis]().union(*(dim.axes for dim in dims))
        labelled = [place for place, dim in enumerate(dims) if dim.labels is not None]
        if not labelled:
            return Dim(None, axes)
        kept = next((p for p in labelled if not self._is_fixed(dims[p])), labelled[0])
        for place in labelled:
            if place != kept:
                self.fix(dims[place], "a reshape merges its channels with others")
        labels = dims[kept].labels
        assert labels is not None
        shape = [1] * len(sizes)
        shape[kept] = sizes[kept]
        self.splits.append(Split(self.module, labels, math.prod(sizes)))
        return Dim(np.broadcast_to(labels.reshape(shape), sizes).reshape(-1), axes)

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """The dimensions that a reshape makes of one: one of them can be cut, the same for all of the others."""
        made = [Dim(None, frozenset({(self.operation, place)})) for place in range(len(sizes))]
        if dim.labels is None:
            return [Dim() for _ in sizes]
        grid = self.roots(dim.labels).reshape(tuple(sizes))
        place = self._cut_place(grid)
        rows = np.moveaxis(grid, place, 0).reshape(sizes[place], -1)
        self.unite(np.repeat(rows[:, :1], rows.shape[1] - 1, axis=1).ravel(), rows[:, 1:].ravel())
        labels = np.ascontiguousarray(rows[:, 0])
        self.splits.append(Split(self.module, labels, len(dim.labels)))
        made[place] = replace(made[place], labels=labels, axes=made[place].axes | dim.axes)
        return made

    def _cut_place(self, grid: Ints) -> int:
        """The dimension that is cut: the one that alone changes the labels, else heads, else the last one."""
        for place in range(grid.ndim):
            rows = np.moveaxis(grid, place, 0).reshape(grid.shape[place], -1)
            if (rows == rows[:, :1]).all():
                return place
        chosen = (place for number, place in self._chosen if number == self.operation)
        return next(chosen, grid.ndim - 1)

    def _is_fixed(self, dim: Dim) -> bool:
        assert dim.labels is not None
        return bool(self._why[dim.labels].all())
