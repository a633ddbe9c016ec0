"""What runs a network whose latency is measured: PyTorch, its compiler, ONNX Runtime, runtimes of phones, a GPU."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn

from amc_env import onnx as onnx_files
from amc_env.costs.latency.timing import Call
from amc_env.errors import UserError, first_line
from amc_env.graph.copying import module_copy
from amc_env.inputs import Inputs, call, device_of, each, to_device
from amc_env.mobile import MOBILE

_CAPTURE_WARMUP = (
    3  # passes before a CUDA graph is captured, in which libraries choose kernels and take memory
)


class Runtime(Protocol):
    """Makes networks ready to be timed.

    Attributes:
        name: One of RUNTIMES.
    """

    @property
    def name(self) -> str: ...

    def check(self) -> None:
        """Finds out whether this machine can.

        Raises:
            UserError: It cannot, with what is missing.
        """

    def prepare(self, model: nn.Module, example: Inputs) -> Call:
        """One pass of ``model`` over the batch ``example``, over when it returns.

        Args:
            model: In eval mode; it is left as it is.
            example: One batch.

        Raises:
            UserError: It cannot run such a network.
        """


@dataclass(frozen=True)
class Eager:
    """PyTorch's eager mode, on the device of the network and the example."""

    name: str = "eager"

    def check(self) -> None:
        """Every machine can."""

    def prepare(self, model: nn.Module, example: Inputs) -> Call:
        """See Runtime."""
        return _pass(partial(call, model), example)


@dataclass(frozen=True)
class Compile:
    """torch.compile, on the device of the network and the example.

    Attributes:
        backend: Of torch.compile.
    """

    name: str = "compile"
    backend: str | Callable[..., Any] = "inductor"

    def check(self) -> None:
        """Refuses a machine without the compiler that inductor calls."""
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if shutil.which(compiler) is None:
            raise UserError(
                f"latency.runtime=compile needs a C++ compiler, and there is no {compiler}: install it, name another in "
                "the environment variable CXX, or use latency.runtime=eager",
                code="missing",
                field="latency.runtime",
            )

    def prepare(self, model: nn.Module, example: Inputs) -> Call:
        """See Runtime; seconds for a layer, minutes for a large network."""

        def forward(batch: Inputs) -> Any:
            return call(model, batch)

        # torch.compile keeps what it compiled by code object, and after a handful for the same one it gives up.
        forward.__code__ = forward.__code__.replace()
        once = _pass(torch.compile(forward, backend=self.backend, dynamic=False), example)
        try:
            once()
        except Exception as error:
            raise _cannot(self.name, model, error) from error
        return once


@dataclass(frozen=True)
class Onnx:
    """ONNX Runtime on the processor, with its default optimisations (it folds batch norms and activations itself).

    Attributes:
        threads: Of one pass.
    """

    threads: int
    name: str = "onnx"

    def check(self) -> None:
        """Refuses a machine without the packages."""
        onnx_files.require_packages("latency.runtime=onnx", "use latency.runtime=eager")

    def prepare(self, model: nn.Module, example: Inputs) -> Call:
        """See Runtime; some 10 ms for a layer."""
        network, batch = onnx_files.plain_copy(model, example)
        try:
            run = onnx_files.session(onnx_files.fixed(network, batch), self.threads)
        except Exception as error:
            raise _cannot(self.name, model, error) from error

        def once() -> None:
            run(batch)

        return once


@dataclass(frozen=True)
class Mobile:
    """A runtime of phones, on the processor.

    Attributes:
        threads: Of one pass.
        name: One of `amc_env.mobile.MOBILE`.
    """

    threads: int
    name: str

    def check(self) -> None:
        """Refuses a machine without the packages."""
        MOBILE[self.name].check(f"latency.runtime={self.name}", "use latency.runtime=eager")

    def prepare(self, model: nn.Module, example: Inputs) -> Call:
        """See Runtime; seconds for a layer."""
        network, batch = onnx_files.plain_copy(model, example)
        made = MOBILE[self.name]
        try:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "network"
                made.convert(network, batch, path)
                run = made.load(path, self.threads)
                run(batch)
        except Exception as error:
            raise _cannot(self.name, model, error) from error

        def once() -> None:
            run(batch)

        return once


