"""The progress display in a terminal and elsewhere, and the table at the end."""

import io
import logging
import sys
from typing import Any

import pytest
from made_results import budget, network, pattern_result, result, search
from rich.console import Console

from search.output import progress as module
from search.output.formatting import amount, comparison, duration, percent, quantity
from search.output.progress import Progress, SearchStatus, final_table


def status(done: int) -> SearchStatus:
    return SearchStatus(done, -0.25, -0.18, 0.82, 0.498, evaluations=done, cache_hits=2)


def plain(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def terminal(width: int = 120) -> Console:
    return Console(file=io.StringIO(), width=width, height=24, force_terminal=True, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_numbers_read_as_people_write_them() -> None:
    assert percent(0.91734) == "91.73%"
    assert percent(float("nan")) == "–"
    assert [quantity(value) for value in (20412000, 269722, 512, 1.5e9)] == [
        "20.41 M",
        "269.72 k",
        "512",
        "1.50 G",
    ]
    assert amount("latency_ms", 4.211) == "4.21 ms"
    assert [duration(seconds) for seconds in (5.2, 95, 3725, -1)] == ["0:05", "1:35", "1:02:05", "0:00"]


class TestPlain:
    def test_a_long_search_writes_a_line_per_tenth(self) -> None:
        console = plain()
        with Progress(episodes=1000, console=console) as progress:
            for episode in range(1000):
                progress.episode(status(episode + 1))
        lines = text_of(console).splitlines()
        assert len(lines) == 11
        assert lines[0].startswith("search 0/1000")
        assert lines[-1].startswith("search 1000/1000")
        assert "best -0.1800 (search accuracy 82.00%, 49.8% of MACs)" in lines[-1]
        assert "1000 scored, 2 cached" in lines[-1]
        assert "left" in lines[-1]

    def test_silence_ends_after_the_set_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: now)
        console = plain()
        with Progress(episodes=10000, console=console, every_s=10.0) as progress:
            for episode in range(60):
                progress.episode(status(episode + 1))
                now += 1.0
        assert len(text_of(console).splitlines()) == 6  # every 10 s, from 0 s on

    def test_time_left_follows_the_pace_since_the_first_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: now)
        console = plain()
        with Progress(episodes=40, console=console) as progress:
            progress.episode(status(20))  # resumed: twenty episodes cost nothing
            now = 50.0
            progress.episode(status(30))
        assert text_of(console).splitlines()[-1].endswith("0:50 elapsed, 0:50 left")

    def test_fine_tuning_follows_the_search(self) -> None:
        console = plain()
        with Progress(episodes=1, epochs=2, console=console) as progress:
            progress.episode(status(1))
            progress.epoch(1, loss=0.5, score=0.9)
            progress.epoch(2, loss=0.25, score=0.9)
        lines = [line.split("  ")[0] for line in text_of(console).splitlines()]
        assert lines == ["search 0/1", "search 1/1", "fine-tune 0/2", "fine-tune 1/2", "fine-tune 2/2"]

    def test_nothing_shown_where_nothing_ran(self) -> None:
        console = plain()
        with Progress(console=console):
            pass
        assert text_of(console) == ""


class TestTerminal:
    @pytest.mark.parametrize("width", [80, 120])
    def test_last_view_holds_every_figure_within_the_width(self, width: int) -> None:
        console = terminal(width)
        with Progress(episodes=4, epochs=2, console=console) as progress:
            for episode in range(4):
                progress.episode(status(episode + 1))
            progress.epoch(1, loss=0.5, score=0.9)
        text = text_of(console)
        for figure in (
            "4/4",
            "reward -0.2500",
            "best -0.1800",
            "82.00%",
            "49.8% of MACs",
            "4 scored, 2 cached",
            "1/2",
        ):
            assert figure in text

    def test_log_lines_go_through_the_display_and_the_handler_is_given_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        console = terminal()
        handler = logging.StreamHandler(sys.stderr)
        root = logging.getLogger()
        monkeypatch.setattr(root, "handlers", [handler])
        before = handler.stream
        with Progress(episodes=2, console=console) as progress:
            progress.episode(status(1))
            root.warning("half way there")
            assert handler.stream is not before
        assert handler.stream is before
        assert "half way there" in text_of(console)

    def test_the_display_ends_where_the_search_fails(self) -> None:
        console = terminal()
        before = sys.stdout
        with pytest.raises(RuntimeError, match="no"), Progress(episodes=2, console=console):
            raise RuntimeError("no")
        assert sys.stdout is before


