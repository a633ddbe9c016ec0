"""Where metrics go: a CSV file always, Weights & Biases or TensorBoard where asked.

Metrics are named with slashes (`episode/reward`, `best/reward`, `finetune/loss`). A row belongs to one phase: `finetune`
where its names start with `finetune/`, `search` otherwise; its step counts episodes in the one and epochs in the other.

A resumed search runs again from its seed and logs its rows again, so every tracker recognises a row it already holds by
(phase, step). Metrics are not worth a search: a tracker outside our own process (W&B) warns once and falls silent.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from amc_env.errors import UserError

logger = logging.getLogger(__name__)


Scalar = float | int | str | bool | None


Row = tuple[str, int]  # phase, step


STEP_AXIS = {"search": "episode", "finetune": "epoch"}


class Tracker(Protocol):
    """Takes the metrics of a run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one row: all metrics of one episode (from 0) or of one fine-tuning epoch (from 0)."""

    def summary(self, values: Mapping[str, Scalar]) -> None:
        """Record the final figures of the run, once, under slash names."""

    def image(self, name: str, path: Path) -> None:
        """Record a picture (PNG) under a slash name."""

    def close(self) -> None:
        """Flush and let go; further calls are not allowed."""


def phase_of(metrics: Mapping[str, float]) -> str:
    """The phase that a row of metrics belongs to: `search` or `finetune`.

    Raises:
        ValueError: if the row is empty, or mixes metrics of both phases (their steps count different things).
    """
    phases = {"finetune" if name.startswith("finetune/") else "search" for name in metrics}
    if len(phases) != 1:
        raise ValueError(
            f"one row of metrics belongs to one phase, but these names belong to {len(phases)}: {sorted(metrics)}; "
            "log the names that start with 'finetune/' in a call of their own"
        )
    return phases.pop()


class NoTracker:
    """Takes metrics and forgets them: `tracker=none`, with the CSV file beside it."""

    def __init__(self, folder: str | Path | None = None) -> None:
        del folder

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        del metrics, step

    def summary(self, values: Mapping[str, Scalar]) -> None:
        del values

    def image(self, name: str, path: Path) -> None:
        del name, path

    def close(self) -> None:
        pass


class CsvTracker(NoTracker):
    """`metrics.csv` in the run folder: columns phase, step, then every metric in the order of its first appearance.

    Each row is on disk when `log` returns. A row that the file already holds is left alone where it is the same and
    replaced in its place where not, so a resumed run ends with the file of a run that was never cut. A row torn by a
    kill (no line end) is dropped on opening.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = ["phase", "step"]
        self._rows: dict[Row, dict[str, str]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._load()
        self._write_all()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        phase = phase_of(metrics)
        row = {"phase": phase, "step": str(step)} | {name: _number(value) for name, value in metrics.items()}
        known = self._rows.get((phase, step))
        if row == known:
            return
        self._rows[phase, step] = row
        new = [name for name in row if name not in self._columns]
        self._columns += new
        if new or known is not None:
            self._write_all()
        else:
            with self.path.open("a", newline="") as file:
                file.write(self._line(row))

    def _load(self) -> None:
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole))
        self._columns = list(reader.fieldnames or self._columns)
        for cells in reader:
            # A metric that a row lacks is an empty cell; a nan is written as 'nan'.
            row = {name: cell for name, cell in cells.items() if cell}
            self._rows[row["phase"], int(row["step"])] = row

    def _write_all(self) -> None:
        scratch = self.path.with_suffix(".csv.tmp")
        rows = [dict(zip(self._columns, self._columns, strict=True)), *self._rows.values()]
        scratch.write_text("".join(self._line(row) for row in rows), newline="")
        scratch.replace(self.path)

    def _line(self, row: Mapping[str, str]) -> str:
        buffer = io.StringIO()
        csv.DictWriter(buffer, self._columns, lineterminator="\n").writerow(row)
        return buffer.getvalue()


