"""Repair: exact where repair is possible, direct least squares elsewhere."""

import pytest
import torch
from networks import SMALL, images, problem, random_removed, settled, with_state
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.graph.topology import Topology
from amc_env.graph.tracing import trace
from amc_env.pruning.calibration import SampledPositions
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.criteria import Norm, rank
from amc_env.pruning.repair.base import BatchNorm, Both, NoRepair
from amc_env.pruning.repair.least_squares import LeastSquares, repairable_consumers
from amc_env.pruning.repair.sequential import Sequential

REPAIRS = {"least_squares": LeastSquares, "sequential": Sequential}


def candidates_of(model: nn.Module, orders: list[Tensor] | None = None) -> Candidates:
    graph = trace(model, images(1))
    return Candidates(model, graph, orders or rank(Norm().channel_scores(model, graph)))


def repaired(
    repair: str, candidates: Candidates, removed: tuple[int, ...], calibration: Tensor, **options: float
) -> nn.Module:
    """A network cut and repaired by a repair of REPAIRS."""
    topology = Topology.of(candidates.original)
    fix = REPAIRS[repair](candidates, topology, calibration, **options)  # type: ignore[arg-type]
    model = candidates.build(removed)
    fix(model, removed, candidates.keeps(removed))
    return model


class Redundant(nn.Module):
    """Four channels of which the last two are combinations of the first two, then ``consumer``."""

    def __init__(self, consumer: nn.Module, flatten: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.consumer, self.flatten = consumer, flatten
        self.norm = nn.BatchNorm2d(consumer.out_channels) if norm else nn.Identity()
        weight, bias = self.first.weight.data, self.first.bias.data
        for row, (a, b) in ((2, (0.5, -1.0)), (3, (2.0, 0.25))):
            weight[row] = a * weight[0] + b * weight[1]
            bias[row] = a * bias[0] + b * bias[1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.norm(self.consumer(x.flatten(1) if self.flatten else x))


CONSUMERS = {
    "1x1": lambda: Redundant(nn.Conv2d(4, 5, 1)),
    "3x3": lambda: Redundant(nn.Conv2d(4, 5, 3, padding=1)),
    "strided": lambda: Redundant(nn.Conv2d(4, 5, 3, stride=2, padding=1)),
    "no_bias": lambda: Redundant(nn.Conv2d(4, 5, 3, padding=1, bias=False)),
    "norm": lambda: Redundant(nn.Conv2d(4, 5, 3, padding=1, bias=False), norm=True),
    "bias_and_norm": lambda: Redundant(nn.Conv2d(4, 5, 1), norm=True),
    "flatten": lambda: Redundant(nn.Linear(4 * 64, 5), flatten=True),
}


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("name", CONSUMERS)
def test_redundant_channels_are_repaired_exactly(name: str, repair: str) -> None:
    torch.manual_seed(0)
    model = settled(CONSUMERS[name]())
    candidates = candidates_of(model, [torch.arange(4)])
    calibration = images(600 if name == "flatten" else 60, seed=1)
    fixed = repaired(repair, candidates, (2,), calibration, ridge=1e-12, per_image=64)
    with torch.no_grad():
        torch.testing.assert_close(fixed(images()), model(images()), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(candidates.build((2,))(images()), model(images()), atol=1e-2)


def test_training_a_repaired_network_does_not_change_the_next_one() -> None:
    torch.manual_seed(0)
    candidates = candidates_of(settled(CONSUMERS["1x1"]()), [torch.arange(4)])
    fix = LeastSquares(candidates, Topology.of(candidates.original), images(60, seed=1))
    found = []
    for _ in range(2):
        model = candidates.build((2,))
        fix(model, (2,), candidates.keeps((2,)))
        consumer = model.get_submodule("consumer")
        found.append([parameter.detach().clone() for parameter in consumer.parameters()])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1.0
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("repair", REPAIRS)
def test_redundant_inputs_of_a_grouped_convolution(repair: str) -> None:
    torch.manual_seed(0)
    first, grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1, groups=2)
    for group in (0, 4):  # in each group the last two channels are combinations of the first two
        for row, (a, b) in ((2, (0.5, -1.0)), (3, (2.0, 0.25))):
            parts = first.weight.data, first.bias.data
            for part in parts:
                part[group + row] = a * part[group] + b * part[group + 1]
    model = nn.Sequential(first, grouped, nn.Conv2d(6, 4, 1)).eval()
    candidates = candidates_of(model, [torch.arange(4), torch.arange(3)])
    fixed = repaired(repair, candidates, (2, 0), images(60, seed=1), ridge=1e-12, per_image=64)
    assert fixed[1].weight.shape == (6, 2, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(fixed(images()), model(images()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SMALL)
def test_least_squares_is_the_direct_solution(name: str, seed: int) -> None:
    """From one factor a layer, or from the sub-Gram (concat): the same as solving anew on the samples."""
    candidates, grids = problem(name)
    topology = Topology.of(candidates.original)
    calibration = images(200, seed=3)
    fix = LeastSquares(candidates, topology, calibration, per_image=8, ridge=1e-10)
    for turn in range(2):  # the second solution comes from the factor made for the first
        removed = random_removed(grids, seed + 10 * turn)
        keeps = candidates.keeps(removed)
        cut = candidates.build(removed)
        fixed = candidates.build(removed)
        fix(fixed, removed, keeps)
        for layer in repairable_consumers(candidates):
            if len(keeps[layer.name]["in"]) == layer.in_channels:
                same = fixed.get_submodule(layer.name).weight, cut.get_submodule(layer.name).weight
                assert torch.equal(*same)
                continue
            got, want = fits(candidates, topology, layer, (fixed, cut), keeps[layer.name], calibration)
            assert float((got - want).norm() / want.norm()) < 1e-3


def fits(
    candidates: Candidates, topology: Topology, layer, networks, sides, calibration
) -> tuple[Tensor, Tensor]:
    """What the repaired layer makes of the samples of its kept inputs, and what a direct solution does."""
    fixed, cut = networks
    x, y = sampled(candidates.original, layer, calibration)
    size = layer.in_channels // layer.groups
    kept = sides["in"][sides["in"] < size]
    columns = x.reshape(len(x), layer.groups, size, -1)[:, :, kept].flatten(2)
    norm = topology.norm_after.get(layer.name)
    parts = y.chunk(layer.groups, dim=1)
    out = sides.get("out", torch.arange(layer.out_channels))
    want = [direct(columns[:, g], part, layer.bias or norm is not None) for g, part in enumerate(parts)]
    module = fixed.get_submodule(layer.name)
    rows = module.weight.detach().flatten(1).double().chunk(layer.groups)
    got = torch.cat([columns[:, g] @ row.T for g, row in enumerate(rows)], 1)
    if layer.bias:
        got += module.bias.detach()
    elif norm is not None:  # the intercept is in the batch norm's mean
        got += cut.get_submodule(norm).running_mean - fixed.get_submodule(norm).running_mean
    return got, torch.cat(want, 1)[:, out]


def sampled(model: nn.Module, layer, calibration: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a layer of the uncut network, float64."""
    taken: list[Tensor] = []
    module = model.get_submodule(layer.name)
    positions = SampledPositions(layer, len(calibration), 8, 0)
    handle = module.register_forward_hook(
        lambda m, args, y: taken.extend(
            (positions.inputs(m, args[0]).double(), positions.outputs(y).double())
        )
    )
    with torch.no_grad():
        model(calibration)
    handle.remove()
    return taken[0], taken[1]


def direct(x: Tensor, y: Tensor, intercept: bool) -> Tensor:
    """The fit of y by least squares on the samples themselves."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if intercept else x
    return x @ torch.linalg.lstsq(x, y, driver="gelsd").solution


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("kind", ["dead", "constant", "duplicate"])
def test_dead_constant_and_duplicate_channels_do_not_break_it(kind: str, repair: str) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 1)
    with torch.no_grad():
        if kind == "duplicate":
            first.weight[:], first.bias[:] = first.weight[0].clone(), 0.3
        else:
            first.weight.zero_()
            first.bias.copy_(torch.linspace(-2, -1, 8) if kind == "dead" else torch.linspace(4, 7, 8).exp())
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 5, 3, padding=0), nn.Conv2d(5, 4, 1)).eval()
    candidates = candidates_of(model, [torch.arange(8), torch.arange(5)])
    fixed = repaired(repair, candidates, (6, 0), images(60, seed=1))
    with torch.no_grad():
        torch.testing.assert_close(fixed(images()), model(images()), rtol=1e-2, atol=1e-2)


def test_batch_norm_statistics_by_hand() -> None:
    candidates, grids = problem("concat")
    removed = random_removed(grids, 0)
    model = candidates.build(removed)
    before = with_state(model)
    calibration = images(20, seed=4)
    BatchNorm(calibration, batch=8)(model, removed, {})  # two whole batches; four images are left over
    joined = torch.cat([model.left(calibration), model.right(calibration)], 1).detach()
    batches = joined[:8], joined[8:16]
    mean = sum(batch.mean((0, 2, 3)) for batch in batches) / 2
    variance = sum(batch.var((0, 2, 3)) for batch in batches) / 2
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    assert not any(module.training for module in model.modules())
    assert model.norm.momentum == 0.1
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert all("running" in key or "num_batches" in key for key in changed)


def test_batch_norm_repair_of_a_network_without_any() -> None:
    candidates, grids = problem("mlp")
    model = candidates.build(random_removed(grids, 0))
    before = with_state(model)
    BatchNorm(images(4))(model, (), {})
    NoRepair()(model, (), {})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_both_is_one_after_the_other() -> None:
    candidates, grids = problem("residual")
    removed, calibration = random_removed(grids, 1), images(60, seed=5)
    keeps = candidates.keeps(removed)
    parts = LeastSquares(candidates, Topology.of(candidates.original), calibration), BatchNorm(calibration)
    together, apart = candidates.build(removed), candidates.build(removed)
    Both("both", parts)(together, removed, keeps)
    for part in parts:
        part(apart, removed, keeps)
    assert all(
        torch.equal(a, b)
        for a, b in zip(together.state_dict().values(), apart.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("name", SMALL)
def test_repair_helps_and_is_a_function_of_the_strategy(name: str, repair: str) -> None:
    candidates, grids = problem(name)
    removed = tuple(grid.snap(0.4) for grid in grids)
    calibration = images(300, seed=6)
    state = torch.get_rng_state()
    fixed, again = (repaired(repair, candidates, removed, calibration) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(a, b)
        for a, b in zip(fixed.state_dict().values(), again.state_dict().values(), strict=True)
    )
    unrepaired = error(candidates.build(removed), candidates.original)
    assert error(fixed, candidates.original) < 0.9 * unrepaired


def error(model: nn.Module, original: nn.Module) -> float:
    """Mean squared difference of outputs on new images."""
    unseen = images(200, seed=99)
    with torch.no_grad():
        return float((model(unseen) - original(unseen)).square().mean())


@pytest.mark.parametrize("name", ["residual", "selection", "pad"])
def test_sequential_repairs_more_than_least_squares(name: str) -> None:
    candidates, grids = problem(name)
    removed = tuple(grid.snap(0.5) for grid in grids)
    calibration = images(500, seed=7)
    errors = {
        repair: error(repaired(repair, candidates, removed, calibration), candidates.original)
        for repair in REPAIRS
    }
    assert errors["sequential"] < errors["least_squares"]


class Shortcut(nn.Module):
    """y = norm(conv(x)) + shortcut(x): what the shortcut loses only the convolution beside it can repair."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.conv, self.norm = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.shortcut = nn.Conv2d(8, 6, 1, bias=False)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(F.relu(self.norm(self.conv(x)) + self.shortcut(x)))


def test_the_shortcuts_error_is_repaired() -> None:
    torch.manual_seed(0)
    model = settled(Shortcut())
    candidates = candidates_of(model, [torch.arange(8), torch.arange(6)])
    topology = Topology.of(model)
    assert list(topology.partner) == ["conv"]
    removed, calibration = (
        (5, 0),
        images(60, seed=1),
    )  # three channels of a three-dimensional input stay: all is left
    model_cut = candidates.build(removed)
    fix = Sequential(candidates, topology, calibration, ridge=1e-12, per_image=64)
    fix._layers.pop("shortcut")  # as if it could not be repaired itself: its error is left to the convolution
    fix(model_cut, removed, candidates.keeps(removed))
    assert torch.equal(model_cut.shortcut.weight, model.shortcut.weight[:, :3])
    assert error(candidates.build(removed), model) > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(model_cut(images()), model(images()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["residual", "selection"])
def test_repairs_work_without_a_trace(name: str) -> None:
    candidates, grids = problem(name)
    removed = tuple(grid.snap(0.4) for grid in grids)
    errors = {"none": error(candidates.build(removed), candidates.original)}
    for repair, kind in REPAIRS.items():
        fixed = candidates.build(removed)
        kind(candidates, Topology(None, "no graph"), images(300, seed=6))(
            fixed, removed, candidates.keeps(removed)
        )
        errors[repair] = error(fixed, candidates.original)
    assert errors["sequential"] < errors["least_squares"] < errors["none"]


def test_the_hooked_pass_repairs_as_the_traced_one() -> None:
    model = settled(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    )
    candidates, removed = candidates_of(model, [torch.arange(8), torch.arange(6)]), (3, 2)
    found = []
    for topology in (Topology.of(model), Topology(None, "no graph")):
        fixed = candidates.build(removed)
        Sequential(candidates, topology, images(60, seed=1))(fixed, removed, candidates.keeps(removed))
        found.append(fixed.state_dict())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """A convolution that is run at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.first(x))))
        return self.last(F.relu(self.twice(F.avg_pool2d(x, 2)))).mean((2, 3))


@pytest.mark.parametrize("repair", REPAIRS)
def test_layers_that_run_twice_are_left_alone(repair: str) -> None:
    candidates = candidates_of(Twice().eval())
    assert [layer.name for layer in repairable_consumers(candidates)] == ["last"]
    fixed, cut = repaired(repair, candidates, (4,), images(20)), candidates.build((4,))
    assert torch.equal(fixed.twice.weight, cut.twice.weight)
    assert not torch.equal(fixed.last.weight, cut.last.weight)


class Tokens(nn.Module):
    """A batch norm over tokens, not over the outputs of the layer before it: no place for an intercept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(F.relu(self.first(x.mean(1)))))).mean(1)


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_batch_norm_over_tokens_takes_no_intercept(repair: str) -> None:
    model = settled(Tokens())
    candidates = candidates_of(model)
    assert candidates.graph.groups[0].name == "first"
    removed = tuple(4 if group.name == "first" else 0 for group in candidates.graph.groups)
    fixed = repaired(repair, candidates, removed, images(50))
    assert torch.equal(fixed.norm.running_mean, model.norm.running_mean)
    assert error(fixed, model) < error(candidates.build(removed), model)


def test_only_nested_solutions_are_kept() -> None:
    candidates, grids = problem("concat")
    fix = LeastSquares(candidates, Topology.of(candidates.original), images(40))
    for seed in range(4):
        removed = random_removed(grids, seed)
        fix(candidates.build(removed), removed, candidates.keeps(removed))
    assert {name for name, _ in fix._solved} == {"head"}  # `join` is fed by two groups
