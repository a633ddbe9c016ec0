"""The latency table: times of units over their channels, and what sums of them miss.

A table is one JSON file, and may come from any machine that writes it so (times in milliseconds)::

    {"format": "latency table 1",
     "conditions": {"runtime": "eager", "threads": 1, "batch": 1, "machine": "...", "versions": {"torch": "2.13.0"}},
     "units": [{"unit": {"kind": "conv", "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1],
                         "groups": 1, "bias": false, "in_size": [32, 32], "norm": true, "activation": "relu"},
                "inputs": [8, 16], "outputs": [8, 16], "ms": [[0.05, 0.07], [0.06, 0.09]]}],
     "correction": {"scale": 1.0, "per_element_ms": 0.0, "per_weight_ms": 0.0, "constant_ms": 0.0},
     "points": 4, "forwards": 140, "seconds": 1.5}

``ms`` has a row for each count of inputs; a depthwise unit (``"groups": "depthwise"``) has ``"inputs": [1]`` and one
row. The correction may be left out, as may the last three, which say what building took.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from amc_env.costs.latency.runtimes import PROCESSOR_ONLY
from amc_env.costs.latency.units import Unit
from amc_env.errors import UserError
from amc_env.files import read_json, reading, write
from amc_env.system import machine

Floats = NDArray[np.float64]


Ints = NDArray[np.int64]


_FORMAT = "latency table 1"


_PACKAGES = {
    "onnx": ("torch", "onnxruntime"),
    "executorch": ("torch", "executorch"),
    "litert": ("torch", "litert-torch", "ai-edge-litert"),
}
"""By runtime the packages whose version times hang on; else torch alone."""


@dataclass(frozen=True)
class Conditions:
    """Under which the times of a table hold.

    Attributes:
        runtime: What ran the units (see `amc_env.costs.latency.runtimes`).
        threads: Threads of the processor.
        batch: Examples of one pass.
        machine: The processor or GPU, in words.
        versions: Package name to version.
    """

    runtime: str
    threads: int
    batch: int
    machine: str
    versions: Mapping[str, str]

    @classmethod
    def here(cls, runtime: str, threads: int, batch: int, device: str = "cpu") -> Conditions:
        """Those of this machine and the packages installed; ``device`` is where the example lies."""
        versions = {name: version(name) for name in _PACKAGES.get(runtime, ("torch",))}
        if runtime in PROCESSOR_ONLY:  # these runtimes take the example to their own place
            device = "cpu"
        elif runtime.startswith("cuda") and device == "cpu":
            device = "cuda"
        return cls(runtime, threads, batch, machine(device), versions)


@dataclass(frozen=True, eq=False)
class Times:
    """Milliseconds of one unit over a grid of channels, non-decreasing in both counts.

    Attributes:
        inputs: Input channels, ascending; (1,) for a depthwise unit.
        outputs: Output channels, ascending.
        ms: Milliseconds, [inputs, outputs].
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ms: Floats

    @classmethod
    def fitted(cls, inputs: Sequence[int], outputs: Sequence[int], measured: ArrayLike) -> Times:
        """Measured milliseconds [inputs, outputs], made monotone by `monotone`.

        Raises:
            ValueError: The counts do not ascend from 1 on, or the times are not above 0 or of another shape.
        """
        ms = np.asarray(measured, dtype=np.float64)
        if ms.shape != (len(inputs), len(outputs)) or not ms.size:
            raise ValueError(f"times of {len(inputs)} by {len(outputs)} channel counts have shape {ms.shape}")
        if not (np.isfinite(ms).all() and (ms > 0).all()):
            raise ValueError("times must be finite and above 0 ms")
        for counts in (inputs, outputs):
            if counts[0] < 1 or any(b <= a for a, b in pairwise(counts)):
                raise ValueError(f"channel counts {list(counts)} must ascend from 1 on")
        return cls(tuple(inputs), tuple(outputs), monotone(ms))


