"""Short-term fine-tuning: a few steps of training before a candidate is scored.

Yang et al., "NetAdapt", ECCV 2018, section 3.3. It is a repair like the others, so any agent can have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from torch import nn

from amc_env.errors import UserError
from amc_env.graph.surgery import Keeps
from amc_env.pruning.candidate import Builder
from amc_env.pruning.repair.base import Repair
from search.data.base import Data
from search.settings import SHORT_TERM, Settings
from search.training.batches import FirstBatches, training_batches
from search.training.finetune import finetune


class ShortTerm:
    """Repairs, then trains for a few steps: SGD on training images, along a cosine from the learning rate to 0.

    All candidates of a start see the same images in the same order; another start sees others.

    Args:
        repair: Runs first.
        builder: Built the candidates; says which weights are masked and stay zero.
        data: Its training split is trained on.
        settings: The run's.
        start: Name of the weights that candidates are cut from.
    """

    name = SHORT_TERM

    def __init__(self, repair: Repair, builder: Builder, data: Data, settings: Settings, start: str):
        self._repair, self._builder = repair, builder
        self._data, self._settings = data, settings
        self._seed = crc32(f"{settings.seed} {start}".encode())

    def __call__(self, model: nn.Module, removed: Sequence[int], keeps: Keeps) -> None:
        """Repairs and trains ``model`` in place.

        Raises:
            UserError: The loss is no longer finite, or the training data ends.
        """
        self._repair(model, removed, keeps)
        try:
            self._train(model, removed)
        except UserError as error:  # the same training as at the end, under settings of its own
            raise error.inside("short_term") from error

    def _train(self, model: nn.Module, removed: Sequence[int]) -> None:
        settings, chosen = self._settings, self._settings.short_term
        batches = training_batches(self._data, chosen.batch_size, self._seed, settings.device)
        finetune(
            model,
            FirstBatches(batches, settings.short_term_steps),
            epochs=1,
            lr=chosen.lr_fraction * settings.original_lr,
            momentum=chosen.momentum,
            weight_decay=chosen.weight_decay,
            seed=self._seed,
            device=settings.device,
            masks=self._builder.masks(removed) or None,
            task=settings.task,
        )


def check_loader(data: Data) -> None:
    """Finds out whether candidates can all be shown the same images.

    Raises:
        UserError: Workers of the loader would depend on the random numbers that earlier candidates used.
    """
    if getattr(data.loader, "persistent_workers", False):
        raise UserError(
            "short_term.steps trains every candidate on the same images, and a train_loader with persistent_workers=True "
            "augments them otherwise each time: make it with persistent_workers=False, or set short_term.steps=0",
            code="conflict",
            field="short_term.steps",
        )
