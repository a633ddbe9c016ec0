"""A strategy that is given: the file of an earlier run, checked against the network that it is to be applied to."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from agents.base import Agent, SearchTask
from amc_env import space as budget
from amc_env.errors import UserError
from amc_env.space import Grid, Removed, SearchSpace, Strategy
from search import files

log = logging.getLogger(__name__)


FILE = "strategy.json"


def read_strategy(path: str) -> dict[str, Any]:
    """The content of a strategy's file.

    Args:
        path: The file, or the run folder that it lies in.

    Raises:
        UserError: There is no such file, or it holds no decisions.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    content = files.read_json(file, f"strategy={path}", f"give the {FILE} of a run, or ratio=0.5")
    if not isinstance(content, dict) or not isinstance(content.get("decisions"), dict):
        raise UserError(
            f"strategy={path} has no object 'decisions' of {{name: {{removed, total}}}}; give the {FILE} of a run",
            code="wrong_type",
            field="decisions",
        )
    start = content.get("start", [])
    if not isinstance(start, list) or not all(isinstance(name, str) for name in start):
        raise UserError(
            f"strategy={path} has start={start}, which must be a list of names; give the {FILE} of a run",
            code="wrong_type",
            field="start",
        )
    return content


@dataclass(frozen=True)
class Given(Agent):
    """Proposes the one strategy of a file.

    Attributes:
        strategy: The file's path.
        decisions: By name: how many units are removed, and of how many.
        content: The file's content.
    """

    name: ClassVar[str] = "given"
    steps: ClassVar[bool] = False

    strategy: str = field(metadata={"identity": False})
    decisions: Mapping[str, Any]
    content: Mapping[str, Any] = field(metadata={"identity": False})

    @classmethod
    def read(cls, strategy: str) -> Given:
        """The strategy of a file.

        Args:
            strategy: The file, or the run folder that it lies in.

        Raises:
            UserError: As `read_strategy`.
        """
        content = read_strategy(strategy)
        return cls(strategy, content["decisions"], content)

    def check(self, space: SearchSpace, episodes: int) -> None:
        """Refuses a search space that the strategy does not fit, or whose budgets it does not meet.

        Raises:
            UserError: Such a search space; with all that does not fit.
        """
        removed = self.counts(space)
        missed = [
            f"{b.cost.name}: {budget.figure(b.cost(removed))} {b.cost.unit}, at most {budget.figure(b.limit)} may remain"
            for b in space.budgets
            if not b.met(removed)
        ]
        if missed:
            raise UserError(
                f"strategy={self.strategy} does not meet the budget: {'; '.join(missed)}; leave it out "
                "(budget=none) or raise it"
            )
        if "start" in self.content:
            log.warning(
                "the strategy was found on weights that had been pruned and tuned before (%s); here it is applied to "
                "the original's at once",
                " → ".join(map(str, self.content["start"])),
            )

    def search(self, task: SearchTask) -> None:
        """Scores the strategy."""
        task.score([self.counts(task.space)])

    def counts(self, space: SearchSpace) -> Removed:
        """The strategy's counts, in the order of the search space.

        Raises:
            UserError: It does not fit; with all reasons.
        """
        grids = space.grids
        problems = list(_infeasible(self.decisions, grids))
        try:
            strategy = Strategy.from_json(self.content, grids)
        except UserError as error:
            problems.insert(0, str(error))
        if problems:
            made = self.content.get("granularity")
            with_it = f" (granularity={made})" if made else ""
            raise UserError(
                f"strategy={self.strategy}: {'; '.join(problems)}; network, granularity, "
                f"channel_multiple and max_ratio must be those that it was made with{with_it}"
            )
        return strategy.removed


def _infeasible(decisions: Mapping[str, Any], grids: Sequence[Grid]) -> Iterator[str]:
    """Counts of units that there are, but that the granularity does not remove."""
    for grid in grids:
        entry = decisions.get(grid.name)
        if not isinstance(entry, Mapping) or entry.get("total", grid.total) != grid.total:
            continue
        removed = entry.get("removed")
        if type(removed) is int and 0 <= removed < grid.total:
            try:
                grid.index(removed)
            except UserError as error:
                yield str(error)
