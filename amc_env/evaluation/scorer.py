"""Scoring of pruned networks on fixed examples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, fx, nn

from amc_env.errors import UserError, first_line
from amc_env.evaluation.folding import Folder
from amc_env.evaluation.int8 import Int8Folder
from amc_env.evaluation.precision import BFLOAT16, FLOAT32, INT8, arithmetic, dtype_of
from amc_env.graph.copying import module_copy
from amc_env.graph.memory_format import fastest_format
from amc_env.graph.topology import Topology
from amc_env.inputs import (
    Inputs,
    call,
    device_of,
    finite,
    holds_images,
    in_format,
    pieces,
    take,
    tensors_of,
    to_dtype,
)
from amc_env.system import in_lanes, in_turn, memory_for, out_of_memory
from amc_env.tasks import Classification, Task
from amc_env.tasks.base import TalliedTask

log = logging.getLogger(__name__)


_BATCH_PIXELS = {"cpu": 2**16, "cuda": 2**20}


_SMALLEST_BATCH = 4


_TOKEN = 64  # pixels that a token counts for: networks make vectors of tokens


def batch_size_for(inputs: Inputs, device: torch.device, precision: str = FLOAT32) -> int:
    """How many examples to score at a time: on a processor what its caches hold, else what fills the device.

    It depends on the size of an example, the kind of device and the precision alone, and not on a timing: two runs of one
    seed must round alike. docs/performance.md has the measurements, which were taken on images.
    """
    room = _BATCH_PIXELS.get(device.type, _BATCH_PIXELS["cuda"]) * (2 if precision == INT8 else 1)
    return max(_SMALLEST_BATCH, room // max(1, *map(_pixels, tensors_of(inputs))))


def _pixels(tensor: Tensor) -> int:
    """Of an image [C, H, W] H x W, likewise for signals and volumes; of a row of a table its columns."""
    if not tensor.is_floating_point() and tensor.ndim == 2:
        return _TOKEN * tensor.shape[1]
    return tensor[0, 0].numel() if tensor.ndim > 2 else tensor[0].numel()


def score(
    model: nn.Module | Callable[[Any], Any],
    inputs: Inputs,
    targets: Inputs,
    task: Task | None = None,
    *,
    batch_size: int | None = None,
    precision: str = FLOAT32,
    prepare: Callable[[Inputs], Inputs] = lambda batch: batch,
) -> float:
    """The score of a network on examples, in [0, 1].

    The model is scored in the mode it is in; put it in eval mode first.

    Args:
        model: The network.
        inputs: Of all examples.
        targets: Of all examples, on the network's device.
        task: Says what a score is; by default the accuracy of a classifier.
        batch_size: By default that of `batch_size_for`.
        precision: Of products on graphics processors; inputs and weights are taken as they are.
        prepare: What is done to a batch of inputs before the network is given it.

    Raises:
        UserError: An output is not a number.
    """
    batch_size = batch_size or batch_size_for(inputs, device_of(targets))
    batches = (
        (prepare(batch), wanted)
        for batch, wanted in zip(pieces(inputs, batch_size), pieces(targets, batch_size), strict=True)
    )
    with torch.inference_mode(), arithmetic(precision):
        return (task or Classification()).score(model, batches)


class Scorer:
    """Scores cut networks on fixed examples: batch norms folded, in one memory layout, batch size and precision.

    On a processor batches of a network that can be traced are run side by side, see `amc_env.system`. A task that runs
    networks itself is given each as it is, with its batch norms.

    Args:
        model: The uncut network, in eval mode.
        topology: Its topology.
        inputs: Of the search split, as the network takes them.
        targets: Their targets.
        task: Says what a score is; by default the accuracy of a classifier.
        batch_size: Examples of a batch; by default that of `batch_size_for`.
        channels_last: Memory format of images and weights, where the network runs in it. It may move outputs by
            rounding only.
        precision: One of PRECISIONS.

    Raises:
        UserError: The network, the task, or this processor, does not work in that precision; an input holds NaN or
            infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        inputs: Inputs,
        targets: Inputs,
        task: Task | None = None,
        *,
        batch_size: int | None = None,
        channels_last: bool = True,
        precision: str = FLOAT32,
    ):
        if not finite(inputs):
            raise UserError(
                "the search images hold values that are infinite or not numbers (NaN): look for them in the data, and "
                "for zeros in the standard deviations that it is normalised by",
                code="not_finite",
            )
        self.task = task or Classification()
        if precision in (BFLOAT16, INT8) and not isinstance(self.task, TalliedTask):
            raise UserError(
                f"{{field}}={precision} does not work for a task that runs networks itself; use {FLOAT32}",
                code="task",
                field="evaluator.precision",
            )
        channels_last = channels_last and holds_images(inputs)
        few = take(inputs, slice(4))
        if channels_last and fastest_format(module_copy(model), few) is not torch.channels_last:
            channels_last = False
            log.info("images are scored contiguous: the network does not run channels-last")
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.inputs = in_format(to_dtype(inputs, dtype_of(precision)), layout)
        self._precision = precision
        self.channels_last = channels_last
        device = device_of(targets)
        batch_size = batch_size or batch_size_for(inputs, device, precision)
        self.folder = _folder(model, topology, self.inputs, channels_last, precision, batch_size, self.task)
        network = _checked(self.folder, model, take(self.inputs, slice(2)), precision)
        # a network that cannot be traced may keep things between its layers: one batch at a time
        self._side_by_side = device.type == "cpu" and isinstance(network, fx.GraphModule)
        self._all_targets = targets
        self._halved = False
        self._divide(batch_size)

    def _divide(self, batch_size: int) -> None:
        """Make batches of this size."""
        self.batch_size = batch_size
        self._batches = list(pieces(self.inputs, batch_size))
        self._targets = list(pieces(self._all_targets, batch_size))

    def __call__(self, model: nn.Module) -> float:
        """The score of a cut network, in [0, 1].

        Where memory is used up, batches are halved, once, for this and all later networks.

        Raises:
            UserError: Half a batch does not fit into memory either.
        """
        if not self._halved and self.batch_size > 1:
            try:
                return self._score(model)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            self._halved = True
            self._divide(self.batch_size // 2)
            self.forget()
            torch.cuda.empty_cache()
            log.warning("out of memory: evaluator.batch_size is halved to %d", self.batch_size)
        with memory_for("scoring", "evaluator.batch_size"):
            return self._score(model)

    def _score(self, model: nn.Module) -> float:
        if not isinstance(self.task, TalliedTask):
            with torch.no_grad(), arithmetic(self._precision):
                return self.task.score(model, self._pairs())
        tally = self.task.tally()
        with closing(self.outputs(self.fold(model))) as batches:
            for outputs, targets in batches:
                tally.add(outputs, targets)
        return tally.score

    def _pairs(self) -> Iterator[tuple[Inputs, Inputs]]:
        return zip(self._batches, self._targets, strict=True)

    def fold(self, model: nn.Module) -> nn.Module:
        """What is scored in place of a cut network; valid until the next one."""
        return self.folder(model)

    def outputs(self, network: nn.Module) -> Generator[tuple[Any, Any]]:
        """Outputs, as the task reads them, and targets of one batch after another; close it where it may not be read
        to its end.

        Until it ends torch's products are in this precision everywhere: do not begin another meanwhile.

        Args:
            network: What `fold` gave.
        """
        return self._outputs_from(0, network)

    def _outputs_from(self, first: int, network: nn.Module) -> Generator[tuple[Any, Any]]:
        @torch.no_grad()
        def outputs(index: int) -> Any:
            return self.task.read(call(network, self._batches[first + index]))

        run = in_lanes if self._side_by_side else in_turn
        with arithmetic(self._precision), closing(run(outputs, len(self._batches) - first)) as found:
            yield from zip(found, self._targets[first:], strict=True)

    def forget(self) -> None:
        """Free what is kept for later candidates, if anything."""


def _folder(
    model: nn.Module,
    topology: Topology,
    inputs: Inputs,
    channels_last: bool,
    precision: str,
    batch_size: int,
    task: Task,
) -> Folder:
    if precision == INT8:
        return Int8Folder(
            model, topology, inputs, read=task.read, channels_last=channels_last, batch_size=batch_size
        )
    example, dtype = to_dtype(take(inputs, slice(4)), torch.float32), dtype_of(precision)
    return Folder(model, topology, example, read=task.read, channels_last=channels_last, dtype=dtype)


def _checked(folder: Folder, model: nn.Module, inputs: Inputs, precision: str) -> nn.Module:
    """The network that is scored in place of the model; it runs."""
    try:
        network = folder(model)
        with torch.inference_mode():
            call(network, inputs)
        return network
    except RuntimeError as error:
        if precision == FLOAT32:
            raise
        raise UserError(
            f"evaluator.precision={precision} does not work for this network ({first_line(error)}); use float32",
            code="unsupported",
            field="evaluator.precision",
        ) from error
