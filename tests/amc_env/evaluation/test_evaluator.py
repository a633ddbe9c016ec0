"""The evaluator: memo, purity, and what was scored is what is delivered."""

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from networks import images, network, problem, random_removed
from torch import Tensor, nn

from amc_env.costs.counts import Macs, Params
from amc_env.errors import UserError
from amc_env.evaluation.evaluator import Evaluator, Key
from amc_env.evaluation.int8 import obstacle
from amc_env.evaluation.precision import BFLOAT16, INT8
from amc_env.evaluation.prefix import PrefixScorer
from amc_env.evaluation.pruner import ORIGINAL, BaseWeights, Pruner
from amc_env.evaluation.scorer import Scorer, batch_size_for, score
from amc_env.graph.topology import Topology
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.repair.base import BatchNorm, Both, NoRepair, Repair
from amc_env.pruning.repair.least_squares import LeastSquares
from amc_env.pruning.repair.sequential import Sequential
from amc_env.space import Budget, SearchSpace, Trial
from amc_env.system import using_threads

LABELS = torch.arange(60) % 4
NO_BYTES = obstacle()
REPAIRS = ("none", "least_squares", "batch_norm", "both", "sequential")


def evaluator(
    name: str = "residual", repair: str = "least_squares", ratio: float = 0.5, memo=None
) -> Evaluator:
    candidates, grids = problem(name)
    macs, params = Macs(candidates.graph), Params(candidates.graph)
    space = SearchSpace(grids, [macs, params], [Budget.of(macs, len(grids), ratio=ratio)])
    calibration = images(40, seed=1)

    def least_squares() -> Repair:
        return LeastSquares(candidates, Topology.of(candidates.original), calibration)

    makers: dict[str, Callable[[], Repair]] = {
        "none": NoRepair,
        "least_squares": least_squares,
        "batch_norm": lambda: BatchNorm(calibration),
        "both": lambda: Both("both", [least_squares(), BatchNorm(calibration)]),
        "sequential": lambda: Sequential(candidates, Topology.of(candidates.original), calibration),
    }
    scorer = Scorer(candidates.original, candidates.graph.topology, images(60), LABELS, batch_size=25)
    weights = BaseWeights(ORIGINAL, candidates, makers)
    return Evaluator(weights, space, Pruner(scorer), repair, memo)


def some(judge: Evaluator, count: int = 3):
    return [judge.space.strategy(random_removed(judge.space.grids, seed)) for seed in range(count)]


