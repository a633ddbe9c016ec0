"""The README's quick start runs as it is printed, and its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


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


def test_the_commands_run(tmp_path: Path) -> None:
    (block,) = blocks("sh")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for line in block.splitlines():
        command, *overrides = shlex.split(line)
        module = f"search.run_{command.removeprefix('amc-')}"
        done = subprocess.run(
            [sys.executable, "-m", module, *overrides, "device=cpu"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("outputs/*")} == {"first", "applied"}
    assert (tmp_path / "outputs" / "applied" / "report.html").exists()


def test_links_lead_somewhere_and_lines_are_short() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)
    assert all(len(line) <= 100 for line in README.splitlines() if not line.startswith("|"))
