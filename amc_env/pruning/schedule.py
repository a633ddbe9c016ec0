"""How the pruning ratio rises over the rounds of iterative pruning.

After each round the network is fine-tuned; one round is pruning in one shot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from amc_env.errors import UserError

Shape = Literal["one_shot", "linear", "cubic"]


@dataclass(frozen=True)
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
    rounds: int = 1

    def __post_init__(self) -> None:
        problems = []
        if self.shape not in get_args(Shape):
            problems.append(f"schedule.shape={self.shape} must be one of {', '.join(get_args(Shape))}")
        if self.rounds < 1:
            problems.append(f"schedule.rounds={self.rounds} must be at least 1")
        if self.shape == "one_shot" and self.rounds > 1:
            problems.append(
                f"schedule.rounds={self.rounds}: one_shot has one round; for more use schedule=linear or "
                "schedule=cubic"
            )
        if problems:
            raise UserError("; ".join(problems))

    @property
    def shares(self) -> tuple[float, ...]:
        """The share after each round, ascending in (0, 1]; the last is exactly 1."""
        done = [number / self.rounds for number in range(1, self.rounds + 1)]
        return tuple(1 - (1 - t) ** 3 if self.shape == "cubic" else t for t in done)
