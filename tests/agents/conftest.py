"""Toy searches with known answers."""

from collections.abc import Callable

import pytest

from agents.toy import ToySearch


@pytest.fixture
def toy() -> Callable[..., ToySearch]:
    """Builds toy searches; by default of four layers, the second of which must not be cut."""
    return ToySearch
