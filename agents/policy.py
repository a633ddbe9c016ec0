"""A policy for any network and budget: it proposes whole strategies, and learns from groups of them.

One token a decision goes through a small network that treats decisions alike (Zaheer et al., "Deep Sets", NeurIPS
2017). The advantage of a strategy is its reward less the mean of those that were scored with it, divided by their standard
deviation (Shao et al., "DeepSeekMath", arXiv 2402.03300): no value function is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from agents.base import Agent, SearchTask
from agents.isolation import learning
from agents.moves import least_error
from amc_env.errors import UserError, diverged, first_line, out_of_range
from amc_env.space import Budget, Removed, SearchSpace, Trial
from amc_env.validation import Count, LearningRate, Listed, Positive, Share, settings

Floats = npt.NDArray[np.float64]

FILE = "policy.safetensors"
"""The trained policy in a run folder."""
KINDS = ("macs", "params", "latency", "memory", "storage", "cycles", "other")
"""Costs whose limits a token holds, as shares of the original; 1 without a limit."""

_FIXED = 8  # first features of an observation: they describe the decision alone, whatever was chosen
_AT = np.arange(1, 10) / 10  # ratios at which the error curve is read
_LEAST = 1e-4  # error that counts as none, on a logarithmic scale
_WAVES = np.arange(1, 9)  # half waves over the depth of the network, which tell decisions apart
_FEATURES = _FIXED + len(_AT) + 1 + len(_WAVES) + 3 + len(KINDS)
_REDRAWS = 10  # of a strategy that was scored already
_MOST_CHANGE = 10.0  # of a logarithmic likelihood; beyond, its exponential would not be finite for long
_WORST = -10.0  # in place of a reward of minus infinity


class PolicyNetwork(nn.Module):
    """What is added to the ratios of a known strategy; 0 before anything is learnt.

    The same layers see each token and the mean of all, so the number and order of decisions are free.
    """

    def __init__(self, hidden: int = 64) -> None:
        """Builds it untrained; its weights come from torch's global random state."""
        super().__init__()
        self.token = nn.Sequential(
            nn.Linear(_FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )
        self.head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        nn.init.zeros_(self.head[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.head[-1].bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        """Corrections [decisions], not limited yet, of tokens [decisions, features]."""
        hidden = self.token(tokens)
        pooled = hidden.mean(dim=0, keepdim=True).expand_as(hidden)
        corrections: Tensor = self.head(torch.cat([hidden, pooled], dim=1))[:, 0]
        return corrections


@dataclass(frozen=True)
class PolicyInput:
    """What the policy sees of the decisions at one budget.

    Attributes:
        space: The decisions with that budget.
        tokens: [decisions, features].
        base: Ratios of the strategy of least layer error, or of the uniform one where that is not known; [decisions].
    """

    space: SearchSpace
    tokens: Tensor
    base: Tensor

    def mean(self, network: PolicyNetwork) -> Tensor:
        """The ratios that a policy answers, [decisions], before they are shifted onto the budget.

        Raises:
            UserError: They are not finite, after updates at a large learning rate.
        """
        correction: Tensor = network(self.tokens)
        if self.space.budgets:  # which decides what all have in common
            correction = correction - correction.mean()
        mean = self.base + torch.tanh(correction)
        if not mean.isfinite().all():
            raise diverged(f"the policy answered {mean.tolist()[0]}")
        return mean


@dataclass(frozen=True)
class Group:
    """Strategies that are scored together.

    Attributes:
        given: What the policy saw.
        removed: The strategies.
        mean: Ratios that the policy answered when they were drawn, [decisions].
        sigma: Standard deviation of the ratios around it.
    """

    given: PolicyInput
    removed: list[Removed]
    mean: Tensor
    sigma: float

    def log_likelihood(self, mean: Tensor) -> Tensor:
        """Of each decision under a policy that answers ``mean``, up to a constant; [strategies, decisions].

        Ratios are taken as they were carried out, less the shift of all of them, which is not the policy's choice.
        """
        carried_out = torch.tensor(
            np.array(self.removed) / np.array(self.given.space.totals), dtype=torch.float32
        )
        apart = carried_out - self.mean
        chosen = self.mean + apart - apart.mean(dim=1, keepdim=True)
        return -((chosen - mean) ** 2) / (2 * self.sigma**2)


class TokenEncoder:
    """Tokens of a search at any level of its first budget."""

    def __init__(self, task: SearchTask) -> None:
        self._space, self._errors = task.space, task.layer_errors()
        depth = (np.arange(len(self._space.names)) + 0.5) / len(self._space.names)
        waves = np.cos(np.pi * depth[:, None] * _WAVES)
        self._fixed = np.column_stack([_described(task), _curves(self._space, self._errors), waves])

    def at(self, ratio: float | None = None) -> PolicyInput:
        """The input with the first budget at a share of the original cost; None: as the search has it."""
        space = self._space if ratio is None else _with_budget(self._space, ratio)
        totals = np.array(space.totals)
        uniform = space.project([0.0] * len(totals))
        base = uniform if self._errors is None or not space.budgets else least_error(space, self._errors)
        levels = np.ones(len(KINDS))
        for budget in space.budgets:
            kind = budget.cost.name if budget.cost.name in KINDS else KINDS[-1]
            levels[KINDS.index(kind)] = budget.ratio
        ratios = [np.array(removed) / totals for removed in (base, uniform)]
        rows = np.column_stack([self._fixed, *ratios, space.maxima, np.tile(levels, (len(totals), 1))])
        return PolicyInput(
            space, torch.tensor(rows, dtype=torch.float32), torch.tensor(ratios[0], dtype=torch.float32)
        )


def _described(task: SearchTask) -> Floats:
    """AMC's features of each decision that do not depend on what was chosen, [decisions, 8]; nothing is scored."""
    env = task.envs(1)
    rows = [env.reset()[0][0, :_FIXED]]
    for _ in range(len(task.space.names) - 1):
        rows.append(env.step(np.zeros((1, 1), np.float32))[0][0, :_FIXED])
    return np.array(rows, dtype=np.float64)


def _curves(space: SearchSpace, errors: Sequence[Floats] | None) -> Floats:
    """The layer errors of each decision at fixed ratios, on a logarithmic scale from 0, and whether they are known."""
    if errors is None:
        return np.zeros((len(space.grids), len(_AT) + 1))
    rows = []
    for grid, curve in zip(space.grids, errors, strict=True):
        ratios = [grid.count(index) / grid.total for index in range(grid.size)]
        scaled = 1.0 - np.log10(np.maximum(np.interp(_AT, ratios, curve), _LEAST)) / np.log10(_LEAST)
        rows.append([*scaled, 1.0])
    return np.array(rows)


def _with_budget(space: SearchSpace, ratio: float) -> SearchSpace:
    """The space with another first budget, at least what can be reached."""
    first, *others = space.budgets
    within = max(ratio, space.least_ratio(first.cost))
    return SearchSpace(
        space.grids, space.costs, [Budget.of(first.cost, len(space.grids), ratio=within), *others]
    )


@settings
class Policy(Agent):
    """Learns to correct the strategy of least layer error, from groups of strategies that are scored together.

    What it learnt is written to policy.safetensors in the run folder. The budget is part of what it sees, so a trained
    policy can be asked at another budget, and about another network.

    Attributes:
        policy: A trained policy to start from: its file or the run folder that holds it. None: an untrained one.
        learn: Whether to learn. If not, the one strategy that the policy answers is scored.
        group: Strategies that are scored together and compared with each other.
        sigma: Standard deviation of the ratios around the policy's, in the first group.
        sigma_decay: Its factor a group.
        lr: Adam's learning rate.
        updates: Steps of Adam a group.
        clip: The most by which these may change the likelihood of a strategy, as a share; as in PPO.
        budgets: Least and largest share of the original cost. Every second group is scored at a budget drawn between
            them, so that the policy learns to answer all of these. Empty: at the search's budget alone.
    """

    name: ClassVar[str] = "policy"
    steps: ClassVar[bool] = False

    policy: str | None = field(default=None, metadata={"identity": False})
    learn: bool = True
    group: Annotated[int, Field(ge=2, le=10**6)] = 8
    sigma: Positive = 0.1
    sigma_decay: Share = 0.95
    lr: LearningRate = 3e-3
    updates: Count = 8
    clip: Positive = 0.5
    budgets: Annotated[Listed[Share], Field(max_length=2)] = ()
    content: str = field(default="", init=False, repr=False)
    """SHA-256 of the policy's weights: what a run depends on, wherever the file lies."""

    def __post_init__(self) -> None:
        """Refuse a range that is none, a policy that cannot be read, and an untrained one that is not to learn."""
        if self.budgets and (len(self.budgets) != 2 or self.budgets[0] > self.budgets[1]):
            raise out_of_range(
                "budgets", list(self.budgets), "the least and the largest share, like [0.2, 0.6]"
            )
        if self.policy is None and not self.learn:
            raise UserError(
                "{field} is needed with learn=false: the policy.safetensors of an earlier run",
                code="missing",
                field="policy",
            )
        if self.policy is not None:
            weights = _loaded(Path(self.policy)).state_dict()
            object.__setattr__(self, "content", sha256(save(weights)).hexdigest())

    def check(self, space: SearchSpace, episodes: int) -> None:
        """Refuse budgets to train for where there is none.

        Raises:
            UserError: There is none.
        """
        if self.budgets and not space.budgets:
            raise UserError(
                "{field} needs a budget; set one, like budget=flops", field="agent.budgets", code="missing"
            )

    def planned(self, space: SearchSpace, episodes: int) -> int:
        """One evaluation where nothing is learnt."""
        return episodes if self.learn else 1

    def search(self, task: SearchTask) -> None:
        """Scores ``task.episodes`` strategies, or the policy's own where it does not learn."""
        encoder = TokenEncoder(task)
        with learning() as outside:
            torch.manual_seed(task.seed)
            network = PolicyNetwork() if self.policy is None else _loaded(Path(self.policy))
            if self.learn:
                self._learn(task, encoder, network, outside)
            else:
                given = encoder.at()
                with torch.no_grad():
                    answer = given.space.land(given.mean(network).numpy())
        if not self.learn:
            task.score([answer])
        elif task.save is not None:
            task.save(FILE, save(network.state_dict(), {"format": "pt"}))

    def _learn(
        self,
        task: SearchTask,
        encoder: TokenEncoder,
        network: PolicyNetwork,
        outside: Callable[[], AbstractContextManager[None]],
    ) -> None:
        rng, optimizer = np.random.default_rng(task.seed), torch.optim.Adam(network.parameters(), lr=self.lr)
        seen: set[Removed] = set()
        for number, done in enumerate(range(0, task.episodes, self.group)):
            ratio = rng.uniform(self.budgets[0], self.budgets[-1]) if self.budgets and number % 2 else None
            given = encoder.at(ratio)
            group = self._group(given, network, number, rng, seen)
            with outside():
                trials = task.score(group.removed[: task.episodes - done])
            if len(trials) == self.group:
                figures = self._update(network, optimizer, group, trials)
                if task.on_update is not None:
                    task.on_update(figures)

    def _group(
        self,
        given: PolicyInput,
        network: PolicyNetwork,
        number: int,
        rng: np.random.Generator,
        seen: set[Removed],
    ) -> Group:
        """The policy's own answer where that is new, then strategies around it, new ones where they are found."""
        sigma = self.sigma * self.sigma_decay**number
        with torch.no_grad():
            mean = given.mean(network)
        removed = [] if (own := given.space.land(mean.numpy())) in seen else [own]
        seen.update(removed)
        while len(removed) < self.group:
            for _ in range(_REDRAWS):
                drawn = given.space.land(mean.numpy() + sigma * rng.standard_normal(len(mean)))
                if drawn not in seen:
                    break
            removed.append(drawn)
            seen.add(drawn)
        return Group(given, removed, mean, sigma)

    def _update(
        self, network: PolicyNetwork, optimizer: torch.optim.Optimizer, group: Group, trials: Sequence[Trial]
    ) -> dict[str, float]:
        """Steps that make the better strategies of a group more likely; figures for a tracker."""
        rewards = torch.tensor([max(trial.reward, _WORST) for trial in trials])
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6))[:, None]
        before = group.log_likelihood(group.mean)
        for _ in range(self.updates):
            change = group.log_likelihood(group.given.mean(network)) - before
            ratio = change.clamp(max=_MOST_CHANGE).exp()
            limited = ratio.clamp(1 - self.clip, 1 + self.clip)
            loss = -torch.minimum(ratio * advantages, limited * advantages).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {
            "agent/sigma": group.sigma,
            "agent/spread": float(rewards.std()),
            "agent/loss": float(loss.detach()),
        }


def _loaded(path: Path) -> PolicyNetwork:
    """The policy of a file or run folder.

    Raises:
        UserError: There is none, or it is of another kind.
    """
    path = path / FILE if path.is_dir() else path
    network = PolicyNetwork()
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{{field}}={path} is no policy ({first_line(error)}); give the {FILE} of a run of agent=policy",
            code="unreadable",
            field="policy",
        ) from error
    return network
