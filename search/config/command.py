"""What all commands share: how mistakes end, and the command that resumes a run."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from importlib import resources
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from amc_env.errors import UserError, did_you_mean, first_line
from search import files, interrupts
from search.config import help

log = logging.getLogger(__name__)

INCOMPLETE = 1
USER_MISTAKE = 2
_INTERRUPTED = 130


class IncompleteError(Exception):
    """A run that ended without a part of what was asked for; the message is one line."""


OmegaConf.register_new_resolver("options", lambda: help.options(), replace=True)
OmegaConf.register_new_resolver("settings", help.settings, replace=True)
"""Of the help's templates in conf/."""


_NOISE = re.compile(r" Config search path:.*| full_key: \S*| object_type=\S*| See https://hydra\.cc.*")
"""What Hydra and OmegaConf add for people who look into their code."""


_UNKNOWN = re.compile(r"Could not find '([\w/]+)/([^/']+)'")
"""How Hydra refuses an option that there is not."""


_REPORTED = (UserError, IncompleteError, HydraException, OmegaConfBaseException)
"""What ends in one line."""


FAILURE = "failure.json"
"""In the folder of a sweep's job that failed: its error. Launchers run jobs in other processes, or on other machines."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_sweeps: list[Path] = []
"""Folders of the sweeps of this command."""
_made: list[Path] = []
"""Folders that Hydra makes for the run of this command: the run's, and those above it."""


Application = TypeVar("Application", bound=Callable[..., Any])


def application(function: Application) -> Application:
    """Decorates what `hydra.main` runs: a user's mistake ends it here, before Hydra adds lines of its own.

    A mistake in one job of a sweep lets the others run; `run_command` reports it at the end. The job's value is then 0,
    the lowest score: some sweepers end at a value that is no number.
    """

    @wraps(function)
    def guarded(cfg: DictConfig) -> Any:
        try:
            (run_folder() / FAILURE).unlink(missing_ok=True)
            _check_sections(cfg)
            return function(cfg)
        except Exception as error:
            refusal, hydra = _refusal(error), HydraConfig.get()
            if refusal is None:
                raise
            if hydra.mode != RunMode.MULTIRUN:
                code = _refused(refusal)
                _remove_refused()
                sys.exit(code)
            job = int(hydra.job.num)
            log.error("job %d: %s", job, _line(refusal))  # Hydra has printed its settings
            failure = {"job": job, "error": _line(refusal), "exit_code": _exit_code(refusal)}
            files.write(run_folder() / FAILURE, json.dumps(failure))
            return 0.0

    return cast(Application, guarded)


def _check_sections(cfg: DictConfig) -> None:
    known = [str(section) for section in hydra.compose(HydraConfig.get().job.config_name)]
    given = [str(section) for section in cfg]
    for section in set(known) - set(given):
        raise UserError("{field} is needed; see --help", code="missing", field=section)
    for section in set(given) - set(known):
        there = did_you_mean(section, known)
        raise UserError(f"unknown key {{field}}{there}", code="unknown_key", field=section)


def run_command(command: Callable[[], object]) -> int:
    """Runs a Hydra application; a user's mistake is one line on stderr.

    Returns:
        The exit code: 0, 1 where a part of what was asked for failed, 2 for a mistake of the user's, 130 after Ctrl-C,
        143 after SIGTERM.
    """
    if sys.argv[1:] == ["--version"]:
        print(f"amc-netadapt {version('amc-netadapt')}")  # noqa: T201
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed with a traceback
    began = time.time()
    _sweeps.clear()
    _made.clear()
    try:
        with interrupts.handled():
            _check_overrides(sys.argv[1:])
            sys.argv[1:] = _with_replaced_sections(sys.argv[1:])
            command()
    except BrokenPipeError:  # what read the output, like head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INCOMPLETE
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        return _refused(refusal)
    except KeyboardInterrupt as stopped:
        interrupts.cleaned_up()
        return stopped.exit_code if isinstance(stopped, interrupts.Stopped) else _INTERRUPTED
    return _sweep_result(began)


