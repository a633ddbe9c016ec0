"""Where metrics go: a CSV file always, Weights & Biases or TensorBoard where asked.

Metrics are named with slashes (`episode/reward`, `best/reward`, `finetune/loss`). A row belongs to one phase: `finetune`
where its names start with `finetune/`, `search` otherwise; its step counts episodes in the one and epochs in the other.

A resumed search runs again from its seed and logs its rows again; a tracker recognises the rows it has by phase and step.
A failing tracker does not end a search: W&B warns once and stops.
"""

from __future__ import annotations

import csv
import io
import logging
import netrc
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import urlsplit

from amc_env.errors import UserError
from search import files

if TYPE_CHECKING:
    from PIL.Image import Image as Pixels

logger = logging.getLogger(__name__)


Scalar = float | int | str | bool | None


Row = tuple[str, int]  # phase, step


STEP_AXIS = {"search": "episode", "finetune": "epoch"}


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show.

    Attributes:
        figures: Final figures under slash names.
        titles: Of the columns of `layers`.
        layers: A row for each layer: channels, weights and MACs, before and after.
        pictures: PNG files of the report.
        files: The network and what describes it.
    """

    figures: Mapping[str, Scalar]
    titles: Sequence[str] = ()
    layers: Sequence[Sequence[str]] = ()
    pictures: Sequence[Path] = ()
    files: Sequence[Path] = ()


class Tracker(Protocol):
    """Takes the metrics of a run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one row: all metrics of one episode (from 0) or of one fine-tuning epoch (from 0)."""

    def outcome(self, outcome: Outcome) -> None:
        """Record how the run ended, once."""

    def close(self) -> None:
        """Flush and close; no further calls are allowed."""


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
    """Ignores metrics: `tracker=none`, where only metrics.csv is written."""

    def __init__(self, folder: str | Path | None = None) -> None:
        del folder

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        del metrics, step

    def outcome(self, outcome: Outcome) -> None:
        del outcome

    def close(self) -> None:
        pass


class CsvTracker(NoTracker):
    """`metrics.csv` in the run folder: columns phase, step, then every metric in the order of its first appearance.

    Each row is on disk when `log` returns. A row that the file already holds is left alone where it is the same and
    replaced in its place where not, so a resumed run ends with the file of an uninterrupted one. A row without a line
    end, which a kill left incomplete, is dropped on opening.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = ["phase", "step"]
        self._rows: dict[Row, dict[str, str]] = {}
        if self.path.exists():
            with files.reading(self.path, "delete it, and a resumed run writes it again"):
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
            with files.writing(self.path), self.path.open("a", newline="") as file:
                file.write(self._line(row))

    def _load(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(complete))
        self._columns = list(reader.fieldnames or self._columns)
        for cells in reader:
            if None in cells:
                raise ValueError(f"line {reader.line_num} has more cells than there are columns")
            # A metric that a row lacks is an empty cell; a nan is written as 'nan'.
            row = {name: cell for name, cell in cells.items() if cell}
            self._rows[row["phase"], int(row["step"])] = row

    def _write_all(self) -> None:
        rows = [dict(zip(self._columns, self._columns, strict=True)), *self._rows.values()]
        files.write(self.path, "".join(self._line(row) for row in rows))

    def _line(self, row: Mapping[str, str]) -> str:
        buffer = io.StringIO()
        csv.DictWriter(buffer, self._columns, lineterminator="\n").writerow(row)
        return buffer.getvalue()


