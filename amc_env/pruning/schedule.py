"""How the pruning ratio rises over the rounds of iterative pruning.

After each round the network is fine-tuned; one round is pruning in one shot.
"""

from __future__ import annotations

from typing import Literal

from amc_env.errors import UserError
from amc_env.validation import Count, settings

Shape = Literal["one_shot", "linear", "cubic"]


@settings
class Schedule:
    """The share of the final pruning ratio that is reached after each round.

    With t = round / rounds: ``linear`` is t; ``cubic`` is 1 - (1 - t)^3, many weights early, while there are
    many to spare, and few at the end (Zhu and Gupta, arXiv 1710.01878, equation 1 with s_i = 0); ``one_shot``
    has one round.

    Attributes:
        shape: ``one_shot``, ``linear`` or ``cubic``.
        rounds: Rounds of pruning and fine-tuning, at least 1.
    """

    shape: Shape = "one_shot"
    rounds: Count = 1

    def __post_init__(self) -> None:
        if self.shape == "one_shot" and self.rounds > 1:
            raise UserError(
                f"{{field}}={self.rounds}: one_shot has one round; for more use schedule=linear or schedule=cubic",
                code="out_of_range",
                field="rounds",
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The share after each round, ascending in (0, 1]; the last is exactly 1."""
        done = [number / self.rounds for number in range(1, self.rounds + 1)]
        return tuple(1 - (1 - t) ** 3 if self.shape == "cubic" else t for t in done)
