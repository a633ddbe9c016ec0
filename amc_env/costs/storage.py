"""Stored size of a masked network in the formats of the field: EIE, CSR and n:m, or dense where that is smaller.

A convolution's weight is the matrix [O, I / groups * kh * kw]. Every layer takes the smaller of its format and
dense storage *at the same bits per weight*, so that sparsity earns no credit for quantisation: a budget's ratio is
of the quantised dense network. Biases, batch norms and other parameters count 32 bits each, always.

No size rises when more is removed, for a layer's kept sets are nested and each format stores less of a smaller
one. For EIE this is no matter of course, since padding may be needed where an entry was (see `eie_entries`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from amc_env.costs.base import BudgetSettings, CostInputs, Kind, NetworkCost, size
from amc_env.errors import UserError
from amc_env.graph.layers import Layer, LayerGraph
from amc_env.pruning.candidate import MaskedCandidates
from amc_env.space import Grid
from amc_env.validation import settings

_OTHER_BITS = 32  # of a parameter that is no weight of a layer


_LONGEST_RUN = 15  # zeros that a 4-bit relative index can skip


Matrix = NDArray[np.bool_]
"""[O, I / groups * kh * kw]: what stays."""


class Format(Protocol):
    """How the weights of one layer are stored."""

    @property
    def name(self) -> str:
        """Its name in conf."""
        ...

    def dense(self, weights: int) -> int:
        """Bits of all weights, zero or not, at this format's bits per weight."""
        ...

    def sparse(self, keep: Matrix, kept: int, total: int) -> int:
        """Bits of the weights that stay.

        Args:
            keep: What stays of the weights.
            kept: Units that stay.
            total: Units that there are.
        """
        ...


@dataclass(frozen=True)
class Eie:
    """Compressed sparse columns with 4-bit codes and 4-bit relative indices.

    Han et al., "EIE: Efficient Inference Engine on Compressed Deep Neural Network", ISCA 2016, section III:

        8 bits x (kept weights + padding zeros) + pointer_bits x (columns + 1) + 16 x 32 bits of codebook

    A column of the matrix (one input at one place of the kernel) is the list of its entries from the first output
    to the last, each a 4-bit index into 16 shared weights and the 4-bit count of zeros before it in its column;
    zeros after the last entry take nothing. Where we differ: the paper interleaves the rows over processing
    elements, each with columns and 16-bit pointers of its own; here one list holds the layer, whose entries may
    be too many for 16 bits. Dense are 4-bit codes and the same codebook. Codes are only counted: no weight is
    quantised here.

    Attributes:
        pointer_bits: Bits of a pointer to the beginning of a column.
    """

    name: ClassVar[str] = "eie"

    pointer_bits: int = 32

    _codebook: ClassVar[int] = 16 * 32

    def dense(self, weights: int) -> int:
        """4 bits a weight."""
        return 4 * weights + self._codebook

    def sparse(self, keep: Matrix, kept: int, total: int) -> int:
        """The formula above."""
        columns: int = keep.shape[1]
        return 8 * eie_entries(keep) + self.pointer_bits * (columns + 1) + self._codebook


@dataclass(frozen=True)
class Csr:
    """Compressed sparse rows: a value and a column index for each weight that stays, a 32-bit pointer for each
    row and one more.

    Attributes:
        value_bits: Bits of a weight.
        index_bits: Bits of a column index; None: 16 up to 65,536 columns, else 32.
    """

    name: ClassVar[str] = "csr"

    value_bits: int = 32
    index_bits: int | None = None

    def dense(self, weights: int) -> int:
        """``value_bits`` a weight."""
        return self.value_bits * weights

    def sparse(self, keep: Matrix, kept: int, total: int) -> int:
        """Values, column indices and row pointers."""
        rows: int = keep.shape[0]
        index_bits = self.index_bits or (16 if keep.shape[1] <= 2**16 else 32)
        return int(np.count_nonzero(keep)) * (self.value_bits + index_bits) + 32 * (rows + 1)


