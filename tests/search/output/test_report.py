"""The report page: every part from a whole run, none from a missing stage, and nothing fetched from elsewhere."""

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_results import (
    NAMES,
    REMOVED,
    TOTALS,
    budget,
    masked_result,
    network,
    pattern_result,
    result,
    search,
)
from refusals import refused

from agents.sensitivity import Curve
from amc_env.space import Grid
from search.files import sealed, unsealed
from search.output import charts
from search.output.plots import plot_finetune
from search.output.report import headline, write_report
from search.output.run_files import LAYER_ERRORS, RunFiles, write_layer_errors
from search.output.run_result import RunResult

MISSED = budget(cost="params", ratio=0.6, limit=200e3, value=202.3e3, met=False)


def leave_run(folder: Path, made: RunResult) -> Path:
    """A made-up run folder with everything in it."""
    decisions = {
        name: {"removed": removed, "total": total, "ratio": removed / total}
        for name, removed, total in zip(NAMES, REMOVED, TOTALS, strict=True)
    }
    lines: list[dict[str, Any]] = [{"header": {"weights": "abc", "versions": {"torch": "2.13"}}}]
    rows = ["phase,step,episode/reward,episode/accuracy,finetune/loss"]
    for episode in range(40):
        accuracy = 0.6 + 0.2 * math.sin(episode) ** 2
        removed = list(REMOVED) if episode == 30 else [episode % 16, 0, 0]
        costs = {"macs": 20e6 + 1e4 * episode, "params": 1000.0}
        line = {"start": "original", "removed": removed, "score": accuracy, "costs": costs, "met": True}
        lines.append(line | {"repair": "none"})
        rows.append(f"search,{episode},{accuracy - 1},{accuracy},")
    rows += [f"finetune,{epoch},,,{1 / (epoch + 1)}" for epoch in range(5)]
    made.write(folder)
    (folder / "strategy.json").write_text(json.dumps({"decisions": decisions}))
    (folder / "evaluations.jsonl").write_text("".join(map(sealed, lines)) + '{"start": "torn')
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "config.yaml").write_text("seed: 1\nnote: 'a <b> & c'\n")
    return folder


