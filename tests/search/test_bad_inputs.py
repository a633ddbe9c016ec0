"""What commands refuse before anything is scored or measured: the rows of bad_inputs.yaml, an input each."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from running import Command

from amc_env.errors import UserError
from search import run_apply, run_latency, run_search, run_sensitivity
from search.config import command

MAINS = {
    "search": run_search.main,
    "apply": run_apply.main,
    "latency": run_latency.main,
    "sensitivity": run_sensitivity.main,
}
ROWS: list[dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("bad_inputs.yaml").read_text(encoding="utf-8")
)


def mistakes_of(error: BaseException) -> list[str]:
    """Code and field of every mistake; what Hydra refuses has the name of its error instead."""
    if not isinstance(error, UserError):
        return [type(error).__name__]
    return [f"{part.code} {part.field}".strip() for part in error.parts]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['command']} {' '.join(row['input'])}")
def test_a_bad_input_is_one_line_and_its_mistakes_are_these(
    amc_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]
) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"strategy": {}}')
    found: list[BaseException] = []
    line = command._line
    monkeypatch.setattr(command, "_line", lambda error: found.append(error) or line(error))
    monkeypatch.setattr("search.run_search.main", MAINS[row["command"]])
    ended = amc_search(*row["input"], "hydra.run.dir=run")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("error: ")
    assert mistakes_of(found[0]) == row["mistakes"]
    for text in row["says"]:
        assert text in ended.err
    assert "Error executing job" not in ended.out + ended.err
    assert not (tmp_path / "run").exists()
    if row["command"] == "apply":
        assert "data: " not in ended.out  # nothing was read
