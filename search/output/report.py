"""report.html: one page on what a run was asked and what came out, from the files in its folder.

The page is self-contained: pictures are data URIs, the style is inline, and nothing is fetched. A script runs only where
the optional charts are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from amc_env.evaluation.precision import FLOAT32
from search import files
from search.output import charts
from search.output.formatting import (
    budget_lines,
    comparison,
    cost_name,
    duration,
    format_name,
    history_line,
    latency_note,
    layer_table,
    pattern_line,
    percent,
    split_name,
)
from search.output.run_files import RunFiles
from search.output.run_result import RunResult, SearchFigures
from search.output.sections import SECTIONS, Picture, Section

TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: str | Path) -> Path:
    """Write plots/*.png and report.html into a run folder, from the files in it.

    Args:
        folder: run folder; result.json must be there, everything else may be missing.

    Returns:
        The page's path.

    Raises:
        UserError: if there is no readable result.json, as in a run that has not ended, or a file is damaged.
    """
    run = RunFiles.read(Path(folder))
    with files.reading(f"the run in {folder}", "its files are damaged, or another version's"):
        page = _rendered("report.html.j2", _view(run))
    path = run.folder / "report.html"
    files.write(path, page)
    return path


def write_page(
    path: Path, headline: str, facts: Sequence[tuple[str, object]], sections: Sequence[Section]
) -> Path:
    """Write a page in the style of the report, for what is no search.

    Args:
        path: the page's file.
        headline: one sentence.
        facts: short ones below it, as (what, value).
        sections: the rest.

    Returns:
        The page's path.
    """
    asked = [(name, str(value)) for name, value in facts]
    view = {"headline": headline, "asked": asked, "sections": sections, "script": ""}
    files.write(path, _rendered("page.html.j2", view))
    return path


def result_html(result: RunResult, folder: Path) -> str:
    """The figures of a run as a piece of HTML, for a notebook.

    Args:
        result: the figures.
        folder: the run folder.
    """
    titles, layers = layer_table(result)
    view = {
        "headline": headline(result),
        "table": comparison(result),
        "budgets": budget_lines(result.budgets, result.base.costs, result.granularity.masked),
        "layers": layers,
        "layer_titles": titles,
        "latency_note": latency_note(result),
        "folder": folder,
    }
    return _rendered("result.html.j2", view)


def _rendered(template: str, view: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**view)


def headline(result: RunResult) -> str:
    """One sentence: the network, the share of the cost that is left, and its score before and after."""
    base, final, masked = result.base, result.delivered, result.granularity.masked
    before, after = percent(base.accuracy), percent(final.accuracy)
    if base.split == final.split:
        scores = f"{before} → {after} {result.metric} on the {split_name(final.split)}"
    else:
        scores = f"{before} on the {split_name(base.split)} → {after} on the {split_name(final.split)}"
    cost = result.budget.cost if result.budget else "params" if masked else "macs"
    share = percent(final.costs[cost] / base.costs[cost], 1)
    state = "after fine-tuning" if final is result.finetuned else "without fine-tuning"
    return f"{result.model} to {share} of its {cost_name(cost, masked)}: {scores} {state}."


def _view(run: RunFiles) -> dict[str, Any]:
    """The names that the template uses."""
    result = run.result
    return {
        "headline": headline(result),
        "asked": [(name, str(value)) for name, value in _asked(result)],
        "table": comparison(result),
        "metric": result.metric,
        "budgets": budget_lines(result.budgets, result.base.costs, result.granularity.masked),
        "masked": result.granularity.masked,
        "speed": result.granularity.speed,
        "latency_note": latency_note(result),
        "history": history_line(result),
        "pattern": pattern_line(result),
        "sections": (sections := [section for make in SECTIONS if (section := make(run)) is not None]),
        "script": charts.script() if any(map(_has_chart, sections)) else "",
    }


def _has_chart(section: Section) -> bool:
    return any(isinstance(block, Picture) and block.chart for block in section.blocks)


def _asked(result: RunResult) -> Iterator[tuple[str, object]]:
    """Short facts about the search, as (what, value)."""
    search = result.search
    yield "data", result.data
    yield "granularity", format_name(result.granularity, result.granularity.name)
    yield "agent", search.agent
    yield "seed", search.seed
    if search.stages or search.episodes != 1:  # else nothing was searched
        yield from _of_the_search(search, result.resumed)


def _of_the_search(search: SearchFigures, resumed: bool) -> Iterator[tuple[str, object]]:
    last = ", last stage" if search.stages else ""
    if last:
        yield "stages", ", ".join(f"{100 * ratio:.3g}%" for ratio in search.stages)
    yield f"episodes{last}", search.episodes
    if search.precision != FLOAT32:
        yield "scored in", search.precision
    yield f"evaluations{last}", f"{search.evaluations}, {search.cache_hits} repeated"
    yield f"search time{last}{', this session' if resumed else ''}", duration(search.seconds)
    yield "best reward", f"{search.best_reward:.4f}"