def monotone(ms: Floats) -> Floats:
    """The nearest matrix that decreases in neither direction, in the largest relative error.

    It lies midway, in logarithms, between the least such matrix above and the greatest one below: both are running
    extremes, and one of the two errors is left half in each direction.
    """
    above = np.maximum.accumulate(np.maximum.accumulate(ms, axis=0), axis=1)
    below = np.minimum.accumulate(np.minimum.accumulate(ms[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
    fitted: Floats = np.where(above == below, ms, np.sqrt(above * below))
    return fitted


class Lookup:
    """Bilinear interpolation in many grids at once, exact at their points.

    Args:
        grids: One for each place of the queries, by a name for messages.
    """

    def __init__(self, grids: Sequence[tuple[str, Times]]):
        self._names, times = zip(*grids, strict=True)
        self._inputs, self._outputs = _Axis([t.inputs for t in times]), _Axis([t.outputs for t in times])
        self._ms = np.concatenate([t.ms.reshape(-1) for t in times])
        self._starts = np.cumsum([0, *(t.ms.size for t in times)])[:-1]

    def __call__(self, inputs: Ints, outputs: Ints) -> Floats:
        """Milliseconds of each grid at its counts.

        Raises:
            UserError: A grid does not reach there.
        """
        inside = self._inputs.reaches(inputs) & self._outputs.reaches(outputs)
        if not inside.all():
            missed = "; ".join(
                f"{self._names[i]} with {inputs[i]} inputs (the table has {self._inputs.range(i)}) and {outputs[i]} "
                f"outputs ({self._outputs.range(i)})"
                for i in np.flatnonzero(~inside)[:4]
            )
            raise UserError(
                f"the latency table does not reach {missed}: build one with the same granularity.max_ratio, or lower it",
                code="wrong_table",
                field="budget.table",
            )
        i, next_i, right = self._inputs.place(inputs)
        o, next_o, down = self._outputs.place(outputs)
        row, next_row = (
            self._starts + i * self._outputs.lengths,
            self._starts + next_i * self._outputs.lengths,
        )
        near = self._ms[row + o] * (1 - down) + self._ms[row + next_o] * down
        far = self._ms[next_row + o] * (1 - down) + self._ms[next_row + next_o] * down
        found: Floats = near * (1 - right) + far * right
        return found


class _Axis:
    """Ascending counts of many grids, padded to one length."""

    def __init__(self, counts: Sequence[Sequence[int]]):
        self.lengths = np.array([len(c) for c in counts])
        self._counts = np.full((len(counts), int(self.lengths.max())), np.iinfo(np.int64).max)
        for row, values in zip(self._counts, counts, strict=True):
            row[: len(values)] = values
        self._rows = np.arange(len(counts))
        self._last = self.lengths - 1
        self._least, self._most = self._counts[:, 0], self._counts[self._rows, self._last]

    def range(self, row: int) -> str:
        """The reach of one grid, for people."""
        return f"{self._least[row]} to {self._most[row]}"

    def reaches(self, values: Ints) -> NDArray[np.bool_]:
        """Whether each value is within its grid."""
        within: NDArray[np.bool_] = (self._least <= values) & (values <= self._most)
        return within

    def place(self, values: Ints) -> tuple[Ints, Ints, Floats]:
        """For each value the count at or below it, the one after, and how far it is between them, in [0, 1)."""
        at = (self._counts <= values[:, None]).sum(axis=1) - 1
        after = np.minimum(at + 1, self._last)
        low, high = self._counts[self._rows, at], self._counts[self._rows, after]
        return at, after, (values - low) / np.maximum(high - low, 1)


@dataclass(frozen=True)
class Correction:
    """What sums of units miss: ``scale * sum + per_element_ms * elements + per_weight_ms * weights + constant_ms``.

    Attributes:
        scale: How much longer units take within a network than alone, at least 0.
        per_element_ms: Milliseconds for each element that operations outside of units give (residual additions,
            pooling), of one example; at least 0.
        per_weight_ms: Milliseconds for each weight: those of a complete network do not stay in the caches that hold one
            unit's; at least 0.
        constant_ms: What every network takes besides; below 0 where calls cost less within a network.
    """

    scale: float = 1.0
    per_element_ms: float = 0.0
    per_weight_ms: float = 0.0
    constant_ms: float = 0.0

    def __post_init__(self) -> None:
        factors = self.scale, self.per_element_ms, self.per_weight_ms
        if not (np.isfinite([*factors, self.constant_ms]).all() and min(factors) >= 0):
            raise ValueError(f"{self} needs finite numbers, the first three at least 0")

    def __call__(self, units_ms: float, elements: float, weights: float) -> float:
        """Milliseconds of a network whose units take ``units_ms`` alone."""
        more = self.per_element_ms * elements + self.per_weight_ms * weights
        return self.scale * units_ms + more + self.constant_ms


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times of all units of a network on one machine.

    Attributes:
        conditions: Under which they hold.
        units: Times by unit.
        correction: What sums of them miss; as fitted, the network's own.
        points: Pairs of a unit and channel counts that were timed.
        forwards: Passes that this took, the warm-up and the correction's complete networks included.
        seconds: Wall-clock time that this took.
    """

    conditions: Conditions
    units: Mapping[Unit, Times]
    correction: Correction = field(default_factory=Correction)
    points: int = 0
    forwards: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Writes the file that `load` reads, in the format that the module describes; all of it or nothing."""
        units = [
            {"unit": unit.to_json(), "inputs": t.inputs, "outputs": t.outputs, "ms": t.ms.tolist()}
            for unit, t in self.units.items()
        ]
        content = {
            "format": _FORMAT,
            "conditions": asdict(self.conditions),
            "units": units,
            "correction": asdict(self.correction),
            "points": self.points,
            "forwards": self.forwards,
            "seconds": round(self.seconds, 3),
        }
        write(path, json.dumps(content, indent=1))

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Reads `save`'s file, or one measured elsewhere in the same format; its times are made monotone.

        Raises:
            UserError: There is no such file, or it is no latency table.
        """
        subject = f"latency table {path}"
        content = read_json(path, subject, "amc-latency build makes one")
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise UserError(
                f'{path} is no latency table: a JSON object with "format": "{_FORMAT}" is needed',
                code="wrong_table",
                field="budget.table",
            )
        with reading(subject):
            return cls._of(content)

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> LatencyTable:
        units = {
            Unit.from_json(each["unit"]): Times.fitted(each["inputs"], each["outputs"], each["ms"])
            for each in content["units"]
        }
        return cls(
            Conditions(**content["conditions"]),
            units,
            Correction(**content.get("correction", {})),
            content.get("points", 0),
            content.get("forwards", 0),
            content.get("seconds", 0.0),
        )

    def refuses(self, conditions: Conditions, what: str = "the latency table") -> None:
        """Compares the table's conditions with those that it would be used under.

        Args:
            conditions: Of the use.
            what: How messages call the table, e.g. by its file.

        Raises:
            UserError: They differ; every difference is named.
        """
        made, here = asdict(self.conditions), asdict(conditions)
        differences = [
            f"{name} {made[name]} there, {here[name]} here" for name in made if made[name] != here[name]
        ]
        if differences:
            raise UserError(
                f"{what} was measured under other conditions ({'; '.join(differences)}): build one here with "
                "amc-latency build, or say budget.elsewhere=true to predict that machine's latency",
                code="wrong_table",
                field="budget.table",
            )
