"""A strategy that is given: the file of an earlier run, checked against the network that it is to be applied to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from agents.base import Agent, SearchTask
from amc_env import space as budget
from amc_env.errors import UserError
from amc_env.space import Grid, Removed, SearchSpace, Strategy
from amc_env.validation import plain
from search import files

log = logging.getLogger(__name__)


FILE = "strategy.json"
STRATEGIES = Path(__file__).parents[2] / "conf" / "strategies"
"""Strategies of papers and of this project's results; each file names its source."""


def read_strategy(path: str) -> dict[str, Any]:
    """The content of a strategy's file.

    Args:
        path: The file, the run folder that it lies in, or the name of a strategy in conf/strategies.

    Raises:
        UserError: There is no such file, or it holds no decisions.
    """
    named = {file.stem: file for file in STRATEGIES.glob("*.json")}
    file = Path(path) / FILE if Path(path).is_dir() else named.get(path, Path(path))
    advice = f"give the {FILE} of a run, ratio=0.5, or one of {', '.join(sorted(named))}"
    content = files.read_json(file, f"strategy={path}", advice)
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


GivenStrategy = str | Path | Strategy | Mapping[str, float] | Sequence[int]
"""A strategy: its file or run folder, the object, the ratio of each decision by name, or the counts removed in order."""


@dataclass(frozen=True)
class Given(Agent):
    """Proposes the one strategy that is given.

    Attributes:
        strategy: What messages call it: the file's path.
        decisions: By name: how many units are removed, and of how many; or the share removed; or counts in order.
        content: The file's content.
    """

    name: ClassVar[str] = "given"
    steps: ClassVar[bool] = False

    strategy: str = field(metadata={"identity": False})
    decisions: Mapping[str, Any] | Sequence[int]
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

    @classmethod
    def of(cls, strategy: GivenStrategy) -> Given:
        """The strategy of a file, or one that is at hand.

        Raises:
            UserError: As `read_strategy`, or it has another form.
        """
        if isinstance(strategy, str | Path):
            return cls.read(str(strategy))
        if isinstance(strategy, Strategy):
            return cls("the one given", strategy.to_json()["decisions"], {})
        if isinstance(strategy, Mapping) and isinstance(strategy.get("decisions"), Mapping):
            return cls("the one given", dict(strategy["decisions"]), strategy)  # type: ignore[call-overload]
        given = _plain_of(strategy)
        if given is None:
            raise UserError(
                f"{{field}}={strategy!r} is no strategy: give the strategy.json of a run, its folder, the ratio of each "
                "decision like {'conv1': 0.5}, or the counts removed in the order of the decisions",
                code="wrong_type",
                field="strategy",
            )
        return cls("the one given", given, {})

    def planned(self, space: SearchSpace, episodes: int) -> int:
        """One evaluation."""
        return 1

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
                "(budget=none) or raise it",
                code="out_of_reach",
                field="strategy",
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
        decisions = _counted(self.decisions, grids)
        problems = list(_infeasible(decisions, grids))
        try:
            strategy = Strategy.from_json({"decisions": decisions}, grids)
        except UserError as error:
            problems.insert(0, str(error))
        if problems:
            made = self.content.get("granularity")
            with_it = f" (granularity={made})" if made else ""
            raise UserError(
                f"strategy={self.strategy}: {'; '.join(problems)}; network, granularity, "
                f"channel_multiple and max_ratio must be those that it was made with{with_it}",
                code="does_not_fit",
                field="strategy",
            )
        return strategy.removed


def _plain_of(strategy: object) -> Mapping[str, Any] | tuple[int, ...] | None:
    """Ratios by name, or counts in order, as Python's own numbers; None where it is neither."""
    if isinstance(strategy, Mapping):
        ratios = {str(name): plain(ratio) for name, ratio in strategy.items()}
        return ratios if all(isinstance(ratio, int | float) for ratio in ratios.values()) else None
    counts = tuple(map(plain, strategy)) if isinstance(strategy, Iterable) else ()
    return counts if counts and all(type(count) is int for count in counts) else None


def _counted(decisions: Mapping[str, Any] | Sequence[int], grids: Sequence[Grid]) -> Mapping[str, Any]:
    """The decisions as a file has them: a ratio becomes the nearest feasible count.

    Raises:
        UserError: Counts in order that are more or fewer than the decisions.
    """
    if not isinstance(decisions, Mapping):
        if len(decisions) != len(grids):
            raise UserError(
                f"{{field}} has {len(decisions)} counts, and the network has {len(grids)} decisions: "
                f"{', '.join(grid.name for grid in grids)}",
                code="wrong_length",
                field="strategy",
            )
        return {grid.name: {"removed": count} for grid, count in zip(grids, decisions, strict=True)}
    known = {grid.name: grid for grid in grids}

    def counted(name: str, entry: Any) -> Any:
        is_ratio = isinstance(entry, float | int) and 0 <= entry < 1 and name in known
        return {"removed": known[name].snap(entry)} if is_ratio else entry

    return {name: counted(name, entry) for name, entry in decisions.items()}


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
