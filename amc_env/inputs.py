"""What a network is given and what it gives: one tensor, several, or tensors by name.

A batch of inputs is a tensor [N, ...], a tuple of tensors for positional arguments, or a dictionary of tensors for
keyword arguments (Hugging Face's ``input_ids`` and ``attention_mask``). The first dimension of each counts examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""A batch for `call`."""


def call(model: nn.Module | Callable[..., Any], inputs: Inputs) -> Any:
    """Run a network on a batch."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs)


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The positional and the keyword arguments that a network is called with."""
    return ((), inputs) if isinstance(inputs, dict) else (tensors_of(inputs), {})


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors of a batch, in their order."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(inputs) if isinstance(inputs, tuple) else tuple(inputs.values())


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The batch with every tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, tuple):
        return tuple(change(tensor) for tensor in inputs)
    return {name: change(tensor) for name, tensor in inputs.items()}


def count(inputs: Inputs) -> int:
    """Examples in a batch."""
    return len(tensors_of(inputs)[0])


def take(inputs: Inputs, which: slice | Tensor) -> Inputs:
    """Some examples of a batch."""
    return each(inputs, lambda tensor: tensor[which])


def pieces(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """The batch in pieces of ``size`` examples; the last one may be smaller."""
    for start in range(0, count(inputs), size):
        yield take(inputs, slice(start, start + size))


def device_of(inputs: Inputs) -> torch.device:
    """Where a batch lies."""
    return tensors_of(inputs)[0].device


def to_device(inputs: Inputs, device: str | torch.device) -> Inputs:
    """The batch on a device."""
    return each(inputs, lambda tensor: tensor.to(device))


def to_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The batch with its floating-point tensors in a type; integers stay as they are."""
    return each(inputs, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def in_format(inputs: Inputs, layout: torch.memory_format) -> Inputs:
    """The batch with its tensors [N, C, H, W] in a memory format, and the others contiguous."""

    def laid_out(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=layout if tensor.ndim == 4 else torch.contiguous_format)

    return each(inputs, laid_out)


def holds_images(inputs: Inputs) -> bool:
    """Whether a tensor of the batch has the dimensions of images, [N, C, H, W]."""
    return any(tensor.ndim == 4 for tensor in tensors_of(inputs))


def finite(inputs: Inputs) -> bool:
    """Whether no value of the batch is infinite or NaN."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors_of(inputs))


def described(inputs: Inputs) -> str:
    """The shapes of one batch, like ``[8, 3, 32, 32]`` or ``input_ids [8, 128], attention_mask [8, 128]``."""
    if isinstance(inputs, dict):
        return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
    return ", ".join(str(list(tensor.shape)) for tensor in tensors_of(inputs))


def joined(batches: list[Inputs]) -> Inputs:
    """Several batches as one."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([tensors_of(batch)[0] for batch in batches])
    columns = [torch.cat(column) for column in zip(*map(tensors_of, batches), strict=True)]
    return tuple(columns) if isinstance(first, tuple) else dict(zip(first, columns, strict=True))


def output_of(given: Any, entry: int | str | None = None) -> Tensor:
    """The tensor that counts of what a network returned.

    Args:
        given: A tensor; a tuple or list; or a dictionary, as Hugging Face's outputs are.
        entry: Which of them: an index or a name. By default the first of a tuple, and ``logits`` or else the first of a
            dictionary.

    Raises:
        KeyError: There is no such entry.
        TypeError: It is no tensor.
    """
    if isinstance(given, Tensor) and entry is None:
        return given
    if isinstance(given, Mapping):
        name = entry if entry is not None else "logits" if "logits" in given else next(iter(given))
        found = given[name]
    elif isinstance(given, tuple | list):
        place = 0 if entry is None else entry
        if not isinstance(place, int) or not -len(given) <= place < len(given):
            raise KeyError(f"output {entry!r} of {len(given)} outputs")
        found = given[place]
    else:
        found = given
    if not isinstance(found, Tensor):
        raise TypeError(f"the network gives a {type(found).__name__} where a tensor is needed")
    return found


def tensors_in(given: Any) -> list[Tensor]:
    """All tensors of what a network returned, in their order, however tuples, lists and dictionaries are nested."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, Mapping):
        given = given.values()
    elif not isinstance(given, tuple | list):
        return []
    return [tensor for part in given for tensor in tensors_in(part)]
