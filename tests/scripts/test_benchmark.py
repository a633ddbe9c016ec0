"""scripts/benchmark.py: every kind of case on the digits, with tiny settings; parts add up, and what is known stays."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark  # noqa: E402 -- scripts are no package
import benchmark_baseline as baseline  # noqa: E402
import benchmark_cases as cases  # noqa: E402

from amc_env.evaluation.int8 import obstacle
from amc_env.evaluation.prefix import PrefixScorer
from amc_env.evaluation.scorer import Scorer
from amc_env.pruning.calibration import Moments  # noqa: E402
from amc_env.pruning.repair.least_squares import _solve

TINY = ("search.images=60", "repair.images=60", "agent.hidden=[8,8]")


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "GEMM_SIZES", (64,))


def job(case: str, folder: Path, common: tuple[str, ...] = TINY) -> cases.Job:
    return cases.Job(case, common, {}, str(folder), episodes=2)


def test_a_part_does_not_count_for_the_part_that_called_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(cases, "time", SimpleNamespace(perf_counter=lambda: now))

    class Worker:
        def outer(self) -> None:
            nonlocal now
            now += 1.0
            self.inner()
            now += 2.0

        def inner(self) -> None:
            nonlocal now
            now += 10.0

    plain = Worker.outer
    with cases.Stopwatch() as watch:
        watch.wrap("cutting", Worker, "outer")
        watch.wrap("solving", Worker, "inner")
        now += 100.0
        Worker().outer()
        Worker().inner()
    assert watch.seconds() == {"other": 100.0, "cutting": 3.0, "solving": 20.0}
    assert watch.calls == {"Worker.outer": 1, "Worker.inner": 2}
    assert Worker.outer is plain


def test_the_parts_of_an_episode_add_up_to_it(tmp_path: Path) -> None:
    plain = Scorer.__call__
    row = cases.run(job("episode:digits_mlp", tmp_path))["rows"][""]
    parts = {part: row[f"{part} s"] for part in cases.PARTS}
    assert sum(parts.values()) == pytest.approx(row["episode s"])  # there is no other part
    assert min(parts.values()) > 0
    assert (row["episodes"], row["repeats"], row["decisions"]) == (2, 0, 2)
    assert row["calibrating once s"] > 0
    assert Scorer.__call__ is plain


def test_strategies_without_episodes_are_taken_apart_too(tmp_path: Path) -> None:
    row = cases.run(job("episode:digits_mlp:random", tmp_path, ("search.images=60", "repair=none")))["rows"][
        ""
    ]
    assert row["episodes"] == 2 * cases.WHOLE_STRATEGIES
    assert row["learning s"] == 0
    assert row["scoring s"] > 0


def test_an_episode_of_the_baseline_is_solving_and_validating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "BATCHES", 6)
    row = cases.run(job("baseline:digits_cnn", tmp_path))["rows"][""]
    assert row["episode s"] == pytest.approx(row["least squares s"] + row["validation s"])
    assert row["layers"] == 9
    assert row["rows"] == 6 * 50 * 10


def test_the_baseline_solves_what_the_product_solves() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 12, generator=generator)
    outputs = inputs @ torch.randn(12, 5, generator=generator) + 0.1 * torch.randn(
        400, 5, generator=generator
    )
    ours, _ = _solve(Moments.of(inputs, outputs, 1), intercept=False, ridge=1e-6)
    theirs = baseline.reconstructed(inputs.numpy(), outputs.numpy())
    torch.testing.assert_close(torch.from_numpy(theirs), ours.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 4, 3, bias=False), nn.Conv2d(6, 4, 1, bias=False), nn.Linear(6, 4)]
)
def test_a_masked_layer_keeps_the_largest_inputs_and_gives_the_same_outputs(layer: nn.Module) -> None:
    area = layer.weight[0, 0].numel()
    with torch.no_grad():
        layer.weight[:, [1, 4]] *= 1e-3
    inputs = torch.randn(300, 6 * area, generator=torch.Generator().manual_seed(0))
    inputs[:, area : 2 * area] = inputs[:, 4 * area : 5 * area] = 0  # what goes carries nothing
    before = layer.weight.detach().clone()
    outputs = inputs @ before.flatten(1).T
    baseline.mask(layer, 4, inputs.numpy(), outputs.numpy())
    kept = (
        layer.weight.detach().flatten(2).abs().sum((0, 2))
        if layer.weight.ndim > 2
        else layer.weight.abs().sum(0)
    )
    assert kept.nonzero().flatten().tolist() == [0, 2, 3, 5]
    torch.testing.assert_close(inputs @ layer.weight.detach().flatten(1).T, outputs, rtol=1e-4, atol=1e-4)


def test_the_scorer_is_measured_in_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "BATCHES", (30,))
    monkeypatch.setattr(cases, "SCORED", 2)
    scored: list[bool] = []
    plain = Scorer.__call__

    def watched(scorer: PrefixScorer, model: nn.Module) -> float:
        value = plain(scorer, model)
        assert scorer._shared is not None
        scored.append(scorer._shared._kept.filled > 0)
        return value

    monkeypatch.setattr(PrefixScorer, "__call__", watched)
    rows = cases.run(job("scoring:digits_cnn", tmp_path))["rows"]
    assert {"full, float32, batch 30, channels-last", "half, bfloat16, batch 30, contiguous"} <= set(rows)
    in_bytes = {label.split(", ", 2)[2] for label in rows if "int8" in label}
    assert in_bytes == (set() if obstacle() else {"batch 30, channels-last"})
    assert all(row["GFLOP/s"] > 0 for row in rows.values())
    assert len(scored) == 3 * len(rows)
    assert not any(scored)  # nothing was shared


def test_a_profile_says_what_folding_took_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "PROFILED", 60)
    monkeypatch.setattr(cases, "OPERATORS", 99)
    rows = cases.profile(job("profile:digits_cnn", tmp_path))
    plain, scored = (
        {name for name in rows if name.startswith(way)} for way in ("as it is, ", "as it is scored")
    )
    assert any("batch_norm" in name for name in plain)
    assert not any("batch_norm" in name for name in scored)
    assert all(any("conv" in name for name in way) for way in (plain, scored))
    for way in (plain, scored):
        assert sum(rows[name]["% of all"] for name in way) == pytest.approx(100)


def test_a_whole_search_is_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def ran(command: list[str], check: bool) -> None:
        told.extend(command)
        (tmp_path / "run").mkdir()
        found = {"seconds": 8.0, "evaluations": 3, "cache_hits": 1, "search_accuracy": 0.5}
        (tmp_path / "run" / "result.json").write_text(json.dumps({"search": found}))

    monkeypatch.setattr(cases.subprocess, "run", ran)
    row = cases.run(job("search:digits_mlp:4:images1000", tmp_path, ()))["rows"][""]
    assert {"search.episodes=4", "search.images=1000", "finetune.epochs=0", "export=[]"} <= set(told)
    assert (row["episode s"], row["evaluations"], row["repeats"]) == (2.0, 3, 1)


def test_a_case_runs_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--rounds", "1", "--cases", "baseline:digits_mlp", "--common", *TINY]
    assert benchmark.main(arguments) == 0
    (run,) = json.loads((tmp_path / "benchmark.json").read_text())["runs"]
    assert run["threads"] == 1
    assert run["peak"]["before"]["float32"] > 0
    assert "| digits_mlp |" in capsys.readouterr().out


Runs = list[tuple[str, int]]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The rounds that were run: episodes of 1, 2, ... s, an episode of the baseline takes ten times as long."""
    runs: Runs = []

    def ran(options: Any, case: str, number: int) -> dict[str, Any]:
        runs.append((case, number))
        if len(runs) == 3:
            raise KeyboardInterrupt
        row = {"episode s": (10.0 if case.startswith("baseline") else 1.0) * number}
        rows = {"batch 25": {"scoring s": 1.0}} if case.startswith("scoring") else {"": row}
        peak = {"before": {"float32": 100.0}, "after": {"float32": 120.0}}
        return {"case": case, "round": number, "commit": "c", "threads": 1, "peak": peak, "rows": rows}

    monkeypatch.setattr(benchmark, "_run", ran)
    return runs


