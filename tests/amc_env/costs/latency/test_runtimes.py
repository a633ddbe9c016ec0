"""Every runtime runs the network it is given and leaves it as it is; what cannot run is refused."""

import copy
import sys

import pytest
import torch
from refusals import refused
from torch import Tensor, nn

from amc_env.costs.latency import RUNTIMES, Call, Runtime, measure, runtime, using_threads
from amc_env.costs.latency.runtimes import Compile
from amc_env.errors import UserError
from amc_env.mobile import MOBILE

ON_GPU = ("cuda", "cuda_graph")


class Called(nn.Module):
    """Writes down when and with how many threads it was run."""

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.log.append((self.name, torch.get_num_threads()))
        return x


def unit(outputs: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()).eval()


def available(name: str) -> Runtime:
    if name in ON_GPU and not torch.cuda.is_available():
        pytest.skip("no graphics processor")
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    for package in MOBILE[name].packages if name in MOBILE else ():
        pytest.importorskip(package, reason=f"the extra '{name}' is not installed")
    return Compile(backend="eager") if name == "compile" else runtime(name, threads=1)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_times_a_network_and_leaves_it_as_it_is(name: str) -> None:
    runs = available(name)
    assert runs.name == name
    runs.check()
    network, example = unit(), torch.randn(2, 3, 8, 8)
    before, flags = copy.deepcopy(network.state_dict()), [p.requires_grad for p in network.parameters()]
    call: Call = runs.prepare(network, example)
    own = call()
    assert (own is not None and own > 0) == (name in ON_GPU)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == flags
    found = measure({"a": network}, example, runtime=runs, threads=1, repeats=3, warmup=1)
    assert 1e-3 < found["a"].low_ms <= found["a"].median_ms <= found["a"].high_ms < 1e4


def test_networks_are_measured_in_turns_with_the_threads_asked_for() -> None:
    log: list[tuple[str, int]] = []
    before = torch.get_num_threads()
    networks = {name: Called(name, log) for name in "ab"}
    found = measure(networks, torch.zeros(1), threads=before + 1, repeats=4, warmup=2)
    assert set(found) == {"a", "b"}
    names = [name for name, _ in log]
    assert names[:4] == ["a", "b"] * 2  # to warm up
    turns = [names[at : at + 4] for at in range(4, len(names), 4)]
    assert len(turns) == 4
    for turn in turns:  # each runs once to settle, then it is timed
        assert turn in (["a", "a", "b", "b"], ["b", "b", "a", "a"])
    assert {threads for _, threads in log} == {before + 1}
    assert torch.get_num_threads() == before


def test_threads_are_put_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), using_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        raise KeyError
    assert torch.get_num_threads() == before
    with using_threads(None):
        assert torch.get_num_threads() == before


def test_many_networks_of_one_class_are_all_compiled() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]):
        compiled.append(1)
        return graph.forward

    example = torch.randn(1, 3, 5, 5)
    calls = [Compile(backend=backend).prepare(unit(outputs), example) for outputs in range(1, 11)]
    for call in calls:
        call()
    assert len(compiled) == 10


def test_what_the_compiler_says_is_handed_on() -> None:
    def backend(graph: torch.fx.GraphModule, _: list[Tensor]):
        raise RuntimeError("no such instruction\nand a page more")

    message = r"latency\.runtime=compile cannot run Sequential \(.*\): use latency\.runtime=eager"
    with pytest.raises(UserError, match=message) as caught:
        Compile(backend=backend).prepare(unit(), torch.randn(1, 3, 5, 5))
    assert "\n" not in str(caught.value)


def test_what_onnx_cannot_express_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: object, **__: object) -> None:
        raise RuntimeError("unknown operation\nand a page more")

    monkeypatch.setattr(torch.onnx, "export", export)
    message = r"=onnx cannot run Sequential \(unknown operation\): use latency\.runtime=eager"
    with pytest.raises(UserError, match=message):
        available("onnx").prepare(unit(), torch.randn(1, 3, 5, 5))


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with refused("missing", "latency.runtime"):
        runtime("compile", 1).check()
    monkeypatch.setenv("CXX", sys.executable)
    runtime("compile", 1).check()


def test_a_machine_without_the_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with refused("missing_package", ""):
        runtime("onnx", 1).check()


@pytest.mark.parametrize("name", ON_GPU)
def test_a_machine_without_a_graphics_processor_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = rf"latency\.runtime={name} needs a CUDA graphics processor, .*use latency\.runtime=eager"
    with pytest.raises(UserError, match=message):
        runtime(name, 1).check()
    with pytest.raises(UserError, match=message):
        runtime(name, 1).prepare(unit(), torch.randn(1, 3, 5, 5))


def test_an_unknown_runtime_is_refused() -> None:
    with refused("unknown_name", "latency.runtime"):
        runtime("tflite", 1)
