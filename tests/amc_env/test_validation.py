"""Settings that check themselves, and how their errors are named by those who know the section."""

from collections.abc import Sequence
from typing import Any, Literal

import pytest
from refusals import refused

from amc_env.errors import UserError, did_you_mean
from amc_env.validation import Count, Listed, Share, check_arguments, settings


@settings
class Small:
    share: Share = 1.0
    rounds: Count = 1
    hidden: Listed[int] = (3,)
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        if self.rounds == 9:
            raise UserError(f"{{field}}={self.rounds} is too many", code="own", field="rounds")


def test_a_list_becomes_a_tuple_and_an_integer_a_float() -> None:
    small = Small(1, hidden=[1, 2])  # type: ignore[arg-type]
    assert (small.share, type(small.share), small.hidden) == (1.0, float, (1, 2))
    assert small == Small(hidden=(1, 2))
    with pytest.raises(AttributeError):
        small.rounds = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", True),
        ("rounds", "3"),
        ("rounds", 1.0),
        ("share", True),
        ("share", "1"),
        ("flag", 1),
        ("name", 5),
        ("hidden", 3),
    ],
)
def test_types_are_strict(field: str, value: object) -> None:
    with refused("wrong_type", field):
        Small(**{field: value})  # type: ignore[arg-type]


def test_all_that_is_wrong_is_in_one_error_with_the_value_and_what_is_allowed() -> None:
    with pytest.raises(UserError) as error:
        Small(0, rounds=0, kind="c", colour="red")  # type: ignore[call-arg, arg-type]
    assert str(error.value.inside("finetune")) == (
        "finetune.share=0 must be above 0; finetune.rounds=0 must be at least 1; finetune.kind=c must be 'a' or 'b'; "
        "unknown key finetune.colour; there are share, rounds, hidden, kind, flag, name"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.5])
def test_numbers_are_finite_and_in_range(value: float) -> None:
    with refused("out_of_range", "share"):
        Small(value)


def test_a_class_s_own_check_is_named_by_its_section_as_well() -> None:
    with pytest.raises(UserError) as error:
        Small(rounds=9)
    inside = error.value.inside("schedule")
    assert (str(inside), inside.code, inside.field) == (
        "schedule.rounds=9 is too many",
        "own",
        "schedule.rounds",
    )


def plain(path: str | None = None, mean: Sequence[float] = (), **more: Any) -> None:
    raise AssertionError("it is not called")


def test_arguments_are_checked_without_a_call() -> None:
    check_arguments(plain, {"path": "a", "mean": [1, 0.5], "other": 3})
    with refused("wrong_type", "path", "mean[1]"):
        check_arguments(plain, {"path": 3, "mean": [1, "b"]})
    with refused("unknown_key", "weight"):
        check_arguments(Small, {"weight": 3})


def test_the_nearest_name_is_suggested() -> None:
    assert did_you_mean("ratoi", ["cost", "ratio"]) == ": did you mean ratio? There are cost, ratio"
    assert did_you_mean("foo", ["cost", "ratio"]) == "; there are cost, ratio"
