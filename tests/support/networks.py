"""Small networks with known shapes, and random strategies for them."""

import functools
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.graph.layers import LayerGraph
from amc_env.graph.tracing import trace
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.criteria import Norm, rank
from amc_env.pruning.granularity import Channel
from amc_env.space import Grid
from search.models.mobilenet import MobileNet
from search.models.resnet import ResNet

V1_WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
V1_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class ImageNetMobileNet(nn.Module):
    """MobileNet-V1 for ImageNet: a convolution with stride 2, then separable blocks of these widths."""

    def __init__(self, widths: tuple[int, ...] = V1_WIDTHS) -> None:
        super().__init__()
        self.first = _block(3, widths[0], 3, 2)
        pairs = zip(widths[:-1], widths[1:], V1_STRIDES, strict=True)
        self.blocks = nn.Sequential(
            *(nn.Sequential(_block(a, a, 3, stride, groups=a), _block(a, b, 1)) for a, b, stride in pairs)
        )
        self.classifier = nn.Linear(widths[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.first(x)).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, into: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = into * expansion
        expand = [] if expansion == 1 else [_block(into, hidden, 1)]
        self.residual = stride == 1 and into == out
        self.conv = nn.Sequential(
            *expand,
            _block(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class ImageNetMobileNetV2(nn.Module):
    """MobileNet-V2 for ImageNet."""

    def __init__(self) -> None:
        super().__init__()
        stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
        blocks: list[nn.Module] = [_block(3, 32, 3, 2)]
        width = 32
        for expansion, planes, count, stride in (*stages, (6, 320, 1, 1)):
            for i in range(count):
                blocks.append(InvertedResidual(width, planes, stride if i == 0 else 1, expansion))
                width = planes
        self.features = nn.Sequential(*blocks, _block(width, 1280, 1))
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _block(into: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


class Concat(nn.Module):
    """Two branches, concatenated; the consumer is strided and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 1)
        self.norm = nn.BatchNorm2d(14)
        self.join = nn.Conv2d(14, 10, 3, stride=2, padding=1, bias=False)
        self.join_norm = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.head(F.relu(self.join_norm(self.join(both))).mean((2, 3)))


class Grouped(nn.Module):
    """A ResNeXt-like chain: a convolution in 4 groups, and one in 2 groups after it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 16, 1, bias=False)
        self.before_norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.halves = nn.Conv2d(24, 12, 3, stride=2, padding=1, groups=2)
        self.after = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before_norm(self.before(x)))
        x = F.relu(self.norm(self.grouped(x)))
        return self.head(F.relu(self.after(F.relu(self.halves(x)))).mean((2, 3)))


class Flatten(nn.Module):
    """Convolutions, then linear layers on the flattened 4 x 4 map, with a batch norm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.act = nn.PReLU(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(8 * 16)
        self.hidden = nn.Linear(8 * 16, 12)
        self.hidden_norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(self.act(self.conv(x))))
        return self.head(F.relu(self.hidden_norm(self.hidden(self.norm(x.flatten(1))))))


class Gated(nn.Module):
    """Inverted residuals, then channels gated by squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _block(3, 8, 3)
        self.blocks = nn.Sequential(InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 2))
        self.squeeze, self.excite = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.last = nn.Conv2d(12, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.first(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(F.relu(self.last(x * gate)).mean((2, 3)))


class Chain(nn.Module):
    """The worked case of NetAdapt's release: 3-16-32-64-10, 3x3 on 32x32, no bias."""

    def __init__(self, widths: tuple[int, ...] = (3, 16, 32, 64, 10)) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.convs = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs))

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x).mean((2, 3))


def mlp() -> nn.Sequential:
    """Three linear layers on a 3 x 8 x 8 image."""
    layers = nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)
    return nn.Sequential(nn.Flatten(), *layers)


NETWORKS = {
    "residual": functools.partial(ResNet, 8, "conv", classes=4),
    "pad": functools.partial(ResNet, 8, "pad", classes=4),
    "selection": functools.partial(ResNet, 8, "selection", classes=4),
    "depthwise": functools.partial(MobileNet, classes=4),
    "concat": Concat,
    "grouped": Grouped,
    "gated": Gated,
    "flatten": Flatten,
    "mlp": mlp,
}
"""What the tests of pruning go over; all take 3 x 8 x 8 images."""

SMALL = ("residual", "pad", "selection", "concat", "grouped", "gated", "flatten", "mlp")


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Eval mode, with batch norms whose scales, shifts and statistics are not those of a new network."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            size = module.num_features
            module.weight.data = 0.5 + torch.rand(size, generator=generator)
            module.bias.data = 0.3 * torch.randn(size, generator=generator)
            module.running_mean = 0.2 * torch.randn(size, generator=generator)
            module.running_var = 0.5 + torch.rand(size, generator=generator)
    return model.eval()


def network(name: str, seed: int = 0) -> nn.Module:
    """A network of NETWORKS with weights from ``seed``; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return settled(NETWORKS[name](), seed)


def images(count: int = 4, seed: int = 0, size: int = 8) -> Tensor:
    """Random images [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def traced(name: str) -> tuple[nn.Module, LayerGraph]:
    """A network and its graph; shared, not to be changed."""
    model = network(name)
    return model, trace(model, images())


def problem(name: str, multiple: int = 2, max_ratio: float = 0.9) -> tuple[Candidates, tuple[Grid, ...]]:
    """Candidates of a network, and the grids of its decisions."""
    model, graph = traced(name)
    graph, grids = Channel(multiple, max_ratio).decisions(graph)
    return Candidates(model, graph, rank(Norm().channel_scores(model, graph))), grids


def random_removed(grids: tuple[Grid, ...], seed: int) -> tuple[int, ...]:
    """A random feasible count for every decision."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(grid.count(int(torch.randint(grid.size, (), generator=generator))) for grid in grids)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two state dicts are equal bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def with_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's state dict that later changes do not reach."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}
