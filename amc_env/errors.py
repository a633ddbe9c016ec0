"""The one exception for a user's mistake."""


class UserError(ValueError):
    """What was asked cannot be done: one message with the value, what is allowed and the way out.

    Commands print it as one line and end with exit code 2; any other exception is a fault of ours and keeps
    its traceback.
    """
