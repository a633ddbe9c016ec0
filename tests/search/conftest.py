"""Commands run inside the test's own process, which saves seconds of imports each."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from running import Command, Ended

from search import run_search


@pytest.fixture
def amc_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """Runs amc-search with overrides; folders are relative to tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0"))  # the command sets it
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def settle() -> None:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        GlobalHydra.instance().clear()

    def command(*overrides: str) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["amc-search", *overrides])
        try:
            with pytest.raises(SystemExit) as ended:
                run_search.main()
        finally:
            settle()
        written = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, written.out, written.err)

    yield command
    settle()