@dataclass(frozen=True)
class Cuda:
    """PyTorch's eager mode on a graphics processor, timed there by events around the pass."""

    name: str = "cuda"

    def check(self) -> None:
        """Refuses a machine without a graphics processor."""
        if not torch.cuda.is_available():
            raise UserError(
                f"latency.runtime={self.name} needs a CUDA graphics processor, and torch finds none here: use "
                "latency.runtime=eager",
                code="no_device",
                field="latency.runtime",
            )

    def prepare(self, model: nn.Module, example: Inputs) -> Call:
        """See Runtime; the network is copied to the example's graphics processor, or to the current one."""
        self.check()
        device = device_of(example)
        if device.type != "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        network = module_copy(model).to(device)
        batch = to_device(each(example, torch.detach), device)
        with torch.cuda.device(device):
            return _between_events(self._run(network, batch), device)

    def _run(self, network: nn.Module, batch: Inputs) -> Callable[[], Any]:
        return lambda: call(network, batch)


@dataclass(frozen=True)
class CudaGraph(Cuda):
    """A CUDA graph of the pass, captured once and replayed: without what it costs to start each kernel."""

    name: str = "cuda_graph"

    def _run(self, network: nn.Module, batch: Inputs) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the warm-up must not run on the stream that is captured
        aside.wait_stream(torch.cuda.current_stream())
        try:
            with torch.inference_mode():
                with torch.cuda.stream(aside):
                    for _ in range(_CAPTURE_WARMUP):
                        call(network, batch)
                torch.cuda.current_stream().wait_stream(aside)
                with torch.cuda.graph(graph):
                    call(network, batch)
        except RuntimeError as error:
            raise _cannot(self.name, network, error) from error

        def replay(_kept: tuple[nn.Module, Inputs] = (network, batch)) -> None:
            graph.replay()  # reads the memory of these two, which therefore has to live as long

        return replay


RuntimeName = Literal["eager", "compile", "onnx", "executorch", "litert", "cuda", "cuda_graph"]
RUNTIMES: tuple[str, ...] = get_args(RuntimeName)
PROCESSOR_ONLY = ("onnx", *MOBILE)
"""Runtimes that take network and example to the processor."""


def runtime(name: str, threads: int) -> Runtime:
    """The runtime of a name.

    Args:
        name: One of RUNTIMES.
        threads: Of the processor, for one pass. torch's own come from ``using_threads``, which has to be around both
            the preparing and the timing.

    Raises:
        UserError: There is none of that name.
    """
    known: list[Runtime] = [Eager(), Compile(), Onnx(threads), Cuda(), CudaGraph()]
    found = {each.name: each for each in (*known, *(Mobile(threads, other) for other in MOBILE))}
    if name not in found:
        raise UserError(
            f"unknown latency.runtime={name}: allowed are {', '.join(RUNTIMES)}",
            code="unknown_name",
            field="latency.runtime",
        )
    return found[name]


def _pass(run: Callable[[Any], Any], example: Inputs) -> Call:
    """One pass in inference mode, waited for."""
    device = device_of(example)

    @torch.inference_mode()
    def once() -> None:
        run(example)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return once


def _between_events(run: Callable[[], Any], device: torch.device) -> Call:
    """One pass, with the milliseconds between the events that the device passes before and after it."""
    started, ended = (_event() for _ in range(2))

    @torch.inference_mode()
    def once() -> float:
        with torch.cuda.device(device):
            started.record()
            run()
            ended.record()
            ended.synchronize()
        return float(started.elapsed_time(ended))

    return once


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _cannot(name: str, model: nn.Module, error: Exception) -> UserError:
    other = "cuda" if name == "cuda_graph" else "eager"
    return UserError(
        f"latency.runtime={name} cannot run {type(model).__name__} ({first_line(error)}): use latency.runtime={other}",
        code="unsupported",
        field="latency.runtime",
    )