class Folders(Callback):
    """Looks after the folders that Hydra writes into; conf/base.yaml has Hydra call it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before anything is written."""
        folder = Path(config.hydra.run.dir)
        with suppress(OSError):  # a name that is too long, which Hydra itself comes to next
            self._prepare(folder)

    def _prepare(self, folder: Path) -> None:
        _made[:] = [path for path in (folder, *folder.parents) if not path.exists()]
        _remove_links(folder)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before anything is written."""
        folder = Path(config.hydra.sweep.dir)
        for one in (folder, *folder.glob("*/")):
            _remove_links(one)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folder of the sweep."""
        _sweeps.append(Path(config.hydra.sweep.dir))


def _remove_links(folder: Path) -> None:
    """Remove symbolic links in a run folder that Hydra's files or a run's folders would be written through.

    The folder may have been made by somebody else. Links to other files are replaced when those are written.
    """
    for path in (*folder.glob("*"), *folder.glob(".hydra/*"), *folder.glob("budgets/*")):
        in_the_way = path.is_dir() or path.suffix in (".log", ".yaml")
        if path.is_symlink() and in_the_way:
            log.warning("%s is a symbolic link; it is removed, and what it leads to is left as it is", path)
            path.unlink()


def _remove_refused() -> None:
    """Remove the folders that Hydra made for a run that was refused before it wrote anything of its own."""
    if not _made or any(path.name != ".hydra" and path.suffix != ".log" for path in _made[0].glob("*")):
        return
    shutil.rmtree(_made[0], ignore_errors=True)
    with suppress(OSError):  # another run's folder is in it
        for parent in _made[1:]:
            parent.rmdir()


def _sweep_result(began: float) -> int:
    """The exit code of a command that came to its end; errors of a sweep's jobs are printed.

    Args:
        began: When the command began, in seconds since the epoch: earlier sweeps in the folder may have failed.
    """
    found = [
        file for folder in _sweeps for file in folder.rglob(FAILURE) if file.stat().st_mtime >= began - 1
    ]
    failures = [json.loads(file.read_text(encoding="utf-8")) for file in found]
    for failure in sorted(failures, key=itemgetter("job")):
        print(f"error: job {failure['job']}: {failure['error']}", file=sys.stderr)  # noqa: T201 -- as `_refused`
    return max((failure["exit_code"] for failure in failures), default=0)


def _check_overrides(overrides: list[str]) -> None:
    """Refuses what Hydra takes for the current folder, choices of nothing, which end in a traceback, and dashes.

    Raises:
        UserError: Such an override.
    """
    groups, sections = _names()
    for override in overrides:
        option = re.fullmatch(r"--((\w+)[\w.]*)=(.*)", override)
        if option and option[2] in groups | sections:
            raise UserError(
                f"{override}: settings have no dashes; write {option[1]}={option[3]}", code="dashes"
            )
        name, _, value = override.lstrip("+").partition("=")
        nothing = value in ("", "''", '""', "null")
        if "=" in override and nothing and name in {"hydra.run.dir", "hydra.sweep.dir", *groups}:
            raise UserError(f"{override} chooses nothing; see --help", code="missing", field=name)


def _with_replaced_sections(overrides: list[str]) -> list[str]:
    """The overrides, where GROUP={_target_: ...} replaces the group's default; Hydra would merge the two."""
    groups, _ = _names()
    replaced = []
    for override in overrides:
        named = re.match(r"(\w+)=\{\s*_target_\s*:", override)
        replaced += [f"~{named[1]}", f"+{override}"] if named and named[1] in groups else [override]
    return replaced


