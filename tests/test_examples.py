"""Every example runs as a script and prints what it found; so does the notebook."""

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import SMALL, Command

NOTEBOOK = Path(__file__).parents[1] / "examples" / "pruning_lab.ipynb"
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.usefixtures("_quick_compress")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.chdir(tmp_path)  # run folders go to outputs/
    runpy.run_path(str(path), run_name="__main__")
    assert "{" in capsys.readouterr().out  # the strategy
    assert len(path.read_text().splitlines()) <= 70


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code cells in order, in one namespace, with small numbers after the first."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {"__name__": "pruning_lab"}
    for source in sources:
        exec(compile(source, NOTEBOOK.name, "exec"), namespace)
        namespace |= {"TRAINING": 5, "EPISODES": 4, "FINALISTS": 1, "EPOCHS": 1, "STEPS": 1}
    assert namespace["small"].result.budget.met
    assert len(namespace["small"].result.baselines) == 2
    assert not any(cell.get("outputs") for cell in cells)


def test_the_wandb_sweep_is_made_of_configurations_and_of_a_metric_that_is_logged(
    amc_search: Command, tmp_path: Path
) -> None:
    sweep = yaml.safe_load((NOTEBOOK.parent / "wandb_sweep.yaml").read_text(encoding="utf-8"))
    first = {
        name: entry.get("value", entry.get("values", [None])[-1])
        for name, entry in sweep["parameters"].items()
    }
    words = [word for word in sweep["command"] if not word.startswith("$")]
    words += [f"{name}={value}" for name, value in first.items()]
    ended = amc_search(*words, *SMALL, "tracker=none", "search.episodes=2", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1][sweep["metric"]["name"]]) > 0.2
