"""Plots are blank where a test is not about them: drawing three takes longer than a small run."""

import io
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from search.output import plots


def _blank(figure: Figure, path: Path) -> Path:
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pixel.getvalue())
    return path


@pytest.fixture(autouse=True)
def _blank_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("plots") is None:
        monkeypatch.setattr(plots, "_save", _blank)