def _names() -> tuple[set[str], set[str]]:
    """The groups of conf, and the names at the top of its files."""
    files = list(resources.files("conf").iterdir())
    texts = [file.read_text(encoding="utf-8") for file in files if file.name.endswith(".yaml")]
    sections = {name for text in texts for name in re.findall(r"^(\w+):", text, flags=re.MULTILINE)}
    return {file.name for file in files if file.is_dir()}, sections - {"defaults"}


def _refusal(error: Exception) -> Exception | None:
    """The error that is reported in one line; None for a fault of the project, which keeps its traceback."""
    if isinstance(error, _REPORTED):
        return error
    return None if isinstance(error, BrokenPipeError) else _of_the_file_system(error) or _of_memory(error)


def _of_the_file_system(error: BaseException) -> UserError | None:
    """The refusal of a file or folder, where that is what Hydra failed by when it made the run folder and its log."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or (cause.filename is None and cause.errno not in _FULL):
        return None
    name = cause.filename or "a file of the run"  # writing to an open file fails without its name
    return UserError(
        f"{name} cannot be used ({cause.strerror}); give another hydra.run.dir", code="unwritable"
    )


def _of_memory(error: BaseException) -> UserError | None:
    """The refusal of what needs more memory than there is, wherever that was."""
    from amc_env.system import out_of_memory  # PyTorch

    if not out_of_memory(error):
        return None
    return UserError(
        f"out of memory ({first_line(error)}): lower search.images, repair.images, evaluator.batch_size or "
        "finetune.batch_size",
        code="out_of_memory",
    )


def _refused(error: BaseException) -> int:
    print(f"error: {_line(error)}", file=sys.stderr)  # noqa: T201 -- the one line that a mistake ends with
    return _exit_code(error)


def _exit_code(error: BaseException) -> int:
    return INCOMPLETE if isinstance(error, IncompleteError) else USER_MISTAKE


def _line(error: BaseException) -> str:
    """The message in one line; Hydra says what was wrong in its own words and in those of its cause."""
    cause = error.__cause__ if isinstance(error, HydraException) else None
    for known in (error, cause):
        if isinstance(known, ConfigKeyError | ConfigAttributeError) and isinstance(
            known.parent_node, DictConfig
        ):
            there = [str(key) for key in known.parent_node if key not in ("hydra", "_target_")]
            return f"unknown key {known.full_key}{did_you_mean(str(known.key), there)}"
    if isinstance(error, MissingConfigException) and (chosen := _UNKNOWN.search(str(error))):
        return f"{chosen[1]}={chosen[2]} is unknown{did_you_mean(chosen[2], error.options or ())}"
    text = " ".join(str(e) for e in (error, cause) if e is not None)
    text = _NOISE.sub("", " ".join(text.split()))
    if not isinstance(error, OverrideParseException):
        return text
    name, _, value = str(error.override).partition("=")
    return f'{error.override} cannot be read: {text}; put such a value in quotes: "{name}={_quoted(value)}"'


@contextmanager
def resumable(go_on: str) -> Iterator[None]:
    """Say the command that resumes the run where it is stopped inside the block."""
    try:
        yield
    except KeyboardInterrupt:
        log.warning("stopped; all scores are kept, resume with: %s", go_on)
        raise


def run_folder() -> Path:
    """The folder of the run that Hydra began."""
    return Path(HydraConfig.get().runtime.output_dir)


def command_line(program: str, folder: Path | None = None) -> str:
    """The command that started this run; with ``folder``, the one that resumes it."""
    hydra = HydraConfig.get()
    overrides = [o for o in hydra.overrides.task if folder is None or not o.startswith("hydra.run.dir=")]
    if folder is not None:
        overrides.append(f"hydra.run.dir={_quoted(str(folder))}")
    return shlex.join([program, *overrides])


def _quoted(value: str) -> str:
    """A value in Hydra's quotes where its grammar would read more into it than text."""
    if re.fullmatch(r"[\w/.:+-]+", value, flags=re.ASCII):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
