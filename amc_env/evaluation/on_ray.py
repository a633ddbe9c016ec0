"""Candidates scored by actors of Ray: processes of this machine, or of a cluster.

The network, the search images and what a repair was calibrated to are put into Ray's object store once. An actor has the
same scorer, repair and number of threads as this process would, so a candidate has the same score to the bit. What
becomes of scores (the journal, trackers, the agent) stays in this process. Ray is imported here alone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from amc_env.errors import UserError, first_line, missing_package
from amc_env.evaluation.pruner import BaseWeights, Pruner
from amc_env.evaluation.scorer import Scorer
from amc_env.pruning.repair.base import Repair
from amc_env.space import Removed

log = logging.getLogger(__name__)

_AT_ONCE = 2  # candidates that an actor is given: one waits while the other is scored
_LOSSES = 3  # times that a candidate's actor may be lost
_POLL_S = 1.0  # signals are seen at least so often

ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Of a Ray of our own: nothing is reported, and actors are not put behind other processes of the machine."""

Scored = tuple[float, dict[str, float]]
"""What `Pruner.score` gives."""


@dataclass(frozen=True)
class Actors:
    """Where candidates are scored.

    Attributes:
        count: How many actors.
        address: Of a Ray cluster, or ``auto``; None: a Ray of this process's own.
        gpu: Whether each takes a GPU.
    """

    count: int
    address: str | None = None
    gpu: bool = False


class _Job(NamedTuple):
    """A candidate to be scored: the number of the weights it is pruned from, the repair, and its counts."""

    weights: int
    repair: str
    removed: Removed


@dataclass(frozen=True, eq=False)
class _Ready:
    """Gives a repair that is calibrated already."""

    repair: Repair

    def __call__(self) -> Repair:
        return self.repair


class _Worker:
    """What an actor does.

    Args:
        path: Where the run imports from.
        stored: A reference to what makes the scorer.
        threads: As for `Pruner`.
        run_threads: Torch's threads of the run.
    """

    def __init__(self, path: Sequence[str], stored: list[Any], threads: int | None, run_threads: int):
        sys.path += [entry for entry in path if entry not in sys.path]  # modules of the user's own
        torch.set_num_threads(run_threads)
        self._pruner = Pruner(_ray().get(stored[0])(), threads)
        self._number = -1
        self._weights: dict[str, BaseWeights] = {}

    def score(self, job: _Job, stored: list[Any]) -> Scored | UserError:
        """The score of a candidate and its seconds, or the user's mistake that it failed by.

        Args:
            job: The candidate.
            stored: A reference to its weights with the repair, which is read when it is new.
        """
        if job.weights != self._number:
            self._number, self._weights = job.weights, {}
        if job.repair not in self._weights:
            self._weights[job.repair] = _ray().get(stored[0])
        try:
            return self._pruner.score(self._weights[job.repair], job.repair, job.removed)
        except UserError as error:
            return error


