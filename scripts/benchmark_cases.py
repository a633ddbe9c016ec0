"""One case of `benchmark.py`, in a process of its own: what is timed, and how it is taken apart.

    python scripts/benchmark_cases.py REQUEST.json RESULT.json

The product has no timers: its methods are wrapped here. Networks that no weights are named for have random ones, which is
fit for timing and says nothing about accuracy.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from amc_env.staging import Staged
from amc_env.workers import _Batch
from benchmark_baseline import Baseline
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from safetensors.torch import save_file

from agents.ddpg import AMCDDPG
from amc_env.evaluation.evaluator import Evaluator
from amc_env.evaluation.folding import Folder
from amc_env.evaluation.int8 import obstacle
from amc_env.evaluation.precision import BFLOAT16, FLOAT32, INT8
from amc_env.evaluation.pruner import ORIGINAL, Bench
from amc_env.evaluation.scorer import Scorer, accuracy
from amc_env.pruning.candidate import Candidates, MaskedCandidates
from amc_env.pruning.repair import least_squares as repair
from amc_env.pruning.repair import masked as masked_repair
from amc_env.system import using_threads
from search.config import compose as wiring
from search.data.loaders import seeded
from search.job import prepared_of
from search.progress import Progress
from search.study.evaluation import Materials, start_of
from search.study.journal import Journal
from search.study.pipeline import Context, header
from search.study.pipeline import search as searched
from search.study.problem import Prepared
from search.study.stages import stage_of
from search.study.study import Loop
from search.training.short_term import ShortTerm

Row = dict[str, float]
"""Figures by name; seconds end in " s"."""

WORKERS = ("agent=random", "evaluator.threads=1")
VARIANTS: dict[str, tuple[str, ...]] = {
    "images1000": ("search.images=1000",),
    "images2000": ("search.images=2000",),
    "batch_norm": ("repair=batch_norm",),
    "sequential": ("repair=sequential",),
    "bfloat16": ("evaluator.precision=bfloat16",),
    "int8": ("evaluator.precision=int8",),
    "staged": ("evaluator.first_images=1000",),
    "fast": ("evaluator.precision=bfloat16", "evaluator.first_images=1000"),
    "fast8": ("evaluator.precision=int8", "evaluator.first_images=1000"),
    "random": ("agent=random",),
    "workers1": (*WORKERS, "evaluator.workers=1"),
    "workers2": (*WORKERS, "evaluator.workers=2"),
    "envs4_workers2": ("agent.n_envs=4", "evaluator.threads=1", "evaluator.workers=2"),
}
"""What an episode: or search: case may be told besides, by the name at its end."""
WARMUP = 3  # episodes of the agent before it learns
WHOLE_STRATEGIES = 3  # times as many evaluations where workers have some in hand when the clock starts
GEMM_SIZES = (512, 1024, 2048)
SLOW_S = 0.2  # a product that takes so long is not tried at a larger size
BATCHES = (32, 64, 128, 256)
SCORED = 3  # times, for a median
PROFILED = 1000  # images
OPERATORS = 6  # of a profile, the dearest


@dataclass(frozen=True)
class Job:
    """A case's round.

    Attributes:
        case: kind:network, and what the kind takes further, with colons between.
        common: Overrides, as for amc-search.
        weights: Files, by network.
        folder: Where the round may write.
        episodes: That are measured.
    """

    case: str
    common: Sequence[str]
    weights: Mapping[str, str]
    folder: str
    episodes: int

    @property
    def network(self) -> str:
        """Its option of conf/model."""
        return self.case.split(":")[1]

    def overrides(self, variant: str = "") -> list[str]:
        """As amc-search would be told, but for the weights."""
        more = VARIANTS[variant] if variant else ()
        return [f"model={self.network}", "budget.ratio=0.5", *self.common, *more]

    def config(self, variant: str = "") -> DictConfig:
        """The configuration, with the weights."""
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose("search", self.overrides(variant))
        cfg.model.weights = self.weights.get(self.network) or self._random(cfg)
        return cfg

    def _random(self, cfg: DictConfig) -> str | None:
        """A file of random weights; none where the network is trained in seconds."""
        source = wiring.model_source(cfg)
        if source.recipe is not None:
            return None
        data = wiring.data_of(cfg)
        with seeded(0):
            network = source.build(data.image_shape, len(data.classes))
        file = Path(self.folder) / "random.safetensors"
        save_file(network.state_dict(), file)
        return str(file)


def matrix_peak() -> dict[str, float]:
    """GFLOP/s of the fastest square matrix product found, by precision; of int8 on processors alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    products = {torch.float32: torch.mm, torch.bfloat16: torch.mm}
    if device == "cpu":
        products[torch.int8] = torch._int_mm
    found = {}
    for dtype, multiply in products.items():
        best = 0.0
        for size in GEMM_SIZES:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            seconds = min(timed(lambda a=a, b=b, multiply=multiply: multiply(a, b)) for _ in range(5))
            best = max(best, 2e-9 * size**3 / seconds)
            if seconds > SLOW_S:
                break
        found[str(dtype).removeprefix("torch.")] = best
    return found


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    _finish()
    started = time.perf_counter()
    call()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    """Waits for what a GPU was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch(ExitStack):
    """Seconds by part, exclusive: what a part calls that is a part itself does not count for it; the rest is "other".

    The methods that it wraps are put back at the end of its block.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._parts = ["other"]
        self._since = time.perf_counter()

    def wrap(self, part: str, owner: type, *methods: str) -> None:
        """Counts the time of methods, and their calls under Class.method."""
        for method in methods:
            plain, name = getattr(owner, method), f"{owner.__name__}.{method}"

            def counted(*args: Any, _plain: Any = plain, _name: str = name, **options: Any) -> Any:
                self.calls[_name] += 1
                with self.part(part):
                    return _plain(*args, **options)

            self.enter_context(patch.object(owner, method, counted))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block's time for a part."""
        self._book()
        self._parts.append(name)
        try:
            yield
        finally:
            self._book()
            self._parts.pop()

    def seconds(self) -> dict[str, float]:
        """Of every part up to now."""
        self._book()
        return dict(self._seconds)

    def _book(self) -> None:
        _finish()
        now = time.perf_counter()
        self._seconds[self._parts[-1]] += now - self._since
        self._since = now


