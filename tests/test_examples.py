"""Every example runs as a script and prints what it found."""

import runpy
from pathlib import Path

import pytest

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
