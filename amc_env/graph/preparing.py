"""Networks made ready to be pruned: wrappers taken off, reparametrized weights baked in, float32 throughout.

What cannot be pruned at all, because it is no network of modules any more, is refused by name.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from amc_env.errors import UserError, first_line
from amc_env.graph.replacing import replace_modules

log = logging.getLogger(__name__)

_EAGER = "bring the network itself, as it was before that: an nn.Module that PyTorch runs in eager mode"


def unwrapped(model: Any) -> nn.Module:
    """The network within torch.compile, DataParallel and DistributedDataParallel.

    Raises:
        UserError: It is no network of modules: TorchScript, an exported program, a quantized network, or no module; or its
            weights are on the meta device, where they have no values.
    """
    while (inner := _inner(model)) is not None:
        log.info("%s is taken off: the network within is pruned", type(model).__name__)
        model = inner
    reason = _refusal(model)
    if reason:
        raise UserError(f"{{field}} is {reason}; {_EAGER}", code="not_eager", field="module")
    assert isinstance(model, nn.Module)
    absent = [
        name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and tensor.is_meta
    ]
    if absent:
        raise UserError(
            f"{{field}} has {len(absent)} tensors on the meta device, which have no values, the first {absent[0]}; load its "
            "weights first",
            code="no_weights",
            field="module",
        )
    return model


def _inner(model: Any) -> nn.Module | None:
    inner = None
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = model.module
    elif type(model).__name__ == "OptimizedModule":  # of torch.compile
        inner = model._orig_mod
    return inner if isinstance(inner, nn.Module) else None


def _refusal(model: Any) -> str:
    """What a network is that cannot be pruned, or nothing."""
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        return f"TorchScript ({type(model).__name__}), whose layers are compiled"
    if isinstance(model, torch.export.ExportedProgram):
        return "an exported program (torch.export), whose layers are gone"
    if not isinstance(model, nn.Module):
        return f"a {type(model).__name__}, and no nn.Module"
    if any(kind.__module__.startswith("torch.export") for kind in type(model).__mro__):
        return "the module of an exported program (torch.export), whose layers are gone"
    quantized = [name for name, module in model.named_modules() if _is_quantized(module)]
    if quantized:
        return f"a quantized network ({', '.join(quantized[:4])}), whose weights are integers"
    return ""


def _is_quantized(module: nn.Module) -> bool:
    names = type(module).__module__.split(".")
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return (names[0] == "torch" and "quantized" in names) or any(tensor.is_quantized for tensor in own)


def prepared(model: nn.Module) -> nn.Module:
    """A network ready to be pruned, in eval mode.

    Args:
        model: A copy, which is changed: what it computes stays the same.

    Returns:
        What `plain` gives, in float32.

    Raises:
        UserError: As `plain`.
    """
    model = plain(model)
    others = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    others -= {torch.float32}
    if others:
        log.info("the network is converted from %s to float32", ", ".join(sorted(map(str, others))))
        model.float()
    return model


def plain(model: nn.Module) -> nn.Module:
    """The network within its wrappers, its modules such that they can be pruned, in eval mode; changed in place.

    The weights of weight_norm, spectral_norm, other parametrizations and pruning masks become plain parameters, and
    modules are replaced as `replace_modules` does.

    Raises:
        UserError: As `unwrapped`; or a parametrization cannot be taken off.
    """
    model = unwrapped(model).eval()
    baked = [name for name, module in model.named_modules() if _bake(name, module)]
    if baked:
        log.info("reparametrized weights are made plain ones: %s", ", ".join(baked))
    if replaced := replace_modules(model):
        log.info("replaced by modules that compute the same and can be pruned: %s", ", ".join(replaced))
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False) is True:
        config.use_cache = (
            False  # of Hugging Face's decoders: exports cannot return it, and no classifier reads it
        )
    return model


def _bake(name: str, module: nn.Module) -> bool:
    """Make the weights of a module plain parameters, in place; whether there was something to do."""
    if isinstance(module, parametrize.ParametrizationList):
        return False
    try:
        return any([_bake_hooks(module), _bake_parametrizations(module)])
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the reparametrized weights of {name or 'the network'} cannot be made plain ones ({first_line(error)}): take "
            "the parametrization off before",
            code="parametrization",
            field="module",
        ) from error


def _bake_parametrizations(module: nn.Module) -> bool:
    if not parametrize.is_parametrized(module):
        return False
    kind = type(
        module
    )  # made for this module, and shared by its copies, from which the weight must not be taken
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, own)
    for name in list(module.parametrizations):  # type: ignore[arg-type]
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return True


def _bake_hooks(module: nn.Module) -> bool:
    """Those of torch.nn.utils.weight_norm and spectral_norm, and of torch.nn.utils.prune."""
    found = False
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    for hook in hooks:
        kind = type(hook).__name__
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
        elif kind == "WeightNorm":
            nn.utils.remove_weight_norm(module, hook.name)
        elif kind == "SpectralNorm":
            nn.utils.remove_spectral_norm(module, hook.name)
        else:
            continue
        found = True
    return found
