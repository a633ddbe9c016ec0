"""Charts of the report that show values under the pointer and can be zoomed: Vega-Lite specifications, drawn by a script.

The script is part of vl-convert, an optional package that only this file knows. It is put into the page, so that nothing
is fetched. Without the package, in print and where scripts are off, the pictures are shown.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from search import files
from search.output.plots import BLUE, ORANGE, VERMILION, Candidate, Width

Chart = Mapping[str, Any]
"""A Vega-Lite specification."""

_PACKAGE = "vl_convert"
_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
_ZOOM = [{"name": "zoom", "select": "interval", "bind": "scales"}]


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec(_PACKAGE) is not None


def embedded(chart: Chart) -> str:
    """The specification as JSON that can stand in a page's script element."""
    return json.dumps(chart).replace("<", "\\u003c")


@cache
def script() -> str:
    """What draws the charts of a page: Vega, Vega-Lite and vega-embed, 900 kB; made once and kept in the cache."""

    def make(path: Path) -> None:
        import vl_convert

        made = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
        # A page's script element ends at the first "</script", wherever it stands.
        files.write(path, re.sub(r"</(?=script)", r"<\\/", made))

    kept = files.cache_folder() / "report" / f"vega-{version('vl-convert-python')}.js"
    return files.cached(kept, make, lambda path: path.read_text(encoding="utf-8"))


def reward(rewards: Sequence[float], stages: Sequence[int] = ()) -> Chart:
    """The reward of each episode and the best so far; see `search.output.plots.plot_reward`."""
    ends = [*stages, len(rewards)]
    rows, start = [], 0
    for end in ends:
        known = [value if math.isfinite(value) else -math.inf for value in rewards[start:end]]
        rows += [
            {
                "episode": start + place,
                "reward": _finite(value),
                "best so far": _finite(most),
                "stage": end,
            }
            for place, (value, most) in enumerate(zip(known, accumulate(known, max), strict=True), start=1)
        ]
        start = end
    x = _axis("episode", "episode", "d")
    x["scale"] = {"domain": [0, len(rewards) + 1], "nice": False}
    tooltip = [_shown("episode", "d"), _shown("reward", ".4f"), _shown("best so far", ".4f")]
    points = _layer({"type": "circle", "color": ORANGE, "size": 30}, x, _axis("reward", "reward"), tooltip)
    line = _layer(
        {"type": "line", "color": BLUE, "interpolate": "step-after"},
        x,
        _axis("best so far", "reward"),
        tooltip,
    )
    line["encoding"]["detail"] = {"field": "stage"}
    return _chart(rows, [points | {"params": _ZOOM}, line])


def tradeoff(
    candidates: Sequence[Candidate],
    removed: Sequence[Sequence[int]],
    cost: str,
    metric: str,
    limit: float | None = None,
    best: Candidate | None = None,
) -> Chart:
    """Score against cost of all evaluations; see `search.output.plots.plot_tradeoff`.

    Args:
        candidates: the evaluations.
        removed: what each removes of every decision.
        cost: title of its axis; `metric` likewise.
        limit: the budget, as a share of the original's cost.
        best: the evaluation that was delivered.
    """
    rows = [
        {
            "evaluation": place,
            "score": candidate.accuracy,
            "cost": candidate.cost,
            "budget": "within" if candidate.met else "over",
            "removed": " ".join(map(str, counts)),
        }
        for place, (candidate, counts) in enumerate(zip(candidates, removed, strict=True), start=1)
    ]
    x, y = _axis("cost", cost, ".3~p"), _axis("score", metric, ".3~p")
    tooltip = [
        *(_shown("evaluation", "d"), _shown("score", ".2%", metric), _shown("cost", ".2%", cost)),
        *({"field": field, "type": "nominal"} for field in ("budget", "removed")),
    ]
    points = _layer({"type": "circle", "size": 45, "opacity": 0.65}, x, y, tooltip)
    colours = {"domain": ["within", "over"], "range": [BLUE, ORANGE]}
    points["encoding"]["color"] = {"field": "budget", "type": "nominal", "scale": colours}
    layers = [points | {"params": _ZOOM}]
    if limit is not None:
        rule = {"type": "rule", "strokeDash": [5, 4], "color": "#8A9097"}
        layers.append({"data": {"values": [{"cost": limit}]}, "mark": rule, "encoding": {"x": x}})
    if best is not None:
        star = _layer(
            {"type": "point", "shape": _STAR, "size": 160, "filled": True, "color": VERMILION}, x, y
        )
        chosen = {"score": best.accuracy, "cost": best.cost, "chosen": "delivered"}
        star["encoding"]["tooltip"] = [{"field": "chosen", "type": "nominal", "title": "strategy"}]
        layers.append(star | {"data": {"values": [chosen]}})
    return _chart(rows, layers)


def widths(decisions: Sequence[Width], unit: str) -> Chart:
    """What is kept of each decision, before the original's; see `search.output.plots.channels_figure`."""
    rows = [
        {"decision": one.name, "kept": one.kept, "total": one.total, "share": one.kept / max(1, one.total)}
        for one in decisions
    ]
    x = {"field": "decision", "type": "nominal", "sort": None, "axis": {"labelLimit": 160, "title": None}}
    tooltip = [
        {"field": "decision", "type": "nominal"},
        *(_shown(name, "d", f"{unit}, {title}") for name, title in (("kept", "kept"), ("total", "original"))),
        _shown("share", ".1%", "share kept"),
    ]
    layers = [
        _layer({"type": "bar", "color": colour}, x, _axis(field, unit), tooltip)
        for field, colour in (("total", "#A9AFB5"), ("kept", BLUE))
    ]
    return _chart(rows, layers)


_STAR = "M0,-1L0.24,-0.32L0.95,-0.31L0.38,0.12L0.59,0.81L0,0.4L-0.59,0.81L-0.38,0.12L-0.95,-0.31L-0.24,-0.32Z"


def _chart(rows: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> Chart:
    return {
        "$schema": _SCHEMA,
        "width": "container",
        "height": 300,
        "data": {"values": list(rows)},
        "layer": list(layers),
        "config": {"font": "system-ui, sans-serif", "view": {"stroke": None}, "axis": {"gridOpacity": 0.4}},
    }


def _layer(mark: Any, x: Any, y: Any, tooltip: Any = None) -> dict[str, Any]:
    encoding = {"x": x, "y": y} | ({"tooltip": tooltip} if tooltip else {})
    return {"mark": mark, "encoding": encoding}


def _finite(value: float) -> float | None:
    """None, a gap in the chart, for what JSON has no number for."""
    return value if math.isfinite(value) else None


def _axis(field: str, title: str, format: str | None = None) -> dict[str, Any]:
    axis = {"title": title, "grid": True} | ({"format": format} if format else {})
    scale = {"zero": False, "padding": 12} if field not in ("total", "kept") else {}
    return {"field": field, "type": "quantitative", "axis": axis, "scale": scale}


def _shown(field: str, format: str, title: str | None = None) -> dict[str, Any]:
    """An entry of what is shown under the pointer."""
    return {"field": field, "type": "quantitative", "format": format, "title": title or field}
