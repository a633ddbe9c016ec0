"""scripts/compare_*.py: tiny studies run, resume and print their tables; points differ in what is compared alone."""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import Command

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import compare_agents  # noqa: E402 -- scripts are no package
import compare_latency  # noqa: E402
import compare_pruning  # noqa: E402
import compare_repairs  # noqa: E402
import compare_scores  # noqa: E402
import reproduce  # noqa: E402
import studies  # noqa: E402
from hydra import compose, initialize_config_module  # noqa: E402

TINY = ("model=digits_mlp", "search.images=60", "repair.images=60", "device=cpu")


@pytest.fixture
def in_process(amc_search: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are not started as processes of their own: test_a_failed_run_gives_exit_code_1 does that."""

    def run(command: list[str], stdout: Any, **_: Any) -> SimpleNamespace:
        ended = amc_search(*command[3:])
        stdout.write(ended.out + ended.err)
        return SimpleNamespace(returncode=ended.code)

    in_turn = SimpleNamespace(submit=lambda call, *given: call(*given))
    monkeypatch.setattr(studies, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(studies, "ThreadPoolExecutor", lambda jobs: nullcontext(in_turn))


@pytest.mark.usefixtures("in_process")
def test_agents_are_compared_and_finished_runs_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = ["--run", "chance", "agent=random", "search.episodes=2"]
    quiet = ["finetune.epochs=0", "export=[safetensors]", "latency.repeats=0", "finalists.count=0"]
    arguments = [str(tmp_path), "--seeds", "1", "2", *runs, "--common", *TINY, *quiet]
    assert compare_agents.main([*arguments]) == 0
    first = capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(studies.subprocess, "run", None)
        assert compare_agents.main(arguments) == 0
    assert capsys.readouterr().out == first
    titles, _, *rows = [line.strip("| ").split(" | ") for line in first.splitlines()]
    assert [row[:2] for row in rows] == [["chance", "2"]]
    macs = rows[0][titles.index("MACs")].split(" ± ")
    assert float(macs[0]) <= 50
    assert float(macs[1]) >= 0
    folders = [str(tmp_path / f"chance-{seed}") for seed in (1, 2)]
    assert compare_latency.main([*folders, "--repeats", "2"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["run", "---", "chance-1", "chance-2"]
    assert all(row[-1].endswith(" ms)") for row in rows[2:])


def test_a_failed_run_gives_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_agents.main([str(tmp_path), "--seeds", "1", "--run", "a", "agent=nosuch"]) == 1
    assert "| a | 0 | – |" in capsys.readouterr().out
    assert "nosuch" in (tmp_path / "a-1" / "output.txt").read_text()


@pytest.mark.usefixtures("in_process")
def test_repairs_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_repairs, "REPAIRS", ("none", "sequential"))
    model = ("model=digits_cnn", *TINY[1:])
    assert compare_repairs.main([str(tmp_path), "--jobs", "2", "--ratios", "0.3", "--common", *model]) == 0
    titles, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    accuracy = {row[0]: float(row[titles.index("search accuracy")]) for row in rows}
    assert set(accuracy) == {f"0.3 {repair}" for repair in compare_repairs.REPAIRS}
    assert accuracy["0.3 sequential"] > accuracy["0.3 none"]


@pytest.mark.usefixtures("in_process")
def test_a_row_is_reproduced_beside_uniform_and_the_unpruned_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*TINY, "data=digits", "model.weights=null", "search.episodes=3", "finetune.epochs=1"]
    assert reproduce.main([str(tmp_path), "resnet20_half", "--common", *given, "export=[]"]) == 0
    titles, _, row = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    found = dict(zip(titles, row, strict=True))
    assert (found["row"], found["seeds"]) == ("resnet20_half", "1")
    assert float(found["MACs left"].rstrip("%")) <= 50
    assert float(found["drop"]) == pytest.approx(
        float(found["unpruned"]) - float(found["fine-tuned"]), abs=0.02
    )
    unpruned = json.loads((tmp_path / "unpruned-1" / "result.json").read_text())
    assert unpruned["pruned"]["macs"] == unpruned["base"]["macs"]
    assert found["unpruned, trained alike"] == f"{100 * unpruned['finetuned']['accuracy']:.2f}"


@pytest.mark.usefixtures("in_process")
def test_a_network_without_published_weights_is_trained_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "TRAINED_FIRST", {"plain20_half": 2})
    given = [*TINY, "data=digits", "search.episodes=3", "finetune.epochs=0", "export=[]"]
    assert reproduce.main([str(tmp_path), "plain20_half", "--common", *given]) == 0
    trained = json.loads((tmp_path / "training-0" / "result.json").read_text())
    accuracy = trained["finetuned"]["accuracy"]
    assert accuracy > trained["base"]["accuracy"] + 0.5
    assert f"| {100 * accuracy:.2f} |" in capsys.readouterr().out


def test_every_row_is_an_experiment() -> None:
    experiments = {path.stem for path in (SCRIPTS.parent / "conf" / "experiment").glob("*.yaml")}
    assert experiments.issuperset(reproduce.PUBLISHED)
    assert set(reproduce.TRAINED_FIRST) <= set(reproduce.PUBLISHED)


@pytest.mark.usefixtures("in_process")
def test_a_point_of_a_pruning_study_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_pruning, "CURVE", (0.8,))
    arguments = [str(tmp_path), "curve", "--epochs", "2", "--common", *TINY]
    assert compare_pruning.main(arguments) == 0
    titles, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    one_shot, cubic = rows
    assert cubic[0] == f"{one_shot[0]} cubic"
    for row in rows:
        assert float(row[titles.index("params left")]) == pytest.approx(20, abs=2)
        assert float(row[titles.index("fine-tuned")]) > 50


@pytest.mark.parametrize("table", compare_pruning.TABLES)
def test_every_point_is_a_configuration(table: str, tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path, seeds=[1], epochs=3)
    points = list(compare_pruning.TABLES[table](options))
    assert len({point.name for point in points}) == len(points)
    composed: set[str] = set()
    with initialize_config_module("conf", version_base="1.3"):
        for point in points:
            if not composed.issuperset(point.overrides):  # a choice that no point before has
                assert compose("search", list(point.overrides)).agent.ratio > 0
                composed.update(point.overrides)


def test_the_best_four_criteria_by_the_search_split_are_tuned(tmp_path: Path) -> None:
    for rank, criterion in enumerate(compare_pruning.CRITERIA):
        point = compare_pruning.uniform("fine_grained", 0.9, compare_pruning.REPAIR, 0, criterion)
        folder = point.folder(tmp_path, 1)
        folder.mkdir()
        (folder / "result.json").write_text(f'{{"search": {{"search_accuracy": 0.{rank}}}}}')
    options = argparse.Namespace(out=tmp_path, seeds=[1], epochs=1)
    names = [point.name.split()[2] for point in compare_pruning.criteria_tuned(options)]
    assert names == list(compare_pruning.CRITERIA[:-5:-1])


def test_strategies_are_chosen_evenly_and_scores_correlated(tmp_path: Path) -> None:
    runs = []
    for name, scores in (("a", [0.1, 0.4, 0.2]), ("b", [0.3, 0.2])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "strategy.json").write_text('{"decisions": {"conv": {"removed": 0}}}')
        lines = [{"header": {}}, *({"removed": [round(10 * score)], "score": score} for score in scores)]
        (tmp_path / name / "evaluations.jsonl").write_text("\n".join(map(json.dumps, lines)))
        runs.append(tmp_path / name)
    assert compare_scores.chosen(runs, 9) == [{"conv": 1}, {"conv": 2}, {"conv": 3}, {"conv": 4}]
    assert compare_scores.chosen(runs, 2) == [{"conv": 1}, {"conv": 4}]
    (file, _) = compare_scores.written([{"conv": 1}, {"conv": 4}], tmp_path)
    assert json.loads(file.read_text()) == {"decisions": {"conv": {"removed": 1}}}

    def result(score: float, test: float) -> dict[str, Any]:
        tuned = {"accuracy": -test}
        return {"search": {"search_accuracy": score}, "pruned": {"accuracy": test}, "finetuned": tuned}

    results = {
        "cheap": [result(score, score) for score in (0.1, 0.2, 0.4, 0.3)],
        "dear": [result(score, score) for score in (0.1, 0.2, 0.3, 0.4)],
    }
    cells = ["cheap", "4", "25.00", "1.00", "0.80", "-1.00", "1.00", "-1.00"]
    assert compare_scores.row("cheap", results) == cells
