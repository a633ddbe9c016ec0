"""The one exception for a user's mistake, and errors in one line."""


class UserError(ValueError):
    """What was asked cannot be done: one message with the value, what is allowed and the way out.

    Commands print it as one line and end with exit code 2; any other exception is a fault of ours and keeps
    its traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
