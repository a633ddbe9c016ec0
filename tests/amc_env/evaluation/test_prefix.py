"""Shared computation: the same accuracies as plain scoring, and what is shared is not run again."""

import copy
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from networks import NETWORKS, images, problem, random_removed
from refusals import refused
from torch import Tensor, fx, nn
from torch.nn import functional as F

from amc_env.evaluation.int8 import obstacle
from amc_env.evaluation.precision import INT8
from amc_env.evaluation.prefix import PrefixScorer, _Kept
from amc_env.evaluation.scorer import Scorer, score
from amc_env.graph.topology import Topology
from amc_env.inputs import Inputs
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.repair.base import BatchNorm, NoRepair, Repair
from amc_env.pruning.repair.least_squares import LeastSquares
from amc_env.pruning.repair.sequential import Sequential
from amc_env.space import Grid
from amc_env.system import using_threads
from amc_env.tasks import Regression

LABELS = torch.arange(60) % 4
NO_BYTES = obstacle()
EIGHT_BITS = pytest.mark.skipif(bool(NO_BYTES), reason=f"no convolutions in eight bits here: {NO_BYTES}")
BATCHES = 3  # of 25, 25 and 10 images


@pytest.fixture(autouse=True)
def _small_networks_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their layers do little for the numbers that they give."""
    monkeypatch.setattr("amc_env.evaluation.prefix._WORTH", 0)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many lanes as there are batches, or as a test asks for."""
    with using_threads(getattr(request, "param", BATCHES)):
        yield


ONE_LANE_TOO = pytest.mark.parametrize("_threads", [1, BATCHES], indirect=True)


def scorer(model: nn.Module, kind: type[Scorer] = PrefixScorer, **more: Any) -> Scorer:
    return kind(model, Topology.of(model), images(60), LABELS, batch_size=25, **more)


class Pair(nn.Module):
    """Two inputs, by name, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, left: Tensor, right: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = self.norm(self.c(torch.relu(self.a(left)) + torch.relu(self.b(right))))
        return {"spare": y, "value": self.head(torch.relu(y) if scale is None else scale * y)}


@ONE_LANE_TOO
def test_inputs_by_name_and_an_output_of_several() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs: Inputs = {name: torch.randn(60, 3, generator=generator) for name in ("right", "left")}
    model, targets = Pair().eval(), torch.randn(60, 2, generator=generator)
    data, task = (inputs, targets), Regression(output="value")
    shared = PrefixScorer(model, Topology.of(model, inputs), *data, task, batch_size=25)
    assert shared._shared is not None
    assert shared.folder.reason == ""
    for layer in (model.head, model.c, model.a):
        nn.init.normal_(layer.bias, generator=generator)
        assert shared(model) == pytest.approx(score(model, *data, task), abs=1e-6)


def single(grids: tuple[Grid, ...], place: int) -> list[tuple[int, ...]]:
    """Strategies that cut one decision alone: least, middle, most."""
    counts = sorted(
        {grids[place].count(index) for index in (1, grids[place].size // 2, grids[place].size - 1)}
    )
    return [tuple(count if t == place else 0 for t in range(len(grids))) for count in counts]


def scan(grids: tuple[Grid, ...]) -> list[tuple[int, ...]]:
    """The original, then every decision alone, front to back."""
    whole = (0,) * len(grids)
    return [whole, *(removed for place in range(len(grids)) for removed in single(grids, place))]


def repairs(candidates: Candidates) -> dict[str, Callable[[], Repair]]:
    topology = Topology.of(candidates.original)
    return {
        "none": NoRepair,
        "least_squares": lambda: LeastSquares(candidates, topology, images(40, seed=1)),
        "batch_norm": lambda: BatchNorm(images(40, seed=1)),
        "sequential": lambda: Sequential(candidates, topology, images(40, seed=1)),
    }


def repaired(candidates: Candidates, removed: tuple[int, ...], repair: Repair) -> nn.Module:
    keeps = candidates.keeps(removed)
    model = candidates.cut(removed, keeps)
    if any(removed):
        repair(model, removed, keeps)
    return model


def count_runs(judge: Scorer, candidates: Candidates, name: str) -> list[int]:
    """A list that grows by one with every batch that a layer is run on."""
    runs: list[int] = []
    network = judge.folder(candidates.original)
    network.get_submodule(name).register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that grows by the logits of every network that is scored; accuracies are 0 meanwhile."""
    seen: list[Tensor] = []

    def note(judge: Scorer, model: nn.Module) -> float:
        seen.append(torch.cat([found.clone() for found, _ in judge.outputs(judge.fold(model))]))
        return 0.0

    monkeypatch.setattr(Scorer, "__call__", note)
    return seen


