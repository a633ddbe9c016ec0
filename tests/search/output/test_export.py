"""Export: bit-equal round trips, files that load without this project, one clear message per mistake."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from amc_env.errors import UserError
from amc_env.graph.layers import keeps_of
from amc_env.graph.surgery import Keeps, resize
from amc_env.graph.tracing import trace
from amc_env.mobile import MOBILE
from search.output.export import FORMATS, TOLERANCE, Exported, Small, check_formats, export_all
from search.output.weights import ExportError, load_pruned, save_pruned

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SHAPE = (3, 8, 8)
FILES = {"safetensors": "model.safetensors", "pt2": "model.pt2", "onnx": "model.onnx"}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.inner_bn = nn.BatchNorm2d(12)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        stem = torch.relu(self.bn(self.stem(images)))
        block = self.outer(torch.relu(self.inner_bn(self.inner(stem))))
        return self.head(torch.relu(stem + block).mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3 * 8 * 8, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(images.flatten(1))))))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.depth_bn = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6 * 4 * 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        images = torch.relu(self.stem_bn(self.stem(images)))
        images = torch.relu(self.point(torch.relu(self.depth_bn(self.depth(images)))))
        return self.head(nn.functional.max_pool2d(images, 2).reshape(images.shape[0], -1))


class BatchBranch(nn.Module):
    """Computes something else on a batch of one, which torch.export traces away."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images) if images.shape[0] > 1 else 2 * self.head(images)


class FixedBatch(BatchBranch):
    """Cannot be exported with a dynamic batch."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.reshape(2, 4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images))


NETWORKS: dict[str, type[nn.Module]] = {"residual": Residual, "mlp": Mlp, "depthwise": Depthwise}


@dataclass(frozen=True)
class Pruned:
    original: nn.Module
    keeps: Keeps
    model: nn.Module


def unpruned(name: str, seed: int = 0) -> nn.Module:
    """A network with batch-norm statistics that are not those of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NETWORKS[name]()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(16, *SHAPE))
    return model.eval()


def pruned(name: str) -> Pruned:
    """Every other channel of every group kept."""
    original = unpruned(name)
    graph = trace(original, torch.zeros(2, *SHAPE))
    assert graph.groups
    keeps = keeps_of(graph.groups, [torch.arange(0, group.total, 2) for group in graph.groups])
    return Pruned(original, keeps, resize(copy.deepcopy(original), keeps))


