"""Workers: the same results to the bit, whatever becomes of the processes."""

import copy
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import images, prepared, random_removed
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.budget import Problem
from amc_env.costs import Params
from amc_env.errors import UserError
from amc_env.evaluator import ORIGINAL, Evaluator, Removed, Start
from amc_env.prefix import PrefixScorer
from amc_env.pruning.candidate import Builder, Candidates, Keeps
from amc_env.pruning.repair import LeastSquares, NoRepair
from amc_env.pruning.topology import Topology
from amc_env.staging import Score
from amc_env.strategy import Grid, Strategy
from amc_env.workers import Workers, _end_with, _read, _write, check_guard


class Logits(PrefixScorer):
    """The sum of all squared logits in place of the accuracy: one bit that differs shows."""

    def __call__(self, model: nn.Module) -> float:
        return sum(float(logits.double().square().sum()) for logits, _ in self.outputs(self.fold(model)))


class Trained:
    """A step of gradient descent."""

    name = "trained"

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        F.cross_entropy(model(self.x), self.y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad


class Killed(NoRepair):
    """Ends the process as the system does for want of memory, once: then a file is there."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        if not self.note.exists():
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Slow(NoRepair):
    """Takes a minute, and leaves a file to say that it has begun."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        self.note.touch()
        time.sleep(60)


@dataclass(frozen=True, eq=False)
class Kit:
    """Materials of a small network."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    folder: Path

    def scorer(self) -> Logits:
        return Logits(self.model, self.images, batch_size=25, labels=self.labels)

    def start(self, name: str, candidates: Builder, removed: Removed) -> Start:
        def least_squares() -> LeastSquares:
            return LeastSquares(candidates, Topology.of(candidates.original), self.images[:40])

        repairs = {
            "none": NoRepair,
            "least_squares": least_squares,
            "trained": lambda: Trained(self.images[:16], self.labels[:16]),
            "killed": lambda: Killed(self.folder / "killed"),
            "slow": lambda: Slow(self.folder / "slow"),
        }
        return Start(name, candidates, repairs, removed)


def kit(folder: Path) -> Kit:
    return Kit(prepared("residual")[0].original, images(60), torch.arange(60) % 4, folder)


def problem() -> Problem:
    candidates, grids = prepared("residual")
    return Problem(grids, [Params(candidates.graph)], [])


def evaluator(materials: Kit, workers: Workers | None = None, repair: str = "none") -> Evaluator:
    start = materials.start(ORIGINAL, prepared("residual")[0], ())
    return Evaluator(start, problem(), materials.scorer(), repair, workers=workers, threads=1)


def scan(grids: Sequence[Grid]) -> list[Strategy]:
    """The original, each decision cut alone, and some at random."""
    alone = [
        tuple(g.count(2) if i == place else 0 for i, g in enumerate(grids)) for place in range(len(grids))
    ]
    some = [random_removed(tuple(grids), seed) for seed in range(3)]
    return [problem().strategy(removed) for removed in [(0,) * len(grids), *alone, *some]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[Workers]:
    """Two of them, begun once: it takes seconds."""
    made = Workers(kit(folder), 2, threads=1)
    yield made
    made.close()


@pytest.mark.parametrize("repair", ["none", "least_squares", "trained"])
def test_results_are_those_of_this_process_to_the_bit(repair: str, workers: Workers, folder: Path) -> None:
    strategies = scan(problem().grids)
    there = evaluator(kit(folder), workers).evaluate(strategies, repair=repair)
    here = evaluator(kit(folder)).evaluate(strategies, repair=repair)
    assert [outcome.accuracy for outcome in there] == [outcome.accuracy for outcome in here]
    assert there == here
    assert len({outcome.accuracy for outcome in here}) == len(strategies)


def test_later_starts_reach_the_workers(workers: Workers, folder: Path) -> None:
    candidates, _ = prepared("residual")
    materials = kit(folder)
    there, here = evaluator(materials, workers), evaluator(materials)
    strategies = scan(problem().grids)[-3:]
    tuned = copy.deepcopy(candidates.original)
    for number in (1, 2, 3):
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.mul_(0.9)
        later = Candidates(tuned, candidates.graph, [order.flip(0) for order in candidates.orders])
        start = materials.start(f"round {number}", later, strategies[0].removed)
        found = []
        for judge in (there, here):
            judge.begin(start)
            found.append(judge.evaluate(strategies, start=start.name, repair="trained"))
        assert found[0] == found[1]
    assert there.evaluate(strategies) == here.evaluate(strategies)  # the first start's file was written anew


def test_mistakes_come_back_as_they_are(workers: Workers, folder: Path) -> None:
    with pytest.raises(UserError, match="unknown repair 'glue'; there are none, least_squares"):
        evaluator(kit(folder), workers).evaluate(scan(problem().grids)[1:], repair="glue")


def test_what_a_killed_worker_leaves_is_handed_out_again(
    workers: Workers, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategies = scan(problem().grids)[-3:]
    with caplog.at_level(logging.WARNING):
        there = evaluator(kit(folder), workers).evaluate(strategies, repair="killed")
    assert "a worker process died" in caplog.text
    here = evaluator(kit(folder)).evaluate(strategies)
    assert [outcome.accuracy for outcome in there] == [outcome.accuracy for outcome in here]


def test_workers_end_at_once_and_leave_nothing_behind(workers: Workers, folder: Path) -> None:
    judge = evaluator(kit(folder), workers)
    outcomes = judge.outcomes(scan(problem().grids)[:3], repair="slow")
    next(outcomes)  # the original is not repaired
    files = workers._files.materials.parent
    deadline = time.monotonic() + 60
    while not (folder / "slow").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(multiprocessing.active_children()) == 2
    assert files.is_dir()
    began = time.monotonic()
    judge.close()
    assert time.monotonic() - began < 30  # the candidates would take a minute
    assert multiprocessing.active_children() == []
    assert not files.exists()


# ------------------------------------------------------------------------------- without processes, in no time


class Pool:
    """Finishes so many candidates, and dies."""

    finishes = 0
    begins = True
    made = 0

    def __init__(self, count: int, threads: int) -> None:
        type(self).made += 1
        self.left = self.finishes

    def submit(self, *job: Any) -> Future[Score]:
        future: Future[Score] = Future()
        if self.left:
            self.left -= 1
            future.set_result(Score(float(sum(job[-2]))))
        else:
            future.set_exception(BrokenProcessPool("killed"))
        return future

    def begun(self) -> bool:
        return self.begins

    def close(self) -> None:
        pass


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> type[Pool]:
    """What stands for processes."""
    kind = type("ThisPool", (Pool,), {})
    monkeypatch.setattr("amc_env.workers._Pool", kind)
    return kind


def test_three_deaths_with_nothing_finished_between_them_are_enough(pool: type[Pool], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="died 3 times in a row .* smaller evaluator.workers"):
        evaluator(kit(tmp_path), Workers(kit(tmp_path), 2)).evaluate(scan(problem().grids))
    assert pool.made == 3


def test_deaths_with_progress_between_them_are_not(pool: type[Pool], tmp_path: Path) -> None:
    pool.finishes = 1
    strategies = scan(problem().grids)
    judge = evaluator(kit(tmp_path), Workers(kit(tmp_path), 2))
    assert [o.accuracy for o in judge.evaluate(strategies)] == [float(sum(s.removed)) for s in strategies]
    assert pool.made == len(strategies) > 3


def test_two_batches_survive_the_death_of_the_processes_that_they_share(
    pool: type[Pool], tmp_path: Path
) -> None:
    pool.finishes = 4
    workers = Workers(kit(tmp_path), 2)
    start = kit(tmp_path).start(ORIGINAL, prepared("residual")[0], ())
    removed = {(0,) * place + (1,): 0.0 for place in range(3)}
    with (
        workers.scoring(start, "none", removed) as one,
        workers.scoring(start, "none", removed) as other,
    ):
        assert [other(counts).accuracy for counts in removed] == [1.0] * 3
        assert [one(counts).accuracy for counts in removed] == [1.0] * 3
    assert pool.made == 2


def test_processes_that_never_begin_point_at_the_script(pool: type[Pool], tmp_path: Path) -> None:
    pool.begins = False
    with pytest.raises(UserError, match="before they begin .* `if __name__ == '__main__':`"):
        evaluator(kit(tmp_path), Workers(kit(tmp_path), 2)).evaluate(scan(problem().grids))
    assert pool.made == 1


def test_a_worker_that_imports_the_script_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    check_guard()
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UserError, match="if __name__ == '__main__'"):
        check_guard()


def test_a_worker_ends_when_the_other_end_of_its_line_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    _end_with(theirs)
    theirs.close()
    assert ended == [0]


def test_what_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    materials = kit(tmp_path)
    materials.model.hook = lambda x: x
    with pytest.raises(UserError, match="cannot be brought to worker processes .*evaluator.workers=0"):
        evaluator(kit(tmp_path), Workers(materials, 2)).evaluate(scan(problem().grids))


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(Slow(tmp_path), tmp_path / "thing.pt")
    monkeypatch.delattr("test_workers.Slow")
    with pytest.raises(UserError, match="cannot import what the run needs"):
        _read(tmp_path / "thing.pt")


def test_tensors_are_read_as_they_were_and_writing_to_them_changes_no_file(tmp_path: Path) -> None:
    written = images(2).contiguous(memory_format=torch.channels_last)
    _write([written, nn.Parameter(written)], tmp_path / "thing.pt")
    first, parameter = _read(tmp_path / "thing.pt")
    assert first.stride() == written.stride()
    assert isinstance(parameter, nn.Parameter)
    assert parameter.requires_grad
    assert torch.equal(first, written)
    first.zero_()
    assert torch.equal(_read(tmp_path / "thing.pt")[0], written)


def test_a_folder_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written to .*TMPDIR"):
        _write(1, tmp_path / "thing.pt")