@pytest.mark.parametrize(
    ("name", "channels_last", "_threads"),
    [*((name, True, BATCHES) for name in NETWORKS), ("residual", False, 1), ("gated", False, BATCHES)],
    indirect=["_threads"],
)
def test_logits_are_those_of_plain_scoring_to_the_bit_in_any_order(
    name: str, channels_last: bool, logits: list[Tensor]
) -> None:
    candidates, grids = problem(name)
    plain = scorer(candidates.original, Scorer, channels_last=channels_last)
    shared = scorer(candidates.original, channels_last=channels_last)
    strategies = scan(grids)[:: 9 if name == "depthwise" else 1]  # it is large: every third decision
    drawn = [random_removed(grids, seed) for seed in range(2)]
    for removed in [*strategies, *drawn, *strategies[::-3], drawn[0], strategies[-1], *strategies[:3]]:
        plain(candidates.cut(removed))
        shared(candidates.cut(removed))
        assert torch.equal(logits[-2], logits[-1]), removed
    assert not torch.equal(logits[0], logits[-1])


@EIGHT_BITS
@pytest.mark.parametrize("name", ["residual", "concat", "gated"])
def test_logits_in_eight_bits_are_those_of_plain_scoring_too(name: str, logits: list[Tensor]) -> None:
    candidates, grids = problem(name)
    plain, shared = (scorer(candidates.original, kind, precision=INT8) for kind in (Scorer, PrefixScorer))
    strategies = scan(grids)
    for removed in [*strategies, random_removed(grids, 0), *strategies[::-3]]:
        plain(candidates.cut(removed))
        shared(candidates.cut(removed))
        assert torch.equal(logits[-2], logits[-1]), removed
    assert shared._shared._kept.filled > 0


@EIGHT_BITS
def test_bytes_that_are_kept_are_not_for_a_candidate_that_is_computed_in_floats(logits: list[Tensor]) -> None:
    candidates, grids = problem("residual")
    plain, shared = (scorer(candidates.original, kind, precision=INT8) for kind in (Scorer, PrefixScorer))
    for broken in (False, False, True, False):  # kept by the first two
        for judge in (plain, shared):
            model = candidates.cut((0,) * (len(grids) - 1) + (grids[-1].count(1),))
            if broken:
                [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1].weight.data[0] = (
                    torch.nan
                )
            judge(model)
        assert torch.equal(logits[-2], logits[-1]) or broken
        assert logits[-2].isnan().any() == logits[-1].isnan().any() == broken


@pytest.mark.parametrize("name", ["residual", "mlp"])
def test_accuracies_are_those_of_plain_scoring(name: str) -> None:
    candidates, grids = problem(name)
    labels = candidates.original(images(60)).argmax(1)
    plain, shared = (
        kind(candidates.original, candidates.graph.topology, images(60), labels, batch_size=25)
        for kind in (Scorer, PrefixScorer)
    )
    assert shared(candidates.original) == 1.0
    found = [(shared(candidates.cut(removed)), plain(candidates.cut(removed))) for removed in scan(grids)]
    assert all(ours == theirs for ours, theirs in found)
    assert len(set(found)) > 1  # some candidates answer otherwise than the original


