"""Runs side by side: groups, the best score after so many evaluations, what amc-report prints and writes."""

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_results import result, search
from refusals import refused

from search import run_report
from search.files import sealed
from search.output.comparing import best_so_far, find_runs, grouped, rows
from search.output.plots import DPI
from search.output.run_files import RunFiles

SCORES = {"random": (0.5, 0.6, 0.55, 0.7), "evolution": (0.6, 0.8, 0.9, 0.85)}


def leave(folder: Path, agent: str, seed: int, shift: float = 0.0, episodes: int = 4) -> Path:
    folder.mkdir(parents=True)
    made = result(search=replace(search(), agent=agent, seed=seed, seconds=60.0))
    made.write(folder)
    header = {"seed": seed, "agent": {"class": agent}, "episodes": episodes, "weights": "abc"}
    lines: list[dict[str, object]] = [{"header": header}]
    for number, score in enumerate(SCORES[agent]):
        line = {"start": "original", "repair": "least_squares", "removed": [number], "costs": {"macs": 1.0}}
        lines.append(line | {"score": score + shift, "met": number > 0})
    lines.append(
        {"start": "original", "repair": "sequential", "removed": [3], "costs": {}, "score": 1.0, "met": True}
    )
    (folder / "evaluations.jsonl").write_text("".join(map(sealed, lines)))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for agent in SCORES:
        for seed in (1, 2):
            leave(tmp_path / "sweep" / f"{agent}{seed}", agent, seed, shift=0.02 * seed)
    return tmp_path / "sweep"


def test_the_best_so_far_meets_the_budget_and_leaves_finalists_out(tmp_path: Path) -> None:
    found = best_so_far(RunFiles.read(leave(tmp_path / "run", "random", 1)))
    assert math.isnan(found[0])
    assert found[1:] == [0.6, 0.6, 0.7]


def test_runs_are_grouped_by_all_but_their_seed(sweep: Path) -> None:
    groups = grouped(find_runs([sweep]))
    assert {group.label: len(group.runs) for group in groups} == {"evolution": 2, "random": 2}
    leave(sweep / "longer", "random", 3, episodes=9)
    labels = [group.label for group in grouped(find_runs([sweep]))]
    assert labels == ["evolution", "random episodes=9", "random episodes=4"]


def test_the_table_has_mean_and_spread_over_seeds(sweep: Path) -> None:
    titles, evolution, random = rows(grouped(find_runs([sweep])), at=(1, 3, 100))
    assert titles[:5] == ("run", "seeds", "best at 1", "best at 3", "best at 100")
    assert evolution[:6] == ("evolution", "2", "–", "93.00% ± 1.41", "–", "93.00% ± 1.41")
    assert random[3] == "63.00% ± 1.41"
    assert evolution[-3:] == ("84.21% ± 0.00", "90.52% ± 0.00", "1:00")


def test_an_agent_that_repeated_itself_keeps_its_best(sweep: Path) -> None:
    """The runs scored 4 strategies in 40 episodes."""
    _, evolution, _ = rows(grouped(find_runs([sweep])), at=(4, 40, 41))
    assert evolution[2] == evolution[3] == "93.00% ± 1.41"
    assert evolution[4] == "–"


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["amc-report", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_report.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.plots
def test_the_command_compares_runs(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, str(sweep), "--at", "2", "--out", str(tmp_path / "out")) == 0
    assert "best at 2" in capsys.readouterr().out
    table = list(csv.reader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert [row[0] for row in table] == ["run", "evolution", "random"]
    png = (tmp_path / "out" / "comparison.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20]) == round(7.2 * DPI)


def test_the_command_writes_one_run_s_report_again(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, str(sweep / "random1")) == 0
    assert "90.52%" in (sweep / "random1" / "report.html").read_text()


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with refused("no_run", ""):
        find_runs([tmp_path])
    assert called(monkeypatch, str(tmp_path / "nowhere")) == 2
    assert capsys.readouterr().err.startswith("error: ")
