"""The journal: every evaluation of a run on disk, so that a killed run can be resumed.

evaluations.jsonl starts with a header (what the evaluations depend on), then one flushed line per unique
evaluation in the order of proposals. A run started again in the same folder runs its agent from the seed;
what the agent asks for is read back here instead of scored. Between evaluations stand the hashes of weights that
the run keeps in files. Every line ends with a checksum; a damaged one is scored again, in its place.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any, Self

from pydantic import Field

from amc_env.errors import UserError
from amc_env.evaluation.evaluator import Key
from amc_env.space import SearchSpace, Trial
from amc_env.validation import Count, Listed, Natural, settings
from search import files, interrupts

log = logging.getLogger(__name__)


FILE = "evaluations.jsonl"
_WEIGHTS = "weights"


@settings
class _Line:
    """The line of an evaluation; see `Trial`."""

    number: Count
    start: str
    repair: str
    removed: Listed[Natural]
    score: float
    costs: Annotated[dict[str, float], Field(min_length=1)]
    met: bool
    reward: float | None
    seconds: dict[str, float]


class Journal:
    """The evaluator's memory, kept in a run folder.

    Args:
        folder: The run folder; created where it is missing.
        header: What evaluations depend on: configuration, fingerprints, threads, layout, versions.
        space: Reads strategies back.
        may_grow: Dotted names of header entries that may be larger than they were.
        ordered: Whether evaluations will be asked for in the order of the file; if not, none is missed.

    Raises:
        UserError: Another run holds the folder, the file cannot be read or written, its header is damaged, or the
            header differs (every difference is named).
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        space: SearchSpace,
        *,
        may_grow: tuple[str, ...] = (),
        ordered: bool = True,
    ):
        files.make_folder(folder)
        self._lock = _locked(folder)
        files.sweep(folder)
        self._path = folder / FILE
        self._space = space
        self._known: dict[Key, Trial] = {}
        self._replay: list[Key] = []
        self._asked = 0
        self._warned = False
        self._hashes: dict[str, str] = {}
        self._lost: list[int] = []  # numbers of damaged lines, from 0
        try:
            self._lines = self._read()
            if self._lines:
                _check(self._header(), header, may_grow, folder)
            self._remember(self._lines[1:])
            self._lines[:1] = [files.sealed({"header": dict(header)}).encode()]
            self._write_back()
            with files.writing(self._path):
                self._file: IO[bytes] = self._path.open("ab")
        except BaseException:
            self._lock.close()
            raise
        self._found = len(self._known)
        if not ordered:
            self._replay.clear()

    def _header(self) -> Mapping[str, Any]:
        """What the file's evaluations depend on.

        Raises:
            UserError: Its line is damaged.
        """
        header = (files.unsealed(self._lines[0]) or {}).get("header")
        if not isinstance(header, Mapping):
            raise UserError(
                f"{self._path} is damaged in its first line, which says what its scores depend on; give another "
                "hydra.run.dir, or remove it to start over",
                code="damaged",
            )
        return header

    def _remember(self, lines: Sequence[bytes]) -> None:
        for number, line in enumerate(lines, start=1):
            entry = files.unsealed(line) or {}
            if _WEIGHTS in entry:
                self._hashes[entry[_WEIGHTS]] = entry["sha256"]
                continue
            try:
                trial = self._trial(entry)
            except (UserError, AssertionError):
                self._lost.append(number)
                continue
            key = Key(trial.start, trial.repair, trial.removed)
            self._known[key] = trial
            if not self._replay or key.repair == self._replay[0].repair:  # finalists come after the search
                self._replay.append(key)
        if self._lost:
            numbers = ", ".join(str(number + 1) for number in self._lost)
            log.warning("damaged lines of %s are scored again: %s", self._path, numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of evaluations on file."""
        return len(self._known)

    @property
    def replayed(self) -> int:
        """Evaluations that were there when the run began."""
        return self._found

    def get(self, key: Key, /) -> Trial | None:
        """The trial of an evaluation, or None where it is not known yet."""
        if self._asked < len(self._replay) and key == self._replay[self._asked]:
            self._asked += 1
        known = self._known.get(key)
        if known is None:
            interrupts.scoring_starts()
        return known

    def __contains__(self, key: Key, /) -> bool:
        """Whether an evaluation is on file."""
        return key in self._known

    def __setitem__(self, key: Key, trial: Trial, /) -> None:
        """Keep a trial; it is on disk when this returns.

        Raises:
            Stopped: The run was asked to end while the trial was scored.
        """
        self._known[key] = trial
        if self._lost:
            number = 1 + sum(b'"number": ' in line for line in self._lines[: self._lost[0]])
            trial = replace(trial, number=number)
        else:
            self._warn_of_another_way(key)
        self._keep(_line(trial))
        interrupts.scoring_ends()

    def weights_hash(self, name: str) -> str | None:
        """The SHA-256 of a file of weights; None where it is not known."""
        return self._hashes.get(name)

    def keep_weights_hash(self, name: str, digest: str) -> None:
        """Keep the SHA-256 of a file of weights."""
        if self._hashes.get(name) != digest:
            self._hashes[name] = digest
            self._keep({_WEIGHTS: name, "sha256": digest})

    def _warn_of_another_way(self, key: Key) -> None:
        other_way = self._asked < len(self._replay) and key.repair == self._replay[0].repair
        if other_way and not self._warned:
            self._warned = True
            log.warning(
                "the run differs from the journal after %d of %d evaluations (hardware that does "
                "not repeat results to the bit?); new strategies are scored",
                self._asked,
                len(self._replay),
            )

    def _keep(self, entry: Mapping[str, Any]) -> None:
        """Write an entry over the first damaged line, as what is missed comes in the order of the file; else at the end."""
        line = files.sealed(entry).encode()
        if self._lost:
            self._lines[self._lost.pop(0)] = line
            self._file.close()
            self._write_back()
            self._file = self._path.open("ab")
            return
        self._lines.append(line)
        with files.writing(self._path):
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Close the file and release the folder."""
        self._file.close()
        self._lock.close()

    def _read(self) -> list[bytes]:
        if not self._path.exists():
            return []
        with files.reading(self._path, "give another hydra.run.dir"):
            *whole, torn = self._path.read_bytes().split(b"\n")
        if torn:
            log.warning("dropped a torn last line of %s", self._path)
        return [line + b"\n" for line in whole]

    def _write_back(self) -> None:
        files.write(self._path, b"".join(self._lines))

    def _trial(self, line: Mapping[str, Any]) -> Trial:
        """The trial of a line.

        Raises:
            UserError: The line is no evaluation of this network.
        """
        _Line(**line)
        reward = line["reward"]
        return Trial(
            number=line["number"],
            strategy=self._space.strategy(line["removed"]),
            start=line["start"],
            repair=line["repair"],
            score=line["score"],
            costs=line["costs"],
            met=line["met"],
            reward=-math.inf if reward is None else reward,
            seconds=line["seconds"],
        )


def _line(trial: Trial) -> dict[str, Any]:
    """A trial as a JSON object; a reward of minus infinity is null."""
    return {
        "number": trial.number,
        "start": trial.start,
        "repair": trial.repair,
        "removed": list(trial.removed),
        "score": trial.score,
        "costs": dict(trial.costs),
        "met": trial.met,
        "reward": trial.reward if math.isfinite(trial.reward) else None,
        "seconds": dict(trial.seconds),
    }


def _locked(folder: Path) -> IO[str]:
    path = folder / ".lock"
    with files.writing(path):
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise UserError(
                f"another run is using {folder}; wait for it, or give another hydra.run.dir", code="in_use"
            ) from error
    return file


def _check(
    before: Mapping[str, Any], now: Mapping[str, Any], may_grow: tuple[str, ...], folder: Path
) -> None:
    old, new = dict(files.flat(before)), dict(files.flat(now))
    problems = []
    for key in sorted(old.keys() | new.keys()):
        was, is_now = old.get(key), new.get(key)
        grown = key in may_grow and was is not None and is_now is not None and is_now >= was
        if was != is_now and not grown:
            note = " (may only grow)" if key in may_grow else ""
            problems.append(f"{key}: {was} then, {is_now} now{note}")
    if problems:
        raise UserError(
            f"the run in {folder} was started with another configuration: {'; '.join(problems)}. Start it with "
            "the old one, or give another hydra.run.dir",
            code="other_configuration",
        )
