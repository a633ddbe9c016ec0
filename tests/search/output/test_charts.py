"""Charts of the report: what they show, and that the page holds them and what draws them."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_results import result
from test_report import Page, leave_run

from search.output import charts
from search.output.plots import Candidate, Width
from search.output.report import write_report

needs_package = pytest.mark.skipif(not charts.available(), reason="the extra 'charts' is not installed")
CANDIDATES = Candidate(0.8, 0.4, True), Candidate(0.9, 0.6, False)


def made() -> dict[str, charts.Chart]:
    return {
        "reward": charts.reward([-0.5, -0.2, -0.3, -0.9, -0.4], stages=[3]),
        "tradeoff": charts.tradeoff(CANDIDATES, [[1, 2], [0, 4]], "MACs", "accuracy", 0.5, CANDIDATES[0]),
        "widths": charts.widths([Width("a.<b>", 12, 16), Width("c", 8, 8)], "channels"),
    }


def test_the_best_so_far_starts_again_with_each_stage() -> None:
    rows = made()["reward"]["data"]["values"]
    assert [row["best so far"] for row in rows] == [-0.5, -0.2, -0.2, -0.9, -0.4]
    assert [row["episode"] for row in rows] == [1, 2, 3, 4, 5]


def test_rewards_that_are_no_numbers_leave_a_gap() -> None:
    chart = charts.reward([math.nan, -0.5, -math.inf, -0.2])
    rows = json.loads(charts.embedded(chart))["data"]["values"]
    assert [row["reward"] for row in rows] == [None, -0.5, None, -0.2]
    assert [row["best so far"] for row in rows] == [None, -0.5, -0.5, -0.2]


def test_a_candidate_has_its_score_cost_and_counts() -> None:
    first, second = made()["tradeoff"]["data"]["values"]
    assert first == {"evaluation": 1, "score": 0.8, "cost": 0.4, "budget": "within", "removed": "1 2"}
    assert second["budget"] == "over"
    _, limit, delivered = made()["tradeoff"]["layer"]
    assert limit["data"]["values"] == [{"cost": 0.5}]
    assert delivered["data"]["values"][0] == {"score": 0.8, "cost": 0.4, "chosen": "delivered"}


def test_a_decision_has_what_is_kept() -> None:
    rows = made()["widths"]["data"]["values"]
    assert rows[0] == {"decision": "a.<b>", "kept": 12, "total": 16, "share": 0.75}


def test_no_text_of_a_run_ends_the_script_element() -> None:
    text = charts.embedded({"name": "</script><script>"})
    assert "<" not in text
    assert json.loads(text) == {"name": "</script><script>"}


@needs_package
@pytest.mark.parametrize("name", ["reward", "tradeoff", "widths"])
def test_vega_lite_takes_the_specification(name: str) -> None:
    import vl_convert

    drawn: dict[str, Any] = vl_convert.vegalite_to_vega(json.dumps({**made()[name], "width": 400}))
    assert {mark["type"] for mark in drawn["marks"]} & {"symbol", "rect", "group"}


@needs_package
def test_the_page_holds_charts_beside_the_pictures_and_fetches_nothing(tmp_path: Path) -> None:
    text = write_report(leave_run(tmp_path / "run", result())).read_text()
    page = Page(text)
    assert page.tags.count("img") == 4
    assert len(page.resources) == 4  # the pictures; no script has a source
    shown = re.findall(r'<script type="application/json">(.*?)</script>', text)
    assert [json.loads(chart)["layer"][0]["mark"]["type"] for chart in shown] == ["bar", "circle", "circle"]
    assert text.count("</script>") == len(shown) + 2


@needs_package
def test_what_draws_the_charts_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vl_convert

    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda _: "run('</script>')")
    charts.script.cache_clear()
    assert charts.script() == r"run('<\/script>')"
    monkeypatch.setattr(vl_convert, "javascript_bundle", None)
    charts.script.cache_clear()
    assert charts.script() == r"run('<\/script>')"
    charts.script.cache_clear()
