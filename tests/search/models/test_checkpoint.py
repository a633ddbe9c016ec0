"""Checkpoints as training scripts leave them: what loads, what is asked, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import same_state
from refusals import refused
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from search.models.checkpoint import read_checkpoint
from search.models.source import load_weights


class Net(nn.Module):
    """A small network; with ``inside``, all of it is under the name ``model``."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        if inside:
            self.model = layers
        else:
            self.features, self.head = layers[:2], layers[3]


def trained(inside: bool = False) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net(inside)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in trained().state_dict().items()}


def optimizer() -> dict[str, Any]:
    net = trained()
    made = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    sum(parameter.sum() for parameter in net.parameters()).backward()
    made.step()
    return made.state_dict()


SHAPES: dict[str, Callable[[], Any]] = {
    "plain": lambda: prefixed(""),
    "state_dict": lambda: {"state_dict": prefixed(""), "epoch": 3, "best_acc1": torch.tensor(91.2)},
    "model": lambda: {"model": prefixed(""), "optimizer": optimizer(), "epoch": 3},
    "net": lambda: {"net": prefixed("module."), "acc": 93.1, "epoch": 199},
    "model_state_dict": lambda: {"model_state_dict": prefixed(""), "optimizer_state_dict": optimizer()},
    "DataParallel": lambda: prefixed("module."),
    "compiled": lambda: prefixed("_orig_mod."),
    "compiled DataParallel": lambda: prefixed("_orig_mod.module."),
    "DataParallel compiled": lambda: {"model": prefixed("module._orig_mod.")},
    "Lightning": lambda: {
        "state_dict": prefixed("model."),
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [optimizer()],
        "pytorch-lightning_version": "2.4",
        "callbacks": {},
    },
    "Lightning compiled": lambda: {"state_dict": prefixed("model._orig_mod.")},
    "averaged": lambda: AveragedModel(trained()).state_dict(),
    "Lightning with a loss": lambda: {"state_dict": prefixed("model.") | {"loss.weight": torch.ones(2)}},
    "ema": lambda: {"ema": prefixed("module."), "epoch": 1},
    "state_dict_ema": lambda: {"state_dict_ema": prefixed("_orig_mod.")},
    "ema_state_dict": lambda: {"meta": {"epoch": 3}, "ema_state_dict": prefixed("module.")},
    "entry in an entry": lambda: {"model": {"state_dict": prefixed(""), "step": 1}, "epoch": 1},
    "averaged beside": lambda: {"epoch": 1, "model_ema": AveragedModel(trained()).state_dict()},
}


@pytest.mark.parametrize(
    ("shape", "suffix"),
    [
        *((shape, "pt") for shape in SHAPES),
        *(("plain", suffix) for suffix in ("pth", "th", "ckpt", "bin", "pth.tar")),
    ],
)
def test_common_shapes_load(tmp_path: Path, shape: str, suffix: str) -> None:
    file = tmp_path / f"checkpoint.{suffix}"
    torch.save(SHAPES[shape](), file)
    net = Net()
    load_weights(net, str(file), None)
    assert same_state(net, trained())


def test_a_name_of_the_network_s_own_is_no_wrapper(tmp_path: Path) -> None:
    state = trained(inside=True).state_dict()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "net.pt")
    net = Net(inside=True)
    load_weights(net, str(tmp_path / "net.pt"), None)
    assert same_state(net, trained(inside=True))


def test_of_several_state_dicts_one_is_chosen_by_its_key(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    torch.save({"model": Net().state_dict(), "ema": prefixed("module."), "epoch": 1}, file)
    with refused("ambiguous", "model.key"):
        read_checkpoint(file)
    net = Net()
    load_weights(net, str(file), None, key="ema")
    assert same_state(net, trained())
    with refused("no_state_dict", ""):
        read_checkpoint(file, "epoch")


def test_a_part_of_the_network_under_a_prefix_is_not_the_network(tmp_path: Path) -> None:
    state = prefixed("model.") | {"loss.weight": torch.ones(2)}
    del state["model.head.bias"]
    torch.save(state, tmp_path / "net.pt")
    with refused("does_not_fit", ""):
        load_weights(Net(), str(tmp_path / "net.pt"), None)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: torch.ones(3).to_sparse(), "wrong_tensor"),
        (lambda: torch.ones(3, 3).to_sparse_csr(), "wrong_tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "wrong_tensor"),
        (lambda: torch.ones(3, device="meta"), "wrong_tensor"),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "wrong_tensor"),
        (lambda: torch.ones(3, dtype=torch.complex64), "wrong_tensor"),
        (lambda: torch.tensor([1.0, torch.nan]), "not_finite"),
        (lambda: torch.tensor([1.0, torch.inf], dtype=torch.bfloat16), "not_finite"),
    ],
    ids=["sparse", "csr", "quantized", "meta", "float8", "complex", "nan", "infinity"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_weights_are_refused(
    tmp_path: Path, make: Callable[[], Tensor], code: str
) -> None:
    torch.save({"weight": make()}, tmp_path / "net.pt")
    with refused(code, ""):
        read_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("content", [b"", b"PK", b"text", None])
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.ckpt"])
def test_files_that_hold_nothing_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused("unreadable", ""):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a b-01234567.th", "nothing-01234567.th", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with refused("wrong_type", "model.url"):
        load_weights(Net(), None, url)
