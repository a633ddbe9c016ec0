"""Shares of zeros by hand; LASSO paths with planted supports and against coordinate descent."""

import pytest
import torch
from networks import images, traced
from refusals import refused
from sklearn.linear_model import Lasso as CoordinateDescent
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.graph.tracing import trace
from amc_env.pruning.calibration import SampledPositions, record
from amc_env.pruning.criteria import APoZ, Lasso, Sample, rank
from amc_env.pruning.criteria.activations import contributions, path_ranks, unit_gram, zero_shares

# ------------------------------------------------------------------------------------------------------ zeros


def sample(pixels: Tensor, seed: int = 0) -> Sample:
    return Sample(pixels, torch.zeros(len(pixels), dtype=torch.int64), seed)


def test_shares_of_zeros_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)).eval()
    model[0].weight.data = torch.ones(3, 1, 1, 1)
    model[0].bias.data = torch.tensor([0.0, -2.0, 1.0])
    pixels = torch.tensor([[[1.0, 2.0], [3.0, -1.0]], [[0.0, 4.0], [5.0, -3.0]]])[:, None]
    # Of 8 pixels, 3 are at most 0, 5 at most 2, 2 at most -1.
    found = APoZ().channel_scores(model, trace(model, pixels), sample(pixels))
    assert found[0].tolist() == [5 / 8, 3 / 8, 6 / 8]


def test_readers_are_averaged() -> None:
    class Fork(nn.Module):
        """A channel that one layer reads as it is, another after a ReLU."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.plain, self.cut = (nn.Conv2d(a, b, 1) for a, b in ((1, 2), (2, 3), (2, 3)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return (self.plain(x) + self.cut(F.relu(x))).mean((2, 3))

    model = Fork().eval()
    model.first.weight.data = torch.ones(2, 1, 1, 1)
    model.first.bias.data = torch.tensor([0.5, -1.5])
    pixels = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])[:, None]
    found = APoZ().channel_scores(model, trace(model, pixels), sample(pixels))
    assert found[0].tolist() == [1 - 0.25 / 2, 1 - 0.5 / 2]


def test_neurons_and_flattened_channels() -> None:
    model, graph = traced("flatten")
    shares = zero_shares(model, [graph.layer("head"), graph.layer("hidden")], images(300))
    with torch.no_grad():
        x = F.relu(model.conv2(model.act(model.conv(images(300))))).flatten(1)
        hidden = F.relu(model.hidden_norm(model.hidden(model.norm(x))))
    torch.testing.assert_close(shares["head"], (hidden == 0).double().mean(0))
    assert bool((shares["hidden"] == 0).all())  # behind a batch norm
    assert shares["head"].shape == (12,)


def test_groups_without_zeros_are_refused_by_name() -> None:
    model, graph = traced("gated")
    with refused("unsupported", "criterion"):
        APoZ().channel_scores(model, graph, sample(images()))


# ------------------------------------------------------------------------------------------------------ LASSO


def gram_of(columns: Tensor) -> Tensor:
    return columns.T.double() @ columns.double()


def test_uncorrelated_columns_enter_by_their_length() -> None:
    columns = torch.diag(torch.tensor([2.0, 5.0, 0.0, 3.0, 1.0]))
    # Ranks 0 to 4 over 4; the dead one comes last.
    assert path_ranks(gram_of(columns)).tolist() == [0.5, 1.0, 0.0, 0.75, 0.25]


def test_the_scale_of_the_contributions_does_not_matter() -> None:
    columns = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(path_ranks(gram_of(columns)), path_ranks(gram_of(columns * 1e-5)))


def test_a_planted_support_enters_first() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(200, 12, generator=generator)
    columns[:, [1, 4, 7]] *= 5  # these make up nearly all of the sum
    assert set(path_ranks(gram_of(columns)).topk(3).indices.tolist()) == {1, 4, 7}


def test_duplicates_and_sums_of_others_come_last() -> None:
    columns = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns[:, 3] = columns[:, 0]
    ranks = path_ranks(gram_of(columns))
    assert ranks.isfinite().all()
    assert min(ranks[0], ranks[3]) == ranks.min() == 0
    assert max(ranks[0], ranks[3]) > 0
    assert path_ranks(torch.zeros(4, 4, dtype=torch.float64)).tolist() == [0.0] * 4


@pytest.mark.parametrize("seed", range(3))
def test_the_path_is_that_of_coordinate_descent(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    columns = torch.randn(80, 10, generator=generator, dtype=torch.float64) @ mixing
    target = columns.sum(1)
    order = path_ranks(gram_of(columns)).argsort(descending=True)
    highest = (columns.T @ target).abs().max().item() / len(columns)
    entered: dict[int, int] = {}
    for step in range(400):  # penalties from the highest down, finely enough to tell entries apart
        solver = CoordinateDescent(
            alpha=highest * 0.97**step, fit_intercept=False, tol=1e-10, max_iter=200_000
        )
        for column in solver.fit(columns.numpy(), target.numpy()).coef_.nonzero()[0].tolist():
            entered.setdefault(column, step)
        if len(entered) == 10:
            break
    steps = [entered[column] for column in order.tolist()]
    assert steps == sorted(steps)
    assert len(set(steps)) > 5


@pytest.mark.parametrize("name", ["join", "grouped", "halves", "hidden"])
def test_contributions_add_up_to_the_outputs(name: str) -> None:
    network_name = {"join": "concat", "hidden": "flatten"}.get(name, "grouped")
    model, graph = traced(network_name)
    layer, module = graph.layer(name), model.get_submodule(name)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(images(20))
    handle.remove()
    positions = SampledPositions(layer, 20, 1000, 0)
    parts = []
    with torch.no_grad():
        for channel in range(layer.in_channels):
            alone = torch.zeros_like(seen[0])
            alone[:, channel] = seen[0][:, channel]
            bias = 0 if module.bias is None else module.bias.view(-1, *([1] * (alone.ndim - 2)))
            parts.append(positions.outputs(module(alone) - bias).flatten())
    moments = record(model, [layer], images(20), per_image=1000, seed=0)[name]
    found = contributions(module, layer, moments)
    torch.testing.assert_close(found, gram_of(torch.stack(parts, 1)), rtol=1e-4, atol=1e-3)


def test_units_of_several_channels_add_up() -> None:
    columns = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.tensor([[0, 3], [1, 4], [2, 5]])
    torch.testing.assert_close(
        unit_gram(gram_of(columns), positions), gram_of(columns[:, :3] + columns[:, 3:])
    )


class Planted(nn.Module):
    """Six channels, of which the reader's weights make 1 and 4 count most, 0 not at all, and 5 is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.reader, self.head = (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 1))
        self.first.weight.data[5] = 0
        self.first.bias.data[5] = 9.0
        for channel, scale in enumerate((0.0, 5.0, 0.01, 0.02, 4.0, 1.0)):
            self.reader.weight.data[:, channel] *= scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.reader(F.relu(self.first(x))))).mean((2, 3))