class Page(HTMLParser):
    """What a browser would fetch, run or show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.resources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(autouse=True)
def _pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the extra "charts"; test_charts.py has the page with it."""
    monkeypatch.setattr(charts, "available", lambda: False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return leave_run(tmp_path / "run", result(budgets=(budget(), MISSED)))


@pytest.mark.plots
def test_a_whole_run_shows_every_part(folder: Path) -> None:
    path = write_report(folder)
    text = path.read_text()
    page = Page(text)
    assert path == folder / "report.html"
    assert (
        "ResNet-20 to 49.9% of its MACs: 91.73% → 90.52% accuracy on the test split after fine-tuning."
        in page.words
    )
    for part in (
        "accuracy, test split",
        "-1.21 points",
        "MACs at most 20.27 M (50.0%), reached 20.23 M (49.9%): met",
        "parameters at most 200.00 k (60.0%), reached 202.30 k (49.9%): NOT met",
        "12 / 16",
        "25.0%",
        "residual stream with a padded shortcut",
        "the classifier's <outputs>",
        "load_pruned",
        'torch.export.load("RUN_FOLDER/model.pt2")',
        'onnxruntime.InferenceSession("RUN_FOLDER/model.onnx")',
        "outputs = session.run(None, {name: inputs})",
        "amc-search model=resnet20 seed=1",
        "note: 'a <b> & c'",
        "machine.threads",
        "versions.torch",
    ):
        assert part in page.words, part
    assert "search split" in page.words
    assert sorted(file.name for file in (folder / "plots").iterdir()) == [
        "channels.png",
        "finetune.png",
        "reward.png",
        "tradeoff.png",
    ]


def test_the_page_is_self_contained(folder: Path) -> None:
    text = write_report(folder).read_text()
    page = Page(text)
    assert len(page.resources) == 4
    for resource in page.resources:
        kind, _, content = resource.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(", text)
    assert str(folder.parent) not in text


def test_layer_errors_are_drawn_where_the_agent_asked_for_them(folder: Path) -> None:
    space = SimpleNamespace(
        names=NAMES, totals=TOTALS, grids=[Grid("", total, 4, 8, first=4) for total in TOTALS]
    )
    write_layer_errors(folder, space, [np.array([0.0, 0.1, 0.4])] * len(NAMES))
    first, *_ = RunFiles.read(folder).energy_kept
    assert first == Curve(NAMES[0], (0.0, 4 / TOTALS[0], 8 / TOTALS[0]), (1.0, 0.9, 0.6))
    assert "What each decision loses alone" in Page(write_report(folder).read_text()).words
    assert (folder / "plots" / "layer_errors.png").is_file()
    for damaged in ('{"fc": {"ratios": [0.0]}}', '{"fc": {"ratios": [0, 0.5], "errors": [0]}}', "[1]"):
        (folder / LAYER_ERRORS).write_text(damaged)
        with refused("unreadable", ""):
            write_report(folder)


def test_pictures_in_the_page_are_those_in_the_folder(folder: Path) -> None:
    page = Page(write_report(folder).read_text())
    shown = {base64.b64decode(resource.partition(",")[2]) for resource in page.resources}
    assert shown == {file.read_bytes() for file in (folder / "plots").iterdir()}


def test_writing_it_twice_gives_the_same_page(folder: Path) -> None:
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_without_fine_tuning_and_export(tmp_path: Path) -> None:
    folder = leave_run(tmp_path, result(finetuned=None, exports=()))
    lines = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text(
        "\n".join(line for line in lines if not line.startswith("finetune")) + "\n"
    )
    page = Page(write_report(folder).read_text())
    assert "91.73% → 84.21% accuracy on the test split without fine-tuning." in page.words
    assert "fine-tuned" not in page.words
    assert "Loading the small network" not in page.words
    assert len(page.resources) == 3


def test_an_export_that_failed_is_said_and_not_offered(tmp_path: Path) -> None:
    exports = result().exports
    failed = replace(exports[2], bytes=0, max_difference=None, error="operator <x> is unknown")
    page = Page(write_report(leave_run(tmp_path, result(exports=(*exports[:2], failed)))).read_text())
    assert "Export onnx failed: operator <x> is unknown" in page.words
    assert "onnxruntime" not in page.words
    assert "model.pt2" in page.words


def test_with_result_json_alone(tmp_path: Path) -> None:
    result().write(tmp_path)
    page = Page(write_report(tmp_path).read_text())
    assert "90.52%" in page.words
    assert page.resources == []


@pytest.mark.parametrize("missing", ["strategy.json", "evaluations.jsonl", "metrics.csv", "config.yaml"])
def test_any_other_file_may_be_missing(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    page = Page(write_report(folder).read_text())
    assert "90.52%" in page.words
    if missing != "config.yaml":
        assert len(page.resources) < 4


def test_headline_names_both_splits_where_they_differ() -> None:
    mixed = result(finetuned=network(0.9052, 20.23e6, split="search"))
    assert "91.73% on the test split → 90.52% on the search split after fine-tuning." in headline(mixed)


def test_headline_speaks_of_the_cost_that_was_bounded() -> None:
    bounded = budget(cost="latency", limit=3.0, value=2.5)
    slow = {"base": network(0.9, 4e7, latency=5.0), "finetuned": network(0.9, 2e7, latency=2.5)}
    assert headline(result(budgets=(bounded,), **slow)).startswith("ResNet-20 to 50.0% of its latency: ")


def test_a_masked_run_says_what_is_zero_and_who_gains(tmp_path: Path) -> None:
    page = Page(write_report(leave_run(tmp_path, masked_result())).read_text())
    for part in (
        "ResNet-20 to 49.9% of its non-zero MACs:",
        "granularity fine_grained",
        "MACs, non-zero",
        "MACs, dense",
        "Speed: Sparsity only: <no>.",
        "Stored size",
        "2.00 kB",
        "75.0%",
        "no weight was quantised",
        "Weights kept per layer",
        "weights kept / total",
        "Loading the network",
    ):
        assert part in page.words, part
    assert "Channels kept" not in page.words
    assert "Pattern:" not in page.words


def test_without_a_budget_a_masked_run_is_measured_by_its_parameters() -> None:
    free = masked_result(budgets=(), finetuned=network(0.9052, 20.23e6, params=0.4 * 405.5e3))
    assert headline(free).startswith("ResNet-20 to 40.0% of its non-zero parameters: ")


@pytest.mark.parametrize("holds", [True, False])
def test_layers_of_a_pattern_are_dense_or_have_it(tmp_path: Path, holds: bool) -> None:
    folder = leave_run(tmp_path, pattern_result(holds))
    counts = {name: {"removed": 2 * (name == NAMES[0]), "total": 4} for name in NAMES}
    (folder / "strategy.json").write_text(json.dumps({"decisions": counts}))
    text = write_report(folder).read_text()
    page = Page(text)
    assert "granularity 2:4" in page.words
    assert "A layer is dense or keeps 2 of every 4." in page.words
    assert re.findall(r"</code></td><td>(.*?)</td>", text) == ["2:4", "dense", "dense"]
    assert ("2:4 holds in 1 of the 3 layers" in page.words) is holds
    assert ('<p class="bad">Pattern: 2:4 does NOT hold' in text) is not holds


def test_stages_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}

    def note(kind: str) -> Any:
        def plot(values: Any, path: Path, *args: Any, **named: Any) -> Path:
            drawn[kind] = (values, args, named)
            return plot_finetune([1.0], path)

        return plot

    monkeypatch.setattr("search.output.sections.plot_reward", note("reward"))
    monkeypatch.setattr("search.output.sections.plot_tradeoff", note("tradeoff"))
    chain = ("original", "stage 1 (0.7)")
    staged = search(stages=(0.7, 0.5), stage_episodes=20, start=chain)
    folder = leave_run(tmp_path, result(search=staged))
    rows = (folder / "metrics.csv").read_text().replace("search,0,", "search,40,")  # steps count from 1
    (folder / "metrics.csv").write_text(rows)
    lines = [unsealed(line) for line in (folder / "evaluations.jsonl").read_bytes().splitlines()[:-1]]
    for number, line in enumerate(lines[1:]):
        line["start"] = chain[number >= 20]
    (folder / "evaluations.jsonl").write_text("".join(map(sealed, lines)))
    page = Page(write_report(folder).read_text())
    rewards, arguments, _ = drawn["reward"]
    note_beside, boundaries = arguments[-2:]
    assert len(rewards) == 40
    assert boundaries == [20]
    assert note_beside == "budget 70%, 50% of MACs"
    assert len(drawn["tradeoff"][0]) == 20  # those of the delivered network's own start
    for part in (
        "Weights: original → stage 1 (0.7) → this network.",
        "stages 70%, 50%",
        "search time, last stage 1:35",
        "strategies that the last stage scored",
    ):
        assert part in page.words, part


def test_a_resumed_run_says_whose_time_it_is(tmp_path: Path) -> None:
    page = Page(write_report(leave_run(tmp_path, result(resumed=True))).read_text())
    assert "search time, this session 1:35" in page.words


@pytest.mark.parametrize("precision, said", [("int8", True), ("float32", False)])
def test_a_coarser_precision_of_the_scoring_is_said(tmp_path: Path, precision: str, said: bool) -> None:
    made = result(search=search(precision=precision))
    page = Page(write_report(leave_run(tmp_path, made)).read_text())
    assert (f"scored in {precision}" in page.words) == said


def test_the_best_strategies_are_listed_with_what_they_have_in_common_with_the_delivered(
    tmp_path: Path,
) -> None:
    made = result(search=search(repair="none"), budgets=(budget(),))
    page = Page(write_report(leave_run(tmp_path, made)).read_text())
    listed = page.words.partition("removed, front to back")[2].split("Fine-tuning")[0]
    scores = [float(share) for share in re.findall(r"(\d\d\.\d\d)%", listed)]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    within = {episode % 16: 60 + 20 * math.sin(episode) ** 2 for episode in range(28)}  # of the budget
    assert scores == pytest.approx(sorted(within.values(), reverse=True)[:5], abs=0.01)
    assert f"of {len(NAMES)} decisions" in listed


def test_one_strategy_is_no_search(tmp_path: Path) -> None:
    folder = leave_run(tmp_path, result(search=search(episodes=1, evaluations=1)))
    rows = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join([rows[0], rows[2], *rows[-5:]]) + "\n")
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    (folder / "evaluations.jsonl").write_text("\n".join([*lines[:2], lines[1]]) + "\n")
    page = Page(write_report(folder).read_text())
    assert "The search" not in page.words
    assert "Accuracy against cost" not in page.words
    assert "best reward" not in page.words
    assert len(page.resources) == 2  # what was kept, and fine-tuning
