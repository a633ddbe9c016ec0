"""The journal: every evaluation of a run on disk, so that a killed run can be resumed.

evaluations.jsonl starts with a header (what the evaluations depend on), then one flushed line per unique
evaluation in the order of proposals. A run started again in the same folder runs its agent from the seed;
what the agent asks for is read back here instead of scored.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from amc_env.errors import UserError
from amc_env.evaluation.evaluator import Key
from amc_env.space import SearchSpace, Trial
from search import files

log = logging.getLogger(__name__)


FILE = "evaluations.jsonl"


class Journal:
    """The evaluator's memory, kept in a run folder.

    Args:
        folder: The run folder; created where it is missing.
        header: What evaluations depend on: configuration, fingerprints, threads, layout, versions.
        space: Reads strategies back.
        may_grow: Dotted names of header entries that may be larger than they were.
        ordered: Whether evaluations will be asked for in the order of the file; if not, none is missed.

    Raises:
        UserError: Another run holds the folder, the file is damaged, or the header differs (every difference
            is named).
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
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        self._path = folder / FILE
        self._space = space
        self._known: dict[Key, Trial] = {}
        self._replay: list[Key] = []
        self._asked = 0
        self._warned = False
        try:
            lines = self._read()
            if lines:
                _check(lines[0].get("header", {}), header, may_grow, folder)
            self._remember(lines[1:])
        except BaseException:
            self._lock.close()
            raise
        self._found = len(self._known)
        if not ordered:
            self._replay.clear()
        self._write_back([{"header": dict(header)}, *lines[1:]])
        self._file: IO[str] = self._path.open("a", encoding="utf-8")

    def _remember(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for number, line in enumerate(lines, start=2):
            try:
                trial = self._trial(line)
            except (KeyError, TypeError, ValueError, AssertionError) as error:
                raise self._damaged(f"line {number} is no evaluation of this network") from error
            key = Key(trial.start, trial.repair, trial.removed)
            self._known[key] = trial
            if not self._replay or key.repair == self._replay[0].repair:  # finalists come after the search
                self._replay.append(key)

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
        return self._known.get(key)

    def __setitem__(self, key: Key, trial: Trial, /) -> None:
        """Keep a trial; it is on disk when this returns."""
        other_way = self._asked < len(self._replay) and key.repair == self._replay[0].repair
        if other_way and not self._warned:
            self._warned = True
            log.warning(
                "the run differs from the journal after %d of %d evaluations (hardware that does "
                "not repeat results to the bit?); new strategies are scored",
                self._asked,
                len(self._replay),
            )
        self._known[key] = trial
        self._file.write(json.dumps(_line(trial)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file and release the folder."""
        self._file.close()
        self._lock.close()

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        raw = self._path.read_text(encoding="utf-8").split("\n")
        whole, torn = raw[:-1], raw[-1]
        if torn:
            log.warning("dropped a torn last line of %s", self._path)
        try:
            lines = [json.loads(line) for line in whole]
        except json.JSONDecodeError as error:
            raise self._damaged(str(error)) from error
        if not all(isinstance(line, dict) for line in lines):
            raise self._damaged("a line is no object")
        return lines

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"{self._path} is damaged ({reason}); give another hydra.run.dir, or remove it to start over"
        )

    def _write_back(self, lines: list[dict[str, Any]]) -> None:
        files.write(self._path, "".join(json.dumps(line) + "\n" for line in lines))

    def _trial(self, line: Mapping[str, Any]) -> Trial:
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
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(
            f"another run is using {folder}; wait for it, or give another hydra.run.dir"
        ) from error
    return file


def _check(
    before: Mapping[str, Any], now: Mapping[str, Any], may_grow: tuple[str, ...], folder: Path
) -> None:
    old, new = dict(_flat(before)), dict(_flat(now))
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
            "the old one, or give another hydra.run.dir"
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
