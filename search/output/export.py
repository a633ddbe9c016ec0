"""What is left of a search to take away: the small network as weights, as a torch.export program, as ONNX.

- model.safetensors + channels.json restore onto the unpruned class (`load_pruned`), bit for bit.
- model.pt2 (torch.export) and model.onnx (one file) load without this project: fp32, CPU, any batch size.

Every file is written under a temporary name beside its target, loaded back, compared with the network, and
only then put in place. ONNX is optional.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from amc_env import onnx as onnx_files
from amc_env.errors import UserError
from amc_env.graph.layers import Side, channels_of
from amc_env.pruning.candidate import Keeps, resize

log = logging.getLogger(__name__)


FILES = {"safetensors": "model.safetensors", "pt2": "model.pt2", "onnx": "model.onnx"}
"""Format -> file name in the run folder."""


CHANNELS_FILE = "channels.json"


CHANNELS_FORMAT = 1


TOLERANCE = 1e-4
"""Largest accepted |file - PyTorch|, as a share of max(1, largest |PyTorch output|); fp32 on the CPU."""


_SIDES: tuple[Side, ...] = ("in", "out")


_TRACED_BATCH = 2  # torch.export treats sizes 0 and 1 as constants, so the traced batch must be larger


_PROBLEMS_SHOWN = 8


_ERROR_WIDTH = 300


_WAY_OUT = "give a fresh, unpruned instance of the class that was pruned"


Run = Callable[[Tensor], Any]


class ExportError(RuntimeError):
    """An exported file does not compute what the network computes."""


@dataclass(frozen=True)
class Exported:
    """One export.

    Attributes:
        format: one of FILES.
        path: the file asked for.
        bytes: its size, 0 where the export failed.
        max_difference: largest |file - PyTorch| over the compared batches, None where the export failed.
        error: one line, None where the file was checked and kept.
    """

    format: str
    path: Path
    bytes: int
    max_difference: float | None
    error: str | None = None


def check_formats(formats: Sequence[str]) -> None:
    """Refuses formats that are unknown, or known but not installed; call it before the expensive part.

    Raises:
        UserError: all unknown names with those allowed, or the missing packages with how to install them.
    """
    _check_known(formats)
    if "onnx" in formats:
        _require_onnx()


def export_all(
    model: nn.Module,
    keeps: Keeps,
    example: Tensor,
    folder: str | Path,
    formats: Sequence[str],
    name: str,
    *,
    original: nn.Module | None = None,
) -> list[Exported]:
    """Exports `model` (the small network) in every format; one that fails is reported, the others are kept.

    Args:
        example: one batch of normalised inputs, [N, ...] with N >= 1; the files are checked on it.
        original: the unpruned network, see `save_pruned`.

    Returns:
        One Exported per format, in the order asked for.

    Raises:
        UserError: an unknown format, or an example without rows.
    """
    _check_known(formats)
    _check_example(example)
    paths = {wanted: Path(folder) / FILES[wanted] for wanted in formats}
    exports: dict[str, Callable[[], Exported]] = {
        "safetensors": lambda: save_pruned(model, keeps, folder, name=name, original=original),
        "pt2": lambda: export_pt2(model, example, paths["pt2"]),
        "onnx": lambda: export_onnx(model, example, paths["onnx"]),
    }
    return [_attempt(wanted, path, exports[wanted]) for wanted, path in paths.items()]


def save_pruned(
    model: nn.Module, keeps: Keeps, folder: str | Path, *, name: str, original: nn.Module | None = None
) -> Exported:
    """Writes model.safetensors and channels.json of the small network `model`.

    Args:
        keeps: what `resize` was given to make `model` from the unpruned network.
        name: the unpruned network's name, for whoever reads the file.
        original: the unpruned network, whose sizes become in_total and out_total; without it they are null,
            and `load_pruned` can only check that the kept channels exist and that the weights fit.

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
    path = Path(folder) / FILES["safetensors"]
    with _complete(path) as weights, _complete(Path(folder) / CHANNELS_FILE) as channels:
        save_file(state, weights, metadata={"format": "pt"})
        channels.write_text(json.dumps(record) + "\n", encoding="utf-8")
        shutil.copymode(channels, weights)  # safetensors makes files that only their owner can read
        _check_same(state, load_file(weights), path)
    return Exported("safetensors", path, path.stat().st_size, 0.0)


