"""Files that are written in one step: all of the new one, or the old one as it was."""

from pathlib import Path

import pytest

from search import files


def test_text_bytes_and_functions_are_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    for content in ("text\nä", "text\nä".encode(), lambda file: file.write_text("text\nä", encoding="utf-8")):
        files.write(path, content)
        assert path.read_bytes() == "text\nä".encode()
        path.unlink()
    assert list(path.parent.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    files.write(path, "old")

    def broken(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        files.write(path, broken)
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    def private(unfinished: Path) -> None:
        unfinished.write_text("mine")
        unfinished.chmod(0o600)

    (tmp_path / "usual").touch()
    files.write(tmp_path / "file", private)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_table_has_its_titles_first(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "table.csv", ("name", "ms"), [("conv, 3x3", 1.5)])
    assert (tmp_path / "table.csv").read_bytes() == b'name,ms\r\n"conv, 3x3",1.5\r\n'
