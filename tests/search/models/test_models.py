"""Networks have their published sizes, layouts and accuracies; weights that do not fit are refused."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn

from amc_env.costs.counts import Macs, Params
from amc_env.errors import UserError
from amc_env.graph.tracing import trace_layers
from amc_env.pruning.granularity import FineGrained
from search.data.base import Data
from search.data.digits import digits
from search.models import digits as digits_models
from search.models import mobilenet, resnet
from search.models import source as models
from search.models.checkpoint import read_checkpoint
from search.models.mobilenet import MobileNet, MobileNetV2
from search.models.resnet import FixedSelection, ResNet, ResNet50
from search.models.source import ModelSource, load_weights
from search.models.vit import Attention
from search.training.finetune import Recipe

CONF = Path(__file__).parents[3] / "conf" / "model"
OF_LIBRARIES = ("torchvision", "timm", "hf", "module")  # these are in test_library_models.py
MODELS = [path.stem for path in sorted(CONF.glob("*.yaml")) if path.stem not in OF_LIBRARIES]
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "plain20": 269_722,
    "mobilenet": 3_217_226,
    "digits_vit": 58_474,
    "vit_cifar10": 1_008_266,
    "resnet50": 23_528_522,  # with ten classes in place of a thousand
}


def from_conf(name: str, **overrides: object) -> ModelSource:
    """The source that `model=name` stands for."""
    return instantiate(OmegaConf.load(CONF / f"{name}.yaml"), **overrides)


def accuracy(model: nn.Module, data: Data, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that the network puts into their class."""
    with torch.inference_mode():
        predicted = torch.cat([model(data.normalise(batch)).argmax(1) for batch in images.split(250)])
    return (predicted == labels).double().mean().item()


def randomised(model: nn.Module) -> nn.Module:
    """The network in eval mode with batch-norm statistics that are not those of a fresh one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_option_builds_and_runs(name: str) -> None:
    channels, size = (1, 8) if name.startswith("digits") else (3, 32)
    model = from_conf(name).build((channels, size, size), 10).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)
    if name in PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_published_addresses_carry_their_hash() -> None:
    for depth in (20, 32, 44, 56, 110):
        assert from_conf(f"resnet{depth}").url.split("/")[-1].startswith(f"resnet{depth}-")
    assert from_conf("resnet50").url.endswith("/resnet50-0676ba61.pth")


def test_digits_cnn_is_residual_with_convolutions_in_its_shortcuts() -> None:
    model = from_conf("digits_cnn").build((1, 8, 8), 10)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 9
    assert [name for name in convolutions if "shortcut" in name] == [
        "layer2.0.shortcut.0",
        "layer3.0.shortcut.0",
    ]


def test_mobilenet_has_the_macs_of_its_description() -> None:
    macs = 0

    def count(module: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        nonlocal macs
        macs += module.weight[0].numel() * output[0].numel()

    model = MobileNet().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert round((macs + 10 * 1024) / 1e6, 1) == 46.4


def test_mobilenet_v2_has_torchvisions_layout_and_size() -> None:
    model = MobileNetV2(classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_504_872
    assert model.state_dict()["features.2.conv.0.0.weight"].shape == (96, 16, 1, 1)


def test_resnet50_has_the_published_size_and_macs() -> None:
    model = ResNet50().eval()
    graph = trace_layers(model, torch.zeros(1, 3, 224, 224))
    graph, grids = FineGrained().decisions(graph)
    dense = [0] * len(grids)
    assert Params(graph, grids)(dense) == 25_557_032
    # Convolutions, the linear layer's weights, its bias.
    assert Macs(graph, grids)(dense) == 4_087_136_256 + 2_048_000 + 1_000


def test_resnet50_has_torchvisions_layout() -> None:
    state = ResNet50().state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    first = [f"conv{n}.weight" for n in (1, 2, 3)] + [f"bn{n}.{entry}" for n in (1, 2, 3) for entry in norm]
    shortcut = ["downsample.0.weight", *(f"downsample.1.{entry}" for entry in norm)]
    expected = {"conv1.weight", *(f"bn1.{entry}" for entry in norm), "fc.weight", "fc.bias"}
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            names = first + (shortcut if block == 0 else [])
            expected.update(f"layer{stage}.{block}.{name}" for name in names)
    assert set(state) == expected
    assert state["layer2.0.conv1.weight"].shape == (128, 256, 1, 1)
    assert state["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)


def test_resnet50_strides_in_its_3x3_convolutions() -> None:
    strided = [
        name
        for name, module in ResNet50().named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
    ]
    assert strided == ["conv1"] + [
        f"layer{stage}.0.{name}" for stage in (2, 3, 4) for name in ("conv2", "downsample.0")
    ]


def test_selection_is_the_padded_shortcut() -> None:
    pad, selection = randomised(ResNet(20, "pad")), ResNet(20, "selection").eval()
    selection.load_state_dict(pad.state_dict())  # strictly: its fixed weights may be absent
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(selection(images), pad(images))


def test_selection_is_free_fixed_and_no_parameter() -> None:
    fixed = [module for module in ResNet(20, "selection").modules() if isinstance(module, FixedSelection)]
    assert [tuple(module.weight.shape) for module in fixed] == [(32, 16, 1, 1), (64, 32, 1, 1)]
    for module in fixed:
        assert module.costless
        assert not list(module.parameters())
        assert module.weight.sum() == module.in_channels


def test_a_plain_network_has_no_shortcut() -> None:
    plain, residual = ResNet(20, "none"), ResNet(20, "pad")
    randomised(residual)
    plain.load_state_dict(residual.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(plain.eval()(images), residual(images))


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "mobilenet"])
def test_real_weights_load_strictly(name: str, shared_data: Path) -> None:
    file = shared_data / "weights" / f"{name}_cifar10.safetensors"
    model = from_conf(name).build((3, 32, 32), 10)
    load_weights(model, str(file), None)
    loaded = model.state_dict()
    for key, value in load_file(file).items():
        assert torch.equal(loaded[key], value)


def test_resnet20_has_its_accuracy(shared_data: Path, cifar10_head: Data) -> None:
    file = shared_data / "weights" / "resnet20_cifar10.safetensors"
    model = from_conf("resnet20", weights=str(file)).load(cifar10_head)
    assert not model.training
    # All 10,000 test images: 0.9173, as published with the file. These 1,000: 0.913; one image of tolerance.
    test = cifar10_head.test
    assert accuracy(model, cifar10_head, test.inputs, test.targets) == pytest.approx(0.913, abs=0.0011)


def test_the_vision_transformer_comes_with_its_weights(cifar10_head: Data) -> None:
    model = from_conf("vit_cifar10").load(cifar10_head)
    # All 10,000 test images: 0.8116.
    test = cifar10_head.test
    assert accuracy(model, cifar10_head, test.inputs, test.targets) == pytest.approx(0.811, abs=0.0011)


@pytest.fixture(scope="session")
def cifar10_head(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The first 1,000 test images of CIFAR-10, also in the place of the training images."""
    from pyarrow import parquet

    from search.data.cifar10 import cifar10

    folder = tmp_path_factory.mktemp("cifar10")
    table = parquet.read_table(shared_data / "cifar10" / "test-00000-of-00001.parquet")[:1000]
    for part in ("train", "test"):
        parquet.write_table(table, folder / f"{part}-00000-of-00001.parquet")
    return cifar10(str(folder), search_images=100)


