"""What a run folder holds."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def read(folder: Path, name: str = "result.json") -> dict[str, Any]:
    """A JSON file of a run."""
    content = json.loads((folder / name).read_text())
    assert isinstance(content, dict)
    return content


def journal_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a journal; the first is its header."""
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def trials_of(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a journal."""
    return [line for line in journal_of(folder) if "score" in line]


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    return list(csv.DictReader(path.read_text().splitlines()))


def pixels(path: Path) -> np.ndarray:
    """A plot [height, width, 3]."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def share_of(image: np.ndarray, colour: tuple[int, int, int], within: int = 12) -> float:
    """The share of a plot's pixels that have nearly this colour."""
    return float((np.abs(image - colour).sum(axis=2) < within).mean())