@ONE_LANE_TOO
def test_candidates_that_are_cut_short_leave_the_others_as_they_are() -> None:
    candidates, grids = problem("residual")
    plain, shared = scorer(candidates.original, Scorer), scorer(candidates.original)
    strategies = scan(grids)
    for number, removed in enumerate([*strategies, *strategies[::-1], *strategies]):
        model = candidates.cut(removed)
        wanted = [logits for logits, _ in plain.outputs(plain.fold(model))]
        with closing(shared.outputs(shared.fold(model))) as found:
            for index, (logits, _) in enumerate(found):
                assert torch.equal(logits, wanted[index]), removed
                if index == number % 4:  # of three batches: some are read to their end
                    break
    assert shared._shared._kept.filled > 0


@pytest.mark.parametrize(
    ("name", "repair"),
    [
        *(("residual", repair) for repair in ("least_squares", "batch_norm", "sequential")),
        *((name, "sequential") for name in ("concat", "gated")),
    ],
)
def test_repairs_change_what_they_like(name: str, repair: str, logits: list[Tensor]) -> None:
    candidates, grids = problem(name)
    fix = repairs(candidates)[repair]()
    plain, shared = scorer(candidates.original, Scorer), scorer(candidates.original)
    for removed in scan(grids):
        model = repaired(candidates, removed, fix)
        plain(model)
        shared(model)
        assert torch.equal(logits[-2], logits[-1]), removed


@pytest.mark.parametrize("repair", ["none", "least_squares", "sequential"])
def test_what_is_before_the_cut_is_run_once_in_a_scan(repair: str) -> None:
    candidates, grids = problem("residual")
    fix = repairs(candidates)[repair]()
    judge = scorer(candidates.original)
    first, middle, last = (
        count_runs(judge, candidates, name) for name in ("conv1", "layer2.0.conv1", "layer3.0.conv1")
    )
    places = [place for place, grid in enumerate(grids) if grid.name.startswith("layer3")]
    strategies = [removed for place in places for removed in single(grids, place)]
    for removed in strategies:
        judge(repaired(candidates, removed, fix))
    assert len(strategies) > 3
    assert (len(first), len(middle)) == (BATCHES, BATCHES)
    assert len(last) > BATCHES


def test_batch_norms_that_are_all_re_estimated_are_shared_by_the_candidates_of_one_cut() -> None:
    candidates, grids = problem("residual")
    fix = repairs(candidates)["batch_norm"]()
    plain, judge = scorer(candidates.original, Scorer), scorer(candidates.original)
    runs = count_runs(judge, candidates, "conv1")
    counted = []
    for removed in single(grids, len(grids) - 1):
        model = repaired(candidates, removed, fix)
        assert judge(model) == plain(model)
        counted.append(len(runs))
    # The second shows what it has in common with the first; the third finds it kept.
    assert counted == [BATCHES, 2 * BATCHES, 2 * BATCHES]


def of_a_policy(grids: tuple[Grid, ...]) -> list[tuple[int, ...]]:
    """Ways that part from one another early and late, and come back to those of long before."""
    last, most = len(grids) - 1, [grid.count(grid.size - 1) for grid in grids]
    a, b = [grid.count(1) for grid in grids], [grid.count(2) for grid in grids]
    late = [(*a[:last], most[last]), (*b[:last], most[last]), (*a[:last], 0), (*b[:last], 0)]
    return [tuple(a), tuple(b), *late, (*a[:2], *[0] * (last - 1))]


