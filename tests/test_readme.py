"""The README's quick start runs as it is printed, and its links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from running import Command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.usefixtures("_quick_compress")
def test_the_python_block_runs_and_prints_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks("python")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), found)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-4:-1]] == ["base", "pruned", "finetuned"]
    assert printed[-1] == str(found["small"].strategy)


def test_the_commands_run(tmp_path: Path, amc_search: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are printed, with fewer episodes and epochs."""
    (block,) = blocks("sh")
    for line in block.splitlines():
        command, *overrides = shlex.split(re.sub(r"(episodes|epochs)=\d+", r"\1=1", line))
        main = importlib.import_module(f"search.run_{command.removeprefix('amc-')}").main
        monkeypatch.setattr("search.run_search.main", main)
        ended = amc_search(*overrides, "device=cpu")
        assert ended.code == 0, ended.err
    assert {path.name for path in tmp_path.glob("outputs/*")} == {"first", "applied"}
    assert (tmp_path / "outputs" / "applied" / "report.html").exists()


def test_links_lead_somewhere_and_lines_are_short() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)
    assert all(len(line) <= 100 for line in README.splitlines() if not line.startswith("|"))
