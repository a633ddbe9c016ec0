"""Which network a run delivers: the fine-tuned one, unless it did clearly worse on the search split."""

from types import SimpleNamespace
from typing import Any

import pytest

from search.study.results import delivered_of


def problem(keep: str) -> Any:
    """100 search images, on which networks have the score that stands for them."""
    settings = SimpleNamespace(finetune=SimpleNamespace(keep=keep), task=SimpleNamespace(metric="accuracy"))
    data = SimpleNamespace(search=range(100))
    return SimpleNamespace(settings=settings, data=data, score=lambda network, split: network)


@pytest.mark.parametrize(
    ("after", "delivered", "said"),
    [
        (0.95, "finetuned", ""),
        (0.90, "finetuned", ""),
        (0.85, "finetuned", "within two standard errors, and the fine-tuned network is delivered"),
        (0.83, "pruned", "the pruned network is delivered"),
    ],
)
def test_two_standard_errors_decide_and_any_loss_is_said(
    caplog: pytest.LogCaptureFixture, after: float, delivered: str, said: str
) -> None:
    networks: Any = {"pruned": 0.9, "finetuned": after}  # a standard error of 0.03
    assert delivered_of(problem("better"), networks) == delivered
    assert said in caplog.text
    assert bool(caplog.records) == bool(said)
    assert delivered_of(problem("last"), networks) == "finetuned"
    assert delivered_of(problem("better"), {"pruned": networks["pruned"]}) == "pruned"