class RayPruner(Pruner):
    """`Pruner` whose candidates are scored by actors; networks that are kept are pruned in this process.

    Actors start with the first candidate. One that is lost is replaced, and its candidates are scored again.

    Args:
        scorer: As for `Pruner`.
        make_scorer: Makes the same scorer in an actor.
        actors: Where candidates are scored.
        threads: As for `Pruner`.
    """

    def __init__(
        self,
        scorer: Callable[[nn.Module], float],
        make_scorer: Callable[[], Scorer],
        actors: Actors,
        threads: int | None = None,
    ):
        super().__init__(scorer, threads)
        self._make_scorer = make_scorer
        self._where = actors
        self._actors: list[Any] = []
        self._begun: BaseWeights | None = None
        self._number = 0  # of these weights
        self._started = False
        self._reset()

    def _reset(self) -> None:
        self._waiting: deque[_Job] = deque()
        self._running: dict[Any, tuple[_Job, Any]] = {}
        self._finished: dict[_Job, Scored | UserError] = {}
        self._losses: dict[_Job, int] = {}
        self._stored: dict[str, Any] = {}  # by repair: references to the weights with it

    def expect(self, weights: BaseWeights, repair: str, wanted: Sequence[Removed]) -> None:
        """Give candidates to the actors."""
        if not wanted:
            return
        if weights is not self._begun:
            self._begun, self._number, self._stored = weights, self._number + 1, {}
        if not self._actors:
            self._start()
        if repair not in self._stored:
            ready = _Ready(self._repair(weights, repair))
            self._stored[repair] = _stored(replace(weights, repairs={repair: ready}))
        known = {*self._waiting, *self._finished, *(job for job, _ in self._running.values())}
        jobs = [_Job(self._number, repair, removed) for removed in dict.fromkeys(wanted)]
        self._waiting += [job for job in jobs if job not in known]
        self._hand_out()

    def score(self, weights: BaseWeights, repair: str, removed: Removed) -> Scored:
        """Score of a candidate, in [0, 1], and the seconds of each phase; waits for its actor."""
        self.expect(weights, repair, [removed])
        job = _Job(self._number, repair, removed)
        while job not in self._finished:
            self._collect()
        found = self._finished.pop(job)
        if isinstance(found, UserError):
            raise found
        return found

    def close(self) -> None:
        """End the actors, and Ray where it was started here; candidates that wait are dropped."""
        ray = _ray() if self._actors or self._started else None
        if ray is not None and ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
            if self._started:
                ray.shutdown()
        self._actors, self._started, self._begun = [], False, None
        self._reset()

    def _start(self) -> None:
        ray = _ray()
        if not ray.is_initialized():
            _connect(self._where)
            self._started = True
        self._check_room()
        self._scorer = _stored(self._make_scorer)
        self._actors = [self._actor() for _ in range(self._where.count)]
        log.info("candidates are scored by %d actors of Ray", self._where.count)

    def _check_room(self) -> None:
        room = _ray().cluster_resources()
        for kind, wanted in (("CPU", self._cpus), ("GPU", int(self._where.gpu))):
            if wanted * self._where.count > room.get(kind, 0):
                self.close()
                raise UserError(
                    f"{{field}}={self._where.count} of {wanted} {kind} each are more than Ray has, {room.get(kind, 0):g}: "
                    "lower it, or evaluator.threads",
                    code="out_of_range",
                    field="evaluator.actors",
                )

    @property
    def _cpus(self) -> int:
        """That are reserved for an actor: on a Ray of our own one each, whatever its threads."""
        return 1 if self._where.address is None else self._threads or torch.get_num_threads()

    def _actor(self) -> Any:
        kind = _ray().remote(_Worker).options(num_cpus=self._cpus, num_gpus=int(self._where.gpu))
        return kind.remote(sys.path, [self._scorer], self._threads, torch.get_num_threads())

    def _hand_out(self) -> None:
        """Give waiting candidates to actors that have room, those with the fewest first."""
        for depth in range(_AT_ONCE):
            for actor in self._actors:
                busy = sum(other is actor for _, other in self._running.values())
                if self._waiting and busy == depth:
                    job = self._waiting.popleft()
                    self._running[actor.score.remote(job, [self._stored[job.repair]])] = job, actor

    def _collect(self) -> None:
        """Take what is finished, after waiting for it, and hand out more."""
        ray = _ray()
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
        for reference in ready:
            job, actor = self._running[reference]
            try:
                self._finished[job] = ray.get(reference)
                del self._running[reference]
            except ray.exceptions.RayActorError as error:
                self._replace(actor, error)
        self._hand_out()

    def _replace(self, lost: Any, error: Exception) -> None:
        """Put a new actor in the place of one that was lost; its candidates come first."""
        if getattr(error, "actor_init_failed", False):
            raise UserError(
                f"an actor of Ray could not start ({str(error).strip().splitlines()[-1]}): what the network is made of must "
                "be importable there; or use {field}=local",
                code="actor_failed",
                field="evaluator",
            ) from error
        references = [reference for reference, (_, actor) in self._running.items() if actor is lost]
        jobs = [self._running.pop(reference)[0] for reference in references]
        for job in jobs[:1]:  # the one that was being scored
            self._losses[job] = self._losses.get(job, 0) + 1
            if self._losses[job] >= _LOSSES:
                raise UserError(
                    f"an actor was lost {_LOSSES} times while it scored {list(job.removed)} ({first_line(error)}): is there "
                    "enough memory? Lower {field}, or use evaluator=local",
                    code="actor_lost",
                    field="evaluator.actors",
                ) from error
        _ray().kill(lost)  # it may be out of reach alone
        log.warning("an actor was lost; its %d candidates are scored again", len(jobs))
        self._waiting.extendleft(reversed(jobs))
        self._actors[self._actors.index(lost)] = self._actor()


def check_ray() -> None:
    """Find out whether Ray is installed.

    Raises:
        UserError: It is not.
    """
    _ray()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise missing_package("evaluator", "ray", "ray", error) from error
    return ray


def _connect(where: Actors) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    own: dict[str, Any] = {"include_dashboard": False}
    own |= {} if where.gpu else {"num_cpus": max(where.count, os.cpu_count() or 1)}
    more = own if where.address is None else {}
    try:
        with _our_signals():
            _ray().init(
                address=where.address or "local", log_to_driver=False, configure_logging=False, **more
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{{field}}={where.address}: Ray cannot be reached or started ({first_line(error)}); use evaluator=local",
            code="unreachable",
            field="evaluator.address",
        ) from error


@contextmanager
def _our_signals() -> Iterator[None]:
    """Keep our handlers: Ray puts its own in their place, which end the process at once."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stored(thing: Any) -> Any:
    """A reference to a thing in the object store.

    Raises:
        UserError: It cannot be sent to another process.
    """
    try:
        return _ray().put(thing)
    except (TypeError, AttributeError, RuntimeError) as error:  # what pickle raises
        raise UserError(
            f"{{field}}=ray: the network or its data cannot be sent to another process ({first_line(error)}); use "
            "evaluator=local",
            code="not_sent",
            field="evaluator",
        ) from error