class WandbTracker:
    """A Weights & Biases run whose files are under `<folder>/wandb`.

    The run's id is kept in `<folder>/wandb_id.txt`, so a resumed search continues the same W&B run. Under a W&B sweep
    agent the run is the agent's (WANDB_RUN_ID). Only rows that the run does not have are logged. W&B says which it has;
    offline it cannot, so the last step of each phase stands beside the id. A resumed search then adds a second set of
    files for `wandb sync <folder>/wandb`.

    Any failure in W&B (not installed, no account, no answer, a full disk) is reported once as a warning; from then on
    this tracker does nothing.
    """

    def __init__(
        self,
        folder: str | Path,
        project: str = "amc-netadapt",
        name: str | None = None,
        mode: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Start the folder's run, or continue it.

        Args:
            folder: the run folder.
            project: W&B project.
            name: display name; W&B invents one where None.
            mode: 'online', 'offline' or 'disabled'; None takes WANDB_MODE where set, else online where an API key is
                configured and offline otherwise.
            group: of runs that W&B shows together, like the seeds of one experiment.
            tags: to filter runs by.
            config: the resolved configuration, to be shown with the run.
            timeout_s: the longest wait, in seconds, for W&B to start, to log in, and to upload at the end.
        """
        self.folder = Path(folder)
        self.run: Any = None
        self._alive = True
        self._last: dict[str, int] = {}  # phase -> the last step that W&B has
        self._note = _Note(self.folder / "wandb_id.txt")
        shown = {
            "project": project,
            "name": name,
            "group": group,
            "tags": list(tags),
            "config": dict(config or {}),
        }
        self._guard(lambda: self._start(shown, mode, timeout_s))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        phase = phase_of(metrics)
        if step > self._last.get(phase, -1):
            self._guard(lambda: self._log(phase, metrics, step))

    def outcome(self, outcome: Outcome) -> None:
        self._guard(lambda: self._outcome(outcome))

    def close(self) -> None:
        self._guard(lambda: self.run.finish())
        self._alive = False

    def _outcome(self, outcome: Outcome) -> None:
        import wandb

        self.run.summary.update(dict(outcome.figures))
        shown: dict[str, Any] = {
            f"plots/{picture.stem}": wandb.Image(_opened(picture)) for picture in outcome.pictures
        }
        if outcome.layers:
            shown["layers"] = wandb.Table(list(outcome.titles), [list(row) for row in outcome.layers])
        if shown:
            self.run.log(shown)
        if outcome.files:
            artifact = wandb.Artifact(f"network-{self.run.id}", "model", metadata=dict(outcome.figures))
            for path in outcome.files:
                artifact.add_file(str(path))
            self.run.log_artifact(artifact)

    def _log(self, phase: str, metrics: Mapping[str, float], step: int) -> None:
        self.run.log({STEP_AXIS[phase]: step, **metrics})
        self._last[phase] = step
        self._note.write(self.run.id, self._last)

    def _guard(self, call: Callable[[], object]) -> None:
        if not self._alive:
            return
        try:
            call()
        # W&B may raise anything, and none of it is worth the search.
        except Exception as error:
            self._alive = False
            logger.warning(
                "W&B failed and is off for the rest of this run (metrics.csv is still written): %s",
                _one_line(error),
            )

    def _start(self, shown: Mapping[str, Any], mode: str | None, timeout_s: float) -> None:
        import wandb

        known, last = self._note.read()
        chosen: Any = mode or os.environ.get("WANDB_MODE") or ("online" if _has_key(wandb) else "offline")
        self.run = wandb.init(
            dir=str(self.folder.resolve()),
            id=_run_id(known),
            resume="allow",
            reinit="create_new",  # several runs in one process: a multirun
            mode=chosen,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=timeout_s,
                login_timeout=timeout_s,
                finish_timeout=timeout_s,
            ),
            **shown,
        )
        offline = self.run.settings.mode == "offline"
        if offline and self.run.id == known:
            self._last |= last
        for phase, axis in STEP_AXIS.items():
            if (last := self.run.summary.get(axis)) is not None:
                self._last[phase] = int(last)
            self.run.define_metric(axis, hidden=True)
            for prefix in ("episode", "best", "agent") if phase == "search" else ("finetune",):
                self.run.define_metric(f"{prefix}/*", step_metric=axis)
        self._note.write(self.run.id, self._last)
        if offline:
            logger.info("W&B is offline; upload with: wandb sync %s", self.folder / "wandb")


class TensorboardTracker(NoTracker):
    """TensorBoard event files under `<folder>/tensorboard`.

    A resumed run logs all its rows again, so earlier event files are removed: TensorBoard would show each step twice.
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
                'pip install "amc-netadapt[tensorboard]", or choose tracker=none or tracker=wandb',
                code="missing_package",
                field="tracker",
            ) from error
        events = Path(folder) / "tensorboard"
        shutil.rmtree(events, ignore_errors=True)
        with files.writing(events):
            self._writer = SummaryWriter(log_dir=str(events), flush_secs=10)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        phase_of(metrics)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def outcome(self, outcome: Outcome) -> None:
        import numpy as np

        figures = "\n".join(f"- {name}: {value}" for name, value in outcome.figures.items())
        self._writer.add_text("summary", figures)
        if outcome.layers:
            lines = (outcome.titles, ["---"] * len(outcome.titles), *outcome.layers)
            self._writer.add_text("layers", "\n".join(f"| {' | '.join(line)} |" for line in lines))
        for picture in outcome.pictures:
            self._writer.add_image(f"plots/{picture.stem}", np.asarray(_opened(picture)), dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """Several trackers as one; each gets every call, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def outcome(self, outcome: Outcome) -> None:
        for tracker in self.trackers:
            tracker.outcome(outcome)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Note:
    """The run's id, and the last step of each phase that was logged: a line each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[str | None, dict[str, int]]:
        """The id and the steps; None and nothing where there is no note."""
        if not self._path.exists():
            return None, {}
        known, *rows = self._path.read_text(encoding="utf-8").splitlines() or [""]
        return known.strip() or None, {phase: int(step) for phase, step in map(str.split, rows)}

    def write(self, run_id: str, last: Mapping[str, int]) -> None:
        """Replace the note."""
        rows = "".join(f"{phase} {step}\n" for phase, step in last.items())
        files.write(self._path, f"{run_id}\n{rows}")


def _run_id(known: str | None) -> str | None:
    """The run to continue: a sweep agent's own, else the folder's, else the one that the environment names."""
    given = os.environ.get("WANDB_RUN_ID")
    return given if given and os.environ.get("WANDB_SWEEP_ID") else known or given


def _opened(picture: Path) -> Pixels:
    """A PNG file's image; a file of another kind under such a name is not given to Pillow's other decoders."""
    from PIL import Image

    with Image.open(picture, formats=("PNG",)) as image:
        return image.convert("RGB")


def _has_key(wandb: Any) -> bool:
    """Whether W&B has an API key without asking for one."""
    settings = wandb.setup(wandb.Settings(silent=True)).settings  # also its remark on a package called agents
    if settings.api_key:
        return True
    try:
        accounts = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return accounts.authenticators(urlsplit(settings.base_url).netloc) is not None


def _number(value: float) -> str:
    return repr(value) if isinstance(value, int | str) else repr(float(value))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
