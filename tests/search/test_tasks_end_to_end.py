"""The main job on networks of other tasks, with several inputs and several outputs."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from torch import Tensor, nn
from torch.nn import functional as F

from amc_env.inputs import call
from amc_env.onnx import PACKAGES
from amc_env.tasks import Regression, Segmentation
from search import compress, make_env
from search.config.compose import default_of
from search.output.run_result import RunResult
from search.settings import FinetuneSettings, LatencySettings, RepairSettings, Settings

HAS_ONNX = all(__import__("importlib").util.find_spec(package) for package in PACKAGES)


class Clinic(nn.Module):
    """An image and a row of a table to a number, and what it is made from."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.row, self.hidden, self.head = nn.Linear(4, 8), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, image: Tensor, row: Tensor, scale: float | None = None) -> dict[str, Tensor]:
        seen = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        both = torch.cat([seen, torch.relu(self.row(row))], 1)
        value = self.head(torch.relu(self.hidden(both)))
        return {"value": value if scale is None else value * scale, "spare": image.mean((1, 2, 3))}


class Pixels(nn.Module):
    """A class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.first(x))
        return x, self.last(y)


def made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


@torch.no_grad()
def rows(form: str = "names", count: int = 48) -> list[Any]:
    """Batches of 16; the last example of all is alone in a batch of its own."""
    draw = torch.Generator().manual_seed(1)
    image, row = torch.randn(count + 1, 1, 6, 6, generator=draw), torch.randn(count + 1, 4, generator=draw)
    value = made(Clinic)(image, row)["value"] + 1e-3 * torch.randn(count + 1, 2, generator=draw)
    parts = [part.split(16) for part in (image, row, value)]
    if form == "names":
        return [{"image": i, "row": r, "labels": v, "id": v} for i, r, v in zip(*parts, strict=True)]
    return list(zip(*parts, strict=True))


def quick(**more: Any) -> Settings:
    chosen = {
        "agent": default_of("agent", "random"),
        "episodes": 3,
        "export": (),
        "latency": LatencySettings(repeats=0),
        "repair": RepairSettings(images=32, norm_images=32),
        "finetune": FinetuneSettings(epochs=0),
        "original_lr": 0.01,
    }
    return Settings(**(chosen | more))


@pytest.mark.parametrize("form", ["names", "places"])
def test_a_network_with_several_inputs_and_outputs(tmp_path: Path, form: str) -> None:
    formats = ("safetensors", "pt2", "onnx") if HAS_ONNX and form == "names" else ("pt2",)
    settings = quick(export=formats, finetune=FinetuneSettings(epochs=1, distillation=0.5))
    data = rows(form)
    small = compress(made(Clinic), data, data, task="regression", folder=tmp_path, settings=settings)
    assert [export.error for export in small.result.exports] == [None] * len(formats)
    assert small.result.metric == "R2"
    assert small.result.base.accuracy > 0.99
    assert small.result.pruned.costs["macs"] <= 0.5 * small.result.base.costs["macs"]
    assert "R2, search split" in small.table()
    assert "accuracy" not in (tmp_path / "report.html").read_text()
    assert RunResult.read(tmp_path).metric == "R2"
    header = json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[0])["header"]
    assert header["task"]["class"].endswith("Regression")
    program = torch.export.load(tmp_path / "model.pt2").module()
    batch = {"image": torch.ones(3, 1, 6, 6), "row": torch.ones(3, 4)}
    found = call(program, batch if form == "names" else tuple(batch.values()))["value"]
    torch.testing.assert_close(found, small.model(**batch)["value"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pixels_of_the_second_output(tmp_path: Path, precision: str) -> None:
    images = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = made(Pixels)(images)[1].argmax(1, keepdim=True).to(torch.uint8)
    labels[:, :, 0] = 255
    settings = quick(finetune=FinetuneSettings(epochs=1, batch_size=8))
    settings = replace(settings, scoring=replace(settings.scoring, precision=precision))
    pair = images, labels
    small = compress(
        made(Pixels), pair, pair, task=Segmentation(output=1), folder=tmp_path, settings=settings
    )
    assert small.result.metric == "mean IoU"
    assert small.result.base.accuracy == 1.0
    assert small.result.finetuned is not None


def test_a_score_and_a_loss_of_one_s_own(tmp_path: Path) -> None:
    seen = []

    def score(model: nn.Module, batches: Any) -> float:
        seen.append(type(model))
        errors = [F.l1_loss(call(model, inputs)["value"], targets) for inputs, targets in batches]
        return float(torch.exp(-torch.stack(errors).mean()))

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return F.l1_loss(outputs["value"], targets)

    data = rows()
    settings = quick(finetune=FinetuneSettings(epochs=1))
    small = compress(made(Clinic), data, data, score=score, loss=loss, folder=tmp_path, settings=settings)
    assert small.result.metric == "score"
    assert set(seen) == {Clinic}  # the pruned network itself
    with refused("task", "score"):
        compress(made(Clinic), data, data, score=score, settings=settings)


def test_an_environment_of_another_task() -> None:
    data = rows("places")
    env = make_env(made(Clinic), data, data, task=Regression(), settings=quick())
    env.reset()
    over = False
    while not over:
        _, reward, over, _, info = env.step([0.5])
    assert reward == pytest.approx(info["accuracy"] - 1)
    assert 0 < info["accuracy"] < 1


def test_the_task_is_named_where_targets_are_of_another_one(tmp_path: Path) -> None:
    data = rows()
    with refused("labels", "val_loader"):
        compress(made(Clinic), data, data, settings=quick())
    with refused("output", "task.output"):
        compress(made(Clinic), data, data, task=Regression(output="price"), settings=quick())
    with refused("out_of_range", "task"):
        compress(made(Clinic), data, data, task="prices", settings=quick())
    with refused("does_not_run", "val_loader"):
        compress(made(Pixels), data, [{"x": torch.ones(2, 4), "labels": torch.ones(2)}], task="regression")


def test_a_wrapped_network_in_double_precision(tmp_path: Path) -> None:
    data = [{**batch, "row": batch["row"].double()} for batch in rows()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.DataParallel(made(Clinic).double())
    small = compress(model, data, data, task="regression", folder=tmp_path, settings=quick())
    assert type(small.model) is Clinic
    assert small.result.base.accuracy > 0.99
    with refused("not_eager", "module"):
        compress(torch.export.export(made(Pixels), (torch.ones(2, 1, 6, 6),)), data, data, settings=quick())  # type: ignore[arg-type]
