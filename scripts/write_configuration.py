"""Write docs/configuration.md from the YAML files in conf/ and their comments: `python scripts/write_configuration.py`."""

import re
from pathlib import Path

from search.config.help import Row, read

ROOT = Path(__file__).resolve().parents[1]
CONF, PAGE = ROOT / "conf", ROOT / "docs" / "configuration.md"
COMMANDS = ("search", "apply", "sensitivity", "latency")
OF_OTHERS = ("preset", "experiment")  # groups whose options set what belongs to other groups
INTRODUCTION = """# Configuration

Written from `conf/` by `scripts/write_configuration.py`; do not edit this page.

Choose an option with `group=option` and change a setting with `group.setting=value`:

    amc-search model=resnet20 data=cifar10 agent=random budget.ratio=0.3 seed=1

`amc-search --cfg job` prints the resolved configuration. Where an option has the same setting as
one above it in its table, with the same default, it is listed once.
"""


def table(rows: list[Row]) -> str:
    """A Markdown table; a row without a default is a section or an option."""
    cells = [(f"`{name}`", f"`{default}`" if default else "", note) for name, default, note in rows]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in cells]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *(f"| {line} |" for line in lines)])


def defaults(command: str) -> dict[str, str]:
    """The option that a command takes of each group by default."""
    head = (CONF / f"{command}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    return dict(re.findall(r"- (\w+): (\w+)", head))


def group_section(group: Path, default: str | None) -> str:
    """One group: a table of its options, each followed by its settings."""
    rows: list[Row] = []
    latest: dict[str, Row] = {}
    for path in sorted(group.glob("*.yaml")):
        about, settings = read(path, "" if group.name in OF_OTHERS else f"{group.name}.")
        rows.append((f"{group.name}={path.stem}", "", about))
        rows += [row for row in settings if latest.get(row[0]) != row]
        latest |= {row[0]: row for row in settings}
    title = f"## {group.name}" + (f" (default: {default})" if default else "")
    return f"{title}\n\n{table(rows)}"


def page() -> str:
    """The whole page."""
    sections, seen = [INTRODUCTION.rstrip()], []
    for command in COMMANDS:
        about, settings = read(CONF / f"{command}.yaml")
        rows = [row for row in settings if row not in seen]
        seen += rows
        kind = "" if command == "search" else "\n\nSettings that differ from those of the commands above:"
        sections.append(f"## amc-{command}\n\n{about}{kind}\n\n{table(rows)}")
    chosen = defaults("search")
    groups = sorted(path for path in CONF.iterdir() if path.is_dir() and list(path.glob("*.yaml")))
    sections += [group_section(group, chosen.get(group.name)) for group in groups]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
