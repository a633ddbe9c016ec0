"""Files for phones: how ExecuTorch programs and LiteRT models are made and run. The one place that knows the packages.

All of them are optional: call `MobileFormat.check` before anything else here. A file computes batches of one size, that
of the example it was made with, in float32.
"""

from __future__ import annotations

import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amc_env.errors import require_packages
from amc_env.inputs import Inputs, arguments, tensors_of

Run = Callable[[Inputs], list[Tensor]]
"""A batch on the CPU to the outputs."""


class MobileFormat(ABC):
    """A format that runs on phones.

    Attributes:
        name: As in conf, and the extra that installs what it needs.
        packages: What is imported.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]

    def check(self, wanted: str, way_out: str) -> None:
        """`amc_env.errors.require_packages` of this format's."""
        require_packages(self.packages, self.name, wanted, way_out)

    @abstractmethod
    def convert(self, network: nn.Module, example: Inputs, path: Path) -> None:
        """Writes a file; seconds for a small network.

        Args:
            network: On the CPU, in float32 and eval mode.
            example: One batch.
            path: The file.

        Raises:
            Exception: Whatever the package raises for a network that it cannot express.
        """

    @abstractmethod
    def load(self, path: Path, threads: int | None = None) -> Run:
        """Reads a file, and gives what runs it.

        Args:
            path: The file.
            threads: Of one pass; None: as the package chooses.
        """


class ExecuTorch(MobileFormat):
    """A program of ExecuTorch, whose layers XNNPACK computes."""

    name = "executorch"
    packages = ("executorch",)

    def convert(self, network: nn.Module, example: Inputs, path: Path) -> None:
        """See MobileFormat."""
        with _quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            given, named = arguments(example)
            program = torch.export.export(network, given, named)
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path.write_bytes(edge.to_executorch().buffer)

    def load(self, path: Path, threads: int | None = None) -> Run:
        """See MobileFormat; the threads are those of the process from now on."""
        with _quiet():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            # The count is asked for in any case: the first call writes what it finds out about the processor.
            portable_lib._unsafe_reset_threadpool(threads or portable_lib._threadpool_get_thread_count())
            program = Runtime.get().load_program(path)
            method = program.load_method("forward")

        def run(batch: Inputs, _kept: Any = program) -> list[Tensor]:  # the method uses the program's memory
            outputs = method.execute([tensor.contiguous() for tensor in tensors_of(batch)])
            return [output.clone() for output in outputs]  # the method's own memory, which it uses again

        return run


class LiteRT(MobileFormat):
    """A model of LiteRT, which was TensorFlow Lite."""

    name = "litert"
    packages = ("litert_torch", "ai_edge_litert")

    def convert(self, network: nn.Module, example: Inputs, path: Path) -> None:
        """See MobileFormat."""
        with _quiet():
            import litert_torch

            given, named = arguments(example)
            litert_torch.convert(network, given, named).export(str(path))

    def load(self, path: Path, threads: int | None = None) -> Run:
        """See MobileFormat."""
        with _quiet():
            from ai_edge_litert.interpreter import Interpreter

            interpreter = Interpreter(str(path), num_threads=threads)
            interpreter.allocate_tensors()
            opened = interpreter.get_signature_runner()

        def run(batch: Inputs) -> list[Tensor]:
            given, named = arguments(batch)
            numbered = {f"args_{place}": tensor for place, tensor in enumerate(given)}
            outputs = opened(**{name: tensor.numpy() for name, tensor in (numbered | named).items()})
            return [torch.from_numpy(outputs[name]) for name in sorted(outputs, key=_place)]

        return run


MOBILE: dict[str, MobileFormat] = {each.name: each for each in (ExecuTorch(), LiteRT())}


def _place(output: str) -> tuple[int, str]:
    """Sorts output_2 before output_10."""
    return len(output), output


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps warnings and the libraries' output, which they write through Python and past it, from the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            for stream in kept:
                os.dup2(nowhere.fileno(), stream)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
    finally:
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
