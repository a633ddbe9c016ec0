"""Batches as loaders give them, made into inputs and targets.

A batch is a pair (inputs, targets), a tuple (x1, x2, ..., y) of a network with several inputs, or a dictionary whose entry
``labels`` or ``label`` is the target and whose other entries are keyword arguments of the network.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amc_env.errors import UserError, first_line
from amc_env.inputs import Inputs, each, tensors_of
from amc_env.tasks import Classification, Task

log = logging.getLogger(__name__)

TARGETS = ("labels", "label")
"""Names of the entry of a dictionary that is the target."""
_FORMS = "(inputs, targets), or dictionaries with an entry labels"
_COLLATE = "give a DataLoader, which makes batches of tensors"


@dataclass(frozen=True)
class Signature:
    """What a network's forward takes.

    Attributes:
        names: of its arguments that may be given by position, in order.
        required: how many of them have no default.
        more: whether it takes any number by position.
        keywords: its arguments that may be given by name.
        any_keyword: whether it takes others, too.
    """

    names: tuple[str, ...] = ("x",)
    required: int = 1
    more: bool = False
    keywords: tuple[str, ...] = ("x",)
    any_keyword: bool = False

    @classmethod
    def of(cls, network: nn.Module) -> Signature:
        """That of a network."""
        parameters = inspect.signature(network.forward).parameters.values()
        placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        kinds = {p.kind for p in parameters}
        return cls(
            tuple(p.name for p in placed),
            sum(p.default is p.empty for p in placed),
            inspect.Parameter.VAR_POSITIONAL in kinds,
            tuple(named),
            inspect.Parameter.VAR_KEYWORD in kinds,
        )


@dataclass(frozen=True, eq=False)
class Reader:
    """Makes inputs and targets of a loader's batches.

    Attributes:
        task: says what targets are.
        signature: what the network takes.
    """

    task: Task = field(default_factory=Classification)
    signature: Signature = field(default_factory=Signature)
    _told: set[str] = field(default_factory=set, repr=False)

    def __call__(self, name: str, batch: Any) -> tuple[Inputs, Any]:
        """Inputs and targets of a batch; inputs of float types as float32, integers as they are.

        Args:
            name: the loader's, such as ``train_loader``.
            batch: what it gave. Tensors of other classes, as of fastai and torchvision's tv_tensors, become plain ones,
                since their classes go through every operation of the network with them.

        Raises:
            UserError: the batch has another form, or its targets are not of the task.
        """
        if isinstance(batch, Mapping):
            inputs, targets = self._of_names(name, batch)
        elif isinstance(batch, tuple | list):
            inputs, targets = self._of_places(name, batch)
        else:
            raise _wrong(name, f"batches of {type(batch).__name__}: {_FORMS} are needed")
        ready = each(inputs, lambda tensor: _input(name, tensor))
        return ready, self.task.targets(name, each(_target(name, targets), _plain))

    def _of_names(self, name: str, batch: Mapping[str, Any]) -> tuple[Inputs, Any]:
        entry = next((key for key in TARGETS if key in batch), None)
        if entry is None:
            raise _wrong(
                name,
                f"dictionaries with {', '.join(batch)}: the target must be called {' or '.join(TARGETS)}",
            )
        others = {key: value for key, value in batch.items() if key != entry}
        known = self.signature.keywords
        taken = {key: value for key, value in others.items() if key in known}
        if not taken and self.signature.any_keyword:
            taken = {key: value for key, value in others.items() if isinstance(value, Tensor)}
        if (
            not taken
            and len(tensors := [value for value in others.values() if isinstance(value, Tensor)]) == 1
        ):
            return tensors[0], batch[entry]  # like image and label: the one tensor there is
        if not taken:
            raise _wrong(
                name, f"dictionaries with {', '.join(others)}, but the network takes {', '.join(known)}"
            )
        self._tell(name, "entries", [key for key in others if key not in taken])
        inputs = self._inputs(name, taken)
        if list(taken) == list(self.signature.names[:1]):  # one input needs no name
            return tensors_of(inputs)[0], batch[entry]
        return inputs, batch[entry]

    def _of_places(self, name: str, batch: tuple[Any, ...] | list[Any]) -> tuple[Inputs, Any]:
        if len(batch) < 2:
            raise _wrong(name, f"batches of {len(batch)} entries: {_FORMS} are needed")
        least, most = self.signature.required, len(self.signature.names)
        others = len(batch) - 1
        if others == 1:
            return self._inputs(name, batch[0]), batch[1]
        if others == least or self.signature.more:
            return self._inputs(name, tuple(batch[:-1])), batch[-1]
        if others < least or (least != most and others <= most) or not least:
            takes = f"{least}" if least == most else f"{least} to {most}"
            raise _wrong(
                name,
                f"batches of {len(batch)} entries, and the network takes {takes} inputs: give pairs "
                "((x1, x2, ...), targets)",
            )
        self._tell(name, "entries from number", [str(least + 1)])
        return self._inputs(name, batch[0] if least == 1 else tuple(batch[:least])), batch[least]

    def _inputs(self, name: str, given: Any) -> Inputs:
        """One tensor, several, or tensors by name."""
        if isinstance(given, Mapping):
            wrong = [key for key, value in given.items() if not isinstance(value, Tensor | np.ndarray)]
            if wrong:
                raise _wrong(name, f"inputs {', '.join(wrong)} that are no tensors: {_COLLATE}")
            return {str(key): torch.as_tensor(value) for key, value in given.items()}
        if isinstance(given, tuple | list):
            if not given or not all(isinstance(value, Tensor | np.ndarray) for value in given):
                raise _wrong(name, f"a {type(given).__name__} of inputs that are no tensors: {_COLLATE}")
            if len(given) > len(self.signature.names) and not self.signature.more:
                raise _wrong(
                    name,
                    f"inputs in a list of {len(given)}, and the network takes {len(self.signature.names)}: images of "
                    "different sizes must be brought to one size, in the dataset or in the loader's collate_fn",
                )
            made = tuple(map(torch.as_tensor, given))
            return made[0] if len(made) == 1 else made
        if not isinstance(given, Tensor | np.ndarray):
            raise _wrong(name, f"inputs of type {type(given).__name__}: {_FORMS} of tensors are needed")
        return torch.as_tensor(given)

    def _tell(self, name: str, what: str, ignored: list[str]) -> None:
        line = f"{name}: {what} {', '.join(ignored)} are ignored: the network does not take them"
        if ignored and line not in self._told:
            self._told.add(line)
            log.info(line)


def batches_from(name: str, loader: Iterable[Any]) -> Iterator[Any]:
    """What a loader gives, with its failure to join examples explained.

    Raises:
        UserError: examples of different sizes.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if "equal size" not in str(error):
            raise
        raise UserError(
            f"{name} cannot make a batch of its examples ({first_line(error)}): bring them to one size, in the dataset or in "
            "the loader's collate_fn",
            code="batch",
            field=name,
        ) from error