def load_pruned(module: nn.Module, folder: str | Path) -> nn.Module:
    """Restores a network that `save_pruned` wrote onto a fresh, unpruned instance of its class.

    Args:
        module: unpruned; it is resized and filled in place, and keeps its device.

    Returns:
        The same module, small, in eval mode.

    Raises:
        UserError: a file that is missing or unreadable, channels that do not fit the module (then unchanged),
            or weights that do not fit the resized module (all names and shapes that differ).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: load_pruned wants the run folder that holds {CHANNELS_FILE}")
    weights = _existing(folder / FILES["safetensors"])
    keeps = _read_channels(module, _existing(folder / CHANNELS_FILE))
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{weights} cannot be read as safetensors ({error}): export it again") from error
    resize(module, keeps)
    if problems := _misfits(module.state_dict(), state):
        raise UserError(f"{weights} does not fit {type(module).__name__}: {_listed(problems)}; {_WAY_OUT}")
    module.load_state_dict(state, strict=True)
    return module.eval()


def export_pt2(model: nn.Module, example: Tensor, path: str | Path) -> Exported:
    """Writes `model` as a torch.export program that `torch.export.load` runs on any batch size; fp32, CPU.

    Args:
        example: as in `export_all`.

    Raises:
        UserError: an example without rows.
        ExportError: the file read back differs from the network by more than TOLERANCE; nothing is kept.
        Exception: whatever torch.export raises for a network that it cannot trace.
    """
    path = Path(path)
    network, example = _prepared(model, example)
    with _complete(path) as temporary, onnx_files.quiet():
        torch.export.save(_traced(network, example), temporary)
        difference = _difference(torch.export.load(temporary).module(), network, example, path)
    return Exported("pt2", path, path.stat().st_size, difference)


def export_onnx(model: nn.Module, example: Tensor, path: str | Path) -> Exported:
    """Writes `model` as one ONNX file with input "input" [batch, ...]; fp32, read back by onnxruntime.

    Args:
        example: as in `export_all`.

    Raises:
        UserError: an example without rows, or a missing package with how to install it.
        ExportError: the file read back differs from the network by more than TOLERANCE; nothing is kept.
        Exception: whatever torch.export or torch.onnx raise for a network that they cannot express.
    """
    _require_onnx()
    path = Path(path)
    network, example = _prepared(model, example)
    with _complete(path) as temporary, onnx_files.quiet():
        onnx_files.write(_traced(network, example), temporary, _batch_shapes())
        difference = _difference(_onnx_run(temporary), network, example, path)
    return Exported("onnx", path, path.stat().st_size, difference)


# Formats and failures


def _check_known(formats: Sequence[str]) -> None:
    # A bare string is a sequence of letters; taken as such it would give a baffling message.
    wanted = [formats] if isinstance(formats, str) else list(formats)
    if unknown := [one for one in wanted if one not in FILES]:
        raise UserError(
            f"unknown export format {', '.join(map(repr, unknown))}: allowed are {', '.join(FILES)}"
        )
    if isinstance(formats, str):
        raise UserError(f"export formats are a list, got {formats!r}: write [{formats}]")


def _require_onnx() -> None:
    onnx_files.require_packages("export to onnx", "leave onnx out of the formats")


def _attempt(wanted: str, path: Path, export: Callable[[], Exported]) -> Exported:
    """Runs one export; any failure (tracer, converter, disk) becomes a report, as the others still count."""
    try:
        return export()
    except Exception as error:
        log.debug("export of %s failed", path.name, exc_info=True)
        stale = f"; {path.name} from before was left as it is" if path.exists() else ""
        message = f"{_one_line(error)}{stale}"
        log.warning("%s was not exported: %s", path.name, message)
        return Exported(wanted, path, 0, None, message)


def _one_line(error: BaseException) -> str:
    """Type and beginning of the innermost cause, on one line: torch.onnx wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {shorten(str(error), _ERROR_WIDTH, placeholder=' ...')}"


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, which becomes `path` only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # torch checks the suffix, so it stays last
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# channels.json


def _channels(model: nn.Module, keeps: Keeps, original: nn.Module | None) -> dict[str, dict[str, Any]]:
    """The "channels" part of channels.json, checked against the small network."""
    modules = dict(model.named_modules())
    whole = dict(original.named_modules()) if original is not None else {}
    entries: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name, sides in keeps.items():
        if name not in modules:
            problems.append(f"no module {name!r}")
            continue
        entries[name] = {side: keep.tolist() for side, keep in sides.items()}
        for side in _SIDES:
            size = channels_of(modules[name], side)
            if side in sides and size != len(sides[side]):
                problems.append(f"{name}.{side} has {size} channels, {len(sides[side])} are kept")
            entries[name][f"{side}_total"] = channels_of(whole[name], side) if name in whole else None
    if problems:
        raise ValueError(f"keeps do not describe {type(model).__name__}: {_listed(problems)}")
    return entries


