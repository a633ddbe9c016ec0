"""The one exception for a user's mistake, and errors in one line."""

from __future__ import annotations

from collections.abc import Mapping


class UserError(ValueError):
    """What was asked cannot be done: one message with the value, what is allowed and the way out.

    Commands print it as one line and end with exit code 2; any other exception is a fault of ours and keeps
    its traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def require(checks: Mapping[str, tuple[bool, object, str]], section: str = "") -> None:
    """Raises one UserError with every setting that is out of range.

    Args:
        checks: Setting name to (whether it is fine, its value, what is allowed).
        section: What stands before every name, like ``criterion.``.
    """
    wrong = [
        f"{section}{name}={value} must be {allowed}"
        for name, (fine, value, allowed) in checks.items()
        if not fine
    ]
    if wrong:
        raise UserError("; ".join(wrong))
