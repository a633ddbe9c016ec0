"""scripts/benchmark.py: a tiny search is measured, rounds interleave, an interrupted benchmark resumes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import benchmark  # noqa: E402 -- scripts are no package

Runs = list[tuple[str, str, str]]


def test_a_search_is_measured_with_a_variant_from_another_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the four rows, in a process of its own."""
    wanted = benchmark.Row("search:digits_mlp", "drawn", "same")
    monkeypatch.setattr(benchmark, "rows", lambda options: iter([wanted]))
    asked = ["--cases", "search:digits_mlp", "--rounds", "1", "--episodes", "2", "--threads", "1"]
    more = ["--variant", "drawn=agent=random search.episodes=1", "--tree", f"same={ROOT}"]
    common = ["--common", "search.images=60", "repair.images=60", "finalists.count=0"]
    assert benchmark.main([str(tmp_path), *asked, *more, *common]) == 0
    (run,) = json.loads((tmp_path / "benchmark.json").read_text())["runs"]
    assert (run["row"]["variant"], run["row"]["tree"]) == ("drawn", "same")
    assert run["machine"]["threads"] == 1
    assert run["figures"]["command s"] > run["figures"]["search s"] >= 0
    assert run["figures"]["peak MiB"] > 50
    assert run["figures"]["evaluations"] == 1  # the variant's episodes
    assert "| search:digits_mlp | drawn | same |" in capsys.readouterr().out


def test_a_failed_run_is_reported_and_not_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([str(tmp_path), "--cases", "search:nosuch", "--rounds", "1"]) == 1
    assert not (tmp_path / "benchmark.json").exists()
    assert "nosuch" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The runs in order; the third is interrupted. An episode takes 1 s, of another tree 2 s."""
    runs: Runs = []

    def fake(row: benchmark.Row, options: Any) -> dict[str, Any]:
        runs.append((row.case, row.variant, row.tree))
        if len(runs) == 3:
            raise KeyboardInterrupt
        seconds = 1.0 if row.tree == "-" else 2.0
        return {"figures": {"episode s": seconds}, "machine": {"cores": 2}, "commit": "c"}

    monkeypatch.setattr(benchmark, "measured", fake)
    return runs


def test_an_interrupted_benchmark_resumes(
    tmp_path: Path, measured: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path), "--rounds", "2", "--cases", "search:a", "search:b", "--tree", f"old={ROOT}"]
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(arguments)
    assert benchmark.main(arguments) == 0
    assert benchmark.main(arguments) == 0
    one_round = [(case, "-", tree) for case in ("search:a", "search:b") for tree in ("-", "old")]
    assert measured == [*one_round[:3], *one_round[2:], *one_round]
    assert "| search:b | - | old | 2 | 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--common"):
        benchmark.main([*arguments, "--common", "seed=1"])


def test_seconds_of_phases_are_medians_over_trials(tmp_path: Path) -> None:
    search = {"seconds": 8.0, "evaluations": 3, "cache_hits": 1, "search_accuracy": 0.5}
    (tmp_path / "result.json").write_text(json.dumps({"search": search}))
    trials = [{"header": {}}, *({"seconds": {"repair": s, "score": 2 * s}} for s in (1.0, 2.0, 6.0))]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(map(json.dumps, trials)))
    found = benchmark.figures(tmp_path, 4)
    assert (found["episode s"], found["repair s"], found["score s"]) == (2.0, 2.0, 4.0)


@pytest.mark.parametrize("wrong", [["--cases", "episode:a"], ["--tree", "old=nosuch"], ["--variant", "int8"]])
def test_wrong_arguments_are_refused_before_anything_runs(tmp_path: Path, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        benchmark.main([str(tmp_path / "out"), *wrong])
    assert error.value.code == 2
    assert not (tmp_path / "out").exists()
