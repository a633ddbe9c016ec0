"""The weights of a small network, and the channels that were kept: restored onto the unpruned class, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.graph.layers import channels_of
from amc_env.graph.preparing import plain
from amc_env.graph.surgery import Keeps, resize
from search import files

WEIGHTS_FILE = "model.safetensors"
CHANNELS_FILE = "channels.json"
CHANNELS_FORMAT = 1

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_TOTAL = "_total"
"""Ending of the entry that holds a side's size in the unpruned network."""
_PROBLEMS_SHOWN = 8
_ERROR_WIDTH = 300
_AGAIN = "it is no file of save_pruned: export it again"
_WAY_OUT = "give a fresh, unpruned instance of the class that was pruned"


class ExportError(RuntimeError):
    """An exported file does not compute what the network computes."""


def save_pruned(
    model: nn.Module, keeps: Keeps, folder: str | Path, *, name: str, original: nn.Module | None = None
) -> Path:
    """Writes model.safetensors and channels.json of the small network `model`.

    Args:
        keeps: what `resize` was given to make `model` from the unpruned network.
        name: the unpruned network's name, for whoever reads the file.
        original: the unpruned network, whose sizes become in_total and out_total; without it they are null,
            and `load_pruned` can only check that the kept channels exist and that the weights fit.

    Returns:
        The file of weights.

    Raises:
        ValueError: `keeps` does not describe `model` (every disagreement listed).
        ExportError: the file read back is not equal to the state dict, bit for bit.
    """
    record = {
        "format": CHANNELS_FORMAT,
        "model": name,
        "channels": _channels(model, keeps, original),
    }
    # Copies, because safetensors refuses tensors that share memory (tied layers, views).
    state = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    path = Path(folder) / WEIGHTS_FILE
    with files.replacing(path) as weights, files.replacing(Path(folder) / CHANNELS_FILE) as channels:
        save_file(state, weights, metadata={"format": "pt"})
        channels.write_text(json.dumps(record) + "\n", encoding="utf-8")
        _check_same(state, load_file(weights), path)
    return path


def _folder(name: str) -> Path:
    """The folder of that name, or of the repository of that name on the hub."""
    if Path(name).is_dir():
        return Path(name)
    if not _REPOSITORY.fullmatch(name):
        raise UserError(
            f"no folder {name}: load_pruned wants the run folder that holds {CHANNELS_FILE}, or user/name of a repository "
            "on the Hugging Face hub",
            code="missing",
        )
    from search.output.hub import download

    return download(name)


def load_pruned(module: nn.Module, folder: str | Path) -> nn.Module:
    """Restores a network that `save_pruned` wrote onto a fresh, unpruned instance of its class.

    Args:
        module: unpruned; it is made ready as for a search, resized and filled in place, and keeps its device.
        folder: the run folder; or, where there is no folder of that name, a repository on the Hugging Face hub,
            ``user/name``, as `Compressed.push_to_hub` leaves it.

    Returns:
        The module, small, in eval mode; what was within it where it was wrapped.

    Raises:
        UserError: a file that is missing or unreadable, channels that do not fit the module (then unchanged),
            or weights that do not fit the resized module (all names and shapes that differ).
    """
    folder = _folder(str(folder))
    weights = _existing(folder / WEIGHTS_FILE)
    module = plain(module)  # as the network was before it was pruned
    keeps = _read_channels(module, _existing(folder / CHANNELS_FILE))
    with files.reading(weights, _AGAIN):
        state = load_file(weights)
    resize(module, keeps)
    if problems := _misfits(module.state_dict(), state):
        raise UserError(
            f"{weights} does not fit {type(module).__name__}: {_listed(problems)}; {_WAY_OUT}",
            code="does_not_fit",
        )
    module.load_state_dict(state, strict=True)
    return module.eval()


# channels.json


