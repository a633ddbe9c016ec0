"""How labels pass through the operations of ATen, PyTorch's library of tensor operations.

A rule takes the labels of a run, an operation's arguments by name and its first output, and returns the dimensions of
that output. Operations without a rule fix the labels of all of their inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from amc_env.graph.labels import Dim, Ints, Labels, Product, Split

Arguments = dict[str, Any]
Rule = Callable[[Labels, Arguments, Tensor], Sequence[Dim]]

RULES: dict[str, Rule] = {}
"""By the operation's name without its overload."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


# ------------------------------------------------------------------------------------------- element by element


def pointwise(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    """Tensors that are broadcast against each other: entries at the same place go together."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    dims = []
    for place in range(-out.ndim, 0):
        there = [(t.shape[place], labels.dims(t)[place]) for t in tensors if t.ndim >= -place]
        dims.append(labels.same([dim for size, dim in there if size == out.shape[place]]))
    return dims


for _name in ("clone", "detach", "alias", "contiguous", "lift_fresh", "_to_copy", "copy", "copy_", "dropout"):
    RULES[_name] = pointwise
for _name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
    RULES[_name] = pointwise
for _name in (
    "hardtanh",
    "hardswish",
    "mish",
    "hardshrink",
    "softshrink",
    "log_sigmoid_forward",
    "_prelu_kernel",
):
    RULES[_name] = RULES[f"{_name}_"] = pointwise
for _name in ("native_dropout", "masked_fill", "masked_fill_", "bernoulli", "fill_", "zero_", "rrelu"):
    RULES[_name] = pointwise


# ------------------------------------------------------------------------------------------- products with weights


@rule("mm", "bmm")
def _mm(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    return _matmul(labels, arguments["self"], arguments["mat2"], out)


@rule("addmm")
def _addmm(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    product = _matmul(labels, arguments["mat1"], arguments["mat2"], out)
    return _plus(labels, product, arguments["self"])


@rule("baddbmm")
def _baddbmm(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    product = _matmul(labels, arguments["batch1"], arguments["batch2"], out)
    return _plus(labels, product, arguments["self"])


def _plus(labels: Labels, dims: Sequence[Dim], bias: Tensor) -> list[Dim]:
    """The dimensions of a product after a bias is added."""
    own = labels.dims(bias)
    found = list(dims)
    for place in range(-bias.ndim, 0):
        if bias.shape[place] > 1:
            found[place] = labels.same([dims[place], own[place]])
    return found


def _matmul(labels: Labels, a: Tensor, b: Tensor, out: Tensor) -> list[Dim]:
    left, right = labels.dims(a), labels.dims(b)
    labels.macs += out.numel() * a.shape[-1]
    inner = labels.same([left[-1], right[-2]])
    batch = [labels.same([x, y]) for x, y in zip(left[:-2], right[:-2], strict=True)]
    if not (labels.is_weight(a) or labels.is_weight(b)):
        labels.fix(inner, "two activations are multiplied along its channels")
        for dim in batch:
            labels.heads |= dim.axes
        cut = next((dim.labels for dim in batch if dim.labels is not None), None)
        labels.products.append(Product(out.numel() * a.shape[-1], cut))
    elif labels.is_weight(b):
        labels.fix(left[-2], "a layer is applied to each of its channels")
    return [*batch, left[-2], right[-1]]


@rule("convolution")
def _convolution(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x, weight, bias, groups = (arguments[key] for key in ("input", "weight", "bias", "groups"))
    given, own = labels.dims(x), labels.dims(weight)
    labels.macs += (x if arguments["transposed"] else out).shape[2:].numel() * len(x) * weight.numel()
    for dim in (given[0], *given[2:]):
        labels.fix(dim, "a convolution slides over its channels")
    inputs, outputs = (own[0], own[1]) if arguments["transposed"] else (own[1], own[0])
    if groups > 1:
        inputs, outputs = _grouped(labels, arguments, given[1], own)
    else:
        labels.same([given[1], inputs])
    if bias is not None:
        outputs = labels.same([outputs, labels.dims(bias)[0]])
    return [given[0], outputs, *(Dim() for _ in given[2:])]


def _grouped(labels: Labels, arguments: Arguments, given: Dim, own: Sequence[Dim]) -> tuple[Dim, Dim]:
    """Inputs and outputs of a grouped convolution: every group loses the same ones, a depthwise one whole groups."""
    weight, groups = arguments["weight"], arguments["groups"]
    if arguments["transposed"]:
        for dim in (given, *own):
            labels.fix(dim, "its channels pass through a grouped transposed convolution")
        return Dim(), Dim(
            labels.fixed(weight.shape[1] * groups, "they leave a grouped transposed convolution")
        )
    if weight.shape[0] == groups and weight.shape[1] == 1:
        return labels.same([given, own[0]]), own[0]
    outputs = _tied(labels, own[0], groups)
    if given.labels is not None:
        tied = _tied(labels, given, groups)
        assert tied.labels is not None
        local = tied.labels[: weight.shape[1]]
        if own[1].labels is not None:
            labels.unite(own[1].labels, local)
    else:
        labels.fix(own[1], "its channels meet values whose number is fixed")
    return own[1], outputs


def _tied(labels: Labels, dim: Dim, groups: int) -> Dim:
    """The dimension with the same entry of every group united."""
    if dim.labels is not None:
        rows = dim.labels.reshape(groups, -1)
        labels.unite(np.tile(rows[0], groups - 1), rows[1:].ravel())
    return dim


@rule("embedding")
def _embedding(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    rows, width = labels.dims(arguments["weight"])
    labels.fix(rows, "they are looked up by number")
    return [*(Dim() for _ in arguments["indices"].shape), width]


# ------------------------------------------------------------------------------------------- attention


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def _attention(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    """Query, key and value [N, heads, tokens, width]."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    dims = [labels.dims(tensor) for tensor in (query, key, value)]
    for own in dims:
        labels.heads |= own[1].axes
        labels.fix(own[2], "attention mixes its channels")
        labels.fix(own[3], "attention multiplies along its channels")
    repeats = [query.shape[1] // tensor.shape[1] for tensor in (query, key, value)]
    heads = labels.same([_repeated(own[1], times) for own, times in zip(dims, repeats, strict=True)])
    bias = arguments.get("attn_mask", arguments.get("attn_bias"))
    if bias is not None and bias.ndim == 4 and bias.shape[1] == query.shape[1] > 1:
        heads = labels.same([heads, labels.dims(bias)[1]])
    macs = query[..., 0].numel() * key.shape[2] * (query.shape[3] + value.shape[3])
    labels.macs += macs
    labels.products.append(Product(macs, heads.labels))
    return [dims[0][0], heads, Dim(), Dim()]


def _repeated(dim: Dim, times: int) -> Dim:
    return Dim(None if dim.labels is None else np.repeat(dim.labels, times), dim.axes)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    dims = labels.dims(arguments["self"])
    labels.fix(dims[arguments["dim"]], "a softmax runs over its channels")
    return dims


# ------------------------------------------------------------------------------------------- norms


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "cudnn_batch_norm",
)
def _batch_norm(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x = labels.dims(arguments["input"])
    own = [arguments.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    channels = labels.same([x[1], *(labels.dims(tensor)[0] for tensor in own if tensor is not None)])
    if arguments.get("training"):
        for dim in (x[0], *x[2:]):
            labels.fix(dim, "its channels are normalised together")
    return [x[0], channels, *x[2:]]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x = arguments["input"]
    dims = list(labels.dims(x))
    own = [arguments.get(name) for name in ("weight", "bias")]
    for place in range(-len(arguments["normalized_shape"]), 0):
        shared = [labels.dims(tensor)[place] for tensor in own if tensor is not None]
        dims[place] = labels.same([dims[place], *shared])
        _normalised(labels, dims[place])
    return dims


def _normalised(labels: Labels, dim: Dim) -> None:
    if not labels.in_norm:
        norm = labels.module or "a norm"
        labels.fix(
            dim, f"its channels are normalised together by {norm}: granularity.residual=true cuts them"
        )


@rule("native_group_norm")
def _group_norm(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    """Whole groups can be removed: each is normalised by itself."""
    x = labels.dims(arguments["input"])
    own = [arguments.get(name) for name in ("weight", "bias")]
    channels = labels.same([x[1], *(labels.dims(tensor)[0] for tensor in own if tensor is not None)])
    if channels.labels is not None and not (arguments["group"] == 1 and labels.in_norm):
        rows = channels.labels.reshape(arguments["group"], -1)
        labels.unite(np.repeat(rows[:, :1], rows.shape[1] - 1, axis=1).ravel(), rows[:, 1:].ravel())
        if arguments["group"] == 1:
            _normalised(labels, channels)
    return [x[0], channels, *x[2:]]


# ------------------------------------------------------------------------------------------- reductions and pooling


@rule(
    *("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "prod", "logsumexp", "argmax"),
    *("argmin", "any", "all", "linalg_vector_norm", "norm", "median", "nansum", "count_nonzero"),
)
def _reduction(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x = arguments["self"]
    if isinstance(arguments.get("other"), Tensor):  # max and min of two tensors
        return pointwise(labels, arguments, out)
    gone = _places(arguments.get("dim"), x.ndim)
    dims = labels.dims(x)
    for place in gone:
        if x.shape[place] > 1 and not labels.in_norm:
            labels.fix(dims[place], "its channels are reduced to one value")
    if out.ndim == x.ndim:
        return [Dim() if place in gone else dim for place, dim in enumerate(dims)]
    return [dim for place, dim in enumerate(dims) if place not in gone]


def _places(dim: int | Sequence[int] | None, ndim: int) -> set[int]:
    given: Iterable[int] = range(ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return {place % ndim for place in given}


def _spatial(last: int) -> Rule:
    """A rule for what works on the last dimensions alone."""

    def apply(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
        x = arguments.get("self", arguments.get("input"))
        assert isinstance(x, Tensor)
        dims = labels.dims(x)
        for dim in dims[-last:]:
            labels.fix(dim, "a pooling slides over its channels")
        return [*dims[:-last], *(Dim() for _ in range(last))]

    return apply


for _n in (1, 2, 3):
    for _name in ("max_pool{}d", "max_pool{}d_with_indices", "avg_pool{}d", "_adaptive_avg_pool{}d"):
        RULES[_name.format(_n)] = _spatial(_n)
    for _name in ("adaptive_avg_pool{}d", "adaptive_max_pool{}d", "reflection_pad{}d", "replication_pad{}d"):
        RULES[_name.format(_n)] = _spatial(_n)
    for _kind in ("nearest", "linear", "bilinear", "bicubic", "trilinear", "_nearest_exact"):
        RULES[f"upsample_{_kind}{_n}d"] = RULES[f"_upsample_{_kind}{_n}d"] = _spatial(_n)
    RULES[f"_upsample_nearest_exact{_n}d"] = RULES[f"_upsample_bilinear{_n}d_aa"] = _spatial(_n)


# ------------------------------------------------------------------------------------------- shapes and places


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy")
def _view(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x = arguments["self"]
    return reshaped(labels, labels.dims(x), x.shape, out.shape)


def reshaped(labels: Labels, dims: Sequence[Dim], old: Sequence[int], new: Sequence[int]) -> list[Dim]:
    """The dimensions after a reshape: neighbours are merged and split where their sizes say so."""
    if math.prod(new) == 0:
        return [Dim() for _ in new]
    before = [place for place, size in enumerate(old) if size > 1]
    after = [place for place, size in enumerate(new) if size > 1]
    found = [Dim() for _ in new]
    while before:
        ins, outs = [before.pop(0)], [after.pop(0)]
        while (a := math.prod(old[p] for p in ins)) != (b := math.prod(new[p] for p in outs)):
            (ins if a < b else outs).append((before if a < b else after).pop(0))
        together = [dims[p] for p in ins]
        dim = together[0] if len(ins) == 1 else labels.merge(together, [old[p] for p in ins])
        made = [dim] if len(outs) == 1 else labels.split(dim, [new[p] for p in outs])
        for place, each in zip(outs, made, strict=True):
            found[place] = each
    return found


@rule("permute")
def _permute(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    dims = labels.dims(arguments["self"])
    return [dims[place] for place in arguments["dims"]]


@rule("transpose", "transpose_", "t", "numpy_T")
def _transpose(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    dims = list(labels.dims(arguments["self"]))
    if len(dims) > 1:
        a, b = arguments.get("dim0", 0), arguments.get("dim1", 1)
        dims[a], dims[b] = dims[b], dims[a]
    return dims


@rule("unsqueeze", "unsqueeze_")
def _unsqueeze(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    dims = list(labels.dims(arguments["self"]))
    dims.insert(arguments["dim"] % out.ndim, Dim())
    return dims


@rule("squeeze", "squeeze_")
def _squeeze(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x = arguments["self"]
    wanted = _places(arguments.get("dim"), x.ndim)
    kept = zip(labels.dims(x), x.shape, strict=True)
    return [dim for place, (dim, size) in enumerate(kept) if size != 1 or place not in wanted]


@rule("expand")
def _expand(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x = arguments["self"]
    dims, new = labels.dims(x), out.ndim - x.ndim
    same = [
        dim if size == wanted else Dim(free=True)
        for dim, size, wanted in zip(dims, x.shape, out.shape[new:], strict=True)
    ]
    return [*(Dim(free=True) for _ in range(new)), *same]


@rule("repeat")
def _repeat(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x, times = arguments["self"], arguments["repeats"]
    dims = [Dim()] * (out.ndim - x.ndim) + list(labels.dims(x))
    tiled = zip(dims, times, strict=True)
    return [dim if n == 1 or dim.labels is None else Dim(np.tile(dim.labels, n)) for dim, n in tiled]


@rule("select")
def _select(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x = arguments["self"]
    dims, place = list(labels.dims(x)), arguments["dim"] % x.ndim
    labels.fix(dims.pop(place), "one of its channels is taken by its number")
    return dims


@rule("unbind")
def _unbind(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    return _select(labels, {"dim": 0, **arguments}, out)


@rule("slice")
def _slice(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x = arguments["self"]
    place = arguments.get("dim", 0) % x.ndim
    part = slice(arguments.get("start"), arguments.get("end"), arguments.get("step", 1))
    return _with(labels, x, place, lambda own: own[part])


def _with(labels: Labels, x: Tensor, place: int, change: Callable[[Ints], Ints]) -> list[Dim]:
    """The dimensions of a tensor with the labels of one of them changed."""
    dims = list(labels.dims(x))
    own = dims[place].labels
    if own is not None:
        dims[place] = Dim(np.ascontiguousarray(change(own)), dims[place].axes)
    return dims


@rule("flip")
def _flip(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    gone = _places(arguments["dims"], out.ndim)
    dims = labels.dims(arguments["self"])
    for place in gone:
        labels.fix(dims[place], "the order of its channels is reversed")
    return dims


@rule("roll")
def _roll(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    dims = labels.dims(arguments["self"])
    for place in _places(arguments["dims"], out.ndim):
        labels.fix(dims[place], "its channels are moved round")
    return dims


@rule("constant_pad_nd")
def _pad(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x, pad = arguments["self"], arguments["pad"]
    dims = list(labels.dims(x))
    for index in range(len(pad) // 2):
        place, (before, after) = x.ndim - 1 - index, pad[2 * index : 2 * index + 2]
        if dims[place].labels is not None and (before or after):
            cure = "model.shortcut=selection cuts them where the network has it"
            labels.fix(dims[place], f"zeros are padded to its channels; {cure}")
            dims[place] = Dim(labels.fixed(out.shape[place], f"its channels meet padded ones; {cure}"))
    return dims


@rule("cat", "concat")
def _cat(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    tensors = [t for t in arguments["tensors"] if t.numel()]
    place = arguments.get("dim", 0) % out.ndim
    found = [
        labels.same([labels.dims(t)[p] for t in tensors]) if p != place else Dim() for p in range(out.ndim)
    ]
    parts = [(t.shape[place], labels.dims(t)[place].labels) for t in tensors]
    if any(own is not None for _, own in parts):
        reason = "its channels are concatenated with values whose number is fixed"
        joined = [labels.fixed(size, reason) if own is None else own for size, own in parts]
        found[place] = Dim(np.concatenate(joined))
    return found


@rule("stack")
def _stack(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    tensors = arguments["tensors"]
    dims = [labels.same([labels.dims(t)[p] for t in tensors]) for p in range(out.ndim - 1)]
    dims.insert(arguments.get("dim", 0) % out.ndim, Dim())
    return dims


@rule("index")
def _index(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    """Rows of a table by number: indices into the first dimensions alone."""
    x, indices = arguments["self"], arguments["indices"]
    dims = labels.dims(x)
    used = [place for place, index in enumerate(indices) if index is not None]
    for place in used:
        labels.fix(dims[place], "its channels are taken by their numbers")
    if used != list(range(len(used))):
        for dim in dims:
            labels.fix(dim, "its channels are taken by their numbers")
        return [Dim() for _ in out.shape]
    rest = dims[len(used) :]
    return [*(Dim() for _ in range(out.ndim - len(rest))), *rest]


@rule("as_strided", "as_strided_")
def _as_strided(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    """The same values in another layout, as pooling of channels-last maps leaves them."""
    x = arguments["self"]
    if x.shape == out.shape:
        return labels.dims(x)
    for dim in labels.dims(x):
        labels.fix(dim, "its channels are read by their places in memory")
    return [Dim() for _ in out.shape]


@rule("index_select")
def _index_select(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    dims = list(labels.dims(arguments["self"]))
    place = arguments["dim"] % out.ndim
    labels.fix(dims[place], "its channels are taken by their numbers")
    dims[place] = Dim()
    return dims


@rule("glu")
def _glu(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    return split(labels, arguments["self"], arguments.get("dim", -1), [0, 1])[0]


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffle(labels: Labels, arguments: Arguments, out: Tensor) -> Sequence[Dim]:
    x = arguments["self"]
    if "groups" in arguments:
        groups = arguments["groups"]
        _tied(labels, labels.dims(x)[1], groups)
        return _with(labels, x, 1, lambda own: own.reshape(groups, -1).T.ravel())
    for dim in labels.dims(x)[-3:]:
        labels.fix(dim, "its channels become pixels")
    return [Dim() for _ in out.shape]


# ------------------------------------------------------------------------------------------- several outputs


def split(labels: Labels, x: Tensor, dim: int, sizes: Sequence[int]) -> list[list[Dim]]:
    """The dimensions of the pieces of a tensor; equal pieces lose the same entries.

    Args:
        labels: Those of the run.
        x: The tensor.
        dim: The dimension that is split.
        sizes: Sizes of the pieces; where all are alike, only their number matters.
    """
    place = dim % x.ndim
    dims, own = labels.dims(x), labels.dims(x)[dim].labels
    if own is None:
        return [list(dims) for _ in sizes]
    if len(set(sizes)) == 1 or sizes == [0, 1]:
        _tied(labels, dims[place], len(sizes))
        parts = np.split(own, len(sizes))
    else:
        parts = np.split(own, np.cumsum(sizes)[:-1])
    labels.splits += [Split(labels.module, part, len(part)) for part in parts]
    return [[Dim(part) if p == place else d for p, d in enumerate(dims)] for part in parts]
