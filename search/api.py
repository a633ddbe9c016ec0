"""The main job from Python, on a network and data of one's own."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import gymnasium
import torch
from rich.console import Console
from torch import Tensor, nn

if TYPE_CHECKING:  # matplotlib takes a third of a second to import
    from matplotlib.figure import Figure

import amc_env  # noqa: F401 -- registers the environment
from agents.base import Agent
from agents.baselines import Random
from amc_env.costs.base import BudgetSettings, budget_on
from amc_env.env import EnvHandle
from amc_env.errors import UserError, first_line, reported_together
from amc_env.graph.copying import module_copy, stored_activations
from amc_env.graph.preparing import prepared, unwrapped
from amc_env.graph.surgery import Keeps
from amc_env.inputs import call, described, take
from amc_env.pruning.criteria import Criterion
from amc_env.pruning.granularity import Channel, Granularity
from amc_env.tasks import OwnTask, Task, task_named
from amc_env.tasks.base import Batches
from amc_env.validation import plain
from search import files
from search.data.base import Data
from search.data.loaders import as_loader, from_loaders, seeded
from search.data.reading import Reader, Signature, batches_from
from search.output.formatting import percent, split_name
from search.output.progress import final_table, shown_log
from search.output.run_files import copy_outcome
from search.output.run_result import FrontRow, RunResult
from search.output.tracking import CsvTracker
from search.settings import (
    SAFE_LR,
    Baseline,
    FinetuneSettings,
    Settings,
    channel_multiple,
)
from search.study.apply import Given, GivenStrategy
from search.study.evaluation import make_evaluator
from search.study.identity import describe
from search.study.pipeline import Context, env_handle, run
from search.study.problem import PruningProblem
from search.study.study import Study

log = logging.getLogger(__name__)
Asked = float | Mapping[str, float] | BudgetSettings | Sequence[BudgetSettings]
"""Budgets: the share of the MACs that may remain, shares by cost, or settings."""


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` gives back.

    Attributes:
        model: The small network, in eval mode, on the CPU.
        strategy: Pruning ratio (share removed) of each decision.
        result: The figures of result.json; every accuracy says which split it is on.
        folder: The run folder: weights, exports, journal, report.
        keeps: What stayed of the original's channels, by module and side.
        models: With several budgets the small network of each, by the budget's ratio; ``model`` is the last of them.
    """

    model: nn.Module
    strategy: Mapping[str, float]
    result: RunResult
    folder: Path
    keeps: Keeps
    models: Mapping[float, nn.Module] = field(default_factory=dict)

    def front(self) -> list[FrontRow]:
        """With several budgets a row for the network of each, in falling order; one can make a data frame of them."""
        return list(self.result.front)

    def __repr__(self) -> str:
        base, delivered = self.result.base, self.result.delivered
        share = delivered.costs["macs"] / base.costs["macs"]
        scores = (
            f"{percent(base.accuracy)} -> {percent(delivered.accuracy)} on the {split_name(delivered.split)}"
        )
        metric = "" if self.result.metric == "accuracy" else f"{self.result.metric} "
        return f"Compressed({metric}{scores}, {percent(share, 1)} of the MACs, folder={str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from search.output.report import result_html

        return result_html(self.result, self.folder)

    def plot(self) -> Figure:
        """Draw the channels that every layer keeps, before the original's; of masked weights, the weights.

        Returns:
            A matplotlib figure, which a notebook shows and ``figure.savefig("kept.png")`` saves.
        """
        from search.output.plots import layers_figure

        return layers_figure(self.result)

    def save(self, folder: str | Path) -> Path:
        """Copy what is needed to use the network: exports, strategy.json, result.json, report.html and its pictures.

        ``load_pruned(module, folder)`` restores the network from there, ``compress(..., strategy=folder)`` applies its
        strategy again.

        Args:
            folder: Made where it is missing; files of the same names are replaced.

        Returns:
            The folder.
        """
        return copy_outcome(self.folder, self.result, Path(folder))

    def push_to_hub(self, repository: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save` copies to the Hugging Face hub, with a model card made from the figures.

        ``load_pruned(module, "user/name")`` restores the network from there.

        Args:
            repository: ``user/name``; made where it is missing.
            private: Whether a repository that is made is private.
            token: Of the hub. None: the one that is logged in, or HF_TOKEN.

        Returns:
            The address of the commit.

        Raises:
            UserError: The hub refuses, or cannot be reached.
        """
        from search.output import hub

        with TemporaryDirectory() as folder:
            hub.write_card(self.save(folder), self.result, repository)
            return hub.upload(Path(folder), repository, private=private, token=token)

    def table(self) -> str:
        """Layers, and original, pruned and fine-tuned network side by side, as `compress` prints them."""
        console = Console(file=StringIO(), width=160)
        final_table(self.result, self.folder, console=console)
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()


def compress(
    module: nn.Module,
    train_loader: Iterable[Any] | Data,
    val_loader: Iterable[Any] | None = None,
    *,
    budget: Asked | None = None,
    budgets: Sequence[float] | None = None,
    agent: str | Agent | type | None = None,
    test_loader: Iterable[Any] | None = None,
    episodes: int | None = None,
    finetune: FinetuneSettings | int | None = None,
    original_lr: float | None = None,
    folder: str | Path | None = None,
    seed: int | None = None,
    device: str | None = None,
    keep: Sequence[str] | None = None,
    granularity: str | Granularity | None = None,
    criterion: str | Criterion | None = None,
    strategy: GivenStrategy | None = None,
    task: str | Task | None = None,
    score: Callable[[nn.Module, Batches], float] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    settings: Settings | None = None,
    baselines: Sequence[Baseline] | None = None,
    verbose: bool = True,
) -> Compressed:
    """Searches pruning ratios for a trained network, prunes and fine-tunes it.

    Args:
        module: The trained network. It is not changed.
        train_loader: Batches for calibration and fine-tuning, normalised and augmented as the network wants them:
            (inputs, targets), where inputs are a tensor, a tuple of tensors or a dictionary of them; (x1, x2, y) of a network
            with several inputs; or dictionaries whose entry ``labels`` is the target. A dataset, or a pair of tensors, is
            taken as well. Or all splits as a `search.data.base.Data`, like `search.data.digits.digits()`; with the same
            settings, a run that was started on the command line can then be continued here, and the other way round.
        val_loader: Batches that candidates are judged on: not the test data, and best not seen in training. Left out
            where ``train_loader`` is a `Data`.
        budget: Share of the original's MACs that may remain, in (0, 1]; or shares by cost, ``{"macs": 0.5,
            "params": 0.4}``, of ``macs`` (or ``flops``), ``params``, ``latency``, ``memory``, ``storage``, ``cycles`` or
            a `NetworkCost` of your own; or the settings of one budget or several,
            ``LatencyBudget(table="phone.json", elsewhere=True, limit=25.0)``. All
            of them hold.
        budgets: Falling shares of the budget's cost, like ``[0.75, 0.5, 0.35]``: one search and one network each, with
            shared scores; see `Compressed.front`. The cost is that of the budget in ``settings``, else MACs.
        agent: ``surrogate``, ``evolution``, ``policy``, ``cmaes``, ``tpe``, ``ddpg``, ``ddpg_near_uniform``, ``td3``,
            ``sac``, ``ppo``, ``netadapt``, ``random``, ``sensitivity`` or ``uniform``, with the settings of its file in
            conf/agent; or an agent of one's own. The class of a Stable-Baselines3 algorithm stands for its name.
        test_loader: Batches for the final figures; without it they are on the validation batches, and are labelled so.
        episodes: Episodes of the search, or evaluations of an agent that does not step.
        finetune: Epochs of fine-tuning, 0 for none, or all of its settings.
        original_lr: Peak learning rate of SGD that the network was trained with; fine-tuning takes three tenths of it by
            default. Without it 0.01 is taken, which is safe for networks that were trained by Adam, too.
        folder: The run folder; the same call with the same folder resumes an interrupted run. By default
            one is made under ``outputs``.
        seed: Of everything that is drawn.
        device: Where networks run.
        keep: Layers that are not pruned: patterns of names, like ``["stem.*"]``, or names of classes, like ``["Linear"]``.
        granularity: What is removed: ``channel``, or ``fine_grained``, ``nm``, ``vector``, ``kernel``, which set weights to
            zero; with the settings of its file in conf/granularity, or an object.
        criterion: What ranks channels or weights: ``l1``, ``l2``, ``bn_scale``, ``apoz``, ``fpgm``, ``lasso``, ``taylor``,
            ``obd``, ``random``, or an object.
        strategy: A strategy that was found elsewhere, to be applied in place of a search: a strategy.json or its run folder,
            the ``info["strategy"]`` of an environment, the pruning ratio of each decision by name, or the counts removed.
            Without ``budget`` none is asked for; without ``settings`` the rest is as without a strategy.
        task: What the network is for: ``classification``, ``multi_label``, ``regression``, ``segmentation``, or a
            `amc_env.tasks.Task`. By default classification, which targets that are no class numbers refuse.
        score: In place of a task, with ``loss``: takes a network in eval mode and batches of (inputs, targets), and gives
            its score in [0, 1], higher is better.
        loss: Takes outputs and targets of a batch, and gives the mean loss of its examples.
        settings: Everything else (repair, criterion, channel multiple, export, the conditions of latency). An argument
            that is given wins over the same field; one that is not leaves it alone. By default half of the
            MACs, the agent ``surrogate``, 300 episodes, 10 epochs of fine-tuning and seed 0 are used, and layers keep
            multiples of 2 channels; without settings, under a latency budget of its ``vector_width``.
        baselines: Agents that are scored beside the agent after the search, of ``uniform`` and ``random``; [] for none.
            By default both, or the first alone where an evaluation is expensive.
        verbose: Print what can be reached, the progress, and the result. Warnings are logged in any case.

    Raises:
        UserError: Whatever is wrong with network, data or settings, in one message, before anything expensive.
    """
    _check_types(settings=settings, folder=folder, score=score, loss=loss)
    given: dict[str, Any] = {"episodes": episodes, "original_lr": original_lr, "seed": seed, "device": device}
    given |= {"budget": budget, "ratios": budgets, "agent": agent, "finetune": finetune, "keep": keep}
    given |= {"granularity": granularity, "criterion": criterion, "strategy": strategy}
    given["baselines"] = baselines
    base = _settings(settings, given | {"task": _task(task, score, loss)})
    with shown_log() if verbose else nullcontext():
        say_rate(base, known=original_lr is not None or base.original_lr != SAFE_LR)
        network = _network(module)
        data = _data(network, train_loader, val_loader, test_loader, base)
        place = _folder(folder)
        context = _context(place, type(network).__name__, base, quiet=not verbose)
        finished = run(network, data, base.in_folder(place), context)
        report, result = _reported(place), finished.result
    if verbose:
        final_table(result, place, report)
    models = {ratio: model.cpu() for ratio, model in finished.models.items()}
    return Compressed(finished.model.cpu(), result.strategy, result, place, finished.keeps, models)


def _reported(place: Path) -> Path:
    from search.output.report import write_report  # matplotlib takes a third of a second to import

    return write_report(place)


def say_rate(settings: Settings, *, known: bool) -> None:
    """Say what fine-tuning starts from where the original training's learning rate is not known."""
    if settings.finetune.epochs and not known:
        rate = settings.finetune.lr_fraction * SAFE_LR
        log.info("original_lr is not given: fine-tuning starts from %g", rate)


def _check_types(settings: object, folder: object, score: object, loss: object) -> None:
    """Refuses arguments of other types; None is always allowed.

    Raises:
        UserError: Such arguments, all together.
    """
    wrong = [
        UserError(f"{{field}} must be {needed}, not {given!r}", code="wrong_type", field=name)
        for name, given, right, needed in (
            ("settings", settings, isinstance(settings, Settings), "a search.Settings"),
            ("folder", folder, isinstance(folder, str | Path) and "\0" not in str(folder), "a path"),
            ("score", score, callable(score), "a function"),
            ("loss", loss, callable(loss), "a function"),
        )
        if given is not None and not right
    ]
    if wrong:
        raise UserError.join(wrong)


def make_env(
    module: nn.Module,
    train_loader: Iterable[Any] | Data,
    val_loader: Iterable[Any] | None = None,
    *,
    budget: Asked | None = 0.5,
    task: str | Task | None = None,
    settings: Settings | None = None,
) -> gymnasium.Env[Any, Any]:
    """The search as a Gymnasium environment, for an agent of one's own; see `PruningEnv` for its specification.

    Args:
        module: As for `compress`.
        train_loader: As for `compress`; calibrates the repair.
        val_loader: As for `compress`; candidates are judged on it.
        budget: As for `compress`; None for no budget (``reward=ErrorFlops()``: accuracy-guaranteed search).
        task: As for `compress`.
        settings: Everything else, as for `compress`. Its agent, episodes and what is trained between or after searches
            (stages, schedule, regularization, finetune) do not matter here; ``short_term.steps`` are trained before an
            episode is scored where they are set.

    Raises:
        UserError: As for `compress`.
    """
    handle = _env_handle(module, train_loader, val_loader, budget, task, settings)
    env: gymnasium.Env[Any, Any] = gymnasium.make("amc_env/Pruning-v0", handle=handle)
    return env


def make_vec_env(
    module: nn.Module,
    train_loader: Iterable[Any] | Data,
    val_loader: Iterable[Any] | None = None,
    *,
    num_envs: int,
    budget: Asked | None = 0.5,
    task: str | Task | None = None,
    settings: Settings | None = None,
) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    """`make_env`'s environment several times side by side, as one; see `PruningVectorEnv`.

    Args:
        module: As for `compress`.
        train_loader: As for `make_env`.
        val_loader: As for `make_env`.
        num_envs: Episodes side by side.
        budget: As for `make_env`.
        task: As for `compress`.
        settings: As for `make_env`.

    Raises:
        UserError: As for `compress`.
    """
    handle = _env_handle(module, train_loader, val_loader, budget, task, settings)
    return gymnasium.make_vec("amc_env/Pruning-v0", num_envs=num_envs, handle=handle)


def _env_handle(
    module: nn.Module,
    train_loader: Iterable[Any] | Data,
    val_loader: Iterable[Any] | None,
    budget: Asked | None,
    task: str | Task | None,
    settings: Settings | None,
) -> EnvHandle:
    """What an environment of a search from Python refers to."""
    budgets = () if budget is None else _budgets(budget)
    base = replace(
        settings or _defaults({"agent": Random(), "budgets": budgets}),
        agent=Random(),
        budgets=budgets,
        ratios=(),
    )
    base = base if task is None else replace(base, task=task_named(task))
    network = _network(module)
    problem = PruningProblem.build(network, _data(network, train_loader, val_loader, None, base), base)
    return env_handle(problem, Study(make_evaluator(problem)))


def _network(module: nn.Module) -> nn.Module:
    """A copy of the user's network, in eval mode on the CPU, ready to be pruned."""
    module = unwrapped(module)
    if stored := stored_activations(module):
        log.info("the network is copied without the activations that it stores: %s", ", ".join(stored))
    return prepared(module_copy(module).cpu())


def _data(
    network: nn.Module,
    train_loader: Iterable[Any] | Data,
    val_loader: Iterable[Any] | None,
    test_loader: Iterable[Any] | None,
    settings: Settings,
) -> Data:
    if isinstance(train_loader, Data):
        return train_loader
    if val_loader is None:
        raise UserError("{field} is needed: candidates are scored on it", code="missing", field="val_loader")
    size = settings.finetune.batch_size
    train = as_loader("train_loader", train_loader, size, shuffle=True)
    val, test = (
        as_loader(name, given, size)
        for name, given in (("val_loader", val_loader), ("test_loader", test_loader))
    )
    reader = Reader(settings.task, Signature.of(network))
    with seeded(settings.seed):  # a loader draws from the global state when it begins, which is the caller's
        outputs = _outputs(network, val, reader)
    images = max(settings.repair.images, settings.repair.norm_images, settings.criterion.images)
    return from_loaders(train, val, test, images, outputs, reader)


def _task(
    task: str | Task | None,
    score: Callable[[nn.Module, Batches], float] | None,
    loss: Callable[[Any, Any], Tensor] | None,
) -> Task | None:
    """The task that the arguments name; None where they leave it to the settings."""
    if score is None and loss is None:
        return None if task is None else task_named(task)
    if score is None or loss is None or task is not None:
        raise UserError("{field} and loss are given together, and without a task", code="task", field="score")
    return OwnTask(score, loss)


def _agent(given: str | Agent | type | None) -> Any:
    """The agent that is named or given, or that runs an algorithm of Stable-Baselines3.

    Raises:
        UserError: The name is unknown, or an algorithm is given that was built already.
    """
    kinds = (given if isinstance(given, type) else type(given)).__mro__
    if any(kind.__module__ == "stable_baselines3.common.base_class" for kind in kinds):
        if not isinstance(given, type):
            raise UserError(
                f"{{field}} is a {type(given).__name__} with an environment of its own: give its class, or let it learn "
                "on search.make_env(...)",
                code="wrong_type",
                field="agent",
            )
        if given.__name__ not in ("DDPG", "PPO", "SAC", "TD3"):
            from agents.stable_baselines import StableBaselines  # imports Stable-Baselines3

            try:
                return StableBaselines(algorithm=given)
            except UserError as error:
                raise error.inside("agent") from error
        given = given.__name__.lower()
    return _named("agent", given)


def _named(section: str, value: Any, *overrides: str) -> Any:
    """What an option of conf makes; an object as it is."""
    if not isinstance(value, str):
        return value
    from search.config.compose import default_of  # Hydra is needed for names alone

    return default_of(section, value, *overrides)


def _settings(settings: Settings | None, arguments: Mapping[str, Any]) -> Settings:
    """The settings of a run, from the arguments of `compress`.

    Raises:
        UserError: With all that is wrong.
    """
    with reported_together() as attempt:
        given = dict(arguments)
        budget, strategy = given.pop("budget"), given.pop("strategy")
        if budget is not None and given["ratios"] is not None:
            attempt(_both_budgets)
        given["budgets"] = budgets = None if budget is None else attempt(lambda: _budgets(budget))
        if strategy is None:
            given["agent"] = attempt(lambda: _agent(given["agent"]))
        else:
            given["agent"] = attempt(lambda: _strategy(strategy, given["agent"]))
            given["budgets"] = (budgets or ()) if settings is None else budgets
        multiple = f"channel_multiple={channel_multiple(budgets or ())}"
        given["granularity"] = attempt(lambda: _named("granularity", given["granularity"], multiple))
        given["criterion"] = attempt(lambda: _named("criterion", given["criterion"]))
        given["finetune"] = attempt(lambda: _finetune(given["finetune"]))
        wanted = {name: value for name, value in given.items() if value is not None}
        made = attempt(lambda: _made(settings, wanted))
    assert isinstance(made, Settings)
    return made


def _both_budgets() -> None:
    raise UserError(
        "{field} and budgets are both given: leave one out; another cost than MACs is given by settings",
        code="conflict",
        field="budget",
    )


def _made(settings: Settings | None, wanted: Mapping[str, Any]) -> Settings:
    try:
        return _defaults(wanted) if settings is None else replace(settings, **wanted)
    except UserError as error:
        raise error.renamed(lambda field: re.sub(r"^(ratios|search\.budgets)", "budgets", field)) from error


def _strategy(strategy: GivenStrategy, agent: object) -> Given:
    if agent is not None:
        raise UserError(
            "{field} and strategy are both given: leave one out, as a strategy is applied without a search",
            code="conflict",
            field="agent",
        )
    return Given.of(strategy)


def _finetune(finetune: FinetuneSettings | int | None) -> FinetuneSettings | None:
    epochs = plain(finetune)
    try:
        return FinetuneSettings(epochs=epochs) if isinstance(epochs, int) else finetune  # type: ignore[return-value]
    except UserError as error:
        raise error.inside("finetune") from error


def _defaults(given: Mapping[str, Any]) -> Settings:
    """Settings where none are given, with these fields."""
    return Settings(**{"granularity": Channel(channel_multiple(given.get("budgets", ()))), **given})


def _budgets(budget: Asked) -> tuple[BudgetSettings, ...]:
    given = (budget,) if isinstance(budget, BudgetSettings) else budget
    if isinstance(given, Sequence):
        wrong = [repr(entry) for entry in given if not isinstance(entry, BudgetSettings)]
        if wrong:
            raise UserError(
                f"budget={budget!r} has {', '.join(wrong)}: give a share, shares by cost like {{'macs': 0.5}}, or the "
                "settings of budgets like LatencyBudget(ratio=0.8)",
                code="wrong_type",
                field="budget",
            )
        return tuple(given)
    shares = given if isinstance(given, Mapping) else {"macs": given}
    try:
        return tuple(budget_on(cost, ratio) for cost, ratio in shares.items())
    except UserError as error:
        raise error.inside("budget") from error


def _context(folder: Path, model: str, settings: Settings, *, quiet: bool) -> Context:
    tracker = cache(lambda: CsvTracker(folder))  # opened when the journal has found that the folder is ours
    return Context(
        folder=folder,
        track=lambda metrics, step: tracker().log(metrics, step),
        model=model,
        command="search.compress",
        configuration=json.dumps(describe(settings), indent=2),
        begin=tracker,
        quiet=quiet,
    )


def _outputs(network: nn.Module, val_loader: Iterable[Any], reader: Reader) -> Any:
    """What the network gives for one example of the first batch."""
    for batch in batches_from("val_loader", val_loader):
        inputs, targets = reader("val_loader", batch)
        one = take(inputs, slice(1))
        try:
            with torch.no_grad():
                given = call(network, one)
        except Exception as error:  # whatever a user's network and loader do not agree on
            raise UserError(
                f"the network does not run on the first batch of val_loader, {described(inputs)}: {first_line(error)}",
                code="does_not_run",
                field="val_loader",
            ) from error
        outputs = reader.task.read(given)
        reader.task.check("val_loader", outputs, targets)
        return outputs
    raise UserError("val_loader gives no batch", code="empty", field="val_loader")


def _folder(folder: str | Path | None) -> Path:
    place = (
        Path("outputs", *time.strftime("%Y-%m-%d/%H-%M-%S").split("/")) if folder is None else Path(folder)
    )
    files.make_folder(place)
    return place
