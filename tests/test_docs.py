"""The Python blocks of the concept and how-to pages run, in the order of their page and in one namespace."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [*sorted((DOCS / "concepts").glob("*.md")), *sorted((DOCS / "how-to").glob("*.md"))]
LONGEST = {"concepts": 12, "how-to": 18}  # lines of a block


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: f"{page.parent.name}/{page.stem}"
)
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(DOCS.parent)  # examples
    monkeypatch.syspath_prepend(tmp_path)  # modules that a block writes
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        assert len(block.splitlines()) <= LONGEST[page.parent.name], block
        exec(compile(block, page.name, "exec"), namespace)
    assert capsys.readouterr().out


def test_every_concept_has_a_block_and_a_figure_and_lines_are_short() -> None:
    for page in PAGES:
        if page.parent.name == "concepts":
            assert blocks(page), page
            assert "![" in page.read_text(encoding="utf-8"), page
        long = [line for line in page.read_text(encoding="utf-8").splitlines() if len(line) > 100]
        assert all(line.startswith("|") for line in long), (page, long)