def _channels(model: nn.Module, keeps: Keeps, original: nn.Module | None) -> dict[str, dict[str, Any]]:
    """The "channels" part of channels.json, checked against the small network."""
    modules = dict(model.named_modules())
    unpruned = dict(original.named_modules()) if original is not None else {}
    entries: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name, sides in keeps.items():
        if name not in modules:
            problems.append(f"no module {name!r}")
            continue
        entries[name] = {side: keep.tolist() for side, keep in sides.items()}
        for side, keep in sides.items():
            size = _size(modules[name], side)
            if size != len(keep):
                problems.append(f"{name}.{side} has {size} channels, {len(keep)} are kept")
            entries[name][side + _TOTAL] = channels_of(unpruned[name], side) if name in unpruned else None
    if problems:
        raise ValueError(f"keeps do not describe {type(model).__name__}: {_listed(problems)}")
    return entries


def _size(module: nn.Module, side: str) -> int:
    """Channels of a pruned module; a PReLU that kept one of several looks like one that all channels share."""
    return module.num_parameters if isinstance(module, nn.PReLU) else channels_of(module, side)


def _read_channels(module: nn.Module, path: Path) -> Keeps:
    with files.reading(path, _AGAIN):
        record = files.read_json(path, advice=_AGAIN)
        version, channels = record["format"], record["channels"]
        entries = [(name, entry, _sides(entry)) for name, entry in channels.items()]
    if version != CHANNELS_FORMAT:
        raise UserError(
            f"{path} has format {version!r}: this version reads {CHANNELS_FORMAT}", code="wrong_format"
        )
    modules = dict(module.named_modules())
    problems = [
        problem for name, entry, sides in entries for problem in _unfit(modules.get(name), name, entry, sides)
    ]
    if problems:
        made_for = f" (made for {record['model']})" if "model" in record else ""
        raise UserError(
            f"{path}{made_for} does not fit {type(module).__name__}: {_listed(problems)}; {_WAY_OUT}",
            code="does_not_fit",
        )
    return {name: sides for name, _, sides in entries}


def _sides(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"an entry is {type(entry).__name__}, not an object of channel numbers")
    sides = {side: keep for side, keep in entry.items() if not side.endswith(_TOTAL)}
    for side, keep in sides.items():
        if not (isinstance(keep, list) and keep and all(type(index) is int for index in keep)):
            raise ValueError(f"{side!r} must be a list of channel numbers, not empty")
        if keep != sorted(set(keep)) or keep[0] < 0:
            raise ValueError(f"{side!r} must hold rising channel numbers from 0 on")
    return {side: torch.tensor(keep, dtype=torch.int64) for side, keep in sides.items()}


def _unfit(
    module: nn.Module | None, name: str, entry: Mapping[str, Any], sides: Mapping[str, Tensor]
) -> Iterator[str]:
    """What speaks against cutting `module` as the file says, one line each."""
    if module is None:
        yield f"no module {name!r}"
        return
    for side, keep in sides.items():
        size, total = channels_of(module, side), entry.get(side + _TOTAL)
        if total is not None and total != size:
            yield f"{name}.{side} has {size} channels, the file expects {total}"
        elif int(keep[-1]) >= size:
            yield f"{name}.{side} has {size} channels, the file keeps number {int(keep[-1])}"


# Weights


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"no file {path}: load_pruned wants {WEIGHTS_FILE} and {CHANNELS_FILE} of one export",
            code="missing",
        )
    return path


def _misfits(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{name} is not in the file" for name in wanted if name not in found]
    problems += [f"{name} is not in the network" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        network, file = _described(wanted[name]), _described(found[name])
        if network != file:
            problems.append(f"{name} is {network} in the network, {file} in the file")
    return sorted(problems)


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check_same(state: Mapping[str, Tensor], read: Mapping[str, Tensor], path: Path) -> None:
    # Bytes and not values are compared, so that a NaN equals itself.
    differ = [name for name in state if name not in read or _bytes(state[name]) != _bytes(read[name])]
    if differ or len(read) != len(state):
        raise ExportError(f"{path.name} read back is not what was written: {_listed(differ)}")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _listed(problems: Sequence[str]) -> str:
    more = len(problems) - _PROBLEMS_SHOWN
    return "; ".join([*problems[:_PROBLEMS_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def one_line(error: BaseException) -> str:
    """Type and beginning of the innermost cause, on one line: torch.onnx wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {shorten(str(error), _ERROR_WIDTH, placeholder=' ...')}"
