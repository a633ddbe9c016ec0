"""Workers: processes that score candidates side by side, each as this process would, to the bit.

What they need is written to files that all of them map into their memory: the network, the images and every start are
there once, however many workers there are, and none is copied for a candidate. A worker ends with the process that
began it, whatever happens to that.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, lru_cache
from multiprocessing import current_process, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from amc_env.errors import UserError, first_line
from amc_env.evaluator import Bench, Removed, Start
from amc_env.pruning.candidate import Builder
from amc_env.staging import Score

log = logging.getLogger(__name__)

_DEATHS = 3  # in a row, with nothing scored between them
_FILES = 2  # of the latest starts
_NO_GUARD = (
    "a script that asks for workers is imported by each of them: put what it runs under "
    "`if __name__ == '__main__':`, or set evaluator.workers=0"
)


class Materials(Protocol):
    """What any process makes its scorer and its starts from. It can be pickled."""

    def scorer(self) -> Callable[[nn.Module], float]:
        """Accuracy of a cut network."""
        ...

    def start(self, name: str, candidates: Builder, removed: Removed) -> Start:
        """The start that has these attributes, with its repairs."""
        ...


def check_guard() -> None:
    """Refuses to work where a worker imports the script that asked for workers, before it runs it a second time.

    Raises:
        UserError: This is such a process.
    """
    if getattr(current_process(), "_inheriting", False):  # as multiprocessing itself finds out
        raise UserError(_NO_GUARD)


class Workers:
    """Worker processes, begun when candidates are first handed out and kept until `close`.

    Args:
        materials: What they need.
        count: How many.
        threads: Of torch in each; None: as many as here.
    """

    def __init__(self, materials: Materials, count: int, threads: int | None = None):
        self._materials = materials
        self._count = count
        self._threads = threads
        self._files: _Files | None = None
        self._pool: _Pool | None = None

    @contextmanager
    def scoring(
        self, start: Start, repair: str, strategies: Mapping[Removed, float]
    ) -> Iterator[Callable[[Removed], Score]]:
        """Hands strategies out, all at once and in order; what is not begun at the block's end is taken back.

        Args:
            start: The weights that they are cut from.
            repair: Its name.
            strategies: Each with its floor, see `Bench.score`.

        Returns:
            Gives the score of each; it waits for it.

        Raises:
            UserError: What workers need cannot be brought to them, or they die again and again.
        """
        if self._files is None:
            self._files = _Files(self._materials)
        batch = _Batch(self, (self._files.materials, self._files.of(start), repair), strategies)
        try:
            yield batch.score
        finally:
            batch.take_back()

    def pool(self) -> _Pool:
        """The processes; begun where there are none."""
        if self._pool is None:
            check_guard()
            log.info("beginning %d worker processes", self._count)
            self._pool = _Pool(self._count, self._threads or torch.get_num_threads())
        return self._pool

    def give_up(self, pool: _Pool) -> None:
        """Ends processes of which one has died, unless another batch found out first."""
        if pool is self._pool:
            self._pool = None
            pool.close()

    def close(self) -> None:
        """Ends the processes, whatever they are at; what is handed out later is handed to new ones."""
        if self._pool is not None:
            self.give_up(self._pool)
        if self._files is not None:
            self._files.remove()
            self._files = None


class _Batch:
    """Strategies handed out together; what is unfinished when a worker dies is handed out again."""

    def __init__(self, workers: Workers, job: tuple[Path, Path, str], strategies: Mapping[Removed, float]):
        self._workers = workers
        self._floors = strategies
        self._job = job
        self._deaths = 0
        self._finished = 0
        self._futures: dict[Removed, Future[Score]] = {}
        self._hand_out(strategies)

    def _hand_out(self, strategies: Iterable[Removed]) -> None:
        self._pool = self._workers.pool()
        self._futures |= {
            removed: self._pool.submit(*self._job, removed, self._floors[removed]) for removed in strategies
        }

    def score(self, removed: Removed) -> Score:
        while True:
            try:
                return self._futures[removed].result()
            except BrokenProcessPool:
                self._go_on()

    def _go_on(self) -> None:
        wait(self._futures.values())  # with one worker's death all is over at once
        over = {removed: future.exception() for removed, future in self._futures.items()}
        unfinished = [removed for removed, error in over.items() if isinstance(error, BrokenProcessPool)]
        finished = len(over) - len(unfinished)
        self._deaths = 1 if finished > self._finished else self._deaths + 1
        self._finished = finished
        begun = self._pool.begun()
        self._workers.give_up(self._pool)
        if not begun:
            raise UserError(f"worker processes end before they begin to work: {_NO_GUARD}")
        if self._deaths == _DEATHS:
            raise UserError(
                f"worker processes died {_DEATHS} times in a row without finishing a candidate, perhaps for want of "
                "memory: set a smaller evaluator.workers, or 0 to score in this process"
            )
        log.warning("a worker process died: %d candidates are handed out again", len(unfinished))
        self._hand_out(unfinished)

    def take_back(self) -> None:
        for future in self._futures.values():
            future.cancel()


class _Pool:
    """The processes, and a line to them that breaks when this one is gone."""

    def __init__(self, count: int, threads: int):
        context = get_context("spawn")  # a process with threads cannot be forked safely
        self._line, self._theirs = context.Pipe()
        self._executor = ProcessPoolExecutor(count, context, _begin, (self._theirs, threads))

    def submit(self, *job: Any) -> Future[Score]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for this process:
        try:  # those that begin here inherit the mask
            return self._executor.submit(_score, *job)
        except BrokenProcessPool as error:
            failed: Future[Score] = Future()
            failed.set_exception(error)
            return failed
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def begun(self) -> bool:
        """Whether any process has come as far as to work."""
        return self._line.closed or self._line.poll()

    def close(self) -> None:
        for process in list(self._executor._processes.values()):  # from Python 3.14 on: kill_workers
            process.kill()
        self._line.close()
        self._executor.shutdown(cancel_futures=True)


class _Files:
    """What workers read, in a folder for temporary files."""

    def __init__(self, materials: Materials):
        self._folder = Path(tempfile.mkdtemp(prefix="workers-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.materials = self._folder / "materials.pt"
        _write(materials, self.materials)
        self._starts: dict[str, Path] = {}
        self._written = 0

    def of(self, start: Start) -> Path:
        if start.name not in self._starts:
            self._written += 1
            path = self._folder / f"start-{self._written}.pt"
            _write((start.name, start.candidates, start.removed), path)
            self._starts[start.name] = path
            if len(self._starts) > _FILES:
                self._starts.pop(next(iter(self._starts))).unlink()
        return self._starts[start.name]


def _write(thing: object, path: Path) -> None:
    try:
        torch.save(thing, path, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"the run cannot be brought to worker processes ({first_line(error)}): define its classes and functions at "
            "the top of a module, or set evaluator.workers=0"
        ) from error
    except (OSError, RuntimeError) as error:  # a full disk is either
        raise UserError(
            f"{path.parent} cannot be written to ({first_line(error)}): make room there, or name another folder with "
            "TMPDIR"
        ) from error


# ------------------------------------------------------------------------------------------------ in a worker


def _begin(line: Connection, threads: int) -> None:
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    torch.set_num_threads(threads)
    line.send(os.getpid())


def _end_with(line: Connection) -> None:
    """Ends this process when the other end of the line is closed or gone."""
    try:
        line.recv()
    except (EOFError, OSError):
        os._exit(0)


def _score(materials: Path, start: Path, repair: str, removed: Removed, floor: float) -> Score:
    _, bench = _bench(materials)
    return bench.score(_start(materials, start), repair, removed, floor)


@cache
def _bench(path: Path) -> tuple[Materials, Bench]:
    materials = _read(path)
    return materials, Bench(materials.scorer())


@lru_cache(maxsize=1)
def _start(materials: Path, path: Path) -> Start:
    return _bench(materials)[0].start(*_read(path))


def _read(path: Path) -> Any:
    """What `_write` wrote; its tensors are mapped from the file, and what is written to them stays here."""
    try:
        return torch.load(path, mmap=True, weights_only=False)
    except (AttributeError, ImportError) as error:
        raise UserError(
            f"a worker process cannot import what the run needs ({first_line(error)}): define it in a module, not in a "
            "notebook or a prompt, or set evaluator.workers=0"
        ) from error
