"""Cycles of an array processor that multiplies a fixed number of input channels, output channels and pixels at once.

The array of AMD's (Xilinx's) DPU for Zynq UltraScale+ works so: "DPUCZDX8G for Zynq UltraScale+ MPSoCs Product
Guide", PG338, v4.1, "Architecture of the DPUCZDX8G": B4096 takes 16 input channels, 16 output channels and 8
pixels a cycle, 8 * 16 * 16 MACs or 4,096 operations at its peak. What does not fill the array waits with it, so
channels pay in steps of 16: the 17th costs as much as the 17th to 32nd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np

from amc_env.costs.base import BudgetSettings, CostInputs, Kind, NetworkCost
from amc_env.costs.counts import Ints, kept_channels
from amc_env.errors import UserError
from amc_env.graph.layers import LayerGraph
from amc_env.validation import Count, settings


@settings
class CyclesBudget(BudgetSettings):
    """A limit on the cycles of an array processor; see `Cycles`.

    Attributes:
        input_parallel: Input channels multiplied at once.
        output_parallel: Output channels multiplied at once.
        pixel_parallel: Pixels multiplied at once.
    """

    cost: str = "cycles"
    input_parallel: Count = 16
    output_parallel: Count = 16
    pixel_parallel: Count = 8


class Cycles(NetworkCost):
    """Cycles of one example's convolutions and linear layers on such an array.

    A layer takes, for ``g`` groups::

        ceil(pixels / pixel_parallel) * ceil(I / g / input_parallel) * ceil(O / g / output_parallel) * g * kh * kw

    A linear layer is a 1x1 convolution at one pixel (at each of its positions). Pixels are taken from the whole
    output, not row by row. A grouped convolution runs group after group. A depthwise convolution does not fill the
    array's input side: ``output_parallel`` channels run side by side on ``depthwise_pixels`` pixels. PG338 runs
    it on a unit of its own at half of the pixel parallelism ("DepthwiseConv"), which is the default.

    Counted is arithmetic at full supply: loads and stores, filling the pipeline, pooling, element-wise operations
    and biases are not, nor are `costless` layers. Convolutions that are no layers of the graph (1d, 3d, transposed)
    count as if they filled the array.

    Args:
        graph: The network, with channel groups; none: nothing can be removed.
        input_parallel: Input channels multiplied at once.
        output_parallel: Output channels multiplied at once.
        pixel_parallel: Pixels multiplied at once.
        depthwise_pixels: Pixels of a depthwise convolution at once; None: half of ``pixel_parallel``.

    Raises:
        UserError: A parallelism is not a whole number of at least 1.
    """

    name: ClassVar[str] = "cycles"
    title: ClassVar[str] = "cycles"
    unit: ClassVar[str] = "cycles"
    granularities: ClassVar[tuple[Kind, ...]] = ("channel",)
    Settings: ClassVar[type[BudgetSettings]] = CyclesBudget

    def __init__(
        self,
        graph: LayerGraph,
        input_parallel: int = 16,
        output_parallel: int = 16,
        pixel_parallel: int = 8,
        depthwise_pixels: int | None = None,
    ):
        pixels = max(1, pixel_parallel // 2) if depthwise_pixels is None else depthwise_pixels
        _check(
            input_parallel=input_parallel,
            output_parallel=output_parallel,
            pixel_parallel=pixel_parallel,
            depthwise_pixels=pixels,
        )
        layers = graph.layers
        self._sizes, self._per_unit = kept_channels(graph)
        self._depthwise = np.array([layer.depthwise for layer in layers], dtype=bool)
        self._groups = np.array([1 if layer.depthwise else layer.groups for layer in layers])
        self._area = np.array([0 if layer.costless else layer.area for layer in layers])
        self._positions = np.array([layer.positions for layer in layers])
        self._waves = _ceil(self._positions, np.where(self._depthwise, pixels, pixel_parallel))
        self._parallel = input_parallel, output_parallel
        self._other = -(-graph.other_macs // (input_parallel * output_parallel * pixel_parallel))

    @classmethod
    def build(cls, problem: CostInputs, settings: CyclesBudget) -> Self:
        """Counts from the layers' shapes."""
        return cls(problem.graph, settings.input_parallel, settings.output_parallel, settings.pixel_parallel)

    def __call__(self, removed: Sequence[int]) -> float:
        """Cycles of the cut network."""
        return float(self._by_layer(removed).sum() + self._other)

    def _kept(self, removed: Sequence[int]) -> tuple[Ints, Ints]:
        """Input and output channels of one group of each layer; of a depthwise layer 1 and its channels."""
        kept = self._sizes - self._per_unit @ np.asarray(removed, dtype=np.int64)
        return np.where(self._depthwise, 1, kept[:, 0] // self._groups), kept[:, 1] // self._groups

    def _by_layer(self, removed: Sequence[int]) -> Ints:
        inputs, outputs = self._kept(removed)
        tiles = _ceil(inputs, self._parallel[0]) * _ceil(outputs, self._parallel[1])
        cycles: Ints = self._waves * self._area * self._groups * tiles
        return cycles


def _ceil(values: Ints, parallel: Ints | int) -> Ints:
    return -(-values // parallel)


def _check(**parallel: int) -> None:
    wrong = [f"budget.{name}={value}" for name, value in parallel.items() if value < 1]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)} must be whole numbers of at least 1, like 16, 16 and 8 of a B4096",
            code="out_of_range",
        )