PARTS = ("deciding", "building", "repairing", "scoring", "learning", "other")


def watch_search(watch: Stopwatch, agent: type) -> None:
    """Wraps what a search consists of. Workers' parts are not seen from here: waiting for them is scoring."""
    watch.wrap("deciding", agent, "search")
    watch.wrap("learning", AMCDDPG, "train")
    watch.wrap("other", Loop, "_episodes")
    watch.wrap("other", Evaluator, "_outcome")
    watch.wrap("calibrating", Bench, "_repair")
    for candidates in (Candidates, MaskedCandidates):
        watch.wrap("building", candidates, "keeps", "cut")
    watch.wrap("building", Folder, "__call__")
    mended = (repair.LeastSquares, repair.Sequential, repair.BatchNorm, ShortTerm)
    for mending in (*mended, masked_repair.MaskedLeastSquares, masked_repair.MaskedSequential):
        watch.wrap("repairing", mending, "__call__")
    watch.wrap("scoring", Scorer, "__call__")
    watch.wrap("scoring", Staged, "score")
    watch.wrap("scoring", _Batch, "score")


def episode(job: Job, variant: str = "") -> dict[str, Row]:
    """Episodes after warm-up, taken apart."""
    cfg = job.config(variant)
    side_by_side = cfg.agent.get("n_envs", 1)
    warmup = -(-WARMUP // side_by_side) * side_by_side
    lead = warmup + side_by_side  # the first that is learnt from ends before the clock starts
    measured = -(-job.episodes // side_by_side) * side_by_side
    if "warmup_episodes" in cfg.agent:
        cfg.agent.warmup_episodes = warmup
    else:
        measured *= WHOLE_STRATEGIES
    cfg.search.episodes, cfg.finalists.count = lead + measured, 0
    prepared = prepared_of(cfg)
    readings: list[tuple[dict[str, float], int]] = []

    def track(metrics: Mapping[str, float], step: int) -> None:
        readings.append((watch.seconds(), watch.calls["Evaluator._outcome"]))

    with Stopwatch() as watch:
        watch_search(watch, type(prepared.settings.agent))
        _search(prepared, Context(Path(job.folder), track))
    (before, known), (after, all_known) = readings[lead - 1], readings[-1]
    spent = {part: seconds - before.get(part, 0.0) for part, seconds in after.items()}
    spent["other"] += spent.pop("calibrating", 0.0)  # looking it up, once it is there
    count, evaluations = len(readings) - lead, all_known - known
    row = {"episode s": sum(spent.values()) / count}
    row |= {f"{part} s": spent.get(part, 0.0) / count for part in PARTS}
    row |= {"episodes": count, "repeats": count - evaluations}
    return {"": row | {"calibrating once s": after.get("calibrating", 0.0), "decisions": len(prepared.grids)}}


def gflops(macs: float, seconds: float) -> float:
    """Two operations a MAC; 0 where nothing was done."""
    return 2e-9 * macs / seconds if seconds else 0.0


def _search(prepared: Prepared, context: Context) -> None:
    """The search of amc-search, and nothing after it."""
    start = start_of(prepared, ORIGINAL, prepared.builder)
    progress = Progress(prepared.settings.episodes, 0)
    with Journal(context.folder, header(prepared, context), prepared.problem) as journal, progress:
        progress.start("search")
        searched(stage_of(prepared, 1, start), start, context, progress, journal)


def baseline(job: Job) -> dict[str, Row]:
    """Episodes of the AMC release's way: the uniform strategy and two random ones, medians over the three."""
    prepared = prepared_of(job.config())
    problem = prepared.problem
    release = Baseline(prepared)
    rng = np.random.default_rng(0)
    draws = [np.zeros(len(prepared.grids)), *(rng.uniform(0.0, problem.maxima) for _ in range(2))]
    times = []
    for removed in (problem.land(ratios) for ratios in draws):
        calls = (partial(release.mend, removed), release.validate, release.validate_by_loader)
        times.append([timed(call) for call in calls])
    solving, plain, loaded = (float(np.median(column)) for column in zip(*times, strict=True))
    work = problem.cost([0] * len(prepared.grids))["macs"] * len(prepared.data.search)
    row = {"episode s": solving + plain, "least squares s": solving, "validation s": plain}
    row |= {"episode, DataLoader s": solving + loaded, "validation, DataLoader s": loaded}
    rows = max(len(inputs) for inputs, _ in release.rows.values())
    return {"": row | {"GFLOP/s": gflops(work, plain), "rows": rows, "layers": len(release.layers)}}


def scoring(job: Job, variant: str = "") -> dict[str, Row]:
    """The scorer alone, in every precision, batch size and memory layout, at full size and at half the MACs."""
    prepared = prepared_of(job.config(variant))
    problem, images = prepared.problem, len(prepared.data.search)
    first = prepared.graph.layers[0].name
    sizes = {"full": (0,) * len(prepared.grids), "half": problem.project([0.0] * len(prepared.grids))}
    rows: dict[str, Row] = {}
    number = count(1)
    for precision, batch, last in product((FLOAT32, BFLOAT16, INT8), BATCHES, (True, False)):
        if precision == INT8 and (not last or prepared.settings.device != "cpu" or obstacle()):
            continue  # there is no such thing
        how = replace(prepared.settings.scoring, precision=precision, batch_size=batch, channels_last=last)
        scorer = Materials.of(replace(prepared, settings=replace(prepared.settings, scoring=how))).scorer()
        for size, removed in sizes.items():
            network, times = prepared.builder.cut(removed), []
            for _ in range(1 + SCORED):  # the first makes things warm
                # no two networks have the same first layer: nothing can be shared
                network.get_submodule(first).weight.data.mul_(1 + 1e-3 * next(number))
                times.append(timed(lambda scorer=scorer, network=network: scorer(network)))
            seconds = float(np.median(times[1:]))
            speed = gflops(problem.cost(removed)["macs"] * images, seconds)
            label = f"{size}, {precision}, batch {batch}, {'channels-last' if last else 'contiguous'}"
            rows[label] = {"scoring s": seconds, "GFLOP/s": speed}
    return rows


def profile(job: Job) -> dict[str, Row]:
    """Where one thread's time goes in scoring a network of half the MACs: as it is, and as the scorer runs it."""
    prepared = prepared_of(job.config())
    images = prepared.images(prepared.data.search, PROFILED)
    network = prepared.builder.cut(prepared.problem.project([0.0] * len(prepared.grids)))
    labels = prepared.data.search.labels[:PROFILED]
    scorer = Scorer(prepared.model, prepared.graph.topology, images, labels)
    ways = {
        "as it is, batches of 250": partial(accuracy, network, images, labels, 250),
        "as it is scored": partial(scorer, network),
    }
    rows: dict[str, Row] = {}
    for way, call in ways.items():
        with using_threads(1):  # a profile shows one thread, and not the lanes beside it
            call()
            with torch.profiler.profile() as found:
                call()
        averages = sorted(found.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
        whole = sum(entry.self_cpu_time_total for entry in averages)
        for entry in averages[:OPERATORS]:
            share = 100 * entry.self_cpu_time_total / whole
            rows[f"{way}: {entry.key}"] = {"own time ms": entry.self_cpu_time_total / 1e3, "% of all": share}
    return rows


def search(job: Job, episodes: str, variant: str = "") -> dict[str, Row]:
    """A whole search by amc-search, without what comes after."""
    folder = Path(job.folder) / "run"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed round has scored would be read back
    weights = job.config(variant).model.weights
    quiet = ("finetune.epochs=0", "export=[]", "latency.repeats=0", f"search.episodes={episodes}")
    more = [*quiet, f"hydra.run.dir='{folder}'", *([f"model.weights='{weights}'"] if weights else [])]
    command = [sys.executable, "-m", "search.run_search", *job.overrides(variant), *more]
    seconds = timed(lambda: subprocess.run(command, check=True))
    result = json.loads((folder / "result.json").read_text())["search"]
    row = {"whole s": seconds, "search s": result["seconds"], "episode s": result["seconds"] / int(episodes)}
    row |= {"evaluations": result["evaluations"], "repeats": result["cache_hits"]}
    return {"": row | {"accuracy %": 100 * result["search_accuracy"]}}


KINDS: dict[str, Callable[..., dict[str, Row]]] = {
    "episode": episode,
    "baseline": baseline,
    "scoring": scoring,
    "profile": profile,
    "search": search,
}


def peak_mib() -> float:
    """The most resident memory of this process so far, MiB; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def run(job: Job) -> dict[str, Any]:
    """The case between two readings of the matrix peak; shares are of their mean."""
    kind, _, *more = job.case.split(":")
    before = matrix_peak()
    rows = KINDS[kind](job, *more)
    after = matrix_peak()
    for label, row in rows.items():
        precision = next((coarse for coarse in (BFLOAT16, INT8) if coarse in label), FLOAT32)
        if "GFLOP/s" in row:
            row["of the peak %"] = 200 * row["GFLOP/s"] / (before[precision] + after[precision])
    facts = {"threads": torch.get_num_threads(), "process MiB": peak_mib()}
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "gpu MiB": torch.cuda.max_memory_allocated() / 2**20}
    return {"peak": {"before": before, "after": after}, "rows": rows, **facts}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    request, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(run(Job(**json.loads(request.read_text())))))
