"""Small networks, one for each way that channels pass through a network, with the decisions that each must have."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from amc_env.inputs import Inputs

WIDTH, HEADS, TOKENS = 8, 4, 6


@dataclass(frozen=True)
class Construct:
    """A network, a batch of two examples, and the units of the decisions that are expected, by name.

    ``residual`` is that of `trace`.
    """

    build: Callable[[], nn.Module]
    example: Callable[[], Inputs]
    units: dict[str, int] = field(default_factory=dict)
    residual: bool = False


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def words() -> Tensor:
    return torch.randint(20, (2, TOKENS), generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """A convolution, something, a convolution, a classifier."""

    def __init__(self, middle: nn.Module, out: int = WIDTH, width: int = WIDTH):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.middle = middle
        self.last = nn.Conv2d(out, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.middle(self.first(x))))).mean((2, 3)))


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(into: int = WIDTH, out: int = WIDTH, kernel: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def shuffled(m: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return m.after(x)


def shuffled_twice(m: nn.Module, x: Tensor) -> Tensor:
    """The second shuffle takes the width from before the layer between them, so that they cannot be cut apart."""
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    x = m.between(x) if hasattr(m, "between") else x
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return m.after(x)


def gated(m: nn.Module, x: Tensor) -> Tensor:
    return x * torch.sigmoid(m.act(m.excite(F.relu(m.squeeze(x.mean((2, 3), keepdim=True))))))


def tied(shared: str, **modules: nn.Module) -> nn.Module:
    """Two layers, each with something after it; both of those have one parameter."""
    block = Function(lambda m, x: m.after(m.two(m.act(m.one(x)))), one=conv(), two=conv(), **modules)
    setattr(block.after, shared, getattr(block.act, shared))
    return block


def c2f(m: nn.Module, x: Tensor) -> Tensor:
    parts = list(m.inner(x).chunk(2, 1))
    parts.append(parts[-1] + m.two(F.relu(m.one(parts[-1]))))
    return m.join(torch.cat(parts, 1))


def ghost(m: nn.Module, x: Tensor) -> Tensor:
    primary = F.relu(m.primary(x))
    return torch.cat([primary, m.cheap(primary)], 1)[:, :WIDTH]


def selective(m: nn.Module, x: Tensor) -> Tensor:
    paths = torch.stack([m.small(x), m.large(x)], 1)
    squeezed = F.relu(m.squeeze(paths.sum(1).mean((2, 3), keepdim=True)))
    weights = m.excite(squeezed).view(len(x), 2, -1, 1, 1).softmax(1)
    return (paths * weights).sum(1)


def spatial_gate(m: nn.Module, x: Tensor) -> Tensor:
    return x * torch.sigmoid(m.gate(F.relu(m.reduce(x))))


def efficient_channel(m: nn.Module, x: Tensor) -> Tensor:
    return x * torch.sigmoid(m.along(x.mean((2, 3))[:, None]))[:, 0, :, None, None]


class Scale(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 1e-6))
        self.inner = conv(width, 12)
        self.out = conv(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.out(F.relu(self.inner(x)))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


class Frozen(nn.Module):
    """A batch norm whose parameters are buffers."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.register_buffer("weight", torch.rand(width) + 0.5)
        self.register_buffer("bias", torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = conv(3, WIDTH, 3)
        self.down = nn.Conv2d(WIDTH, 16, 2, stride=2)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.join = conv(WIDTH + 6, 10, 3)
        self.out = conv(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        up = F.relu(self.up(F.relu(self.down(x))))
        return self.out(F.relu(self.join(torch.cat([x, up], 1))))


class Attention(nn.Module):
    """Separate projections; fewer heads of keys and values than of queries where asked for."""

    def __init__(self, kv_heads: int = HEADS, style: str = "sdpa"):
        super().__init__()
        self.num_heads, self.head_dim, self.kv_heads, self.style = HEADS, 5, kv_heads, style
        self.repeats = HEADS // kv_heads
        self.q, self.o = nn.Linear(WIDTH, HEADS * 5), nn.Linear(HEADS * 5, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * 5), nn.Linear(WIDTH, kv_heads * 5)
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS)) if style == "bias" else None
        self.talk = nn.Linear(HEADS, HEADS) if style == "talking" else None

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, -1, self.head_dim).transpose(1, 2)
        k = self.k(x).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.repeats > 1:
            k, v = (y.repeat_interleave(self.repeats, 1) for y in (k, v))
        if self.style == "sdpa":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.style == "einsum":
            mixed = torch.einsum("nhqk,nhkd->nhqd", torch.einsum("nhqd,nhkd->nhqk", q, k).softmax(-1), v)
        else:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            scores = scores if self.bias is None else scores + self.bias
            scores = (
                scores if self.talk is None else self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            )
            mixed = scores.softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(n, t, -1))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, 2
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * 2), nn.Linear(HEADS * 2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


class Tokens(nn.Module):
    """A residual block on tokens, a classifier on their mean."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norm, self.block, self.head = nn.LayerNorm(WIDTH), block, nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.block(self.norm(x))).mean(1))


class Both(nn.Module):
    """Query, key and value are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def swiglu(m: nn.Module, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def mixer(m: nn.Module, x: Tensor) -> Tensor:
    return m.two(F.gelu(m.one(x.transpose(1, 2)))).transpose(1, 2)


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.inner, self.outer = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head((x + self.outer(F.gelu(self.inner(x))))[:, 0])


class Stream(nn.Module):
    """A residual stream with norms: patches, positions, attention and a hidden layer."""

    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(3))
        self.attention = Fused()
        self.inner, self.outer = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.attention(self.norms[0](x))
        x = x + self.outer(F.gelu(self.inner(self.norms[1](x))))
        return self.head(self.norms[2](x).mean(1))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OwnNorm(nn.Module):
    """A root mean square norm as Hugging Face's models write it."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def borrowed(m: nn.Module, x: Tensor) -> Tensor:
    """Uses a layer's weight without calling the layer."""
    return m.after(F.relu(F.conv2d(m.before(x), m.lender.weight)))


def merged(m: nn.Module, x: Tensor) -> Tensor:
    corners = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return m.join(torch.cat(corners, 1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        return {"logits": self.head(F.relu(self.inner(self.embed(input_ids)))).mul(weights).sum(1)}


class Twice(nn.Module):
    """Two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 10), nn.Linear(7, 10)
        self.head, self.extra = nn.Linear(10, 4), nn.Linear(10, 1)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.left(left)) + F.relu(self.right(right))
        return self.head(x), self.extra(x)


class ByName(nn.Module):
    """Its layers are given their inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=F.relu(self.inner(input=x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.head = (
            nn.Linear(WIDTH, 12),
            nn.LSTM(12, 10, batch_first=True),
            nn.Linear(10, 6),
        )
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.head(self.inner(F.relu(self.enter(x)))[0][:, -1])))


class Sequence1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, WIDTH, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.two = nn.Conv1d(WIDTH, 6, 3, padding=2, dilation=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.norm(self.one(x))))).mean(2))