class Fixed(nn.Module):
    """Logits that are the images."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("batch_size", [1, 2, 3, 250])
def test_accuracy_by_hand(batch_size: int) -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, float("-inf")]])
    assert score(Fixed(), logits, torch.tensor([1, 0, 0, 0]), batch_size=batch_size) == 0.75


def test_logits_that_are_not_numbers_are_refused() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    with pytest.raises(UserError, match=r"not numbers \(NaN\)"):
        score(Fixed(), logits, torch.tensor([1, 0]), batch_size=1)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", ["residual", "depthwise", "flatten", "mlp"])
def test_scorer_is_plain_accuracy(name: str, channels_last: bool) -> None:
    candidates, grids = problem(name)
    scorer = Scorer(
        candidates.original,
        candidates.graph.topology,
        images(60),
        LABELS,
        batch_size=25,
        channels_last=channels_last,
    )
    for seed in range(3):
        model = candidates.cut(random_removed(grids, seed))
        assert scorer(model) == score(model, images(60), LABELS)


COARSE = [
    *((BFLOAT16, name, torch.bfloat16) for name in ("residual", "gated", "mlp")),
    *(
        pytest.param(
            INT8,
            name,
            torch.float32,
            marks=pytest.mark.skipif(
                bool(NO_BYTES), reason=f"no convolutions in eight bits here: {NO_BYTES}"
            ),
        )
        for name in ("residual", "gated")
    ),
]


@pytest.mark.parametrize("kind", [Scorer, PrefixScorer])
@pytest.mark.parametrize(("precision", "name", "dtype"), COARSE)
def test_coarse_arithmetic_scores_nearly_what_float32_does(
    precision: str, name: str, dtype: torch.dtype, kind: type[Scorer]
) -> None:
    candidates, grids = problem(name)
    labels = candidates.original(images(60)).argmax(1)
    exact = kind(candidates.original, candidates.graph.topology, images(60), labels)
    coarse = kind(candidates.original, candidates.graph.topology, images(60), labels, precision=precision)
    assert coarse.inputs.dtype == dtype
    assert coarse(candidates.original) >= 0.9  # rounding moves few of these answers
    for seed in range(3):
        model = candidates.cut(random_removed(grids, seed))
        state = {key: value.clone() for key, value in model.state_dict().items()}
        assert abs(coarse(model) - exact(model)) <= 0.1
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.skipif(bool(NO_BYTES), reason=f"no convolutions in eight bits here: {NO_BYTES}")
def test_ranges_are_of_images_from_all_over() -> None:
    model = problem("residual")[0].original
    scorer = Scorer(model, Topology.of(model), images(60), LABELS, precision=INT8)
    assert torch.equal(scorer.folder._inputs, images(60)[::4])


class Float32Only(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.float()).mean((2, 3))


def test_a_network_that_does_not_run_in_bfloat16_is_refused() -> None:
    model = Float32Only().eval()
    with pytest.raises(
        UserError, match=r"evaluator.precision=bfloat16 does not work for this network .*float32"
    ):
        Scorer(model, Topology.of(model), images(60), LABELS, precision=BFLOAT16)


def test_batches_suit_the_size_of_an_image_and_the_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:1")
    assert batch_size_for(torch.empty(1, 3, 32, 32), cpu) == 64
    assert batch_size_for(torch.empty(1, 3, 32, 32), cpu, INT8) == 128
    assert batch_size_for(torch.empty(1, 3, 224, 224), cpu) == 4
    assert batch_size_for(torch.empty(1, 128), cpu) == 512
    assert batch_size_for(torch.empty(1, 3, 32, 32), cuda) == 1024  # wherever the images are as yet


def test_the_same_strategy_is_never_scored_twice() -> None:
    judge = evaluator()
    scored: list[int] = []
    inner = judge._pruner.scorer
    judge._pruner.scorer = lambda model: scored.append(1) or inner(model)
    strategies = some(judge)
    first = judge.evaluate([*strategies, strategies[0]])
    assert (len(scored), judge.evaluations, judge.hits) == (3, 3, 1)
    assert judge.evaluate(strategies) == first[:3]
    assert first[3] == first[0]
    assert (len(scored), judge.evaluations, judge.hits) == (3, 3, 4)
    judge.evaluate(strategies[:1], repair="none")
    assert (len(scored), judge.evaluations) == (4, 4)


def test_a_calibration_takes_the_room_of_what_is_kept_between_candidates() -> None:
    judge = evaluator()
    candidates, _ = problem("residual")
    scorer = PrefixScorer(candidates.original, candidates.graph.topology, images(60), LABELS)
    forgot: list[str] = []
    scorer.forget = lambda: forgot.append("forgot")  # type: ignore[method-assign]
    judge._pruner.scorer = scorer
    strategies = some(judge)
    judge.evaluate(strategies)
    assert len(forgot) == 1
    judge.evaluate(strategies[:1], repair="batch_norm")
    judge.evaluate(strategies, repair="batch_norm")
    assert len(forgot) == 2


def test_a_memo_from_before_is_believed() -> None:
    judge = evaluator()
    strategy = some(judge)[0]
    known = Trial(1, strategy, ORIGINAL, "least_squares", 0.123, {}, True, 0.123 - 1)
    judge = evaluator(memo={Key("original", "least_squares", strategy.removed): known})
    assert judge.evaluate([strategy]) == [known]
    assert (judge.hits, judge.evaluations) == (1, 0)


def test_outcome_states_costs_budget_and_repair() -> None:
    judge = evaluator()
    whole = judge.space.strategy([0] * len(judge.space.grids))
    half = judge.space.strategy(judge.space.project([0.0] * len(judge.space.grids)))
    outcomes = judge.evaluate([whole, half])
    assert [outcome.met for outcome in outcomes] == [False, True]
    assert outcomes[0].score == score(network("residual"), images(60), LABELS)
    assert outcomes[1].costs == judge.space.cost(half.removed)
    assert outcomes[1].costs["macs"] <= 0.5 * outcomes[0].costs["macs"]
    assert {(o.repair, o.start) for o in outcomes} == {("least_squares", "original")}


@pytest.mark.parametrize("repair", REPAIRS)
def test_what_was_scored_is_what_is_delivered(repair: str) -> None:
    judge = evaluator(repair=repair)
    scored: list[dict[str, Tensor]] = []
    inner = judge._pruner.scorer

    def scorer(model: nn.Module) -> float:
        scored.append({key: value.clone() for key, value in model.state_dict().items()})
        return inner(model)

    judge._pruner.scorer = scorer
    outcomes = judge.evaluate(some(judge))
    for outcome, state in zip(outcomes, list(scored), strict=True):
        pruned = judge.network(outcome)
        model, keeps = pruned.network, pruned.keeps
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert inner(model) == outcome.score
        assert not model.training
        assert keeps["linear"]["in"].numel() == model.linear.in_features
    first = judge.network(outcomes[0]).network
    judge.evaluate([judge.space.strategy(random_removed(judge.space.grids, 9))])
    # A network of its own: later candidates leave it alone.
    assert all(torch.equal(scored[0][key], value) for key, value in first.state_dict().items())


@pytest.mark.parametrize("repair", REPAIRS)
def test_scoring_is_a_function_of_the_strategy(repair: str) -> None:
    one, other = evaluator(repair=repair), evaluator(repair=repair)
    strategies = some(one)
    forwards = one.evaluate(strategies)
    torch.manual_seed(123)
    backwards = other.evaluate(strategies[::-1])
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("repair", REPAIRS)
def test_the_global_random_states_stay_as_they_were(repair: str) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    judge = evaluator(repair=repair)
    judge.network(judge.evaluate(some(judge, 1))[0])
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


def test_unknown_repair() -> None:
    judge = evaluator()
    with pytest.raises(UserError, match=r"unknown repair 'glue'; there are none, least_squares"):
        judge.evaluate(some(judge, 1), repair="glue")


def test_a_candidate_with_broken_weights_is_refused() -> None:
    judge = evaluator(repair="none")
    with torch.no_grad():
        judge._weights[ORIGINAL].candidates.original.conv1.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not numbers"):
        judge.evaluate(some(judge, 1))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_image_that_is_no_number_is_refused(value: str) -> None:
    candidates, _ = problem("residual")
    broken = images(8)
    broken[3, 0, 0, 0] = float(value)
    with pytest.raises(UserError, match="search images hold values that are infinite or not numbers"):
        Scorer(candidates.original, candidates.graph.topology, broken, torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batches_side_by_side_give_the_accuracy_of_one_after_another(threads: int) -> None:
    candidates, _ = problem("residual")
    labels = torch.arange(len(images())) % 4
    scorer = Scorer(candidates.original, candidates.graph.topology, images(), labels, batch_size=3)
    with using_threads(threads):
        assert scorer(candidates.original) == score(candidates.original, images(), labels)


def test_a_network_that_cannot_be_traced_is_run_one_batch_at_a_time() -> None:
    class Remembers(nn.Module):
        """Keeps what its first half gave: two batches at once would get into each other's way."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
            self.running = 0

        def forward(self, x: Tensor) -> Tensor:
            self.running += 1
            assert self.running == 1
            x = self.conv(x).relu()
            x = x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))
            self.running -= 1
            return self.last(x)

    model = Remembers().eval()
    scorer = Scorer(model, Topology.of(model), images(), torch.arange(len(images())) % 4, batch_size=1)
    with using_threads(4):
        assert 0 <= scorer(model) <= 1
    assert model.running == 0