class WandbTracker:
    """A Weights & Biases run whose files lie under `<folder>/wandb`.

    The run's id is kept in `<folder>/wandb_id.txt`; a resumed search keeps it. What the run already holds is read from
    the run files themselves rather than from a note of ours: after a kill the files may lack rows that were handed over
    (W&B writes them from another process), and only they know. Rows keep counting where the files end, so that the
    pieces of one run are uploaded in order by `wandb sync <folder>/wandb`.

    Whatever goes wrong in W&B (not installed, no account, no answer, a full disk) is reported once as a warning; from then on
    this tracker does nothing.
    """

    def __init__(
        self,
        folder: str | Path,
        project: str = "amc-netadapt",
        name: str | None = None,
        mode: str | None = None,
        config: Mapping[str, Any] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Start the run, or go on with the folder's.

        Args:
            folder: the run folder.
            project: W&B project.
            name: display name; W&B invents one where None.
            mode: 'online', 'offline' or 'disabled'; None takes WANDB_MODE where set, else online where an API key is
                configured and offline otherwise.
            config: the resolved configuration, to be shown with the run.
            timeout_s: the longest wait, in seconds, for W&B to start, to log in, and to upload at the end.
        """
        self.folder = Path(folder)
        self.run: Any = None
        self._alive = True
        self._id = ""
        self._next = 0
        self._logged: set[Row] = set()
        self._settings: dict[str, Any] = {
            "project": project,
            "name": name,
            "mode": mode,
            "config": dict(config or {}),
        }
        self._timeout_s = timeout_s
        self._guard(self._start)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        row = (phase_of(metrics), step)
        if row not in self._logged:
            self._guard(lambda: self._log(metrics, row))

    def summary(self, values: Mapping[str, Scalar]) -> None:
        self._guard(lambda: self.run.summary.update(dict(values)))

    def image(self, name: str, path: Path) -> None:
        # Kept as a file of the run: a logged image would take a step of its own on every resumption.
        self._guard(lambda: self._save(Path(self.run.dir) / f"{name}{path.suffix}", path))

    def close(self) -> None:
        self._guard(self._finish)
        self._alive = False

    def _guard(self, call: Callable[[], object]) -> None:
        if not self._alive:
            return
        try:
            call()
        # W&B may raise anything, and none of it is worth the search.
        except Exception as error:
            self._alive = False
            logger.warning(
                "W&B failed and is off for the rest of this run (metrics.csv goes on): %s", _one_line(error)
            )

    def _start(self) -> None:
        import wandb

        self._id = self._run_id()
        self._logged, self._next = _read_back(self.folder, self._id)
        self.run = wandb.init(
            dir=str(self.folder.resolve()),
            id=self._id,
            resume="allow",
            reinit="create_new",  # several runs in one process: a multirun
            project=self._settings["project"],
            name=self._settings["name"],
            config=self._settings["config"],
            mode=self._settings["mode"] or os.environ.get("WANDB_MODE") or _default_mode(),
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=self._timeout_s,
                login_timeout=self._timeout_s,
                finish_timeout=self._timeout_s,
                x_transaction_log_flush_interval=1.0,  # seconds that a kill can cost; 15 by default
            ),
        )
        for phase, axis in STEP_AXIS.items():
            self.run.define_metric(axis, hidden=True)
            for prefix in ("episode", "best", "search") if phase == "search" else ("finetune",):
                self.run.define_metric(f"{prefix}/*", step_metric=axis)
        if self.run.settings.mode == "offline":
            logger.info("W&B is offline; upload with: wandb sync %s", self.folder / "wandb")

    def _log(self, metrics: Mapping[str, float], row: Row) -> None:
        phase, step = row
        self.run.log({STEP_AXIS[phase]: step, **metrics}, step=self._next, commit=True)
        self._logged.add(row)
        self._next += 1

    def _save(self, kept: Path, path: Path) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept)
        self.run.save(str(kept), base_path=self.run.dir, policy="now", glob=False)

    def _finish(self) -> None:
        self.run.finish()
        # Offline, W&B's process acknowledges before it has written the file; a run that goes on at once must find it whole.
        deadline = time.monotonic() + 5.0
        while self.run.settings.mode == "offline" and time.monotonic() < deadline:
            if self._logged <= _read_back(self.folder, self._id)[0]:
                return
            time.sleep(0.02)

    def _run_id(self) -> str:
        note = self.folder / "wandb_id.txt"
        if note.exists() and (known := note.read_text().strip()):
            return known
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = secrets.token_hex(4)
        note.write_text(fresh + "\n")
        return fresh


class TensorboardTracker(NoTracker):
    """TensorBoard event files under `<folder>/tensorboard`.

    A resumed run logs all its rows again, so it starts its event files anew: TensorBoard would draw a step twice.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the event file.

        Raises:
            UserError: if TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"tracker=tensorboard needs TensorBoard, which cannot be imported here ({error}): "
                'pip install "amc-netadapt[tensorboard]", or choose tracker=none or tracker=wandb'
            ) from error
        events = Path(folder) / "tensorboard"
        shutil.rmtree(events, ignore_errors=True)
        self._writer = SummaryWriter(log_dir=str(events), flush_secs=10)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        phase_of(metrics)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def summary(self, values: Mapping[str, Scalar]) -> None:
        self._writer.add_text("summary", "\n".join(f"- {name}: {value}" for name, value in values.items()))

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """Several trackers as one; each gets every call, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def summary(self, values: Mapping[str, Scalar]) -> None:
        for tracker in self.trackers:
            tracker.summary(values)

    def image(self, name: str, path: Path) -> None:
        for tracker in self.trackers:
            tracker.image(name, path)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def logged_rows(folder: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """The rows that the run files under `<folder>/wandb` hold for a run, in the order they were logged.

    Yields:
        name -> value, W&B's own `_step`, `_timestamp` (s) and `_runtime` (s) included.

    Raises:
        ValueError: if a run file is not in the format that this reader knows.
    """
    from wandb.proto import wandb_internal_pb2

    for path in sorted((folder / "wandb").glob(f"*run-*-{run_id}*/run-{run_id}.wandb")):
        for body in _log_records(path.read_bytes(), path):
            record = wandb_internal_pb2.Record.FromString(body)
            if record.WhichOneof("record_type") == "history":
                yield {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }


def _read_back(folder: Path, run_id: str) -> tuple[set[Row], int]:
    """The rows of a run that W&B already holds, and the step that its next row gets."""
    logged: set[Row] = set()
    following = 0
    for values in logged_rows(folder, run_id):
        logged |= {(phase, int(values[axis])) for phase, axis in STEP_AXIS.items() if axis in values}
        following = max(following, int(values.get("_step", following)) + 1)
    return logged, following


def _log_records(raw: bytes, path: Path) -> Iterator[bytes]:
    """Split a .wandb file, which is a LevelDB log after a header of 7 bytes, into its records.

    Blocks of 32 KiB hold pieces with a header of checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle,
    4: last). A torn end, as a kill leaves it, ends the iteration.
    """
    if raw and not raw.startswith(b":W&B"):
        raise ValueError(
            f"{path} does not start as a W&B run file does; move it away to start the run's files anew"
        )
    position, record, header = 7, b"", 7
    while position + header <= len(raw):
        room = 32768 - position % 32768
        if room < header:  # too short for a header: padding
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, position)
        piece = raw[position + header : position + header + length]
        if kind == 0 or len(piece) < length:
            return
        position += header + length
        record += piece
        if kind in (1, 4):
            yield record
            record = b""


def _default_mode() -> str:
    """'online' where W&B would find an API key without asking for one, else 'offline'."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    key = settings.api_key or wbauth.read_netrc_auth(host=settings.base_url)
    return "online" if key else "offline"


def _number(value: float) -> str:
    return repr(value) if isinstance(value, int | str) else repr(float(value))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
