"""Train mode without the layers that run in it alone, like the auxiliary heads of GoogLeNet and Inception."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from amc_env.graph.copying import module_copy
from amc_env.inputs import Inputs, call
from search.data.loaders import seeded

log = logging.getLogger(__name__)


def callers_of_train_only(model: nn.Module, example: Inputs) -> tuple[str, ...]:
    """Names of the modules that call others with parameters in train mode only.

    Those others have no part in the score, and a cut does not know their layers. They do not run where their callers
    stay in eval mode, and everything else can be trained.

    Args:
        model: The network, in eval mode.
        example: Two of its inputs.
    """
    used = _calls(model, example)
    idle = {
        name
        for name, module in model.named_modules()
        if name not in used and any(True for _ in module.parameters())
    }
    found: dict[str, str] = {}
    network = module_copy(model) if idle else model
    more = idle
    while more:  # an auxiliary head that does not fit ends the run before later ones are seen
        set_training(network, tuple(found.values()))
        calls = _calls(network, example)
        more = {name for name, caller in calls.items() if name in idle and caller in used} - set(found)
        found |= {name: calls[name] for name in more}
    if found:
        outermost = sorted(name for name in idle if name.rpartition(".")[0] not in idle)
        log.info("no part in the score, and not trained: %s", ", ".join(outermost))
    return tuple(dict.fromkeys(found.values()))


def set_training(model: nn.Module, in_eval: Sequence[str]) -> None:
    """Set train mode for all modules but those of these names; what is inside of those is in train mode."""
    model.train()
    for name in in_eval:
        model.get_submodule(name).training = False


def _calls(model: nn.Module, example: Inputs) -> dict[str, str]:
    """The modules that a run calls until it ends or fails, each with the first one that calls it."""
    calls: dict[str, str] = {}
    running: list[str] = []
    handles: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            calls.setdefault(name, running[-1] if running else "")
            running.append(name)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        with torch.no_grad(), seeded(0):
            call(model, example)
    except Exception as error:  # a user's network may raise anything; the training will say what
        log.debug("this run failed: %s", error)
    finally:
        for handle in handles:
            handle.remove()
    return calls
