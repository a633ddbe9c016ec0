"""What a run came to: result.json, written and read here alone.

Its keys are the names of the fields below, but for those of `NetworkFigures.costs` and `MaskedFigures`, which stand one
level higher.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter

from search import files
from search.output.export import Exported

FILE = "result.json"
NETWORKS = ("base", "pruned", "finetuned")

Figures = TypeVar("Figures")


@dataclass(frozen=True)
class NetworkFigures:
    """Figures of one network.

    Attributes:
        accuracy: the score in [0, 1], on `split`.
        split: the images that the accuracy is on, such as 'test'.
        costs: by name, for one image: `macs`, `params` and those that were bounded; of masked weights what is not zero,
            and `dense_macs`, `dense_params` for all of them.
        latency_ms: measured, in milliseconds; None where it was not.
        latency_spread: distance of its quartiles, as a share of the median.
    """

    accuracy: float
    split: str
    costs: Mapping[str, float]
    latency_ms: float | None = None
    latency_spread: float | None = None

    def figure(self, name: str) -> float | None:
        """A cost or latency figure by its name in result.json; None where there is none."""
        return self.costs.get(
            name, {"latency_ms": self.latency_ms, "latency_spread": self.latency_spread}.get(name)
        )

    def to_json(self) -> dict[str, Any]:
        entry = asdict(self)
        return {"accuracy": entry.pop("accuracy"), **entry.pop("costs"), **entry}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> NetworkFigures:
        own = _known(cls, entry)
        costs = {name: value for name, value in entry.items() if name not in own}
        return _checked(cls, own | {"costs": costs})


@dataclass(frozen=True)
class BudgetFigures:
    """A budget and what the delivered network needs of it.

    Attributes:
        cost: its name.
        ratio: the share of the original's cost that `limit` is.
        limit: the most that may remain, in the cost's unit.
        value: the delivered network's.
        met: whether the value is within the limit.
        format: of stored weights, where those are bounded.
    """

    cost: str
    ratio: float
    limit: float
    value: float
    met: bool
    format: str | None = None


@dataclass(frozen=True)
class FrontRow:
    """The network of one of several budgets.

    Attributes:
        cost: name of the budget's cost.
        ratio: the share of the original's cost that `limit` is.
        limit: the most that may remain, in the cost's unit.
        value: the network's.
        met: whether the value is within the limit.
        search_accuracy: the strategy's score on the search split, before fine-tuning.
        split: the images that the following accuracies are on, such as 'test'.
        base: accuracy of the original network.
        pruned: before fine-tuning.
        finetuned: None without fine-tuning.
        delivered: 'pruned' or 'finetuned'.
        costs: of the network, by name.
        latency_ms: measured, in milliseconds; None where it was not.
        evaluations: different strategies scored by this budget's search.
        strategy: decision -> share removed.
        failed: formats that could not be exported.
        folder: of the exported network and its strategy.json, from the run folder.
    """

    cost: str
    ratio: float
    limit: float
    value: float
    met: bool
    search_accuracy: float
    split: str
    base: float
    pruned: float
    finetuned: float | None
    delivered: str
    costs: Mapping[str, float]
    latency_ms: float | None
    evaluations: int
    strategy: Mapping[str, float]
    failed: tuple[str, ...] = ()
    folder: str = "."

    @property
    def accuracy(self) -> float:
        """Of the delivered network."""
        tuned = self.finetuned if self.delivered == "finetuned" else None
        return self.pruned if tuned is None else tuned

    @classmethod
    def of(cls, result: RunResult, folder: str) -> FrontRow:
        """The row of the result of a single budget."""
        budget, network = result.budgets[0], result.delivered
        return cls(
            cost=budget.cost,
            ratio=budget.ratio,
            limit=budget.limit,
            value=budget.value,
            met=budget.met,
            search_accuracy=result.search.search_accuracy,
            split=network.split,
            base=result.base.accuracy,
            pruned=result.pruned.accuracy,
            finetuned=result.finetuned.accuracy if result.finetuned else None,
            delivered="finetuned" if network is result.finetuned else "pruned",
            costs=network.costs,
            latency_ms=network.latency_ms,
            evaluations=result.search.evaluations,
            strategy=result.strategy,
            failed=tuple(export.format for export in result.exports if export.error),
            folder=folder,
        )


@dataclass(frozen=True)
class GranularityFigures:
    """What decisions remove.

    Attributes:
        name: as in conf.
        masked: whether weights are set to zero instead of cut out.
        speed: which hardware gains by it, in a sentence.
        unit: what is counted, such as 'channels'.
        n: of n:m, the non-zero weights of every m; None for others.
        m: see `n`.
    """

    name: str
    masked: bool
    speed: str
    unit: str
    n: int | None = None
    m: int | None = None


@dataclass(frozen=True)
class SearchFigures:
    """How the strategy was found; of a search in stages the counts are those of the last.

    Attributes:
        agent: its name.
        episodes: played.
        evaluations: different strategies scored.
        cache_hits: episodes that ended in a strategy scored before.
        seconds: wall-clock time of this session.
        seed: of the run.
        best_reward: of the delivered strategy.
        search_accuracy: its accuracy on the search split, before fine-tuning.
        precision: that candidates were scored in.
        repair: of the delivered network.
        warmup: episodes at the start that were played at random.
        start: the weights that led to those it was cut from, the original's first; empty for the original's.
        stages: the budget's ratio in each stage.
        stage_episodes: episodes of a stage.
        schedule: shape of the pruning schedule, where it has several rounds.
        rounds: their number.
    """

    agent: str
    episodes: int
    evaluations: int
    cache_hits: int
    seconds: float
    seed: int
    best_reward: float
    search_accuracy: float
    precision: str
    repair: str
    warmup: int = 0
    start: tuple[str, ...] = ()
    stages: tuple[float, ...] = ()
    stage_episodes: int | None = None
    schedule: str | None = None
    rounds: int | None = None


@dataclass(frozen=True)
class BaselineFigures:
    """A baseline's best strategy, scored as the agent's were and not fine-tuned.

    Attributes:
        agent: its name.
        evaluations: different strategies scored, the finalists once more.
        reward: of the best.
        search_accuracy: on the search split.
        accuracy: on the split of the final figures.
        costs: by name.
    """

    agent: str
    evaluations: int
    reward: float
    search_accuracy: float
    accuracy: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class LayerRow:
    """A masked layer: its weights, and how many are not zero."""

    weights: int
    nonzero: int


@dataclass(frozen=True)
class Pattern:
    """Whether the n:m pattern holds in the layers that were to have it."""

    n: int
    m: int
    layers: tuple[str, ...]
    holds: bool


@dataclass(frozen=True)
class MaskedFigures:
    """What is counted on masked weights.

    Attributes:
        layers: by name, in forward order.
        storage: bytes of the network by format.
        pattern: of n:m.
    """

    layers: Mapping[str, LayerRow]
    storage: Mapping[str, int]
    pattern: Pattern | None = None


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that is not pruned, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class LayerFigures:
    """A convolution or linear layer, original and pruned: every figure is a pair.

    Attributes:
        name: of the module.
        inputs: input channels or features.
        outputs: output channels or features.
        weights: all of them, and those that are left; of masked weights, those that are not zero.
        macs: multiply-accumulates of its weights for one example.
        ms: of its unit alone by the latency table, under a latency budget.
    """

    name: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    weights: tuple[int, int]
    macs: tuple[int, int]
    ms: tuple[float, float] | None = None


@dataclass(frozen=True)
class RunResult:
    """The content of result.json.

    Attributes:
        base: the original network.
        pruned: before fine-tuning.
        finetuned: None without fine-tuning.
        delivered_network: the one that is exported, 'pruned' or 'finetuned'; by default the last that there is.
        budgets: in the order they were given.
        strategy: decision -> share removed.
        baselines: scored beside the agent.
        images: examples of the search split and, where there is one, of the test split.
        shapes: all layers, in forward order.
        masked: of masked weights only.
        skipped: layers that are not pruned.
        latency_batch: images that latency was measured with; likewise its runtime and threads.
        machine: the machine and versions.
        model: the network's name.
        command: that started the run.
        resumed: whether evaluations of an earlier session were read back.
        metric: what the accuracies are: the name of the task's score, which is 'accuracy' for classifiers.
        front: of a run with several budgets the network of each, in falling order; everything else is that of the last.
    """

    data: str
    granularity: GranularityFigures
    base: NetworkFigures
    pruned: NetworkFigures
    finetuned: NetworkFigures | None
    budgets: tuple[BudgetFigures, ...]
    search: SearchFigures
    strategy: Mapping[str, float]
    baselines: tuple[BaselineFigures, ...] = ()
    images: Mapping[str, int] = field(default_factory=dict)
    shapes: tuple[LayerFigures, ...] = ()
    masked: MaskedFigures | None = None
    skipped: tuple[SkippedLayer, ...] = ()
    exports: tuple[Exported, ...] = ()
    latency_batch: int = 1
    latency_runtime: str = "eager"
    latency_threads: int = 1
    machine: Mapping[str, Any] = field(default_factory=dict)
    model: str = "model"
    command: str = ""
    resumed: bool = False
    delivered_network: str = ""
    metric: str = "accuracy"
    front: tuple[FrontRow, ...] = ()

    @property
    def networks(self) -> dict[str, NetworkFigures]:
        """Those that there are, by their name in result.json."""
        found = {name: getattr(self, name) for name in NETWORKS}
        return {name: network for name, network in found.items() if network is not None}

    @property
    def delivered(self) -> NetworkFigures:
        """The network that is exported."""
        return self.networks[self.delivered_network or list(self.networks)[-1]]

    @property
    def budget(self) -> BudgetFigures | None:
        """The one with the smallest ratio; None without budgets."""
        return min(self.budgets, key=lambda budget: budget.ratio, default=None)

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        content = asdict(self) | {
            name: network and network.to_json() for name, network in ((n, getattr(self, n)) for n in NETWORKS)
        }
        content["budgets"] = [_without_none(asdict(b), "format") for b in self.budgets]
        content["budget"] = self.budget and _without_none(asdict(self.budget), "format")
        content["shapes"] = [_without_none(shape, "ms") for shape in content["shapes"]]
        content["search"] = _without_none(
            content["search"], "start", "stages", "stage_episodes", "schedule", "rounds"
        )
        content["granularity"] = _without_none(content["granularity"], "n", "m")
        content["exports"] = [entry | {"path": entry["path"].name} for entry in content["exports"]]
        content = _without_none(content, "front")
        return content | _without_none(content.pop("masked") or {}, "pattern")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunResult:
        """Reads what `to_json` gives, from JSON.

        Raises:
            KeyError, TypeError, ValueError: a key is missing, or a value is of another type.
        """
        finetuned = content["finetuned"]
        own = _known(cls, content) | {
            "granularity": _read(GranularityFigures, content["granularity"]),
            "base": NetworkFigures.from_json(content["base"]),
            "pruned": NetworkFigures.from_json(content["pruned"]),
            "finetuned": finetuned and NetworkFigures.from_json(finetuned),
            "budgets": tuple(_read(BudgetFigures, entry) for entry in content["budgets"]),
            "search": _read(SearchFigures, content["search"]),
            "baselines": tuple(_read(BaselineFigures, entry) for entry in content.get("baselines", ())),
            "shapes": tuple(_read(LayerFigures, entry) for entry in content.get("shapes", ())),
            "skipped": tuple(_read(SkippedLayer, entry) for entry in content["skipped"]),
            "exports": tuple(
                _read(Exported, entry | {"path": Path(entry["path"])}) for entry in content["exports"]
            ),
        }
        if "front" in content:
            own["front"] = tuple(_read(FrontRow, entry) for entry in content["front"])
        if "layers" in content:
            layers = {name: _read(LayerRow, entry) for name, entry in content["layers"].items()}
            pattern = _read(Pattern, content["pattern"]) if "pattern" in content else None
            masked = {"layers": layers, "storage": content["storage"], "pattern": pattern}
            own["masked"] = _checked(MaskedFigures, masked)
        return _checked(cls, own)

    def write(self, folder: Path) -> None:
        """Writes result.json."""
        files.write(folder / FILE, json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> RunResult:
        """Reads result.json.

        Raises:
            UserError: it is missing or not readable, as in a run that has not ended.
        """
        advice = "a run writes it when it ends: start the same command with hydra.run.dir set to this folder to finish it"
        with files.reading(folder / FILE, advice):
            return cls.from_json(files.read_json(folder / FILE, advice=advice))


def _known(cls: type[Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the class has fields for."""
    found = {one.name: entry[one.name] for one in fields(cls) if one.name in entry}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _read(cls: type[Figures], entry: Mapping[str, Any]) -> Figures:
    return _checked(cls, _known(cls, entry))


def _checked(cls: type[Figures], values: Mapping[str, Any]) -> Figures:
    """The dataclass with these values, whose types are those of its fields."""
    for name, kind in get_type_hints(cls).items():
        if name in values:
            TypeAdapter(kind).validate_python(values[name], strict=True)
    return cls(**values)


def _without_none(entry: dict[str, Any], *optional: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in optional or value not in (None, ())}
