"""What the commands' help says of every option and setting: the comments in conf/."""

from __future__ import annotations

import re
import textwrap
from importlib import resources
from importlib.resources.abc import Traversable

_ENTRY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: +(?P<value>[^# ].*?))?(?: +# *(?P<note>.*))?")
_WIDTH = 100
_COLUMN = 30
Row = tuple[str, str, str]
"""Dotted name, default, meaning."""


def read(path: Traversable, prefix: str = "") -> tuple[str, list[Row]]:
    """Reads one file of conf/: the comment at its top, and its settings with their comments."""
    lines = path.read_text(encoding="utf-8").partition("\nhydra:")[0].splitlines()
    first = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    about = " ".join(line.lstrip("# ") for line in lines[:first] if not line.startswith("# @package"))
    rows: list[Row] = []
    parents: list[str] = []
    for line in lines[first:]:
        if line.lstrip().startswith("#") and rows:  # a comment that continues on its own line
            rows[-1] = (*rows[-1][:2], f"{rows[-1][2]} {line.strip(' #')}")
        entry = _ENTRY.fullmatch(line)
        if entry is None or entry["key"] in ("_target_", "defaults"):
            continue
        parents[len(entry["indent"]) // 2 :] = [entry["key"]]
        rows.append((prefix + ".".join(parents), entry["value"] or "", entry["note"] or ""))
    return about, [row for row in rows if any(row[1:])]


def options() -> str:
    """All groups and their options, each with the first sentence of its file's comment."""
    lines = []
    for group in sorted(resources.files("conf").iterdir(), key=lambda path: path.name):
        files = sorted(
            (f for f in group.iterdir() if f.name.endswith(".yaml")) if group.is_dir() else (),
            key=lambda path: path.name,
        )
        lines += [f"{group.name}="] if files else []
        for file in files:
            about, _ = read(file)
            sentence = re.split(r"(?<! al)\. |; ", about)[0].rstrip(".")
            lines.append(_line(f"  {file.name.removesuffix('.yaml')}", sentence))
    return "\n".join(lines)


def settings(command: str) -> str:
    """The settings of a command's own file, with their defaults and meanings."""
    _, rows = read(resources.files("conf").joinpath(f"{command}.yaml"))
    return "\n".join(_line(f"  {name}={value}" if value else f"  {name}", note) for name, value, note in rows)


def _line(left: str, right: str) -> str:
    """Two columns; a left one that is too long has a line of its own."""
    wrapped = textwrap.wrap(right, _WIDTH - _COLUMN) or [""]
    start = [left.ljust(_COLUMN) + wrapped[0]] if len(left) < _COLUMN else [left, " " * _COLUMN + wrapped[0]]
    return "\n".join([*start, *(" " * _COLUMN + line for line in wrapped[1:])]).rstrip().replace("$", "$$")