def test_a_way_is_gone_on_from_where_any_earlier_candidate_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, grids = problem("residual")
    plain, judge = scorer(candidates.original, Scorer), scorer(candidates.original)
    runs = count_runs(judge, candidates, "layer1.0.conv1")
    counted = []
    for removed in of_a_policy(grids):
        assert judge(candidates.cut(removed)) == plain(candidates.cut(removed))
        counted.append(len(runs) // BATCHES)
    # Two ways; each is met again and kept; both are gone on from; the last leaves before what is kept.
    assert counted == [1, 2, 3, 4, 4, 4, 5]
    again = candidates.cut(of_a_policy(grids)[2])
    given_back: list[bool] = []
    monkeypatch.setattr("amc_env.evaluation.prefix.release_heap", lambda: given_back.append(True))
    judge.forget()
    assert given_back
    assert judge(again) == plain(again)
    assert len(runs) // BATCHES == 6


@pytest.mark.parametrize("remembered", [2, 5])
def test_what_is_forgotten_bit_by_bit_changes_nothing(
    remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates, grids = problem("residual")
    plain, judge = scorer(candidates.original, Scorer), scorer(candidates.original)
    assert judge._shared is not None
    monkeypatch.setattr("amc_env.evaluation.prefix._SEEN", remembered * len(judge._shared._nodes))
    draw = random.Random(0)
    for _ in range(40):
        removed = tuple(grid.count(draw.choice((1, 2)) if t > 1 else 1) for t, grid in enumerate(grids))
        assert judge(candidates.cut(removed)) == plain(candidates.cut(removed))


def test_what_can_have_no_room_drives_nothing_out() -> None:
    kept = _Kept(room=1000)
    for number in range(4):
        assert kept.add(bytes([number]), 0, torch.zeros(50))
    kept.use([])
    assert not kept.add(b"large", 0, torch.zeros(500))
    assert all(bytes([number]) in kept for number in range(4))
    assert kept.add(b"fits", 0, torch.zeros(100))
    assert [bytes([number]) in kept for number in range(4)] == [False, True, True, True]
    kept.use([])
    assert kept.add(b"view", 0, torch.zeros(200)[:1])  # holds all 800 bytes
    assert [bytes([number]) in kept for number in range(4)] == [False] * 4


def test_what_spares_little_for_its_size_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, grids = problem("residual")
    a, _, again, *_ = of_a_policy(grids)
    # For an image, as uncut: all before the last decision is 3 x 9 x 1024 multiply-accumulates, 16 x 9 x 2 x 1024 and so on
    # for what is 32 x 4 x 4 numbers of the stream and 64 x 2 x 2 of the layer beside it.
    work = 3 * 9 * 1024 + 2 * 16 * 9 * 1024 + (16 + 32) * 9 * 512 + 16 * 512 + 32 * 9 * 256
    for least, runs in ((work // 768, 2), (work // 768 + 1, 3)):
        monkeypatch.setattr("amc_env.evaluation.prefix._WORTH", least)
        judge = scorer(candidates.original)
        counted = count_runs(judge, candidates, "layer1.0.conv1")
        for removed in (a, again, again):
            judge(candidates.cut(removed))
        assert len(counted) == runs * BATCHES


def test_the_longest_unused_goes_first_where_there_is_no_room_for_two() -> None:
    candidates, grids = problem("residual")
    plain = scorer(candidates.original, Scorer)
    way = (32 * 4 * 4 + 62 * 2 * 2) * 4 * 60  # bytes that the last decision's layers read, of all images
    judge = scorer(candidates.original, room=way + way // 2)
    runs = count_runs(judge, candidates, "layer1.0.conv1")
    counted = []
    a1, b1, a2, b2, a3, b3, _ = of_a_policy(grids)
    for removed in (a1, b1, a2, a3, b2, b3, a3):
        assert judge(candidates.cut(removed)) == plain(candidates.cut(removed))
        counted.append(len(runs) // BATCHES)
    assert counted == [1, 2, 3, 3, 4, 4, 5]


def test_what_has_no_room_is_run_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    candidates, grids = problem("residual")
    plain = scorer(candidates.original, Scorer)
    values = 16 * 8 * 8 * 4 * 25  # bytes of the front before layer1: one batch of 25 images
    runs = {}
    for room in (0, values, 10 * values):
        caplog.clear()
        judge = scorer(candidates.original, room=room)
        counted = count_runs(judge, candidates, "conv1")
        place = [grid.name for grid in grids].index("layer1.0.conv1")
        for removed in single(grids, place):
            assert judge(candidates.cut(removed)) == plain(candidates.cut(removed))
        runs[room] = len(counted)
        assert caplog.text.count("run from the first layer on") == (room < 3 * values)
    # Three candidates: all batches anew; the first batch kept; everything kept.
    assert runs == {0: 3 * BATCHES, values: 3 * BATCHES - 2, 10 * values: BATCHES}


def test_weights_changed_in_place_are_seen() -> None:
    candidates, _ = problem("residual")
    model = copy.deepcopy(candidates.original)
    judge = scorer(model)
    before = judge(model)
    with torch.no_grad():
        model.linear.weight.neg_()
    assert judge(model) == scorer(model, Scorer)(model) != before
    with torch.no_grad():
        model.linear.weight.neg_()
        model.conv1.weight.mul_(-1)
    assert judge(model) == scorer(model, Scorer)(model) != before


def test_outputs_that_are_not_numbers_are_refused() -> None:
    candidates, grids = problem("residual")
    judge = scorer(candidates.original)
    model = candidates.cut(single(grids, len(grids) - 1)[0])
    with torch.no_grad():
        model.linear.weight[0, 0] = torch.nan
    with refused("not_finite", ""):
        judge(model)


class Small(nn.Module):
    """Three convolutions, and ways to write a sum down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.first(x))).mean((2, 3)))

    def body(self, x: Tensor) -> Tensor:
        return x + self.third(self.second(x))


class Overwriting(Small):
    """A sum that is written over what the next candidate would read again."""

    def body(self, x: Tensor) -> Tensor:
        return x.add_(self.third(self.second(x)))


class Fresh(Small):
    """A sum written over a value of its own, and a ReLU in place: nothing kept is touched."""

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.third(self.second(x)).add_(x), inplace=True)


class Statement(Small):
    """A value changed by an operation whose result nothing reads."""

    def body(self, x: Tensor) -> Tensor:
        y = self.second(x)
        x.mul_(2.0)
        return self.third(x) + y


class Branching(Small):
    """Not to be traced."""

    def body(self, x: Tensor) -> Tensor:
        return self.second(x) if x.sum() > 0 else self.third(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Small, None),
        (Fresh, None),
        (Overwriting, "values that are read again are overwritten in place"),
        (Statement, "mul_ is run, perhaps for a side effect"),
        (Branching, "torch.fx cannot trace it"),
    ],
)
def test_networks_that_share_and_networks_that_cannot(
    kind: type[Small], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().eval()
    plain, judge = scorer(model, Scorer), scorer(model)
    network = judge.folder(model)
    runs: list[int] = []
    if isinstance(network, fx.GraphModule):
        network.get_submodule("first").register_forward_hook(lambda *_: runs.append(1))
    for layer, factor in (
        ("second", 2.0),
        ("second", -3.0),
        ("third", 2.0),
        ("third", -3.0),
        ("second", 5.0),
    ):
        candidate = copy.deepcopy(model)
        with torch.no_grad():
            candidate.get_submodule(layer).weight.mul_(factor)
        assert judge(candidate) == plain(candidate)
    if reason is None:
        assert len(runs) == BATCHES
        assert "from the first layer on" not in caplog.text
    else:
        assert f"run from the first layer on: {reason}" in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't")]
)
@pytest.mark.parametrize("kind", [Scorer, PrefixScorer])
def test_batches_are_halved_once_where_memory_is_used_up(
    kind: type[Scorer], error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = NETWORKS["mlp"]().eval()
    score_of, most, sizes = scorer(model, kind), [25], []
    expected, forward = score_of(model), nn.Linear.forward

    def within(layer: nn.Linear, x: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > most[0]:
            raise error
        return forward(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", within)
    model[1].weight.data.mul_(1.0001)  # nothing of the first score can be used again
    most[0] = 12
    assert score_of(model) == expected
    assert score_of.batch_size == 12
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "out of memory: evaluator.batch_size is halved to 12"
    ]
    most[0], model[1].weight.data = 6, 1.0001 * model[1].weight.data
    with refused("out_of_memory", "evaluator.batch_size"):
        score_of(model)
    assert max(sizes) == 25
