"""Signals wait for the candidate at hand, and a second one does not."""

import os
import signal
from collections.abc import Iterator

import pytest

from search import interrupts
from search.interrupts import Stopped, handled


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """SIGINT as on a terminal: where the tests run in a shell's background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_candidate(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    scored = False
    with pytest.raises(Stopped) as stopped, handled():
        interrupts.scoring_starts()
        os.kill(os.getpid(), number)
        scored = True
        interrupts.scoring_ends()
    assert scored
    assert stopped.value.exit_code == code
    signal.signal(number, before)


def test_a_second_signal_does_not_wait() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped), handled():
        interrupts.scoring_starts()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def test_without_a_signal_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with handled():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with handled():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


def test_after_cleaning_up_a_signal_ends_the_process_by_itself() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped), interrupts.handled():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) not in (before, signal.SIG_DFL)
        interrupts.cleaned_up()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_error_of_a_library_that_a_signal_passed_through_is_the_signal() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped) as stopped, handled():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:  # as in omegaconf, where a variable is then not set
            int("not set")
    assert stopped.value.exit_code == 143
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), handled():
        1 / 0  # noqa: B018