def test_a_killed_benchmark_goes_on(tmp_path: Path, begun: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("episode", "baseline", "scoring")
    arguments = [str(tmp_path), "--rounds", "3", "--cases", *(f"{kind}:resnet20" for kind in kinds)]
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(arguments)
    assert benchmark.main(arguments) == 0
    assert benchmark.main(arguments) == 0
    rounds = [(case, number) for number in (1, 2, 3) for case in arguments[4:]]
    assert begun == [*rounds[:3], *rounds[2:]]
    printed = capsys.readouterr().out
    assert "| resnet20 | 2 (1–3) |" in printed
    assert "| resnet20, batch 25 | 1 |" in printed
    assert "episode:resnet20: 10.0 times as fast as the baseline's episode" in printed
    assert "float32, GFLOP/s: 110 (100–120)" in printed
    with pytest.raises(SystemExit, match="another common"):
        benchmark.main([*arguments, "--common", "seed=1"])


def test_rounds_interleave_what_growth_stands_for(tmp_path: Path, begun: Runs) -> None:
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([str(tmp_path), "--cases", "growth:layers", "episode:resnet20"])
    assert begun == [(case, 1) for case in benchmark.GROWTH["growth:layers"]]


@pytest.mark.parametrize(
    "case", ["episode", "episode:a:nosuch", "baseline:a:random", "search:a", "growth:depth"]
)
def test_unknown_cases_are_refused_before_anything_runs(tmp_path: Path, case: str) -> None:
    with pytest.raises(SystemExit, match=f"unknown case {case}; there are .*images1000"):
        benchmark.main([str(tmp_path / "out"), "--cases", "episode:resnet20", case])
    assert not (tmp_path / "out").exists()
