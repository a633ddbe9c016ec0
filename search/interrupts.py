"""Ctrl-C and SIGTERM: a run ends after the candidate at hand; asked again, it ends at once.

Schedulers and containers send SIGTERM some time before they kill a process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The run was asked to end.

    Attributes:
        exit_code: As shells give it: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number


class _Asked:
    """How often this process was asked to end, and whether it is scoring a candidate."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.times = 0
        self.scoring = False
        self.waiting = 0  # number of the signal that waits for the candidate

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        if self.times > 2 or os.getpid() != self.process:  # while it ends, or in a worker of a data loader
            os._exit(128 + number)
        if self.scoring and self.times == 1:
            self.waiting = number
            return
        raise Stopped(number)


_asked = _Asked()


@contextmanager
def handled() -> Iterator[None]:
    """Turn the signals into `Stopped` inside the block.

    A signal that is ignored stays so, as in a shell's background. After a `Stopped` the handlers stay, so that a further
    signal ends the process while it cleans up.

    Raises:
        Stopped: A signal came; also where code that `Stopped` passed through raised another error because of it.
    """
    global _asked
    _asked = _Asked()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _asked)
    try:
        yield
    except Exception as error:
        if (stopped := _stopped_before(error)) is not None:
            raise stopped from None
        raise
    finally:
        if not _asked.times:
            for number, handler in before.items():
                signal.signal(number, handler)


def _stopped_before(error: BaseException | None) -> Stopped | None:
    """The `Stopped` during whose handling an error was raised, if there was one."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def cleaned_up() -> None:
    """Let a further signal end the process without a word, once nothing is left to clean up: Python itself ends."""
    for number in _SIGNALS:
        if signal.getsignal(number) is _asked:
            signal.signal(number, signal.SIG_DFL)


def scoring_starts() -> None:
    """Let signals wait for the candidate that is about to be scored."""
    _asked.scoring = True


def scoring_ends() -> None:
    """Raise the signal that waited, if there is one.

    Raises:
        Stopped: There is one.
    """
    _asked.scoring = False
    if _asked.waiting:
        raise Stopped(_asked.waiting)
