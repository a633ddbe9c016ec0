"""The small network in files: weights, a torch.export program, ONNX, ExecuTorch, LiteRT.

- model.safetensors + channels.json restore onto the unpruned class (`load_pruned`), bit for bit.
- model.pt2 (torch.export) and model.onnx (one file) load without this project: fp32, CPU, any batch size.
- model.pte (ExecuTorch) and model.tflite (LiteRT) run on phones: fp32, one example at a time.

Every file is written under a temporary name beside its target, read back, compared with the network, and only then
put in place. ONNX, ExecuTorch and LiteRT are optional.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amc_env import onnx as onnx_files
from amc_env.errors import UserError
from amc_env.graph.surgery import Keeps
from amc_env.inputs import (
    Inputs,
    arguments,
    call,
    count,
    described,
    each,
    joined,
    output_of,
    pieces,
    take,
    tensors_in,
    tensors_of,
)
from amc_env.mobile import MOBILE
from search import files
from search.output.weights import WEIGHTS_FILE, ExportError, one_line, save_pruned

log = logging.getLogger(__name__)


TOLERANCE = 1e-4
"""Largest accepted |file - PyTorch|, as a share of max(1, largest |PyTorch output|); fp32 on the CPU."""

_COMPARED = 4  # examples that a file for single ones is checked on
_TRACED_BATCH = 2  # torch.export treats sizes 0 and 1 as constants, so the traced batch must be larger

Run = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Exported:
    """One export.

    Attributes:
        format: one of FORMATS.
        path: the file.
        bytes: its size, 0 where the export failed.
        max_difference: largest |file - PyTorch| over the compared batches, None where the export failed.
        error: one line, None where the file was checked and kept.
    """

    format: str
    path: Path
    bytes: int
    max_difference: float | None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Small:
    """The network to export.

    Attributes:
        model: the small network.
        example: one batch of inputs, of one example or more; the files are checked on it.
        keeps: what `resize` was given to make it from the unpruned network.
        name: the unpruned network's.
        original: the unpruned network, see `save_pruned`.
        output: which of the network's outputs is compared; see `amc_env.inputs.output_of`.
    """

    model: nn.Module
    example: Inputs
    keeps: Keeps = field(default_factory=dict)
    name: str = "model"
    original: nn.Module | None = None
    output: int | str | None = None

    def __post_init__(self) -> None:
        """Refuses an example without rows."""
        if any(tensor.dim() < 1 or tensor.numel() == 0 for tensor in tensors_of(self.example)):
            raise UserError(
                f"the example batch has shape {described(self.example)}: it must be [N, ...] with N >= 1",
                code="wrong_shape",
            )


class Format(ABC):
    """A format that the small network is exported in; a new one is a subclass with a place in FORMATS.

    Attributes:
        name: as in conf.
        file: its file in the run folder.
        title: what the file is loaded with.
        load_snippet: code that loads it from RUN_FOLDER.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    title: ClassVar[str]
    load_snippet: ClassVar[str]

    def check(self) -> None:  # noqa: B027 -- most need nothing
        """Refuses where a package is missing; called before the expensive part.

        Raises:
            UserError: the packages, with how to install them.
        """

    @abstractmethod
    def write(self, small: Small, folder: Path) -> Exported:
        """Writes the file, reads it back and compares; only then it is put in place.

        Raises:
            ExportError: the file read back differs from the network.
            Exception: whatever the format's library raises for a network that it cannot express.
        """


class Safetensors(Format):
    """Weights and kept channels, for the unpruned class; see `save_pruned`."""

    name = "safetensors"
    file = WEIGHTS_FILE
    title = "Onto the unpruned class (this project)"
    load_snippet = """from search import load_pruned

module = ...  # the unpruned network, as you build it
load_pruned(module, "RUN_FOLDER")  # model.safetensors and channels.json
module.eval()
outputs = module(inputs)  # as in training; of images float32 [N, C, H, W], normalised"""

    def write(self, small: Small, folder: Path) -> Exported:
        path = save_pruned(small.model, small.keeps, folder, name=small.name, original=small.original)
        return Exported(self.name, path, path.stat().st_size, 0.0)