def test_starts_are_scored_and_remembered_apart() -> None:
    judge = evaluator(repair="none")
    strategy = judge.space.strategy(judge.space.most)
    candidates, _ = problem("residual")
    tuned = copy.deepcopy(candidates.original)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(0.5)
    other = Candidates(tuned, candidates.graph, candidates.orders)
    judge.add(BaseWeights("round-1", other, {"none": NoRepair}))
    first = judge.evaluate([strategy])[0]
    second = judge.evaluate([strategy], start="round-1")[0]
    assert (first.start, second.start) == (ORIGINAL, "round-1")
    assert judge.evaluations == 2
    state = judge.network(second).network.state_dict()
    assert all(
        torch.equal(state[key], value) for key, value in other.build(strategy.removed).state_dict().items()
    )


def test_unknown_and_repeated_starts_are_refused() -> None:
    judge = evaluator()
    with pytest.raises(ValueError, match="unknown start 'nowhere'; there are original"):
        judge.evaluate(some(judge), start="nowhere")
    with pytest.raises(ValueError, match="known already"):
        judge.add(BaseWeights(ORIGINAL, problem("residual")[0], {}))


def test_candidates_have_their_own_number_of_threads() -> None:
    judge = evaluator(repair="none")
    seen: list[int] = []
    judge._pruner = Pruner(lambda model: seen.append(torch.get_num_threads()) or 0.5, threads=3)
    before = torch.get_num_threads()
    judge.network(judge.evaluate(some(judge, 1))[0])
    assert seen == [3]
    assert torch.get_num_threads() == before != 3


def test_repairs_are_calibrated_once_for_a_start_until_the_next_one() -> None:
    judge = evaluator(repair="mend")
    candidates, _ = problem("residual")
    made: list[str] = []

    def start(name: str) -> BaseWeights:
        return BaseWeights(name, candidates, {"mend": lambda: made.append(name) or NoRepair()})

    strategies = some(judge, 3)
    judge.add(start("one"))
    judge.add(start("two"))
    judge.evaluate(strategies[:2], start="one")
    judge.evaluate(strategies, start="two")
    judge.evaluate(strategies, start="one")
    assert made == ["one", "two", "one"]


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_network_given_away_holds_no_more_than_its_tensors(repair: str) -> None:
    judge = evaluator(repair=repair)
    strategy = some(judge, 1)[0]
    pruned = judge.apply(strategy).network
    for name, tensor in pruned.state_dict().items():
        assert tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
