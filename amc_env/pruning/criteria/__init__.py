"""Criteria: what an element of a weight is worth, and what a unit is. All that conf offers, by name."""

from __future__ import annotations

from amc_env.errors import UserError
from amc_env.pruning.criteria.activations import APoZ, Lasso
from amc_env.pruning.criteria.base import Criterion, ElementCriterion, Sample, rank
from amc_env.pruning.criteria.gradients import OBD, Taylor
from amc_env.pruning.criteria.weights import FPGM, BatchNormScale, Norm, Random

__all__ = [
    "CRITERIA",
    "FPGM",
    "OBD",
    "APoZ",
    "BatchNormScale",
    "Criterion",
    "ElementCriterion",
    "Lasso",
    "Norm",
    "Random",
    "Sample",
    "Taylor",
    "check_fits",
    "rank",
]


CRITERIA: tuple[Criterion, ...] = (
    Norm(1),
    Norm(2),
    BatchNormScale(),
    Taylor(),
    OBD(),
    APoZ(),
    Lasso(),
    FPGM(),
    Random(),
)
"""Every criterion that conf offers, with its defaults."""


def check_fits(criterion: Criterion, granularity: str) -> None:
    """Finds out whether a criterion can rank the units of a granularity.

    Args:
        criterion: The criterion.
        granularity: The granularity's name.

    Raises:
        UserError: It cannot; the message names the criteria that can, and the granularities it fits.
    """
    if granularity in criterion.granularities:
        return
    fitting = [other.name for other in CRITERIA if granularity in other.granularities]
    raise UserError(
        f"criterion={criterion.name} does not fit granularity={granularity}: it fits "
        f"{', '.join(criterion.granularities)}; for granularity={granularity} use one of {', '.join(fitting)}",
        code="does_not_fit",
        field="criterion",
    )
