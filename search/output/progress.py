"""What a run shows in the terminal, besides its log: progress, and a table at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from search.output.formatting import (
    baseline_rows,
    budget_lines,
    comparison,
    duration,
    front_table,
    history_line,
    latency_note,
    layer_table,
    pattern_line,
    percent,
    spread_line,
    storage_rows,
)
from search.output.run_result import RunResult

_FILE_WIDTH = 160
_LAYERS_SHOWN = 30
_PACKAGES = ("amc_env", "agents", "search")


@dataclass(frozen=True)
class SearchStatus:
    """Where a search stands after an episode.

    Attributes:
        done: episodes behind us, this one included.
        reward: of this episode.
        best_reward: of the best so far; the next two belong to it.
        best_accuracy: on the search split, in [0, 1].
        best_cost_ratio: its cost as a share of the original's, in [0, 1].
        cost: name of that cost as shown, such as 'MACs'.
        metric: name of the score, such as 'accuracy'.
        evaluations: strategies scored.
        cache_hits: strategies met again and not scored.
    """

    done: int
    reward: float
    best_reward: float
    best_accuracy: float
    best_cost_ratio: float
    evaluations: int
    cache_hits: int
    cost: str = "MACs"
    metric: str = "accuracy"


class Progress:
    """Shows a search and its fine-tuning: bars in a terminal, a line now and then elsewhere.

    In a terminal the bars stay at the bottom and log lines scroll above them. Elsewhere (a file, a pipe, a CI log) a line
    is written at the start of a stage, at each tenth of it, and after `every_s` seconds of silence.

    Example:
        with Progress(episodes=400, epochs=10) as progress:
            progress.episode(status)
            progress.epoch(1, loss=0.31, score=0.9)
    """

    def __init__(
        self, episodes: int = 0, epochs: int = 0, console: Console | None = None, every_s: float = 30.0
    ) -> None:
        self.console = console or Console(stderr=True)
        self._stages: dict[str, Stage] = {}
        self._totals = {"search": episodes, "fine-tune": epochs}
        self._every_s = every_s
        self._bars = Bars(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _Pace(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self._live: Live | None = None
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(self._view(), console=self.console, refresh_per_second=4)
            streams = (sys.stdout, sys.stderr)
            self._live.start()
            self._redirect_logging(streams)
        return self

    def __exit__(self, *_: object) -> None:
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()
        if self._live is not None:
            self._live.update(self._view())
            self._live.stop()
            self._live = None

    def start(self, name: str) -> None:
        """Show that the search (``search``) or the fine-tuning (``fine-tune``) has started; its clock runs from here."""
        self.stage(name, self._totals[name])

    def stage(self, name: str, total: int) -> Stage:
        """Show a stage of so many steps, 0 where their number is not known; that of a known name gets the new total."""
        stage = self._stages.get(name)
        if stage is None:
            stage = self._stages[name] = Stage(name, total, self._bars.add_task(name, total=None), self._show)
            self._show(stage)
        stage.total = total
        return stage

    def episode(self, status: SearchStatus) -> None:
        """Show a finished episode."""
        now = f"reward {status.reward:.4f}"
        best = (
            f"best {status.best_reward:.4f} (search {status.metric} {percent(status.best_accuracy)}, "
            f"{percent(status.best_cost_ratio, 1)} of {status.cost})"
        )
        search = self.stage("search", self._totals["search"])
        search.advance(
            f"{now}  {best}", f"{status.evaluations} scored, {status.cache_hits} cached", status.done
        )

    def epoch(self, done: int, loss: float, score: float) -> None:
        """Show a finished fine-tuning epoch, with the score on the search split."""
        text = f"loss {loss:.4f}  score {percent(score)}"
        self.stage("fine-tune", self._totals["fine-tune"]).advance(text, done=done)

    def _show(self, stage: Stage) -> None:
        if self._live is not None:
            self._bars.update(stage.task, completed=stage.done, total=stage.total or None)
            self._live.update(self._view())
        elif not self.console.is_terminal and stage.due(self._every_s):
            self.console.print(stage.line(), soft_wrap=True, highlight=False, markup=False)

    def _view(self) -> Group:
        stages = [stage for stage in self._stages.values() if stage.text or stage.rest]
        if self.console.width >= 110:
            lines = [Text(f"{s.name:<9} {s.text}  {s.rest}".rstrip(), no_wrap=True) for s in stages]
        else:
            parts = [
                (s.name if part is s.text else "", part) for s in stages for part in (s.text, s.rest) if part
            ]
            lines = [Text(f"{name:<9} {part}", no_wrap=True, overflow="ellipsis") for name, part in parts]
        return Group(self._bars, *lines) if self._stages else Group()

    def _redirect_logging(self, streams: tuple[Any, ...]) -> None:
        """Let log handlers write through the live display, which has replaced the streams they hold."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stdout if handler.stream is streams[0] else sys.stderr)


class _Pace(ProgressColumn):
    """Steps a second, or seconds a step where that is more than one."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def shown_log() -> Iterator[None]:
    """Print this project's log on standard output, where the program has set up no logging of its own."""
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in _PACKAGES]
    if root.handlers:
        yield
        return
    handler, levels = logging.StreamHandler(sys.stdout), [logger.level for logger in ours]
    root.addHandler(handler)
    for logger in ours:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)