def _target(name: str, given: Any) -> Inputs:
    """Targets of a batch as a tensor, or several."""
    if isinstance(given, tuple | list) and given and isinstance(given[0], Tensor) and given[0].ndim:
        given = tuple(given)
    elif isinstance(given, np.ndarray | list | tuple | int | float):
        try:
            given = torch.as_tensor(given)
        except (TypeError, ValueError):
            raise _wrong(name, f"targets that are no numbers: {_COLLATE}") from None
    several = given.values() if isinstance(given, Mapping) else given
    if not isinstance(given, Tensor) and not (
        isinstance(given, Mapping | tuple) and all(isinstance(one, Tensor) for one in several)
    ):
        raise _wrong(name, f"targets of type {type(given).__name__}: {_COLLATE}")
    if isinstance(given, Tensor) and given.ndim == 0:
        raise _wrong(name, f"single examples: {_COLLATE}")
    return dict(given) if isinstance(given, Mapping) else given


def _input(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.uint8:
        raise UserError(
            f"{name} gives uint8 inputs: normalise them as in the network's training, or at least divide them by 255",
            code="uint8",
            field=name,
        )
    if tensor.is_complex() or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        raise _wrong(
            name,
            f"inputs that are complex, sparse, nested or without values ({tensor.dtype}, {tensor.layout})",
        )
    if tensor.ndim == 0:
        raise _wrong(name, f"single examples: {_COLLATE}")
    tensor = _plain(tensor.detach())
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def _plain(tensor: Tensor) -> Tensor:
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def _wrong(name: str, reason: str) -> UserError:
    return UserError(f"{name} gives {reason}", code="batch", field=name)
