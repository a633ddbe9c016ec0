"""Which rows of a labelled dataset are trained on, judge candidates, and are the test split."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from amc_env.errors import UserError, out_of_range
from search.data.base import stratified

log = logging.getLogger(__name__)

MOST_SEARCHED = 5000


@dataclass(frozen=True)
class Sizes:
    """How many examples a split has, and which.

    Attributes:
        search: Of the training examples; None: a tenth of them, at most MOST_SEARCHED.
        seed: Which training examples these are.
        calibration: Size of ``train``, where fine-tuning reads the training examples as a stream. None: all of them.
        test: Of the held-out examples, every class in its share; None: all of them.
    """

    search: int | None
    seed: int
    calibration: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Rows:
    """Row numbers of splits, int64 and rising.

    Attributes:
        train: Of the training part.
        search: Of the training part.
        rest: Of the training part: all but the search split and a test split that is taken off it.
        test: Of the held-out part, or of the training part where there is none.
    """

    train: Tensor
    search: Tensor
    rest: Tensor
    test: Tensor


def chosen_rows(name: str, labels: Tensor, held_out: Tensor | None, sizes: Sizes) -> Rows:
    """Rows of every split, each class in its share.

    Args:
        name: Of the dataset.
        labels: Of the training part, int64 [N].
        held_out: Labels of the held-out part; None where there is none: a fifth of the training part is split off then.
        sizes: How many each split has.

    Raises:
        UserError: More rows are asked for than there are, or none.
    """
    pool = torch.arange(len(labels))
    if held_out is None:
        order = stratified(labels, 0)
        fifth = max(1, len(order) // 5)
        test, pool = order[:fifth], order[fifth:].sort().values
        log.info(
            "data: %s has one part; %d of %d examples, each class in its share, are split off as the test split",
            *(name, fifth, len(order)),
        )
    else:
        test = stratified(held_out, 0)
    if sizes.test is not None and not 1 <= sizes.test <= len(test):
        raise out_of_range("data.test_images", sizes.test, f"from 1 to {len(test)}, or null for all")
    searched = min(MOST_SEARCHED, max(1, len(pool) // 10)) if sizes.search is None else sizes.search
    _check(len(pool), searched, sizes.calibration)
    order = pool[stratified(labels[pool], sizes.seed)]
    calibration = len(pool) - searched if sizes.calibration is None else sizes.calibration
    # From both ends: another size of one leaves the other as it is.
    chosen = order[-calibration:], order[:searched], order[searched:], test[: sizes.test]
    return Rows(*(rows.sort().values for rows in chosen))


def _check(training: int, search: int, calibration: int | None) -> None:
    least = 1 if calibration is None else calibration
    if search < 1 or least < 1 or search + least > training:
        given = "" if calibration is None else f", data.calibration_images={calibration}"
        raise UserError(
            f"{{field}}={search}{given}: each at least 1, and together at most the {training} training examples",
            code="out_of_range",
            field="search.images",
        )