def volume() -> nn.Module:
    layers = (
        nn.Conv3d(2, WIDTH, 3, padding=1),
        nn.BatchNorm3d(WIDTH),
        nn.ReLU(),
        nn.Conv3d(WIDTH, 6, 3, stride=2),
    )
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 4))


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=True), nn.Linear(WIDTH, 4))


def between(middle: Callable[[], nn.Module], units: dict[str, int], **options: int) -> Construct:
    return Construct(lambda: Between(middle(), **options), image, {**units, "last": 6})


def on_tokens(block: Callable[[], nn.Module], units: dict[str, int]) -> Construct:
    return Construct(lambda: Tokens(block()), tokens, units)


def _conv_of(weight: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    return nn.Sequential(weight(conv(kernel=3)), nn.ReLU(), conv())


CONSTRUCTS = {
    "group norm": between(lambda: nn.GroupNorm(4, WIDTH), {"first": 4}),
    "group norm of one group": between(lambda: nn.GroupNorm(1, WIDTH), {}),
    "instance norm": between(lambda: nn.InstanceNorm2d(WIDTH, affine=True), {"first": 8}),
    "synchronised batch norm": between(lambda: nn.SyncBatchNorm(WIDTH), {"first": 8}),
    "frozen batch norm": between(Frozen, {"first": 8}),
    "layer scale": between(Scale, {"first": 8, "middle.inner": 12}),
    "channel shuffle": between(lambda: Function(shuffled, after=conv()), {"first": 4, "middle.after": 8}),
    "two channel shuffles": between(
        lambda: Function(shuffled_twice, after=conv()), {"first": 2, "middle.after": 8}
    ),
    "two channel shuffles around a layer": between(
        lambda: Function(shuffled_twice, between=conv(), after=conv()), {"middle.after": 8}
    ),
    "gate with a PReLU of one parameter": between(
        lambda: Function(gated, squeeze=conv(WIDTH, 4), excite=conv(4, WIDTH), act=nn.PReLU()),
        {"first": 8, "middle.squeeze": 4},
    ),
    "two PReLUs with one parameter": between(
        lambda: tied("weight", act=nn.PReLU(WIDTH), after=nn.PReLU(WIDTH)), {"first": 8, "middle.one": 8}
    ),
    "two layers with one weight": between(lambda: tied("weight", act=conv(), after=conv()), {"first": 8}),
    "chunk and concatenation": between(
        lambda: Function(c2f, inner=conv(), one=conv(4, 4, 3), two=conv(4, 4, 3), join=conv(12, WIDTH)),
        {"first": 8, "middle.inner": 4, "middle.one": 4, "middle.join": 8},
    ),
    "ghost module": between(
        lambda: Function(ghost, primary=conv(WIDTH, 4), cheap=conv(4, 4, 3, groups=4)),
        {"first": 8, "middle.primary": 4},
    ),
    "selective kernels": between(
        lambda: Function(
            selective, small=conv(), large=conv(kernel=3), squeeze=conv(WIDTH, 6), excite=conv(6, 2 * WIDTH)
        ),
        {"first": 8, "middle.small": 8, "middle.squeeze": 6},
    ),
    "gate over places": between(
        lambda: Function(spatial_gate, reduce=conv(WIDTH, 5), gate=conv(5, 1)),
        {"first": 8, "middle.reduce": 5},
    ),
    "convolution along channels": between(
        lambda: Function(efficient_channel, along=nn.Conv1d(1, 1, 3, padding=1)), {}
    ),
    "pixel shuffle": between(lambda: nn.PixelShuffle(2), {}, out=2),
    "standardised weights": between(
        lambda: Standardised(WIDTH, WIDTH, 3, padding=1), {"first": 8, "middle": 8}
    ),
    "weight norm": between(
        lambda: _conv_of(parametrizations.weight_norm), {"first": 8, "middle.0": 8, "middle.2": 8}
    ),
    "spectral norm": between(
        lambda: _conv_of(parametrizations.spectral_norm), {"first": 8, "middle.0": 8, "middle.2": 8}
    ),
    "reflected padding": between(lambda: conv(kernel=3, padding_mode="reflect"), {"first": 8, "middle": 8}),
    "borrowed weight": between(
        lambda: Function(borrowed, before=conv(), lender=conv(), after=conv()),
        {"first": 8, "middle.after": 8},
    ),
    "merged corners": between(lambda: Function(merged, join=conv(4 * WIDTH)), {"first": 8, "middle.join": 8}),
    "bilinear upsampling": between(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), {"first": 8}),
    "U-Net": Construct(UNet, image, {"enter": 8, "down": 16, "up": 6, "join": 10}),
    "signals": Construct(Sequence1d, lambda: torch.randn(2, 3, 20), {"one": 8, "two": 6}),
    "volumes": Construct(volume, lambda: torch.randn(2, 2, 5, 6, 7), {"0": 8, "3": 6}),
    "class token": Construct(ClassToken, image, {"patches": 8, "inner": 12}),
    "words by name": Construct(
        Words, lambda: {"input_ids": words(), "attention_mask": torch.ones_like(words())}, {"inner": 12}
    ),
    "two inputs and outputs": Construct(Twice, lambda: (torch.randn(2, 5), torch.randn(2, 7)), {"left": 10}),
    "layers called by name": Construct(ByName, lambda: torch.randn(2, 5), {"inner": 8}),
    "recurrent": Construct(Recurrent, tokens, {"head": 6}),
    "attention": on_tokens(Attention, {"block.q": 4}),
    "grouped queries": on_tokens(lambda: Attention(2), {"block.q": 2}),
    "attention by einsum": on_tokens(lambda: Attention(style="einsum"), {"block.q": 4}),
    "attention with a bias": on_tokens(lambda: Attention(style="bias"), {"block.q": 4}),
    # the heads of queries and of values would be two decisions, and kv_heads is one number
    "talking heads": on_tokens(lambda: Attention(style="talking"), {}),
    "fused attention": on_tokens(Fused, {"block.qkv": 4}),
    "torch's attention": on_tokens(Both, {"block.attention.q_proj": 4}),
    "torch's encoder": Construct(encoder, tokens, {"0.self_attn.q_proj": 4, "0.linear1": 12}),
    "gated linear units": on_tokens(
        lambda: nn.Sequential(nn.Linear(WIDTH, 24), nn.GLU(), nn.Linear(12, WIDTH)), {"block.0": 12}
    ),
    "SwiGLU": on_tokens(
        lambda: Function(
            swiglu, gate=nn.Linear(WIDTH, 12), up=nn.Linear(WIDTH, 12), down=nn.Linear(12, WIDTH)
        ),
        {"block.gate": 12},
    ),
    "mixing of tokens": on_tokens(
        lambda: Function(mixer, one=nn.Linear(TOKENS, 12), two=nn.Linear(12, TOKENS)), {"block.one": 12}
    ),
    "layer norm within a block": on_tokens(
        lambda: nn.Sequential(nn.Linear(WIDTH, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, WIDTH)), {}
    ),
    "residual stream": Construct(
        lambda: Stream(nn.LayerNorm), image, {"patches": 8, "attention.qkv": 4, "inner": 12}, residual=True
    ),
    "residual stream with RMSNorm": Construct(
        lambda: Stream(OwnNorm), image, {"patches": 8, "attention.qkv": 4, "inner": 12}, residual=True
    ),
    "layer norm of maps": Construct(
        lambda: Between(LayerNorm2d(WIDTH)), image, {"first": 8, "last": 6}, residual=True
    ),
    "group norm of one group, cut": Construct(
        lambda: Between(nn.GroupNorm(1, WIDTH)), image, {"first": 8, "last": 6}, residual=True
    ),
}