class TestFinalTable:
    def test_figures_ratios_budget_and_paths_are_printed(self, tmp_path: Any) -> None:
        console = plain()
        final_table(result(), tmp_path, tmp_path / "report.html", console)
        text = text_of(console)
        for figure in (
            "91.73%",
            "84.21% (-7.52)",
            "90.52% (-1.21)",
            "40.55 M",
            "20.23 M (49.9%)",
            "405.50 k",
            "2.02 ms",
        ):
            assert figure in text
        assert "accuracy, test split" in text
        assert "16 → 12" in text
        assert "2.30 k → 1.73 k |       75% |" in text
        rows = [line.split() for line in text.splitlines() if line.startswith(("| ddpg", "| uniform"))]
        assert [row[1:10:2] for row in rows] == [
            ["ddpg", "38", "82.00%", "84.21%", "49.9%"],
            ["uniform", "2", "70.00%", "69.00%", "49.8%"],
        ]
        assert "one image is 0.02 points of the search split (standard error 0.5) and 0.01 points" in text
        assert "latency, batch 1, eager" in text
        assert text.count(" 3.4% ") == 3  # the spreads, which are compared with nothing
        assert "budget: MACs at most 20.27 M (50.0%), reached 20.23 M (49.9%): met" in text
        assert f"run folder: {tmp_path}" in text
        assert f"report: {tmp_path / 'report.html'}" in text

    def test_a_stage_left_out_is_absent(self) -> None:
        console = plain()
        final_table(result(finetuned=None), console=console)
        assert "fine-tuned" not in text_of(console)
        assert "pruned" in text_of(console)

    def test_masked_weights_have_their_sizes_and_pattern(self) -> None:
        console = plain(100)
        final_table(pattern_result(search=search(start=("original", "stage 1 (0.5)"))), console=console)
        text = text_of(console)
        for line in (
            "stored: dense 32 bits 1.00 kB, CSR 32 bits 900 B (90.0%), 2:4 32 bits 531 B (53.1%), dense 4 bits 200 B, "
            "EIE 4 bits 150 B (75.0%)",
            "pattern: 2:4 holds in 1 of the 3 layers that it fits",
            "speed: GPUs gain.",
            "weights: original → stage 1 (0.5) → this network",
            "| MACs, non-zero",
            "budget: non-zero MACs at most",
        ):
            assert line in text, line

    def test_cut_channels_need_no_such_words(self) -> None:
        console = plain()
        final_table(result(), console=console)
        assert not {"stored:", "pattern:", "speed:", "weights:"} & set(text_of(console).split())

    def test_without_a_budget(self) -> None:
        console = plain()
        final_table(result(budgets=()), console=console)
        assert "original" in text_of(console)
        assert "budget" not in text_of(console)

    def test_a_budget_missed_is_said(self) -> None:
        console = plain()
        missed = budget(cost="latency", ratio=0.75, limit=3.0, value=4.0, met=False)
        networks = {name: network(0.9, 4e7, latency=4.0) for name in ("base", "pruned")}
        final_table(result(budgets=(missed,), baselines=(), **networks), console=console)
        assert "budget: latency at most 3.00 ms (75.0%), reached 4.00 ms (100.0%): NOT met" in text_of(
            console
        )

    def test_accuracies_of_different_splits_are_named_and_not_subtracted(self) -> None:
        mixed = comparison(result(finetuned=network(0.9, 2e7, split="search")))
        cells = mixed.rows["accuracy"]
        assert [cell.text for cell in cells] == [
            "91.73%, test split",
            "84.21%, test split",
            "90.00%, search split",
        ]
        assert [cell.relative for cell in cells] == ["", "-7.52", ""]


def test_a_stage_shows_before_its_first_step_is_done() -> None:
    out = io.StringIO()
    with Progress(episodes=4, epochs=2, console=Console(file=out, width=100)) as progress:
        progress.start("fine-tune")
        progress.start("fine-tune")
    assert out.getvalue().splitlines() == ["fine-tune 0/2  0:00 elapsed"]


def test_any_stage_counts_its_steps_and_may_grow() -> None:
    out = io.StringIO()
    with Progress(console=Console(file=out, width=100)) as progress:
        progress.stage("units", 4).advance("first")
        progress.stage("units", 8).advance(done=8)
    lines = [line.split("  ")[:2] for line in out.getvalue().splitlines()]
    assert [line[0] for line in lines] == ["units 0/4", "units 1/4", "units 8/8"]
    assert lines[1][1] == "first"