# ---------------------------------------------------------------------------------------------------- weights


def test_a_pickle_with_wrapped_names_loads(tmp_path: Path) -> None:
    model = randomised(ResNet(8))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "net.th")
    other = ResNet(8)
    load_weights(other, str(tmp_path / "net.th"), None)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def test_a_whole_pickled_module_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save(ResNet(8), tmp_path / "net.pth")
    with pytest.raises(UserError, match="cannot be read.*weights_only=True.*convert it") as caught:
        read_checkpoint(tmp_path / "net.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "no such file"),
        ("net.zip", b"x", "not '.zip'"),
        ("net.pt", b"not a pickle", "cannot be read"),
        ("net.safetensors", b"not a header", "cannot be read"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, {"state_dict": {"conv1.weight": 1}}, {1: torch.ones(1)}]
)
def test_a_pickle_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "net.pt")
    with refused("no_state_dict", ""):
        read_checkpoint(tmp_path / "net.pt")


def test_all_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    state = ResNet(8, classes=12).state_dict()
    state["extra.weight"] = torch.ones(2)
    del state["conv1.weight"]
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(UserError) as caught:
        load_weights(ResNet(8), str(tmp_path / "net.safetensors"), None, name="resnet8")
    text = str(caught.value)
    assert "does not fit model=resnet8" in text
    assert "missing: conv1.weight [16, 3, 3, 3];" in text
    assert "unexpected: extra.weight [2];" in text
    assert "linear.bias [12] instead of [10], linear.weight [12, 64] instead of [10, 64]" in text


