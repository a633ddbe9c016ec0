"""A network that a function of the user's own makes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from amc_env.errors import UserError, first_line
from amc_env.validation import Positive
from search.models.source import RANDOM, ModelSource

FACTORY = "factory"
"""The setting that names the function. Configurations may name what ``trusted`` lists, as for a ``_target_``."""
_CLASS_COUNTS = ("num_classes", "classes")


def dotted(factory: str) -> str:
    """``package.module.function`` for ``package.module:function``."""
    return factory.replace(":", ".")


def module_model(
    factory: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    original_lr: Positive | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> ModelSource:
    """The network that a function makes, with the weights that it gives it or those of a file.

    Args:
        factory: ``package.module:function``, importable. A parameter of it called ``num_classes`` or ``classes`` is given
            the data's number of classes, unless ``arguments`` has it.
        weights: A checkpoint; None or ``pretrained`` for the network as the function gives it.
        key: See `ModelSource`.
        original_lr: See `ModelSource`.
        arguments: Further ones for the function.

    Raises:
        UserError: The function cannot be found, or ``weights`` is ``random``.
    """
    if factory is None or ":" not in factory:
        raise UserError(
            f"{{field}}={factory}: needed is a function of yours, like my_package.my_module:build",
            code="missing",
            field="model.factory",
        )
    if weights == RANDOM:
        raise UserError(
            "{field}=random: the factory decides on the first weights", field="model.weights", code="conflict"
        )
    function = _function(factory)
    build = partial(_build, factory, function, dict(arguments or {}))
    return ModelSource(factory, build, original_lr, weights, key=key, pretrained=build, needs_shape=False)


def _function(factory: str) -> Any:
    module, _, name = factory.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{{field}}={factory} cannot be found: {first_line(error)}",
            code="unknown_target",
            field="model.factory",
        ) from error


def _build(
    factory: str, function: Any, arguments: Mapping[str, Any], shape: tuple[int, int, int], classes: int
) -> nn.Module:
    given, signature = dict(arguments), inspect.Signature()
    try:
        signature = inspect.signature(function)
        given = {name: classes for name in _CLASS_COUNTS if name in signature.parameters} | given
        signature.bind(**given)
    except TypeError as error:
        raise UserError(
            f"{{field}}={dict(arguments)} do not fit {factory}{signature}: {error}",
            code="unknown_key",
            field="model.arguments",
        ) from error
    except ValueError:  # a builtin has no signature
        pass
    model = function(**given)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{{field}}={factory} gives a {type(model).__name__}, needed is a torch.nn.Module",
            code="wrong_type",
            field="model.factory",
        )
    return model