class Program(Format):
    """A file that computes the network without its class: fp32, CPU, any batch size; within TOLERANCE."""

    @abstractmethod
    def save(self, network: nn.Module, example: Inputs, path: Path) -> None:
        """Writes a network that takes batches like this one."""

    @abstractmethod
    def load(self, path: Path) -> Run:
        """Reads it back."""

    def batches(self, example: Inputs) -> list[Inputs]:
        """What the file is compared with the network on."""
        return _batches(example)

    def write(self, small: Small, folder: Path) -> Exported:
        self.check()
        path = folder / self.file
        network, example = onnx_files.plain_copy(small.model, small.example)
        with files.replacing(path) as temporary, onnx_files.quiet():
            self.save(network, example, temporary)
            run, batches = self.load(temporary), self.batches(example)
            difference = _difference(run, network, batches, small.output, path)
        return Exported(self.name, path, path.stat().st_size, difference)


class TorchExport(Program):
    """A torch.export program."""

    name = "pt2"
    file = "model.pt2"
    title = "With PyTorch alone"
    load_snippet = """import torch

module = torch.export.load("RUN_FOLDER/model.pt2").module()
outputs = module(inputs)  # as in training; of images float32 [N, C, H, W], normalised"""

    def save(self, network: nn.Module, example: Inputs, path: Path) -> None:
        torch.export.save(_traced(network, example), path)

    def load(self, path: Path) -> Run:
        return partial(call, torch.export.load(path).module())


class Onnx(Program):
    """One ONNX file with input "input" [batch, ...]; several inputs have the names of the arguments, or numbers."""

    name = "onnx"
    file = "model.onnx"
    title = "With ONNX Runtime"
    load_snippet = """import onnxruntime

session = onnxruntime.InferenceSession("RUN_FOLDER/model.onnx")
name = session.get_inputs()[0].name
outputs = session.run(None, {name: inputs})  # NumPy; of images float32 [N, C, H, W], normalised"""

    def check(self) -> None:
        onnx_files.require_packages("export to onnx", "leave onnx out of the formats")

    def save(self, network: nn.Module, example: Inputs, path: Path) -> None:
        names, shapes = onnx_files.input_names(example), _batch_shapes(example)
        onnx_files.write(_traced(network, example), path, names, shapes)

    def load(self, path: Path) -> Run:
        run = onnx_files.session(path)
        return lambda batch: [torch.from_numpy(output) for output in run(batch)]


class Mobile(Program):
    """A file for phones, which takes one example at a time."""

    def check(self) -> None:
        MOBILE[self.name].check(f"export to {self.name}", f"leave {self.name} out of the formats")

    def save(self, network: nn.Module, example: Inputs, path: Path) -> None:
        MOBILE[self.name].convert(network, take(example, slice(1)), path)

    def load(self, path: Path) -> Run:
        return MOBILE[self.name].load(path)

    def batches(self, example: Inputs) -> list[Inputs]:
        return list(pieces(take(example, slice(_COMPARED)), 1))


class ExecuTorch(Mobile):
    """A program of ExecuTorch."""

    name = "executorch"
    file = "model.pte"
    title = "With ExecuTorch, on phones and here"
    load_snippet = """from executorch.runtime import Runtime

program = Runtime.get().load_program("RUN_FOLDER/model.pte")
method = program.load_method("forward")  # uses the program's memory: keep both
outputs = method.execute([inputs])  # one example; of images float32 [1, C, H, W], normalised"""


class LiteRT(Mobile):
    """A model of LiteRT."""

    name = "litert"
    file = "model.tflite"
    title = "With LiteRT, on phones and here"
    load_snippet = """from ai_edge_litert.interpreter import Interpreter

run = Interpreter("RUN_FOLDER/model.tflite").get_signature_runner()
outputs = run(args_0=inputs)  # NumPy; one example; of images float32 [1, C, H, W], normalised"""


