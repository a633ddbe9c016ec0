"""The one exception for a user's mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any


class UserError(ValueError):
    """A request that cannot be met: the message gives the value, what is allowed and what to do.

    Commands print it as one line and end with exit code 2; any other exception is a fault of the project and keeps
    its traceback.

    Args:
        message: What is wrong; ``{field}`` in it stands for the field's path.
        code: See the attribute.
        field: See the attribute.

    Attributes:
        code: A short stable name of the kind of mistake, like ``out_of_range``. Tests and callers compare this instead of
            the message.
        field: Path of the setting that is wrong, like ``finetune.epochs``; empty where there is no single one.
        parts: The single mistakes, where several are reported at once; else the error itself.
    """

    def __init__(self, message: str, *, code: str, field: str = "") -> None:
        super().__init__(message.replace("{field}", field))
        self._message = message
        self.code = code
        self.field = field
        self.parts: tuple[UserError, ...] = (self,)

    def renamed(self, path: Callable[[str], str]) -> UserError:
        """The same error where the caller knows its settings by other paths; ``path`` gives the new one of each."""
        return UserError.join(
            UserError(part._message, code=part.code, field=path(part.field)) if part.field else part
            for part in self.parts
        )

    def inside(self, section: str) -> UserError:
        """The same error for settings that are part of a section, like ``finetune``."""
        return self.renamed(lambda field: f"{section}.{field}")

    @classmethod
    def join(cls, errors: Iterable[UserError]) -> UserError:
        """One error that reports several, each once."""
        parts = {str(part): part for error in errors for part in error.parts}
        first = next(iter(parts.values()))
        if len(parts) == 1:
            return first
        joined = cls("; ".join(parts), code=first.code, field=first.field)
        joined.parts = tuple(parts.values())
        return joined


def diverged(given: str) -> UserError:
    """The error for an agent that has learned weights which are not finite."""
    return UserError(
        f"{given}, and a finite pruning ratio is needed: the weights of the {{field}} are no longer finite; lower its "
        "learning rate",
        code="diverged",
        field="agent",
    )


@contextmanager
def reported_together() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Gives a function that makes a part, or None where it is refused; all refusals are raised at the end.

    Raises:
        UserError: Something was refused; with all mistakes.
    """
    refused: list[UserError] = []

    def attempt(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except UserError as error:
            refused.append(error)
            return None

    yield attempt
    if refused:
        raise UserError.join(refused)


def did_you_mean(given: str, there: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, and all."""
    near = get_close_matches(given, there, n=1)
    start = f": did you mean {near[0]}? There" if near else "; there"
    return f"{start} are {', '.join(there)}"


def out_of_range(field: str, value: object, allowed: str) -> UserError:
    """The error for a setting whose value is not allowed."""
    return UserError(f"{{field}}={value} must be {allowed}", code="out_of_range", field=field)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def require_packages(packages: Sequence[str], extra: str, wanted: str, way_out: str) -> None:
    """Refuses what needs optional packages where one is missing; none of them is imported.

    Args:
        packages: What would be imported.
        extra: The extra of this project that installs them.
        wanted: What needs them, like ``export to onnx``.
        way_out: What to do without.

    Raises:
        UserError: The missing packages with how to install them.
    """
    if missing := [package for package in packages if find_spec(package) is None]:
        install = f'pip install "amc-netadapt[{extra}]"'
        raise UserError(
            f"{wanted} needs {', '.join(missing)}: {install}, or {way_out}", code="missing_package"
        )


def missing_package(field: str, package: str, extra: str, error: Exception) -> UserError:
    """The error for a setting that needs an optional package.

    Args:
        field: The setting.
        package: What cannot be imported.
        extra: The extra of this project that installs it.
        error: Why it cannot be imported.
    """
    install = f'pip install "amc-netadapt[{extra}]"'
    return UserError(
        f"{{field}} needs {package}, which cannot be imported here ({first_line(error)}): {install}",
        code="missing_package",
        field=field,
    )
