"""examples/own_cost.py: a cost that one class defines is a budget, in the result and for people."""

import runpy
from pathlib import Path

import pytest

from amc_env.costs.base import COSTS
from amc_env.costs.counts import Params
from search.output.formatting import amount, comparison, cost_name

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_cost.py"


def test_a_cost_of_your_own_holds_as_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        COSTS, "energy", Params
    )  # the example replaces it; the test leaves nothing registered
    small = runpy.run_path(str(EXAMPLE))["main"](str(tmp_path))
    (budget,) = small.result.budgets
    base, pruned = small.result.base.costs, small.result.pruned.costs
    assert (budget.cost, budget.ratio, budget.met) == ("energy", 0.6, True)
    assert pruned["energy"] <= 0.6 * base["energy"]
    assert pruned["energy"] == round(4.6 * pruned["macs"] + 640 * pruned["params"])
    assert (cost_name("energy"), amount("energy", 1.234e6)) == ("energy", "1.23 µJ")
    assert "energy" in comparison(small.result).rows