FORMATS: dict[str, Format] = {
    each.name: each for each in (Safetensors(), TorchExport(), Onnx(), ExecuTorch(), LiteRT())
}


def check_formats(formats: Sequence[str]) -> None:
    """Refuses formats that are unknown, or known but not installed; call it before the expensive part.

    Raises:
        UserError: all unknown names with those allowed, or the missing packages with how to install them.
    """
    for chosen in _formats(formats):
        chosen.check()


def export_all(small: Small, folder: Path, formats: Sequence[str]) -> list[Exported]:
    """Exports a network in every format; one that fails is reported, the others are kept.

    Returns:
        One Exported per format, in the order asked for.

    Raises:
        UserError: an unknown format.
    """
    return [_attempt(chosen, small, folder) for chosen in _formats(formats)]


# Formats and failures


def _formats(names: Sequence[str]) -> list[Format]:
    # A bare string is a sequence of letters; taken as such it would give a baffling message.
    wanted = [names] if isinstance(names, str) else list(names)
    if unknown := [one for one in wanted if one not in FORMATS]:
        raise UserError(
            f"unknown export format {', '.join(map(repr, unknown))}: allowed are {', '.join(FORMATS)}",
            code="unknown_name",
            field="export",
        )
    if isinstance(names, str):
        raise UserError(
            f"export formats are a list, got {names!r}: write [{names}]", code="wrong_type", field="export"
        )
    return [FORMATS[name] for name in wanted]


def _attempt(chosen: Format, small: Small, folder: Path) -> Exported:
    """Runs one export; any failure (tracer, converter, disk) becomes a report, as the others still count."""
    path = folder / chosen.file
    try:
        return chosen.write(small, folder)
    except Exception as error:
        log.debug("export of %s failed", path.name, exc_info=True)
        stale = f"; {path.name} from before was left as it is" if path.exists() else ""
        message = f"{one_line(error)}{stale}"
        log.warning("%s was not exported: %s", path.name, message)
        return Exported(chosen.name, path, 0, None, message)


# Programs


def _batch_shapes(example: Inputs) -> Any:
    """The first axis of every input is the batch's."""
    axes = {0: torch.export.Dim("batch")}
    return dict.fromkeys(example, axes) if isinstance(example, dict) else (axes,) * len(tensors_of(example))


def _traced(network: nn.Module, example: Inputs) -> torch.export.ExportedProgram:
    # The sample input is stored in the file: zeros, so that no image of the user's is given away with it.
    sample = each(example, lambda tensor: tensor.new_zeros(_TRACED_BATCH, *tensor.shape[1:]))
    given, named = arguments(sample)
    program = torch.export.export(network, given, named, dynamic_shapes=_batch_shapes(example))
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # source lines and paths of this machine
    return program


def _batches(example: Inputs) -> list[Inputs]:
    """The example and other sizes, one of which is 1: a branch on it is traced away without a word."""
    flipped = each(example, lambda tensor: tensor.flip(-1))
    rows = joined([example, flipped, example, example])  # enough rows, and not all the same
    return [example, *(take(rows, slice(size)) for size in (1, 3) if size != count(example))]


@torch.no_grad()
def _difference(
    run: Run, network: nn.Module, batches: Sequence[Inputs], output: int | str | None, path: Path
) -> float:
    """Largest |run - network| over all batches.

    Raises:
        ExportError: it is beyond TOLERANCE, or the outputs differ in number, shape or finiteness.
    """
    largest = 0.0
    for batch in batches:
        wanted = call(network, batch)
        expected, got = tensors_in(wanted), tensors_in(run(batch))
        shapes = [list(one.shape) for one in expected], [list(one.shape) for one in got]
        if shapes[0] != shapes[1]:
            raise ExportError(
                f"{path.name} gives shapes {shapes[1]} on a batch of {count(batch)}, the network {shapes[0]}"
            )
        counts = output_of(wanted, output)
        (ours, theirs), *_ = (pair for pair in zip(expected, got, strict=True) if pair[0] is counts)
        largest = max(largest, _checked(ours.double(), theirs.double(), count(batch), path))
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