def _read_channels(module: nn.Module, path: Path) -> Keeps:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, channels = record["format"], record["channels"]
        entries = [(name, entry, _sides(entry)) for name, entry in channels.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a file of save_pruned ({_one_line(error)}): export it again"
        ) from error
    if version != CHANNELS_FORMAT:
        raise UserError(f"{path} has format {version!r}: this version reads {CHANNELS_FORMAT}")
    modules = dict(module.named_modules())
    problems = [
        problem for name, entry, sides in entries for problem in _unfit(modules.get(name), name, entry, sides)
    ]
    if problems:
        made_for = f" (made for {record['model']})" if "model" in record else ""
        raise UserError(
            f"{path}{made_for} does not fit {type(module).__name__}: {_listed(problems)}; {_WAY_OUT}"
        )
    return {name: sides for name, _, sides in entries}


def _sides(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    sides = {side: entry[side] for side in _SIDES if side in entry}
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
    for side in _SIDES:
        size, total = channels_of(module, side), entry.get(f"{side}_total")
        if total is not None and total != size:
            yield f"{name}.{side} has {size} channels, the file expects {total}"
        elif side in sides and int(sides[side][-1]) >= size:
            yield f"{name}.{side} has {size} channels, the file keeps number {int(sides[side][-1])}"


# Weights


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"no file {path}: load_pruned wants {FILES['safetensors']} and {CHANNELS_FILE} of one export"
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


# Programs


def _check_example(example: Tensor) -> None:
    if example.dim() < 2 or example.numel() == 0:
        raise UserError(f"the example batch has shape {list(example.shape)}: it must be [N, ...] with N >= 1")


def _prepared(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    _check_example(example)
    return onnx_files.plain_copy(model, example)


def _batch_shapes() -> tuple[dict[int, Any], ...]:
    return ({0: torch.export.Dim("batch")},)


def _traced(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    # The sample input is stored in the file: zeros, so that no image of the user's is given away with it.
    sample = example.new_zeros(_TRACED_BATCH, *example.shape[1:])
    program = torch.export.export(network, (sample,), dynamic_shapes=_batch_shapes())
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # source lines and paths of this machine
    return program


def _onnx_run(path: Path) -> Run:
    run = onnx_files.session(path)
    return lambda batch: [torch.from_numpy(output) for output in run(batch)]


def _batches(example: Tensor) -> list[Tensor]:
    """The example and other sizes, one of which is 1: a branch on it is traced away without a word."""
    rows = torch.cat([example, example.flip(-1), example, example])  # enough rows, and not all the same
    return [example, *(rows[:size] for size in (1, 3) if size != len(example))]


@torch.no_grad()
def _difference(run: Run, network: nn.Module, example: Tensor, path: Path) -> float:
    """Largest |run - network| over all batches.

    Raises:
        ExportError: it is beyond TOLERANCE, or the outputs differ in number, shape or finiteness.
    """
    largest = 0.0
    for batch in _batches(example):
        expected, got = _outputs(network(batch)), _outputs(run(batch))
        shapes = [list(output.shape) for output in expected], [list(output.shape) for output in got]
        if shapes[0] != shapes[1]:
            raise ExportError(
                f"{path.name} gives shapes {shapes[1]} on a batch of {len(batch)}, the network {shapes[0]}"
            )
        for ours, theirs in zip(expected, got, strict=True):
            largest = max(largest, _checked(ours.double(), theirs.double(), len(batch), path))
    return largest


def _checked(ours: Tensor, theirs: Tensor, batch: int, path: Path) -> float:
    if not ours.numel():
        return 0.0
    if not bool(ours.isfinite().all()):
        raise ExportError(
            f"the network's own output on a batch of {batch} is not finite: {path.name} cannot be checked"
        )
    difference = float((ours - theirs).abs().max())
    allowed = TOLERANCE * max(1.0, float(ours.abs().max()))
    if not difference <= allowed:  # this way round a NaN is refused
        raise ExportError(
            f"{path.name} differs from the network by {difference:.3g} on a batch of {batch}, "
            f"allowed {allowed:.3g}"
        )
    return difference


def _outputs(output: Any) -> list[Tensor]:
    """The tensors of a network's output, in order, out of tuples, lists and mappings."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [tensor for part in parts if part is not None for tensor in _outputs(part)]
