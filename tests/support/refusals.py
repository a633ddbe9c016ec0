"""Expecting a user's mistake by what is wrong instead of by its wording."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from amc_env.errors import UserError


@contextmanager
def refused(code: str, *fields: str) -> Iterator[None]:
    """The block raises one UserError, whose mistakes are all of this kind and of exactly these settings."""
    with pytest.raises(UserError) as caught:
        yield
    assert [(part.code, part.field) for part in caught.value.parts] == [(code, field) for field in fields]
