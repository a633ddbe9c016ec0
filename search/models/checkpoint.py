"""Checkpoints as training scripts leave them: the state dict in a file, with the names that the network has.

Files are read without running code of theirs: safetensors, or pickles with ``weights_only=True``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from amc_env.errors import UserError
from search import files

log = logging.getLogger(__name__)

PICKLES = (".th", ".pt", ".pth", ".bin", ".ckpt", ".tar")
LISTED_NAMES = 8
_WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes of DataParallel and averaged models, of torch.compile, of Lightning."""
_AVERAGED = "n_averaged"
"""Entry of `torch.optim.swa_utils.AveragedModel` beside the weights."""
_TYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)


def read_checkpoint(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file.

    Args:
        path: .safetensors, or a pickle.
        key: The entry that holds it; None: the file itself, or its only entry that is a state dict.

    Raises:
        UserError: No such file, another kind of file, a pickle that needs more than ``weights_only``, no state dict,
            several of them, or tensors of a kind that networks here do not have.
    """
    if path.suffix not in (".safetensors", *PICKLES) and path.is_file():
        raise UserError(
            f"{{field}}={path}: .safetensors, {', '.join(PICKLES)} are read, not '{path.suffix}'",
            code="unreadable",
            field="model.weights",
        )
    with files.reading(f"model.weights={path}", _conversion(path)):
        content = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    return state_dict(content, str(path), key)


def state_dict(content: Any, source: str, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in what a file holds; see `read_checkpoint`."""
    found = {"": content} if _is_state(content) and key is None else _entries(content)
    if key is not None:
        found = {name: value for name, value in found.items() if name == key}
    if len(found) > 1:
        raise UserError(
            f"{source} holds several state dicts: choose one by {{field}}, of {', '.join(found)}",
            code="ambiguous",
            field="model.key",
        )
    if not found:
        there = sorted(map(str, content)) if isinstance(content, Mapping) else [type(content).__name__]
        entry = "" if key is None else f" under {key}"
        raise UserError(
            f"{source} holds no state dict{entry} (names to tensors): {listed(there)}", code="no_state_dict"
        )
    (state,) = found.values()
    _check_tensors(state, source)
    return dict(state)


def _entries(content: Any) -> dict[str, Mapping[str, Tensor]]:
    """The state dicts in a checkpoint by their names: its entries, or else entries of these, like ``model.state_dict``."""
    outer = content if isinstance(content, Mapping) else {}
    inner = {
        f"{name}.{key}": value
        for name, entry in outer.items()
        if isinstance(entry, Mapping)
        for key, value in entry.items()
    }
    levels = ({str(n): v for n, v in level.items() if _is_state(v)} for level in (outer, inner))
    return next(filter(None, levels), {})


def unwrapped(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The state dict without the prefixes that wrappers put before every name.

    Where the names with one prefix are all of the network's, the others are left out: a Lightning module has a loss and
    metrics beside its network.

    Args:
        state: By the file's names.
        own: The network's names; as soon as one is there, nothing more is taken off.
    """
    names = {name: name.replace("_orig_mod.", "") for name in state if name != _AVERAGED or name in own}
    while not any(name in own for name in names.values()):
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in names.values())), None)
        if prefix is None:
            names = _complete_part(names, own)
            break
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    return {short: state[name] for name, short in names.items()}


def _complete_part(names: dict[str, str], own: Collection[str]) -> dict[str, str]:
    """The names under one prefix, without it, where they are all of the network's; else all names as they are."""
    for prefix in _WRAPPERS:
        part = {name: short.removeprefix(prefix) for name, short in names.items() if short.startswith(prefix)}
        if own and set(own) <= set(part.values()):
            log.info(
                "%d entries of the checkpoint that are not under %s are not used",
                len(names) - len(part),
                prefix,
            )
            return part
    return names


def listed(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    rest = len(names) - LISTED_NAMES
    return ", ".join(names[:LISTED_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _unpickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _conversion(path: Path) -> str:
    """For a pickle: how to make a file of tensors only out of it, if its source is trusted."""
    if path.suffix not in PICKLES or not path.is_file():
        return ""
    return (
        "pickles are read with weights_only=True, as others may run code. If you trust it, convert it: "
        f"torch.save(torch.load('{path.name}', weights_only=False).state_dict(), 'weights.pt') "
        "where it holds a whole module, or save its dict of tensors alone"
    )


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _check_tensors(state: Mapping[str, Tensor], source: str) -> None:
    """Refuses tensors that are sparse, quantized, without values, or of a type that networks here do not compute in."""
    odd = [
        f"{name} ({'meta' if value.is_meta else value.layout if value.layout != torch.strided else value.dtype})"
        for name, value in state.items()
        if value.is_meta or value.layout != torch.strided or value.dtype not in _TYPES
    ]
    if odd:
        raise UserError(
            f"{source}: {listed(odd)} are no plain tensors of numbers; save the weights as float32",
            code="wrong_tensor",
        )
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise UserError(
            f"{source}: NaN or infinite values in {listed(broken)}; the checkpoint cannot be used",
            code="not_finite",
        )
