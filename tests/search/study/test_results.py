"""result.json and strategy.json of runs whose weights went through several hands."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from run_folders import read
from running import SMALL, Command
from small_runs import go, small

from amc_env import onnx as onnx_files
from amc_env.costs.latency import Timing
from search.data.base import Data
from search.settings import LatencySettings

QUICK = (
    *SMALL,
    "agent=ddpg",
    "granularity=fine_grained",
    "budget=params",
    "search.episodes=5",
    "agent.warmup_episodes=2",
    "finetune.epochs=1",
    "latency.repeats=0",
    "export=[]",
    "hydra.run.dir=run",
)


def test_a_run_in_stages_names_the_chain_of_its_weights(amc_search: Command, tmp_path: Path) -> None:
    ended = amc_search(
        *QUICK, "search.stages=[0.6,0.4]", "regularization=l1", "regularization.before_epochs=1"
    )
    assert ended.code == 0
    run = tmp_path / "run"
    chain = ["original", "regularised", "stage 1 (0.6)"]
    strategy, result = read(run, "strategy.json"), read(run, "result.json")
    assert strategy["start"] == chain
    assert strategy["granularity"] == "fine_grained"
    search = result["search"]
    assert (search["start"], search["stages"], search["stage_episodes"]) == (chain, [0.6, 0.4], 5)
    assert search["episodes"] == 5  # of the last stage
    starts = [json.loads(line).get("start") for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert set(starts) - {None} == {"regularised", "stage 1 (0.6)"}
    way = "original → regularised → stage 1 (0.6) → this network"
    assert way in ended.out
    page = (run / "report.html").read_text()
    for text in (
        way,
        "stages <b>60%, 40%</b>",
        "episodes, last stage <b>5</b>",
        "rewards of different stages",
    ):
        assert text in page
    assert not result["resumed"]


def test_a_masked_run_states_both_counts_and_every_layer(amc_search: Command, tmp_path: Path) -> None:
    assert amc_search(*QUICK, "budget.ratio=0.4").code == 0
    result, strategy = read(tmp_path / "run", "result.json"), read(tmp_path / "run", "strategy.json")
    assert "start" not in strategy
    assert not {"start", "stages", "rounds"} & set(result["search"])
    for stage in ("base", "pruned", "finetuned"):
        assert result[stage]["dense_macs"] == result["base"]["macs"] == 17_226  # 64-128-64-10, with biases
        assert result[stage]["dense_params"] == result["base"]["params"] == 17_226
    kept = sum(layer["nonzero"] for layer in result["layers"].values())
    biases = 128 + 64 + 10
    assert result["finetuned"]["params"] == kept + biases == result["budget"]["value"]
    for name, decision in strategy["decisions"].items():
        assert result["layers"][name] == {
            "weights": decision["total"],
            "nonzero": decision["total"] - decision["removed"],
        }
    assert result["storage"]["dense_fp32"] == 4 * 17_226
    assert "Sparsity only" in result["granularity"]["speed"]


@pytest.mark.parametrize("format", ["eie", "csr"])
def test_a_budget_on_storage_names_its_format_and_agrees_with_what_was_counted(
    amc_search: Command, tmp_path: Path, format: str
) -> None:
    budget = ("budget=storage", f"budget.format={format}", "budget.ratio=0.7", "finetune.epochs=0")
    ended = amc_search(*QUICK, *budget)
    assert ended.code == 0
    result = read(tmp_path / "run", "result.json")
    assert result["budget"]["format"] == format
    assert result["budget"]["value"] == result["pruned"]["storage"] == result["storage"][format]
    assert f"stored size, {format.upper()}" in ended.out


def test_a_later_stage_counts_the_storage_of_the_weights_it_begins_with(
    amc_search: Command, tmp_path: Path
) -> None:
    """Tuned weights rank anew, so their zeros lie elsewhere and need other padding."""
    budget = ("budget=storage", "budget.format=eie", "search.stages=[0.9,0.7]", "finetune.epochs=1")
    ended = amc_search(*QUICK, *budget)
    assert ended.code == 0
    result = read(tmp_path / "run", "result.json")
    assert result["budget"]["value"] == result["pruned"]["storage"] == result["storage"]["eie"]
    assert result["budget"]["met"]


LATENCY = ("latency.repeats=2", "latency.runtime=onnx", "latency.threads=1", "finetune.epochs=0")


def test_latency_states_its_conditions_and_its_spread(amc_search: Command, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ended = amc_search(*QUICK, *LATENCY)
    assert ended.code == 0
    result = read(tmp_path / "run", "result.json")
    conditions = [result[f"latency_{name}"] for name in ("batch", "runtime", "threads")]
    assert conditions == [1, "onnx", 1]
    assert 1e-3 < result["pruned"]["latency_ms"] < 1e3
    assert result["pruned"]["latency_spread"] > 0
    assert result["finetuned"] is None
    for text in (ended.out, (tmp_path / "run" / "report.html").read_text()):
        assert "latency, batch 1, onnx" in text
        assert "latency, spread" in text


def test_a_batch_of_more_images_than_there_are_is_measured_as_large_as_it_is_said_to_be(
    small_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def measured(networks: Mapping[str, object], example: torch.Tensor, **_: object) -> dict[str, Timing]:
        seen.append(example)
        return dict.fromkeys(networks, Timing(1.0, 1.0, 1.0, 1))

    monkeypatch.setattr("search.study.results.measure", measured)
    settings = small("channel", latency=LatencySettings(batch=70, repeats=1))
    assert go(tmp_path, small_data, settings).result.latency_batch == 70
    (example,) = seen
    assert len(small_data.search) == 32
    images = small_data.normalise(small_data.search.inputs)
    assert torch.equal(example, torch.cat([images, images, images[:6]]))


@pytest.mark.parametrize(
    ("granularity", "timed"), [("channel", ["base", "pruned"]), ("fine_grained", ["base"])]
)
def test_networks_of_one_architecture_are_timed_once(
    small_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str, timed: list[str]
) -> None:
    seen: list[str] = []

    def measured(networks: Mapping[str, object], *_: object, **more: object) -> dict[str, Timing]:
        seen.extend(networks)
        return {name: Timing(1.0 + len(name), 1.0, 1.0, 1) for name in networks}

    monkeypatch.setattr("search.study.results.measure", measured)
    result = go(tmp_path, small_data, small(granularity, latency=LatencySettings(repeats=1))).result
    assert seen == timed
    assert result.finetuned is not None
    assert result.finetuned.latency_ms == result.pruned.latency_ms == 1.0 + len(timed[-1])


def test_a_run_outlives_a_runtime_that_cannot_run_its_network(
    amc_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(*_: object) -> bytes:
        raise RuntimeError("operation unknown")

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_files, "fixed", fixed)
    assert amc_search(*QUICK, *LATENCY).code == 0
    assert read(tmp_path / "run", "result.json")["pruned"]["latency_ms"] is None
    said = (tmp_path / "run" / "run_search.log").read_text()
    assert "latency was not measured: latency.runtime=onnx cannot run" in said


def test_a_runtime_that_is_not_there_is_refused_first(
    amc_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = amc_search(*QUICK, "latency.repeats=1", "latency.runtime=cuda_graph")
    assert ended.code == 2
    assert "latency.runtime=cuda_graph needs a CUDA graphics processor" in ended.err
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
