"""Results of made-up runs, built through the class that writes result.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from search.output.export import Exported
from search.output.run_result import (
    BaselineFigures,
    BudgetFigures,
    GranularityFigures,
    LayerFigures,
    LayerRow,
    MaskedFigures,
    NetworkFigures,
    Pattern,
    RunResult,
    SearchFigures,
    SkippedLayer,
)

NAMES = ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1")
REMOVED, TOTALS = (4, 16, 40), (16, 32, 64)
CHANNEL = GranularityFigures("channel", False, "Any hardware gains.", "channels")
FINE_GRAINED = GranularityFigures("fine_grained", True, "Sparsity only: <no>.", "weights")
TWO_OF_FOUR = GranularityFigures("nm", True, "GPUs gain.", "weights", 2, 4)


def network(accuracy: float, macs: float, split: str = "test", **costs: float) -> NetworkFigures:
    """Figures of one network."""
    costs = {"macs": macs, "params": macs / 100} | costs
    return NetworkFigures(accuracy, split, costs, latency_ms=macs / 1e7, latency_spread=0.034)


def search(**changes: Any) -> SearchFigures:
    """A search of 40 episodes with DDPG."""
    found = SearchFigures("ddpg", 40, 38, 2, 95.0, 1, -0.17, 0.82, "float32", "none")
    return replace(found, **changes)


def budget(**changes: Any) -> BudgetFigures:
    """Half of the MACs."""
    return replace(BudgetFigures("macs", 0.5, 20.275e6, 20.23e6, True), **changes)


def result(**changes: Any) -> RunResult:
    """A run that cut channels, fine-tuned and exported."""
    made = RunResult(
        model="ResNet-20",
        data="cifar10",
        granularity=CHANNEL,
        base=network(0.9173, 40.55e6),
        pruned=network(0.8421, 20.23e6),
        finetuned=network(0.9052, 20.23e6),
        budgets=(budget(),),
        search=search(),
        strategy={name: gone / total for name, gone, total in zip(NAMES, REMOVED, TOTALS, strict=True)},
        baselines=(BaselineFigures("uniform", 2, -0.3, 0.7, 0.69, {"macs": 20.2e6, "params": 2e5}),),
        images={"search": 5000, "test": 10000},
        shapes=(LayerFigures(NAMES[0], (16, 16), (16, 12), (2304, 1728), (2_359_296, 1_769_472)),),
        skipped=(
            SkippedLayer("conv1", "residual stream with a padded shortcut"),
            SkippedLayer("layer1.0.conv2", "residual stream with a padded shortcut"),
            SkippedLayer("fc", "the classifier's <outputs>"),
        ),
        exports=(
            Exported("safetensors", Path("model.safetensors"), 590_000, 0.0),
            Exported("pt2", Path("model.pt2"), 710_000, 1e-6),
            Exported("onnx", Path("model.onnx"), 585_000, 1e-6),
        ),
        machine={"system": "Linux", "threads": 2},
        command="amc-search model=resnet20 seed=1 hydra.run.dir=outputs/here",
    )
    return replace(made, **changes)


def masked_result(**changes: Any) -> RunResult:
    """A run that set weights to zero."""
    dense = {"dense_macs": 40.55e6, "dense_params": 405.5e3}
    layers = {
        name: LayerRow(total, total - gone) for name, gone, total in zip(NAMES, REMOVED, TOTALS, strict=True)
    }
    made = result(
        granularity=FINE_GRAINED,
        base=network(0.9173, 40.55e6, **dense),
        pruned=network(0.8421, 20.23e6, **dense),
        finetuned=network(0.9052, 20.23e6, **dense),
        shapes=(),
        masked=MaskedFigures(layers, {"dense_fp32": 4000, "csr": 2000, "dense_4bit": 800, "eie": 600}),
    )
    return replace(made, **changes)


def pattern_result(holds: bool = True, **changes: Any) -> RunResult:
    """A run that masked one of three layers to 2:4."""
    masked = masked_result().masked
    assert masked is not None
    storage = {"dense_fp32": 1000, "csr": 900, "nm": 531, "dense_4bit": 200, "eie": 150}
    found = replace(masked, storage=storage, pattern=Pattern(2, 4, NAMES[:1], holds))
    return masked_result(granularity=TWO_OF_FOUR, masked=found, **changes)