class Stage:
    """A part of a run, its steps, and when a line was last written for it; made by `Progress.stage`.

    Attributes:
        total: steps, 0 where their number is not known.
        done: steps that are finished.
        text: of the last step.
        rest: more of it, on a line of its own where the terminal is narrow.
        task: its bar.
    """

    def __init__(self, name: str, total: int, task: TaskID, show: Callable[[Stage], None]) -> None:
        self.name, self.total, self.task = name, total, task
        self.done, self.text, self.rest = 0, "", ""
        self._show = show
        self._start = self._spoke = time.monotonic()
        self._first_done: int | None = None
        self._tenth = -1

    def advance(self, text: str = "", rest: str = "", done: int | None = None) -> None:
        """Show a finished step.

        Args:
            text: what it came to.
            rest: more of it.
            done: steps that are finished; by default one more than before.
        """
        self.done = self.done + 1 if done is None else done
        self.text, self.rest = text, rest
        self._show(self)

    def due(self, every_s: float) -> bool:
        now = time.monotonic()
        tenth = 10 * self.done // self.total if self.total else 0
        if tenth == self._tenth and now - self._spoke < every_s:
            return False
        self._tenth, self._spoke = tenth, now
        return True

    def line(self) -> str:
        count = f"{self.done}/{self.total}" if self.total else f"{self.done}"
        parts = [f"{self.name} {count}", self.text, self.rest, self._left()]
        return "  ".join(part for part in parts if part)

    def _left(self) -> str:
        # A resumed search has not paid for what it read back: its first count is where its pace is taken from.
        if self._first_done is None and self.done:
            self._first_done = self.done if self.name == "search" else 0
        spent, covered = time.monotonic() - self._start, self.done - (self._first_done or 0)
        left = spent / covered * (self.total - self.done) if covered and self.total else 0.0
        return (
            f"{duration(spent)} elapsed, {duration(left)} left" if covered else f"{duration(spent)} elapsed"
        )


def final_table(
    result: RunResult,
    folder: Path | None = None,
    report: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the outcome of a run: layers, original / pruned / fine-tuned, the budget, and where to look further.

    Args:
        result: the figures of the run.
        folder: the run folder.
        report: the report page.
        console: where to print; standard output by default.
    """
    console = console or _standard_output()
    _print_layers(result, console)
    compared = comparison(result)
    rows = [
        (title, *(f"{cell.text} ({cell.relative})" if cell.relative else cell.text for cell in cells))
        for title, cells in compared.rows.items()
    ]
    print_table(("", *compared.stages), rows, console=console)
    if front := front_table(result):
        print_table(front[0], front[1:], console=console)
    _print_baselines(result, console)
    for line, met in budget_lines(result.budgets, result.base.costs, result.granularity.masked):
        console.print(Text(f"budget: {line}", style="" if met else "bold red"), soft_wrap=True)
    if result.granularity.masked:
        _print_masked(result, console)
    if note := latency_note(result):
        console.print(Text(note, style="bold red"), soft_wrap=True)
    if history := history_line(result):
        console.print(Text(f"weights: {history}"), soft_wrap=True)
    for name, path in (("run folder", folder), ("report", report)):
        if path is not None:
            console.print(Text(f"{name}: {path}"), soft_wrap=True)


def _print_baselines(result: RunResult, console: Console) -> None:
    """Print the agent beside its baselines, and what chance amounts to."""
    compared = baseline_rows(result)
    if compared:
        print_table(*compared, console=console)
        if line := spread_line(result):
            console.print(Text(line), soft_wrap=True)


def _print_layers(result: RunResult, console: Console) -> None:
    """Print what became of every layer; of a deep network the first ones."""
    titles, rows = layer_table(result)
    if not rows:
        return
    print_table(titles, rows[:_LAYERS_SHOWN], console=console)
    if len(rows) > _LAYERS_SHOWN:
        console.print(f"and {len(rows) - _LAYERS_SHOWN} more layers: report.html lists them", highlight=False)


def print_table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    below: Iterable[Sequence[str]] = (),
    *,
    words: int = 1,
    console: Console | None = None,
) -> None:
    """Print a table.

    Args:
        titles: of its columns.
        rows: a text for each column.
        below: more rows, below a line.
        words: columns at the left that hold words; figures are right-justified.
        console: where to print; standard output by default.
    """
    console = console or _standard_output()
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2)
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place < words else "right")
    for row in rows:
        table.add_row(*row)
    table.add_section()
    for row in below:
        table.add_row(*row)
    console.print(table)


def _standard_output() -> Console:
    """A terminal is as wide as it is; in a file no table need be squeezed."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def _print_masked(result: RunResult, console: Console) -> None:
    """Stored sizes, whether an n:m pattern holds, and which hardware gains."""
    sizes = [
        f"{s.format} {s.weights} {s.size}" + (f" ({s.share})" if s.share else "")
        for s in storage_rows(result)
    ]
    console.print(Text(f"stored: {', '.join(sizes)}"), soft_wrap=True)
    if pattern := pattern_line(result):
        console.print(Text(f"pattern: {pattern[0]}", style="" if pattern[1] else "bold red"), soft_wrap=True)
    console.print(Text(f"speed: {result.granularity.speed}"), soft_wrap=True)