@dataclass(frozen=True)
class Nm:
    """n of every m weights, and ceil(log2 m) bits for the position of each (2:4: 2 bits).

    Mishra et al., arXiv 2104.08378, section 3.

    Attributes:
        value_bits: Bits of a weight.
    """

    name: ClassVar[str] = "nm"

    value_bits: int = 32

    def dense(self, weights: int) -> int:
        """``value_bits`` a weight."""
        return self.value_bits * weights

    def sparse(self, keep: Matrix, kept: int, total: int) -> int:
        """Values and places; ``kept`` of ``total`` are n of m."""
        return keep.size // total * kept * (self.value_bits + place_bits(total))


def eie_entries(keep: Matrix) -> int:
    """Entries of EIE's list: weights that stay, and a padding zero for every 16th zero of a run before one.

    A run of ``g`` zeros before an entry takes ``g // 16`` padding zeros: each skips 15 zeros and is one itself.
    Removing an entry never lengthens the list: it merges the runs ``a`` and ``b`` around it into one of ``a + b +
    1`` zeros, and ``(a + b + 1) // 16 <= a // 16 + b // 16 + 1``, at most one more padding zero for the entry
    that is gone. The last entry of a column takes its padding with it.
    """
    rows = keep.shape[0]
    spots = np.flatnonzero(np.ascontiguousarray(keep.T))  # column after column
    gaps = np.diff(spots, prepend=-1) - 1
    np.minimum(gaps, spots % rows, out=gaps)  # a run begins with its column
    return len(spots) + int((gaps // (_LONGEST_RUN + 1)).sum())


def place_bits(m: int) -> int:
    """Bits of a weight's position within a block of ``m``: ceil(log2 m)."""
    return (m - 1).bit_length()


def follows_pattern(weight: Tensor, n: int, m: int) -> bool:
    """Whether each block of ``m`` input channels has at most ``n`` weights that are not zero.

    Args:
        weight: [O, I / groups, kh, kw] or [O, I]; blocks run along the input channels at each kernel position.
        n: Non-zero weights allowed in a block.
        m: Weights of a block.

    Raises:
        UserError: n:m is no pattern, or the input channels do not divide into blocks.
    """
    if not 1 <= n <= m:
        raise UserError(
            f"{n}:{m} is no pattern: 1 <= n <= m is needed, like 2:4",
            code="out_of_range",
            field="granularity",
        )
    if weight.shape[1] % m:
        raise UserError(
            f"{weight.shape[1]} input channels (per group) are not divisible by m={m}: such a layer is not pruned",
            code="does_not_fit",
        )
    blocks = weight.movedim(1, -1).reshape(len(weight), -1, m)
    return bool((blocks != 0).sum(-1).max() <= n)


def params_beside_weights(graph: LayerGraph) -> int:
    """Parameters that are no weights of a layer: biases, batch norms and all others."""
    biases = sum(layer.out_channels for layer in graph.layers if layer.bias and not layer.costless)
    channelwise = sum(module.channels * module.params_per_channel for module in graph.channelwise)
    return biases + channelwise + graph.other_params


@settings
class StorageBudget(BudgetSettings):
    """A limit on the stored size of a masked network; see `Storage`.

    Attributes:
        format: ``eie``, ``csr`` or ``nm``; each layer takes it or dense, whichever is smaller.
        value_bits: Bits of a weight in ``csr`` and ``nm``; EIE's are 4.
    """

    cost: str = "storage"
    format: Literal["eie", "csr", "nm"] = "eie"
    value_bits: Annotated[int, Field(ge=1, le=64)] = 32


class Storage(NetworkCost):
    """Stored size of a masked network in bytes: one format for all layers, or dense where that is smaller.

    Each layer is rounded up to whole bytes. A weight that stays is stored even if its value happens to be zero.

    Args:
        layers: All layers whose weights are stored in this format; `costless` ones are fixed selections that cost
            nothing. Those without a decision are dense.
        grids: The decisions, each named like its layer.
        places: By layer: the place of each weight's unit in the order of removal, int32, shaped like the weight;
            a weight stays where its place is below ``total - removed``.
        other_params: Parameters that are no weights of these layers; see `params_beside_weights`.
        format: ``eie``, ``csr`` or ``nm``.
        value_bits: Bits of a weight in ``csr`` and ``nm``; EIE's are 4.
        index_bits: Bits of a column index in ``csr``; None: 16 up to 65,536 columns, else 32.
        pointer_bits: Bits of a column pointer in ``eie``.

    Raises:
        UserError: The format is unknown, or ``nm`` is asked for weights that are not pruned n:m.
    """

    name: ClassVar[str] = "storage"
    title: ClassVar[str] = "stored size"
    unit: ClassVar[str] = "bytes"
    granularities: ClassVar[tuple[Kind, ...]] = ("masked",)
    Settings: ClassVar[type[BudgetSettings]] = StorageBudget

    def __init__(
        self,
        layers: Sequence[Layer],
        grids: Sequence[Grid],
        places: Mapping[str, Tensor],
        other_params: int,
        format: str = "eie",
        *,
        value_bits: int = 32,
        index_bits: int | None = None,
        pointer_bits: int = 32,
    ):
        formats: tuple[Format, ...] = Eie(pointer_bits), Csr(value_bits, index_bits), Nm(value_bits)
        names = {known.name: known for known in formats}
        if format not in names:
            raise UserError(
                f"budget.format={format} must be one of {', '.join(names)}",
                code="unknown_name",
                field="budget.format",
            )
        self._format = names[format]
        self._grids = tuple(grids)
        if format == "nm":
            _check_blocks(self._grids, places)
        weights = {layer.name: layer.weights for layer in layers if not layer.costless}
        self._weights = weights
        self._places = [places[g.name].cpu().reshape(len(places[g.name]), -1).numpy() for g in self._grids]
        assert all(p.size == weights[g.name] for g, p in zip(self._grids, self._places, strict=True))
        decided = {grid.name for grid in self._grids}
        self._whole = {
            name: ("dense", _bytes(self._format.dense(count)))
            for name, count in weights.items()
            if name not in decided
        }
        self._fixed = _bytes(_OTHER_BITS * other_params) + sum(size for _, size in self._whole.values())
        self._memo: dict[tuple[int, int], tuple[str, int]] = {}

    @classmethod
    def build(cls, problem: CostInputs, settings: StorageBudget) -> Self:
        """Counts the weights that stay in the order in which units are removed.

        Raises:
            UserError: The format does not fit the granularity.
        """
        builder, graph = problem.builder, problem.graph
        assert isinstance(builder, MaskedCandidates)
        others = params_beside_weights(graph)
        return cls(
            graph.layers,
            problem.grids,
            builder.removal_rank,
            others,
            settings.format,
            value_bits=settings.value_bits,
        )

    def __call__(self, removed: Sequence[int]) -> float:
        """Bytes of the masked network."""
        return float(self._fixed + sum(self._stored(i, int(count))[1] for i, count in enumerate(removed)))

    @classmethod
    def format(cls, value: float) -> str:
        """Bytes, like '590.00 kB'."""
        return size(value)

    def sizes(self, removed: Sequence[int]) -> dict[str, tuple[str, int]]:
        """By layer, in forward order: what its weights are stored as (the format's name or ``dense``), bytes."""
        found = {g.name: self._stored(i, int(removed[i])) for i, g in enumerate(self._grids)}
        return {name: found.get(name) or self._whole[name] for name in self._weights}

    def _stored(self, decision: int, removed: int) -> tuple[str, int]:
        key = decision, removed
        if key not in self._memo:
            grid, places = self._grids[decision], self._places[decision]
            kept = grid.total - removed
            dense = _bytes(self._format.dense(places.size))
            sparse = _bytes(self._format.sparse(places < kept, kept, grid.total))
            self._memo[key] = (self._format.name, sparse) if sparse < dense else ("dense", dense)
        return self._memo[key]


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _check_blocks(grids: Sequence[Grid], places: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not pruned in blocks along the input channels."""
    for grid in grids:
        inputs = places[grid.name].shape[1]
        blocked = inputs % grid.total == 0
        if blocked:
            blocks = places[grid.name].cpu().movedim(1, -1).reshape(-1, grid.total).sort(dim=1).values.numpy()
            blocked = bool((blocks == np.arange(grid.total)).all())
        if not blocked:
            raise UserError(
                f"budget.format=nm stores n of every m input channels, but {grid.name} is not pruned so: take "
                "granularity=nm, or budget.format=eie or csr",
                code="does_not_fit",
                field="budget.format",
            )
