"""ONNX files: how they are made from networks and run. The one place that knows onnx, onnxscript and onnxruntime.

All three are optional: call `require_packages` before anything else here.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amc_env import errors
from amc_env.graph.copying import module_copy
from amc_env.inputs import Inputs, arguments, each, tensors_of, to_dtype

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


INPUT = "input"
"""Name of a file's input, where there is one; several without names of their own are numbered."""


_ERRORS = 3  # the level of onnxruntime's log; its warnings are about its own optimisations


def require_packages(wanted: str, way_out: str) -> None:
    """`amc_env.errors.require_packages` of these three."""
    errors.require_packages(PACKAGES, "onnx", wanted, way_out)


def input_names(example: Inputs) -> list[str]:
    """The names of a file's inputs."""
    if isinstance(example, Tensor):
        return [INPUT]
    return (
        [f"{INPUT}_{number}" for number in range(len(example))]
        if isinstance(example, tuple)
        else list(example)
    )


def plain_copy(model: nn.Module, example: Inputs) -> tuple[nn.Module, Inputs]:
    """Copies on the CPU, in fp32 and eval mode: the caller's network keeps its flags, device and layout."""
    network = module_copy(model).cpu().float().eval().requires_grad_(False)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # missing in torch's stubs
    return network, to_dtype(each(example, lambda tensor: tensor.detach().cpu()), torch.float32)


def write(
    program: torch.export.ExportedProgram, path: Path, names: Sequence[str], dynamic_shapes: Any
) -> None:
    """Writes a traced network as one file, its inputs named by ``names`` and its axes by ``dynamic_shapes``.

    Raises:
        Exception: Whatever torch.onnx raises for a network that it cannot express.
    """
    with quiet():
        torch.onnx.export(
            program,
            (),
            path,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=list(names),
            dynamic_shapes=dynamic_shapes,  # again, because only this names the axes in the file
        )


def fixed(network: nn.Module, example: Inputs) -> bytes:
    """The content of a file for one batch size, made to be timed and not to be kept.

    torch's older exporter takes milliseconds for a layer where the one by torch.export takes a second, and
    onnxruntime makes the same kernels of both; it knows fewer operations, so the other follows where it fails.

    Args:
        network: A copy of ``plain_copy``.
        example: Its batch.

    Raises:
        Exception: Whatever torch.onnx raises for a network that it cannot express.
    """
    with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's age, and about what holds for this batch only
        path = Path(folder) / "network.onnx"
        given, named = arguments(example)
        names = input_names(example)
        try:
            torch.onnx.export(network, given, path, kwargs=named, input_names=names, dynamo=False)
        except Exception:
            options: dict[str, Any] = {"external_data": False, "verbose": False, "input_names": names}
            torch.onnx.export(network, given, path, kwargs=named, dynamo=True, **options)
        return path.read_bytes()


def session(file: Path | bytes, threads: int | None = None) -> Callable[[Inputs], list[Any]]:
    """Runs a file by onnxruntime on the processor, with its default optimisations.

    Args:
        file: Its path or content.
        threads: That one pass uses; None: as many as there are cores.

    Returns:
        A batch on the CPU to the outputs, as NumPy arrays.
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # idle threads leave the cores to others
    opened = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    sources = [source.name for source in opened.get_inputs()]

    def run(batch: Inputs) -> list[Any]:
        names = sources[:1] if isinstance(batch, Tensor) else input_names(batch)
        given = zip(names, tensors_of(batch), strict=True)
        feed = {
            name: tensor.numpy() for name, tensor in given if name in sources
        }  # what is unused is left out
        outputs: list[Any] = opened.run(None, feed)
        return outputs

    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Drops the messages of a plain export that no user can act on; everything else is shown."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used", UserWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch 2.11
        registration.addFilter(_not_about_torchvision)
        try:
            yield
        finally:
            registration.removeFilter(_not_about_torchvision)


def _not_about_torchvision(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("torchvision is not installed")