def test_what_counts_is_what_varies() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Planted().eval()
    model.first.weight.data[[1, 4]] = torch.eye(3)[:2].view(2, 3, 1, 1)
    model.first.bias.data[[1, 4]] = 0.0
    graph = trace(model, images())
    order = rank(Lasso(200).channel_scores(model, graph, sample(images(200))))[0].tolist()
    assert set(order[:2]) == {1, 4}
    assert set(order[-2:]) == {0, 5}  # a constant is taken up by the intercept


def test_several_readers_are_averaged_by_rank() -> None:
    model, graph = traced("selection")
    found = Lasso().channel_scores(model, graph, sample(images(30)))
    names = [group.name for group in graph.groups]
    stream = found[names.index("conv1")]
    readers = [name for name in graph.groups[names.index("conv1")].consumers if "shortcut" not in name]
    assert len(readers) == 2
    steps = stream * (len(stream) - 1) * len(readers)  # means of two whole ranks
    torch.testing.assert_close(steps, steps.round())
    inner = found[names.index("layer1.0.conv1")] * 15
    torch.testing.assert_close(inner, inner.round())


def test_the_path_depends_on_the_seed_and_memory_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = traced("residual")
    first, other = (
        Lasso(per_image=2).channel_scores(model, graph, sample(images(30), seed)) for seed in (0, 1)
    )
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    monkeypatch.setattr("amc_env.pruning.criteria.activations._BYTES", 1)  # a pass for every layer
    alone = Lasso(per_image=2).channel_scores(model, graph, sample(images(30)))
    assert all(torch.equal(a, b) for a, b in zip(first, alone, strict=True))


def test_readers_that_cannot_be_sampled_are_refused_by_name() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(5, 4, 1),
    ).eval()
    graph = trace(model, images())
    with refused("unsupported", "criterion"):
        Lasso().channel_scores(model, graph, sample(images()))
    assert not any(module._forward_hooks for module in model.modules())
