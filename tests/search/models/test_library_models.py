"""Networks of torchvision, timm and transformers, and of a user's own function: classes, weights, what is refused."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import same_state
from omegaconf import OmegaConf
from refusals import refused
from torch import nn

from amc_env.inputs import output_of
from search.config import compose as wiring
from search.data.base import Data, Split, fingerprint
from search.models.hf_models import hf_model
from search.models.source import ModelSource
from search.models.timm_models import timm_model
from search.models.torchvision_models import torchvision_model
from search.models.user_module import module_model

Optional = Callable[[str], Any]


def images_of(size: int, classes: int = 3) -> Data:
    """Two images of 3 x size x size."""
    split = Split(torch.full((2, 3, size, size), 7, dtype=torch.uint8), torch.tensor([0, 1]))
    names = tuple(map(str, range(classes)))
    half = (0.5,) * 3
    return Data("few", split, split, split, names, half, half, augment=False, fingerprint=fingerprint(split))


@pytest.fixture(scope="module")
def images() -> Data:
    """Images of 3 x 32 x 32 in three classes."""
    return images_of(32)


def build(name: str, optional: Optional) -> Callable[..., ModelSource]:
    """The maker of a small network's source, for 3 x 32 x 32 images."""
    optional(name)
    if name == "torchvision":
        return lambda **more: torchvision_model("shufflenet_v2_x0_5", **more)
    return lambda **more: timm_model("test_resnet", **more)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_checkpoint_goes_into_a_network_with_the_data_s_classes(
    name: str, optional: Optional, images: Data, tmp_path: Path
) -> None:
    make = build(name, optional)
    own = make().build((3, 32, 32), 3)
    torch.save({"state_dict_ema": {f"module.{k}": v for k, v in own.state_dict().items()}}, tmp_path / "x.pt")
    before = torch.get_rng_state()
    model = make(weights=str(tmp_path / "x.pt")).load(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_state(model, own)
    assert model(images.normalise(images.train.inputs)).shape == (2, 3)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_random_weights_must_be_asked_for(name: str, optional: Optional, images: Data) -> None:
    make = build(name, optional)
    assert not make(weights="random").load(images).training
    assert make().pretrained is not None
    assert make().origin == "pretrained"


def test_a_head_for_other_classes_is_refused(
    optional: Optional, images: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = optional("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name, **more))
    with refused("wrong_classes", "model.weights"):
        timm_model("test_resnet", weights="pretrained").load(images)
    assert timm_model("test_resnet").load(images_of(32, 1000)).num_classes == 1000


@pytest.mark.parametrize("name", ["resnet51", "", None, "fasterrcnn_resnet50_fpn"])
def test_a_name_that_is_not_there_is_refused(name: str | None, optional: Optional) -> None:
    for library, make in (("timm", timm_model), ("torchvision", torchvision_model)):
        optional(library)
        with refused("unknown_name", "model.name"):
            make(name)


def test_images_are_prepared_as_the_weights_want(optional: Optional) -> None:
    optional("torchvision")
    optional("timm")
    scaling = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert torchvision_model("resnet50").data_settings == {
        **{"size": 224, "crop": 224 / 232, "squash": False, "interpolation": "bilinear"},
        **scaling,
    }
    assert timm_model("vit_tiny_patch16_224").data_settings == {
        **{"size": 224, "crop": 0.9, "squash": False, "interpolation": "bicubic"},
        **{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    }
    smaller = timm_model("vit_tiny_patch16_224", arguments={"img_size": 32})
    assert smaller.data_settings["size"] == 32
    assert smaller.build((3, 32, 32), 3)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_a_network_that_does_not_run_on_the_images_is_refused(optional: Optional) -> None:
    optional("timm")
    with refused("does_not_run", "model"):
        timm_model("vit_tiny_patch16_224", weights="random").load(images_of(8, 3))


# ------------------------------------------------------------------------------------------------------------ hf


def test_an_image_classifier_of_transformers_is_read_from_its_folder(tiny_vit: Path) -> None:
    source = hf_model(str(tiny_vit))
    half = (0.5, 0.5, 0.5)
    assert source.data_settings == {
        **{"size": 16, "crop": 1.0, "squash": True, "interpolation": "bilinear", "mean": half, "std": half}
    }
    model = source.load(images_of(16, 3))
    assert output_of(model(torch.zeros(2, 3, 16, 16))).shape == (2, 3)
    with refused("wrong_classes", "model.weights"):
        source.load(images_of(16, 4))
    with refused("does_not_run", "model"):
        source.load(images_of(8, 3))


def test_classes_in_another_order_are_refused(tiny_vit: Path) -> None:
    source = hf_model(str(tiny_vit))
    assert source.class_names == ()  # LABEL_0 and so on say nothing
    data = replace(images_of(16), classes=("cat", "dog", "eel"))
    replace(source, class_names=("Cat", "dog", "EEL")).load(data)
    with refused("class_order", "data"):
        replace(source, class_names=("dog", "cat", "eel")).load(data)


def test_a_checkpoint_for_other_classes_goes_into_a_network_of_transformers(
    tiny_vit: Path, tmp_path: Path
) -> None:
    own = hf_model(str(tiny_vit)).build((3, 16, 16), 4)
    torch.save(own.state_dict(), tmp_path / "net.pt")
    model = hf_model(str(tiny_vit), str(tmp_path / "net.pt")).load(images_of(16, 4))
    assert same_state(model, own)


def test_a_sequence_classifier_of_transformers_is_built(tiny_bert: Path) -> None:
    source = hf_model(str(tiny_bert))
    assert source.data_settings == {"tokenizer": str(tiny_bert)}
    assert source.pretrained is not None
    tokens = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
    for make, classes in ((source.pretrained, 2), (source.build, 3)):
        model = make((0, 0, 0), 3).eval()
        assert output_of(model(**tokens)).shape == (2, classes)


def test_a_network_without_a_head_or_of_another_kind_is_refused(
    tiny_bert: Path, optional: Optional, tmp_path: Path
) -> None:
    transformers = optional("transformers")
    transformers.AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "headless")
    source = hf_model(str(tmp_path / "headless"))
    assert source.pretrained is not None
    with refused("no_head", "model.name"):
        source.pretrained((0, 0, 0), 2)
    transformers.VitDetConfig().save_pretrained(tmp_path / "detector")
    with refused("no_classifier", "model.name"):
        hf_model(str(tmp_path / "detector"))
    for name in (str(tmp_path / "nowhere"), str(tmp_path)):
        with refused("unreadable", "model.name"):
            hf_model(name)
    with refused("missing", "model.name"):
        hf_model()


@pytest.mark.parametrize(
    ("package", "make"),
    [("timm", timm_model), ("torchvision", torchvision_model), ("transformers", hf_model)],
)
def test_a_missing_package_is_named(
    package: str, make: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with refused("missing_package", "model"):
        make("resnet18")


# -------------------------------------------------------------------------------------------------------- factory


def small_network(num_classes: int, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, width), nn.ReLU(), nn.Linear(width, num_classes))


def no_network() -> str:
    return "network"


def test_a_function_of_one_s_own_makes_the_network(small_data: Data, tmp_path: Path) -> None:
    source = module_model(f"{__name__}:small_network", arguments={"width": 5})
    model = source.load(small_data)
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [5, 4]
    torch.save(model.state_dict(), tmp_path / "net.pt")
    again = module_model(f"{__name__}:small_network", str(tmp_path / "net.pt"), arguments={"width": 5})
    assert same_state(again.load(small_data), model)


def test_a_function_that_makes_none_is_refused(small_data: Data) -> None:
    with refused("wrong_type", "model.factory"):
        module_model(f"{__name__}:no_network").load(small_data)
    for factory in (f"{__name__}:nothing", "no_such_module:build"):
        with refused("unknown_target", "model.factory"):
            module_model(factory)
    for missing in (None, "no_colon.build"):
        with refused("missing", "model.factory"):
            module_model(missing)
    with refused("conflict", "model.weights"):
        module_model(f"{__name__}:small_network", "random")
    with refused("unknown_key", "model.arguments"):
        module_model(f"{__name__}:small_network", arguments={"depth": 3}).load(small_data)


def test_a_factory_is_imported_from_the_current_folder_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = "from torch import nn\ndef build(classes):\n    return nn.Linear(2, classes)\n"
    (tmp_path / "factory_of_mine.py").write_text(text)
    section = {"_target_": "search.models.user_module.module_model", "factory": "factory_of_mine:build"}
    cfg = OmegaConf.create({"model": section, "trusted": []})
    with refused("untrusted_target", "model.factory"):
        wiring.model_source(cfg)
    assert "factory_of_mine" not in sys.modules
    cfg.trusted = ["factory_of_mine"]
    assert wiring.model_source(cfg).build((1, 1, 2), 3).out_features == 3