def test_long_lists_are_cut(tmp_path: Path) -> None:
    save_file(ResNet(8).state_dict(), tmp_path / "net.safetensors")
    with refused("does_not_fit", ""):
        load_weights(ResNet(20), str(tmp_path / "net.safetensors"), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = ResNet(8).state_dict()
    state["layer1.0.bn1.running_var"][3] = value
    save_file(state, tmp_path / "net.safetensors")
    with refused("not_finite", ""):
        load_weights(ResNet(8), str(tmp_path / "net.safetensors"), None)


@pytest.mark.parametrize("weights", [None, "pretrained"])
def test_a_network_without_published_weights_asks_for_a_file(weights: str | None, small_data: Data) -> None:
    with refused("no_weights", "model.weights"):
        mobilenet.mobilenet(weights).load(small_data)


def published(folder: Path, model: nn.Module, hash_prefix: str | None = None) -> str:
    """A file: address of a pickle in the old format, named after its SHA-256."""
    torch.save({"state_dict": model.state_dict()}, folder / "net", _use_new_zipfile_serialization=False)
    prefix = hash_prefix or hashlib.sha256((folder / "net").read_bytes()).hexdigest()[:8]
    return (folder / "net").rename(folder / f"net-{prefix}.th").as_uri()


def test_a_published_file_is_fetched_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    model, other = ResNet(8), ResNet(8)
    load_weights(other, None, published(tmp_path, model))
    assert torch.equal(other.conv1.weight, model.conv1.weight)
    (kept,) = (tmp_path / "hub" / "hub" / "checkpoints").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    load_weights(ResNet(8), None, (tmp_path / kept.name).as_uri())
    assert kept.stat().st_size > 100  # damaged, and fetched again
    wrong = published(tmp_path, model, "0" * 8)
    with refused("unreadable", ""):
        load_weights(other, None, wrong)


def test_a_failing_network_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with refused("unreadable", ""):
        load_weights(ResNet(8), None, "http://127.0.0.1:9/net-01234567.th")
    with refused("wrong_type", "model.url"):
        load_weights(ResNet(8), None, "http://127.0.0.1:9/net.th")


@pytest.mark.parametrize(("depth", "shortcut"), [(21, "pad"), (2, "pad"), (20, "identity")])
def test_impossible_resnets_are_refused(depth: int, shortcut: str) -> None:
    with pytest.raises(UserError, match="is needed|6n"):
        resnet.resnet(depth, shortcut)


# ----------------------------------------------------------------------------------------------- trained once


def test_a_digits_network_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    data = digits()
    source = digits_models.digits_mlp()
    before = torch.get_rng_state()
    first = source.load(data)
    monkeypatch.setattr(models, "train", lambda *_: pytest.fail("trained again"))
    second = source.load(data)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert accuracy(second, data, data.test.inputs, data.test.targets) > 0.95
    (kept,) = (tmp_path / "models").iterdir()
    monkeypatch.undo()
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    for damage in (b"", b"text", kept.read_bytes()[:-9]):
        kept.write_bytes(damage)
        third = source.load(data)
        assert all(torch.equal(value, third.state_dict()[key]) for key, value in first.state_dict().items())


def test_what_was_trained_otherwise_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    data = digits()
    build = digits_models._build_mlp
    for recipe, split in ((Recipe(1, 0.1), data), (Recipe(1, 0.2), data), (Recipe(1, 0.1), digits(200))):
        models.trained_once("net", lambda: build((1, 8, 8), 10), split, recipe)
    assert len(list((tmp_path / "models").iterdir())) == 3


@pytest.mark.parametrize(
    ("source", "least"),
    [(digits_models.digits_cnn, 0.98), pytest.param(digits_models.digits_vit, 0.97, marks=pytest.mark.slow)],
)
def test_digits_networks_reach_their_accuracy(source: Callable[[], ModelSource], least: float) -> None:
    data = digits()
    model = source().load(data)
    assert not model.training
    assert accuracy(model, data, data.test.inputs, data.test.targets) >= least


def test_attention_keeps_working_with_fewer_heads() -> None:
    torch.manual_seed(0)
    attention, images = Attention(12, 3), torch.randn(2, 5, 12)
    with torch.no_grad():
        attention.proj.weight[:, 8:] = 0  # the last head's part of the output
        expected = attention(images)
        for layer in (attention.query, attention.key, attention.value):
            layer.weight, layer.bias = nn.Parameter(layer.weight[:8]), nn.Parameter(layer.bias[:8])
        attention.proj.weight = nn.Parameter(attention.proj.weight[:, :8])
        attention.num_heads = 2
        torch.testing.assert_close(attention(images), expected)


@pytest.mark.parametrize("shape", [(1, 8, 6), (1, 7, 7)])
def test_a_vision_transformer_refuses_images_of_no_whole_patches(shape: tuple[int, int, int]) -> None:
    with refused("image_size", "data"):
        digits_models.digits_vit().build(shape, 10)