def batch(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {*FILES.values(), "channels.json"}


def isolated(script: str, *arguments: object, cwd: Path) -> str:
    """Runs `script` in a Python that ignores the environment, in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Pruned, list[Exported]]]:
    """Every network in every format, with warnings as errors."""
    made = {}
    for name in NETWORKS:
        folder, cut = tmp_path_factory.mktemp(name), pruned(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            small = Small(cut.model, batch(4), cut.keeps, name, cut.original)
            results = export_all(small, folder, list(FILES))
        made[name] = folder, cut, results
    return made


# Kept files


@pytest.mark.parametrize("name", NETWORKS)
def test_every_format_is_checked_and_kept(exported, name: str) -> None:
    folder, _, results = exported[name]
    assert [(result.format, result.path, result.error) for result in results] == [
        (wanted, folder / file, None) for wanted, file in FILES.items()
    ]
    for result in results:
        assert result.bytes == result.path.stat().st_size > 0
        assert result.max_difference is not None
        assert 0 <= result.max_difference <= 10 * TOLERANCE
    assert results[0].max_difference == 0
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert not leftovers(folder)
    with pytest.raises(FrozenInstanceError):
        results[0].bytes = 0


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_bit_equal(exported, name: str) -> None:
    folder, cut, _ = exported[name]
    fresh = unpruned(name, seed=5).train()
    restored = load_pruned(fresh, folder)
    assert restored is fresh
    assert not restored.training
    expected, got = cut.model.state_dict(), restored.state_dict()
    assert list(expected) == list(got)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    with torch.no_grad():
        assert torch.equal(restored(batch(3)), cut.model(batch(3)))
        assert not torch.equal(restored(batch(3)), cut.original(batch(3)))


def test_channels_file_says_what_was_kept_of_what(exported) -> None:
    folder, cut, _ = exported["residual"]
    record = json.loads((folder / "channels.json").read_text())
    assert (record["format"], record["model"]) == (1, "residual")
    assert record["channels"]["inner"] == {
        "in": [0, 2, 4, 6],
        "out": [0, 2, 4, 6, 8, 10],
        "in_total": 8,
        "out_total": 12,
    }
    assert record["channels"]["head"] == {"in": [0, 2, 4, 6], "in_total": 8}
    assert set(record["channels"]) == set(cut.keeps)


def test_programs_load_without_this_project(exported, tmp_path: Path) -> None:
    """Both files of every network, on batches of 1, 4 and 7, in a process that cannot import it."""
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("amc_env", "agents", "search", "conf"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import onnxruntime, torch
from safetensors.torch import load_file, save_file
outputs = {}
for name, folder in zip(sys.argv[2::2], sys.argv[3::2]):
    program = torch.export.load(folder + "/model.pt2").module()
    session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
    for rows, images in load_file(sys.argv[1]).items():
        outputs[f"{name} pt2 {rows}"] = program(images).detach()
        outputs[f"{name} onnx {rows}"] = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
save_file(outputs, "outputs.safetensors")
"""
    images = {str(rows): batch(rows, seed=rows) for rows in (1, 4, 7)}
    save_file(images, tmp_path / "images.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    folders = [part for name, (folder, _, _) in exported.items() for part in (name, folder)]
    isolated(script, tmp_path / "images.safetensors", *folders, cwd=empty)
    outputs = load_file(empty / "outputs.safetensors")
    assert len(outputs) == 2 * len(exported) * len(images)
    for key, output in outputs.items():
        name, _, rows = key.split()
        with torch.no_grad():
            torch.testing.assert_close(output, exported[name][1].model(images[rows]), atol=1e-5, rtol=1e-4)


def test_onnx_is_one_file_with_a_named_batch_axis(exported) -> None:
    onnx = pytest.importorskip("onnx")
    folder, _, _ = exported["mlp"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.input] == ["input"]
    assert [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        *SHAPE,
    ]
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.initializer)


def test_programs_give_away_neither_paths_nor_images(exported) -> None:
    folder, _, _ = exported["residual"]
    for file in ("model.pt2", "model.onnx"):
        assert str(ROOT).encode() not in (folder / file).read_bytes()
    program = torch.export.load(folder / "model.pt2")
    (sample,), _ = program.example_inputs
    assert not sample.any()


def test_load_pruned_in_a_fresh_process(exported, tmp_path: Path) -> None:
    folder, cut, _ = exported["depthwise"]
    script = """
import importlib.util, sys
root, test_file, folder = sys.argv[1:]
sys.path[:0] = [root, f"{root}/tests/support"]
spec = importlib.util.spec_from_file_location("networks", test_file)
networks = importlib.util.module_from_spec(spec)
sys.modules["networks"] = networks
spec.loader.exec_module(networks)
import torch
from safetensors.torch import save_file
from search.output.weights import load_pruned
model = load_pruned(networks.Depthwise(), folder)
with torch.no_grad():
    save_file({"output": model(networks.batch(3))}, "output.safetensors")
"""
    isolated(script, ROOT, Path(__file__).resolve(), folder, cwd=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            load_file(tmp_path / "output.safetensors")["output"], cut.model(batch(3)), atol=1e-6, rtol=1e-6
        )


def test_tied_weights_and_double_precision_survive(tmp_path: Path) -> None:
    model = Tied().double().eval()
    save_pruned(model, {}, tmp_path, name="tied")
    restored = load_pruned(Tied().double(), tmp_path)
    assert restored.first.weight is restored.second.weight
    assert torch.equal(restored.first.weight, model.first.weight)
    assert torch.equal(restored.second.bias, model.second.bias)


def test_without_the_original_totals_are_unknown_and_loading_still_works(tmp_path: Path) -> None:
    cut = pruned("mlp")
    save_pruned(cut.model, cut.keeps, tmp_path, name="mlp")
    record = json.loads((tmp_path / "channels.json").read_text())
    assert record["channels"]["first"]["out_total"] is None
    restored = load_pruned(unpruned("mlp", seed=5), tmp_path)
    assert torch.equal(restored.second.weight, cut.model.second.weight)


# The network is left alone, and so is the terminal


@pytest.mark.parametrize("name, file", [("pt2", "model.pt2"), ("onnx", "model.onnx")])
def test_export_leaves_the_network_as_it_was_and_says_nothing(
    name: str, file: str, tmp_path: Path, capfd
) -> None:
    model = unpruned("residual")
    model.train()
    model.bn.eval()
    model.stem.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    example = batch(1)  # torch.export would make a traced batch of one a constant
    result = FORMATS[name].write(Small(model, example), tmp_path)
    assert result.error is None
    assert result.path == tmp_path / file
    assert result.path.is_file()
    assert flags == [module.training for module in model.modules()]
    assert [p.requires_grad for p in model.parameters()] == [
        name != "stem.weight" for name, _ in model.named_parameters()
    ]
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(example, batch(1))
    assert capfd.readouterr() == ("", "")


def test_channels_last_networks_are_exported_without_a_warning(tmp_path: Path) -> None:
    model = unpruned("residual").to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = FORMATS["pt2"].write(Small(model, batch(2)), tmp_path)
    assert result.error is None
    assert model.inner.weight.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_networks_are_exported_in_fp32(tmp_path: Path) -> None:
    model = unpruned("mlp").half()
    result = FORMATS["pt2"].write(Small(model, batch(2).half()), tmp_path)
    assert result.max_difference == 0
    assert torch.export.load(result.path).module()(batch(2)).dtype == torch.float32
    assert model.first.weight.dtype == torch.float16


# What fails


def test_a_failing_export_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    (tmp_path / "model.pt2").write_bytes(b"earlier")
    safetensors, pt2, onnx = export_all(Small(FixedBatch(), torch.randn(2, 4)), tmp_path, list(FILES))
    assert safetensors.error is None
    assert safetensors.path.is_file()
    assert (pt2.bytes, pt2.max_difference) == (onnx.bytes, onnx.max_difference) == (0, None)
    assert pt2.error is not None
    assert "specialized it to be a constant" in pt2.error
    assert "\n" not in pt2.error
    assert "model.pt2 from before was left as it is" in pt2.error
    assert onnx.error is not None
    assert "onnxscript" in onnx.error
    assert "amc-netadapt[onnx]" in onnx.error
    assert (tmp_path / "model.pt2").read_bytes() == b"earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "channels.json", "model.pt2"}
    assert "model.pt2 was not exported" in caplog.text


@pytest.mark.parametrize("name, file", [("pt2", "model.pt2"), ("onnx", "model.onnx")])
def test_a_program_that_differs_on_another_batch_size_is_not_kept(
    name: str, file: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=rf"{file} differs from the network by .* on a batch of 1, allowed"):
        FORMATS[name].write(Small(BatchBranch(), torch.randn(4, 4)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_whose_output_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    model = unpruned("mlp")
    model.head.bias.data.fill_(torch.nan)
    with pytest.raises(ExportError, match="own output on a batch of 4 is not finite"):
        FORMATS["pt2"].write(Small(model, batch(4)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_prelu_that_kept_one_channel_is_saved_and_restored(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 2, 1)).eval()
    kept = torch.tensor([2])
    keeps = {"0": {"out": kept}, "1": {"out": kept}, "2": {"in": kept}}
    small = resize(copy.deepcopy(model), keeps)
    save_pruned(small, keeps, tmp_path, name="m", original=model)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(load_pruned(copy.deepcopy(model), tmp_path)(x), small(x))


def test_keeps_of_another_network_are_refused(tmp_path: Path) -> None:
    cut = pruned("mlp")
    keeps = {**cut.keeps, "first": {"out": torch.arange(3)}, "ghost": {"out": torch.arange(3)}}
    with pytest.raises(ValueError, match=r"first\.out has 8 channels, 3 are kept; no module 'ghost'"):
        save_pruned(cut.model, keeps, tmp_path, name="mlp")
    assert not list(tmp_path.iterdir())


# A user's mistakes


def test_unknown_formats_are_listed_with_those_allowed(tmp_path: Path) -> None:
    message = "unknown export format 'tflite', 'pb': allowed are safetensors, pt2, onnx, executorch, litert"
    with pytest.raises(UserError, match=message):
        check_formats(["pt2", "tflite", "pb"])
    with pytest.raises(UserError, match=message):
        export_all(Small(Mlp(), batch(2)), tmp_path, ["tflite", "pb"])
    with refused("wrong_type", "export"):
        check_formats("onnx")
    check_formats(["safetensors", "pt2"])
    check_formats([])


@pytest.mark.parametrize("name", MOBILE)
@pytest.mark.parametrize("network", ["residual", "depthwise"])
def test_files_for_phones_compute_the_network_example_by_example(
    exported: dict[str, tuple[Path, Pruned, list[Exported]]], name: str, network: str, tmp_path: Path, capfd
) -> None:
    for package in MOBILE[name].packages:
        pytest.importorskip(package, reason=f"the extra '{name}' is not installed")
    _, cut, _ = exported[network]
    capfd.readouterr()
    (file,) = export_all(Small(cut.model, batch(4), cut.keeps, network, cut.original), tmp_path, [name])
    assert file.error is None
    assert 0 < file.max_difference < TOLERANCE
    assert capfd.readouterr() == ("", "")
    run = MOBILE[name].load(file.path, threads=1)
    for image in torch.randn(3, 1, *SHAPE):
        with torch.no_grad():
            torch.testing.assert_close(run(image)[0], cut.model(image), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", MOBILE)
def test_a_missing_package_for_phones_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in MOBILE[name].packages:
        monkeypatch.setitem(sys.modules, package, None)
    with refused("missing_package", ""):
        check_formats([name])


def test_missing_onnx_packages_are_named_with_the_way_to_install_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with refused("missing_package", ""):
        check_formats(["onnx"])
    check_formats(["pt2"])


@pytest.mark.parametrize("example", [torch.zeros(0, *SHAPE), torch.zeros(())])
def test_an_example_without_rows_is_refused(example: Tensor) -> None:
    with refused("wrong_shape", ""):
        Small(Mlp(), example)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cut = pruned("mlp")
    save_pruned(cut.model, cut.keeps, tmp_path, name="mlp", original=cut.original)
    return tmp_path


@pytest.mark.parametrize("file", ["model.safetensors", "channels.json"])
def test_missing_folder_or_file(saved: Path, file: str) -> None:
    with refused("missing", ""):
        load_pruned(Mlp(), saved / "nowhere")
    (saved / file).unlink()
    with pytest.raises(UserError, match=rf"no file .*{file}: load_pruned wants"):
        load_pruned(Mlp(), saved)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "it is no file of save_pruned"),
        ("[]", "it is no file of save_pruned"),
        ('{"format": 1}', "it is no file of save_pruned"),
        ('{"format": 2, "channels": {}}', "has format 2: this version reads 1"),
        (
            '{"format": 1, "channels": {"first": {"out": []}}}',
            "'out' must be a list of channel numbers, not empty",
        ),
        ('{"format": 1, "channels": {"first": {"out": [0.5]}}}', "'out' must be a list of channel numbers"),
        ('{"format": 1, "channels": {"first": {"out": [2, 1]}}}', "'out' must hold rising channel numbers"),
        ('{"format": 1, "channels": {"first": {"out": [-1, 1]}}}', "'out' must hold rising channel numbers"),
        (
            '{"format": 1, "channels": {"first": {"out": [16]}}}',
            "first.out has 16 channels, the file keeps number 16",
        ),
    ],
)
def test_damaged_channels_file(saved: Path, text: str, message: str) -> None:
    (saved / "channels.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_pruned(Mlp(), saved)


def test_channels_of_another_network(saved: Path) -> None:
    module = Residual()
    with pytest.raises(
        UserError, match=r"\(made for mlp\) does not fit Residual: no module 'first'"
    ) as caught:
        load_pruned(module, saved)
    assert "no module 'second'" in str(caught.value)
    assert "head.in has 8 channels, the file expects 12" in str(caught.value)
    assert module.head.in_features == 8
    with refused("does_not_fit", ""):
        load_pruned(pruned("mlp").model, saved)


def test_weights_that_do_not_fit(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["stray"] = weights.pop("head.bias")
    weights["first.bias"] = torch.zeros(3)
    weights["head.weight"] = weights["head.weight"].half()
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors does not fit Mlp") as caught:
        load_pruned(Mlp(), saved)
    for space in (
        "stray is not in the network",
        "head.bias is not in the file",
        "first.bias is [8] float32 in the network, [3] float32 in the file",
        "head.weight is [5, 6] float32 in the network, [5, 6] float16 in the file",
    ):
        assert space in str(caught.value)


def test_damaged_weights_file(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not weights")
    with refused("unreadable", ""):
        load_pruned(Mlp(), saved)
