"""Sharing a network on the hub, which stands here in a local folder."""

from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from networks import network
from refusals import refused

from search import Compressed, compress, load_pruned
from search.data.base import Data
from search.output import hub
from search.settings import LatencySettings, Settings


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of repositories, which uploads go to and downloads come from."""
    folder = tmp_path / "hub"

    class Api:
        def __init__(self, token: str | None, library_name: str) -> None:
            self.token = token

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
            if self.token != "secret":
                raise PermissionError("401: a token is needed")
            (folder / name).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, *, folder_path: Path, repo_id: str, commit_message: str) -> str:
            copytree(folder_path, folder / repo_id, dirs_exist_ok=True)
            return f"hub/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, library_name: str(folder / name))
    return folder


@pytest.fixture
def small(small_data: Data, tmp_path: Path) -> Compressed:
    settings = Settings(latency=LatencySettings(repeats=0), export=("safetensors",))
    given: dict[str, Any] = {"agent": "uniform", "finetune": 0, "settings": settings, "verbose": False}
    return compress(network("concat"), small_data, budget=0.5, folder=tmp_path / "run", **given)


def test_a_network_is_shared_and_restored(small: Compressed, small_data: Data, local_hub: Path) -> None:
    assert small.push_to_hub("me/small", token="secret") == "hub/me/small"
    restored = load_pruned(network("concat"), "me/small")
    images = small_data.normalise(small_data.test.inputs[:5])
    with torch.no_grad():
        assert torch.equal(restored(images), small.model(images))


def test_the_card_has_the_figures_and_how_to_load(small: Compressed, local_hub: Path) -> None:
    small.push_to_hub("me/small", token="secret")
    card = ModelCard.load(local_hub / "me/small" / hub.CARD)
    assert (card.data.library_name, card.data.tags) == ("amc-netadapt", ["pruning"])
    assert f"{100 * small.result.delivered.accuracy:.2f}%" in card.text
    assert f"{100 * small.result.base.accuracy:.2f}%" in card.text
    assert 'load_pruned(module, "me/small")' in card.text


def test_a_hub_that_refuses_is_one_message(small: Compressed, local_hub: Path) -> None:
    with refused("unreachable", "repository"):
        small.push_to_hub("me/small")
