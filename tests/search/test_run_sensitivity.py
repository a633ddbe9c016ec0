"""amc-sensitivity from the command line, and its picture."""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journals import content
from run_folders import pixels, rows_of, share_of, trials_of
from running import Command

from agents.sensitivity import Curve
from amc_env.evaluation.pruner import Pruner
from search import run_sensitivity
from search.output.plots import DPI, plot_sensitivity

QUICK = (
    "device=cpu",
    "model=digits_mlp",
    "model.epochs=3",
    "search.images=100",
    "repair.images=100",
    "ratios=[0.25,0.5,0.75]",
    "hydra.run.dir=run",
)


@pytest.fixture
def amc_sensitivity(amc_search: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs amc-sensitivity with overrides, as `amc_search` runs that."""
    monkeypatch.setattr("search.run_search.main", run_sensitivity.main)
    return amc_search


@pytest.mark.plots
def test_a_scan_leaves_a_table_a_picture_and_a_strategy_behind(
    amc_sensitivity: Command, tmp_path: Path
) -> None:
    ended = amc_sensitivity(*QUICK, "budget.ratio=0.4")
    assert ended.code == 0
    run = tmp_path / "run"
    rows = rows_of(run / "sensitivity.csv")
    assert list(rows[0]) == ["decision", "ratio", "removed", "total", "accuracy", "macs", "params"]
    decisions = list(dict.fromkeys(row["decision"] for row in rows))
    assert len(rows) == 4 * len(decisions)
    for name in decisions:
        ratios = [float(row["ratio"]) for row in rows if row["decision"] == name]
        assert ratios == [0.0, 0.25, 0.5, 0.75]
    assert all(int(row["removed"]) == float(row["ratio"]) * int(row["total"]) for row in rows)
    lines = trials_of(run)
    assert len(lines) == 1 + 3 * len(decisions) + 1  # the original, every decision alone, the pick
    known = {tuple(line["removed"]): line for line in lines}
    for place, name in enumerate(decisions):
        for row in (row for row in rows if row["decision"] == name):
            alone = tuple(int(row["removed"]) if t == place else 0 for t in range(len(decisions)))
            assert float(row["accuracy"]) == pytest.approx(known[alone]["score"])
            assert float(row["macs"]) == known[alone]["costs"]["macs"]
    strategy = json.loads((run / "strategy.json").read_text())["decisions"]
    picked = known[tuple(strategy[name]["removed"] for name in decisions)]
    assert picked["costs"]["macs"] <= 0.4 * known[(0,) * len(decisions)]["costs"]["macs"]
    assert (run / "plots" / "sensitivity.png").stat().st_size > 10_000
    page = (run / "report.html").read_text()
    assert f"{100 * picked['score']:.2f}%" in page
    assert all(f"{strategy[name]['removed']:,} of {strategy[name]['total']:,}" in page for name in decisions)
    for text in ("most sensitive", "points", "picked where", f"{100 * picked['score']:.2f}%", ": met"):
        assert text in ended.out
    assert "scan 7/7" in ended.err


def test_without_a_budget_there_are_curves_and_with_a_drop_a_strategy_too(
    amc_sensitivity: Command, tmp_path: Path
) -> None:
    ended = amc_sensitivity(*QUICK, "budget=none")
    assert ended.code == 0
    assert "picked" not in ended.out
    assert not (tmp_path / "run" / "strategy.json").exists()
    assert len(rows_of(tmp_path / "run" / "sensitivity.csv")) == 8
    assert amc_sensitivity(*QUICK, "budget=none", "threshold=0.9").code == 0
    strategy = json.loads((tmp_path / "run" / "strategy.json").read_text())["decisions"]
    assert {entry["ratio"] for entry in strategy.values()} == {0.75}  # no curve falls by as much


def test_a_scan_that_was_stopped_goes_on_with_the_command_it_printed(
    amc_sensitivity: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert amc_sensitivity(*QUICK, "hydra.run.dir=whole").code == 0
    one, asked = Pruner.score, itertools.count(1)

    def stopped(self: Pruner, *arguments: Any) -> Any:
        if next(asked) > 4:
            raise KeyboardInterrupt
        return one(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Pruner, "score", stopped)
        ended = amc_sensitivity(*QUICK)
    assert ended.code == 130
    assert len(trials_of(tmp_path / "run")) == 4
    (line,) = [text for text in ended.out.splitlines() if text.startswith("stopped")]
    program, *arguments = shlex.split(line.split("resume with: ")[1])
    assert program == "amc-sensitivity"
    again = amc_sensitivity(*arguments)
    assert again.code == 0
    assert "resuming with 4 evaluations" in again.out
    for name in ("sensitivity.csv", "strategy.json", "evaluations.jsonl"):
        assert content(tmp_path / "run" / name) == content(tmp_path / "whole" / name), name


def test_another_budget_or_more_ratios_score_only_what_is_new(
    amc_sensitivity: Command, tmp_path: Path
) -> None:
    assert amc_sensitivity(*QUICK, "budget.ratio=0.6").code == 0
    before = trials_of(tmp_path / "run")
    ended = amc_sensitivity(*QUICK, "budget=params", "budget.ratio=0.3")
    assert ended.code == 0
    assert "differs from the journal" not in ended.out
    after = trials_of(tmp_path / "run")
    assert after[: len(before)] == before
    assert len(after) == len(before) + 1
    whole, picked = after[0]["costs"]["params"], after[-1]["costs"]["params"]
    assert 0.2 * whole < picked <= 0.3 * whole
    assert amc_sensitivity(*QUICK, "ratios=[0.25,0.4,0.5,0.75]").code == 0
    new = trials_of(tmp_path / "run")[len(after) :]
    alone = [line["removed"] for line in new if sum(count > 0 for count in line["removed"]) == 1]
    assert alone == [[52, 0], [0, 26]]  # 0.4 of 130 and of 64


def test_a_change_that_changes_scores_is_refused(amc_sensitivity: Command, tmp_path: Path) -> None:
    assert amc_sensitivity(*QUICK).code == 0
    ended = amc_sensitivity(*QUICK, "repair=none")
    assert ended.code == 2
    assert ended.err.startswith("error: the run in")
    assert "repair.name: least_squares then, none now" in ended.err


@pytest.mark.parametrize("granularity", ["fine_grained", "nm", "kernel"])
def test_weights_that_are_masked_are_scanned_layer_by_layer(
    amc_sensitivity: Command, tmp_path: Path, granularity: str
) -> None:
    ended = amc_sensitivity(
        *QUICK,
        "model=digits_cnn",
        f"granularity={granularity}",
        "budget=params",
        "budget.ratio=0.8",
        "ratios=[0.5,0.75]",
    )
    assert ended.code == 0
    rows = rows_of(tmp_path / "run" / "sensitivity.csv")
    assert "layer1.0.conv1" in {row["decision"] for row in rows}
    assert {float(row["ratio"]) for row in rows} <= {0.0, 0.5, 0.75} or granularity != "fine_grained"
    strategy = json.loads((tmp_path / "run" / "strategy.json").read_text())["decisions"]
    assert list(strategy) == list(dict.fromkeys(row["decision"] for row in rows))


def test_a_budget_on_another_cost_takes_the_scan_as_it_is(amc_sensitivity: Command, tmp_path: Path) -> None:
    masked = (*QUICK, "granularity=fine_grained")
    assert amc_sensitivity(*masked, "budget=params").code == 0
    before = trials_of(tmp_path / "run")
    ended = amc_sensitivity(*masked, "budget=storage", "budget.ratio=0.6")
    assert ended.code == 0
    assert list(rows_of(tmp_path / "run" / "sensitivity.csv")[0])[-1] == "storage"
    assert ": met" in ended.out
    assert len(trials_of(tmp_path / "run")) <= len(before) + 1


def test_a_scan_for_latency_serves_other_budgets_and_the_other_way_round(
    amc_sensitivity: Command, tmp_path: Path
) -> None:
    conditions = ("latency.batch=2", "latency.threads=1", "budget.repeats=1", "budget.tolerance=10")
    latency = ("budget=latency", "budget.ratio=1", *conditions)
    ended = amc_sensitivity(*QUICK, *latency, "also.params=0.5")
    assert (ended.code, ended.err.count("error")) == (0, 0)
    assert list(rows_of(tmp_path / "run" / "sensitivity.csv")[0])[-1] == "latency"
    lines = ended.out.splitlines()
    assert len([line for line in lines if line.startswith("budget: ") and ": met" in line]) == 2
    made = json.loads((tmp_path / "run" / "latency.json").read_text())["conditions"]
    assert (made["batch"], made["threads"], made["runtime"]) == (2, 1, "eager")
    before = trials_of(tmp_path / "run")
    refused = amc_sensitivity(*QUICK, "budget.ratio=0.3")
    assert "granularity.multiple: 8 then, 2 now" in refused.err
    assert amc_sensitivity(*QUICK, "budget.ratio=0.3", "channel_multiple=8").code == 0
    after = trials_of(tmp_path / "run")
    assert after[: len(before)] == before
    assert len(after) <= len(before) + 1
    assert amc_sensitivity(*QUICK, *latency, "also.params=0.5").code == 0
    assert len(trials_of(tmp_path / "run")) == len(after)


def test_help_says_what_it_does_and_what_there_is(amc_sensitivity: Command) -> None:
    ended = amc_sensitivity("--help")
    assert ended.code == 0
    for text in ("One decision at a time", "ratios=[", "granularity", "amc-sensitivity", "threshold="):
        assert text in ended.out
    assert "Powered by Hydra" not in ended.out
    assert "tracker: " not in ended.out


def test_the_policy_searches_like_any_other(amc_search: Command, tmp_path: Path) -> None:
    quick = ("finalists.count=0", "finetune.epochs=0", "latency.repeats=0", "export=[]")
    options = [option for option in QUICK if not option.startswith("ratios")]
    ended = amc_search(
        *options, *quick, "agent=sensitivity", "agent.ratios=[0.25,0.5,0.75]", "search.episodes=20"
    )
    assert ended.code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["search"]["agent"], result["search"]["evaluations"]) == ("sensitivity", 8)
    assert result["budget"]["met"]


def test_scanning_draws_nothing_from_the_search(amc_sensitivity: Command, tmp_path: Path) -> None:
    """The journal names no agent: it is the network's, not a policy's."""
    assert amc_sensitivity(*QUICK).code == 0
    header = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[0])["header"]
    assert not {"agent", "budgets", "reward", "episodes", "latency_ms"} & set(header)
    assert header["data"]["search_images"] == 100


# --------------------------------------------------------------------------------------------- the picture


def curves(count: int) -> list[Curve]:
    ratios = np.linspace(0.0, 0.9, 10)
    bends = np.linspace(1.5, 8.0, count)
    return [
        Curve(f"layer{k}.conv1", tuple(ratios), tuple(0.95 - 0.8 * ratios**b)) for k, b in enumerate(bends)
    ]


@pytest.mark.plots
@pytest.mark.parametrize("count", [1, 9, 60])
def test_every_number_of_decisions_makes_a_picture_of_one_size(tmp_path: Path, count: int) -> None:
    image = pixels(plot_sensitivity(curves(count), tmp_path / "plots" / "s.png"))
    assert image.shape[1] / DPI == pytest.approx(7.4, abs=0.1)
    first, last = (187, 223, 39), (68, 1, 84)  # light in front, dark behind
    assert share_of(image, first) > 2e-4
    if count > 1:
        assert share_of(image, last) > 2e-4


@pytest.mark.plots
def test_the_picture_shows_what_was_picked(tmp_path: Path) -> None:
    lines = curves(20)
    plain = pixels(plot_sensitivity(lines, tmp_path / "a.png"))
    picked = [curve.ratio_at(0.8) for curve in lines]
    marked = pixels(plot_sensitivity(lines, tmp_path / "b.png", threshold=0.8, picked=picked))
    vermilion = (213, 94, 0)
    assert share_of(plain, vermilion) < 1e-6 < share_of(marked, vermilion)
