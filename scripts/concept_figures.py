"""Draw the figures of docs/concepts from runs on the digits: `python scripts/concept_figures.py [OUT]`.

Most are plots that a run leaves behind; two are drawn here. The page on NetAdapt shows docs/rounds.png of the results.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copyfile

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

from agents.baselines import Uniform
from amc_env.pruning.granularity import NM, Channel, FineGrained, Granularity, Kernel, Vector
from search import Settings, compress
from search.data.digits import digits
from search.models.digits import digits_cnn
from search.settings import LatencySettings, RepairSettings

QUICK = ("device=cpu", "baselines=[]", "latency.repeats=0", "export=[]", "finalists.count=0")
RUNS = {
    "pruning-ratio": ("sensitivity", (), "sensitivity"),
    "amc": ("search", (*QUICK, "agent=ddpg", "budget.ratio=0.2", "finetune.epochs=0"), "reward"),
    "fine-tuning": (
        "search",
        (*QUICK, "agent=uniform", "budget.ratio=0.05", "finetune.epochs=20"),
        "finetune",
    ),
    "hardware": ("latency", ("check", "device=cpu", "check.networks=30"), "latency_check"),
}
"""Page: a command, its options, and the plot of its run folder."""
GRANULARITIES: tuple[Granularity, ...] = (Channel(), Kernel(), Vector(), NM(2, 4), FineGrained())
CRITERIA = ("l1", "l2", "bn_scale", "taylor", "random")
RATIOS = (0.2, 0.35, 0.5, 0.65, 0.8)


def pruned(folder: Path, ratio: float, **more: object) -> object:
    """The digits network with one ratio for all decisions, not fine-tuned."""
    settings = Settings(
        budgets=(), export=(), latency=LatencySettings(repeats=0), repair=RepairSettings("none")
    )
    data = digits()
    given = {"agent": Uniform(ratio), "finetune": 0, "folder": folder}
    return compress(digits_cnn().load(data), data, settings=settings, verbose=False, **given, **more)


def granularity(out: Path, folder: Path) -> None:
    """Which weights of a layer are left, at each granularity."""
    figure, axes = plt.subplots(1, len(GRANULARITIES), figsize=(11, 2.6), layout="constrained")
    for place, (axis, kind) in enumerate(zip(axes, GRANULARITIES, strict=True)):
        small = pruned(folder / str(place), 0.5, granularity=kind)
        layer = [module for module in small.model.modules() if isinstance(module, torch.nn.Conv2d)][2]
        left = torch.zeros(32, 32, 9) if place == 0 else layer.weight.detach().flatten(2)
        if place == 0:  # removed channels are gone: shown as missing rows and columns
            outputs, inputs = layer.weight.shape[:2]
            left[:outputs, :inputs] = layer.weight.detach().flatten(2)
        axis.imshow(left[:16, :8].flatten(1) != 0, cmap="Greys", interpolation="nearest", aspect="auto")
        axis.set(title=kind.name, xticks=[], yticks=[], xlabel="inputs × 3 × 3")
    axes[0].set_ylabel("outputs")
    figure.savefig(out / "granularity.png", dpi=120)


def criterion(out: Path, folder: Path) -> None:
    """Accuracy before repair and fine-tuning, by criterion and ratio."""
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name in CRITERIA:
        scores = [
            100 * pruned(folder / f"{name}{ratio}", ratio, criterion=name).result.pruned.accuracy
            for ratio in RATIOS
        ]
        axis.plot([100 * ratio for ratio in RATIOS], scores, marker="o", label=name)
    axis.set(xlabel="pruning ratio of all layers, %", ylabel="accuracy, %, no repair")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(out / "criterion.png", dpi=120)


def main() -> None:
    """All figures."""
    mpl.use("agg")
    root = Path(__file__).resolve().parents[1]
    out = Path(sys.argv[1]) if sys.argv[1:] else root / "docs" / "concepts"
    with tempfile.TemporaryDirectory() as name:
        for page, (command, options, plot) in RUNS.items():
            folder = Path(name) / page
            line = [sys.executable, "-m", f"search.run_{command}", *options, f"hydra.run.dir={folder}"]
            subprocess.run(line, check=True, cwd=root, capture_output=True)
            copyfile(folder / "plots" / f"{plot}.png", out / f"{page}.png")
        granularity(out, Path(name) / "granularity")
        criterion(out, Path(name) / "criterion")


if __name__ == "__main__":
    main()
