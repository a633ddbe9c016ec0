"""Settings that check themselves: frozen pydantic dataclasses whose problems are reported in one UserError."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from amc_env.errors import UserError, did_you_mean

T = TypeVar("T")
_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=1, le=10**9)]
Natural = Annotated[int, Field(ge=0, le=10**9)]
Width = Annotated[int, Field(ge=1, le=2**16)]
"""Of a layer."""
BatchSize = Annotated[int, Field(ge=1, le=2**16)]
TrainingBatch = Annotated[int, Field(ge=2, le=2**16)]
"""Images of a step of training: batch norm needs two."""
Threads = Annotated[int, Field(ge=1, le=1024)]
SplitSeed = Annotated[int, Field(ge=0, lt=2**64)]
"""What `torch.Generator.manual_seed` takes."""
Positive = Annotated[float, Field(gt=0)]
LARGEST_RATE = 10
LearningRate = Annotated[float, Field(gt=0, le=LARGEST_RATE)]
"""Of Adam, which moves each weight by about this much in a step; beyond the largest, numbers overflow."""
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
"""In (0, 1]."""
Fraction = Annotated[float, Field(gt=0, lt=1)]
"""In (0, 1)."""
ShareOrZero = Annotated[float, Field(ge=0, le=1)]
"""In [0, 1]."""
FractionOrZero = Annotated[float, Field(ge=0, lt=1)]
"""In [0, 1)."""
Listed = Annotated[tuple[T, ...], Strict(False)]
"""A tuple that may be given as a list, as configuration files do."""
Widths = Annotated[Listed[Width], Field(min_length=1)]

_ALLOWED = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "finite",
    "literal_error": "{expected}",
    "too_short": "a list of at least {min_length}",
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "names with values, like {name: 8}",
}


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(kind: type[T]) -> type[T]:
    """Make a class a frozen dataclass that refuses unknown names, wrong types and values that are out of range.

    Types are strict: true is no number and "3" is not 3; a whole number may stand for a float. All problems come in one
    UserError with the codes ``unknown_key``, ``missing``, ``wrong_type`` and ``out_of_range``. What concerns several
    fields is checked by the class's ``__post_init__``, once each field is fine. NumPy and tensor scalars are converted to
    numbers, a torch.device to its name.
    """
    made: Any = dataclass(frozen=True, config=_CONFIG)(kind)
    build = made.__init__

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            build(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
        except ValidationError as error:
            names = [each.name for each in fields(made) if each.init]
            raise UserError.join(_problems(error, names)) from None

    made.__init__ = checked
    return made  # type: ignore[no-any-return]


def plain(value: Any) -> Any:
    """A NumPy or tensor scalar as a number, a torch.device as its name; also within a list or tuple."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    is_device = (type(value).__module__, type(value).__name__) == ("torch", "device")
    return str(value) if is_device else value


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check values against a function's annotations without calling it.

    Raises:
        UserError: It has no such parameters, or they are of other types; all in one message.
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a builtin, which has none
        return
    names, takes_all = list(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _hints(function)
    problems = []
    for name, value in values.items():
        if name not in names and not takes_all:
            problems.append(_unknown(name, names))
            continue
        try:
            TypeAdapter(hints.get(name, Any), config=_CONFIG).validate_python(value)
        except ValidationError as error:
            problems += _problems(error, [], (name,))
    if problems:
        raise UserError.join(problems)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(
            function.__init__ if inspect.isclass(function) else function, include_extras=True
        )
    except (NameError, TypeError):  # annotations of a user's own function that cannot be evaluated
        return {}


def _problems(error: ValidationError, names: list[str], outer: tuple[str, ...] = ()) -> Iterator[UserError]:
    """What pydantic found, in plain words; ``outer`` is the place of what was validated."""
    for problem in error.errors(include_url=False):
        kind, context = problem["type"], problem.get("ctx", {})
        path, value = _path((*outer, *problem["loc"]), names), problem["input"]
        if kind == "too_short" and len(value) >= context["min_length"]:
            continue  # its entries are wrong, and are reported themselves
        if isinstance(context.get("error"), UserError):
            yield context["error"]
        elif kind == "unexpected_keyword_argument":
            yield _unknown(path, names)
        elif kind == "missing":
            yield UserError("{field} is needed", code="missing", field=path)
        elif kind in _ALLOWED:
            allowed = _ALLOWED[kind].format(**context)
            yield UserError(f"{{field}}={value} must be {allowed}", code="out_of_range", field=path)
        elif name := context.get("class", context.get("class_name")):
            given = type(value).__name__
            yield UserError(f"{{field}} must be of type {name}, not {given}", code="wrong_type", field=path)
        else:
            wanted = _TYPES.get(kind, problem["msg"])
            yield UserError(f"{{field}}={value} must be {wanted}", code="wrong_type", field=path)


def _path(place: tuple[int | str, ...], names: list[str]) -> str:
    """A place like ("hidden", 0) as hidden[0]; the first is an index where the argument was given by position."""
    first = "" if not place else names[place[0]] if isinstance(place[0], int) and names else place[0]
    return f"{first}{''.join(f'[{part}]' for part in place[1:])}"


def _unknown(name: str, names: list[str]) -> UserError:
    return UserError(f"unknown key {{field}}{did_you_mean(name, names)}", code="unknown_key", field=name)
