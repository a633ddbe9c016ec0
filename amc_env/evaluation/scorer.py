"""Scoring of pruned networks on fixed images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import closing

import torch
from torch import Tensor, fx, nn

from amc_env.errors import UserError, first_line
from amc_env.evaluation.folding import Folder
from amc_env.evaluation.int8 import Int8Folder
from amc_env.evaluation.precision import FLOAT32, INT8, arithmetic, dtype_of
from amc_env.graph.copying import module_copy
from amc_env.graph.memory_format import fastest_format
from amc_env.graph.topology import Topology
from amc_env.system import in_lanes, in_turn

log = logging.getLogger(__name__)


_BATCH_PIXELS = {"cpu": 2**16, "cuda": 2**20}


_SMALLEST_BATCH = 4


def batch_size_for(images: Tensor, device: torch.device, precision: str = FLOAT32) -> int:
    """How many images [N, ...] to score at a time: on a processor what its caches hold, else what fills the device.

    It depends on the size of an image, the kind of device and the precision alone, and not on a timing: two runs of one
    seed must round alike. docs/performance.md has the measurements.
    """
    room = _BATCH_PIXELS.get(device.type, _BATCH_PIXELS["cuda"]) * (2 if precision == INT8 else 1)
    pixels = images[0, 0].numel() if images.ndim > 2 else images[0].numel()
    return max(_SMALLEST_BATCH, room // pixels)


def accuracy(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    batch_size: int | None = None,
    precision: str = FLOAT32,
) -> float:
    """Share of images [N, ...] whose largest logit is their label [N], in [0, 1].

    The model is scored in the mode it is in; put it in eval mode first. It is given the images batch by batch, as they
    are; its logits are where the labels are.

    Args:
        model: Images to logits.
        images: As the model takes them.
        labels: int64.
        batch_size: By default that of `batch_size_for`.
        precision: Of products on graphics processors; images and weights are taken as they are.

    Raises:
        UserError: A logit is not a number.
    """
    batch_size = batch_size or batch_size_for(images, labels.device)
    tally = _Tally(labels.device)
    with torch.inference_mode(), arithmetic(precision):
        for batch, wanted in zip(
            torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
        ):
            tally.add(model(batch), wanted)
    return tally.accuracy


class _Tally:
    """Counts hits without waiting for a GPU until the result is read.

    Attributes:
        images: Images counted.
    """

    def __init__(self, device: torch.device):
        self.images = 0
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        self._broken = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: logits [N, classes] whose largest is the label, int64 [N]."""
        self._hits += (logits.argmax(1) == labels).sum()
        self._broken |= logits.isnan().any()
        self.images += len(labels)

    @property
    def accuracy(self) -> float:
        """Share of hits, in [0, 1].

        Raises:
            UserError: A logit is not a number.
        """
        if self._broken:
            raise UserError(
                "the network's outputs are not numbers (NaN): look for NaN in its weights and in the data"
            )
        return int(self._hits) / self.images


class Scorer:
    """Scores cut networks on fixed images: batch norms folded, in one memory layout, batch size and precision.

    On a processor batches of a network that can be traced are run side by side, see `amc_env.system`.

    Args:
        model: The uncut network, in eval mode.
        topology: Its topology.
        images: Normalised images of the search split, [N, C, H, W].
        labels: Their labels, int64 [N].
        batch_size: Images of a batch; by default that of `batch_size_for`.
        channels_last: Memory format of images and weights, where the network runs in it. It may move logits by
            rounding only.
        precision: One of PRECISIONS.

    Raises:
        UserError: The network, or this processor, does not run in that precision; an image holds NaN or infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int | None = None,
        channels_last: bool = True,
        precision: str = FLOAT32,
    ):
        if not images.isfinite().all():
            raise UserError(
                "the search images hold values that are infinite or not numbers (NaN): look for them in the data, and "
                "for zeros in the standard deviations that it is normalised by"
            )
        channels_last = channels_last and images.ndim == 4
        if channels_last and fastest_format(module_copy(model), images[:4]) is not torch.channels_last:
            channels_last = False
            log.info("images are scored contiguous: the network does not run channels-last")
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.images = images.to(dtype_of(precision)).contiguous(memory_format=layout)
        self._precision = precision
        self.channels_last = channels_last
        batch_size = batch_size or batch_size_for(images, labels.device, precision)
        self.folder = _folder(model, topology, self.images, channels_last, precision, batch_size)
        network = _checked(self.folder, model, self.images[:2], precision)
        # a network that cannot be traced may keep things between its layers: one batch at a time
        self._side_by_side = labels.device.type == "cpu" and isinstance(network, fx.GraphModule)
        self._batches = torch.split(self.images, batch_size)
        self._labels = torch.split(labels, batch_size)

    def __call__(self, model: nn.Module) -> float:
        """Accuracy of a cut network, in [0, 1]."""
        tally = _Tally(self.images.device)
        with closing(self.outputs(self.fold(model))) as batches:
            for logits, labels in batches:
                tally.add(logits, labels)
        return tally.accuracy

    def fold(self, model: nn.Module) -> nn.Module:
        """What is scored in place of a cut network; valid until the next one."""
        return self.folder(model)

    def outputs(self, network: nn.Module) -> Generator[tuple[Tensor, Tensor]]:
        """Logits and labels of one batch after another; close it where it may not be read to its end.

        Until it ends torch's products are in this precision everywhere: do not begin another meanwhile.

        Args:
            network: What `fold` gave.
        """
        return self._outputs_from(0, network)

    def _outputs_from(self, first: int, network: nn.Module) -> Generator[tuple[Tensor, Tensor]]:
        @torch.no_grad()
        def logits(index: int) -> Tensor:
            found: Tensor = network(self._batches[first + index])
            return found

        run = in_lanes if self._side_by_side else in_turn
        with arithmetic(self._precision), closing(run(logits, len(self._batches) - first)) as found:
            yield from zip(found, self._labels[first:], strict=True)

    def forget(self) -> None:
        """Free what is kept for later candidates, if anything."""


def _folder(
    model: nn.Module,
    topology: Topology,
    images: Tensor,
    channels_last: bool,
    precision: str,
    batch_size: int,
) -> Folder:
    if precision == INT8:
        return Int8Folder(model, topology, images, channels_last=channels_last, batch_size=batch_size)
    example = images[:4].float()
    return Folder(model, topology, example, channels_last=channels_last, dtype=dtype_of(precision))


def _checked(folder: Folder, model: nn.Module, images: Tensor, precision: str) -> nn.Module:
    """The network that is scored in place of the model; it runs."""
    try:
        network = folder(model)
        with torch.inference_mode():
            network(images)
        return network
    except RuntimeError as error:
        if precision == FLOAT32:
            raise
        raise UserError(
            f"evaluator.precision={precision} does not work for this network ({first_line(error)}); use float32"
        ) from error
