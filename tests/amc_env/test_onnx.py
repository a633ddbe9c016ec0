"""ONNX files made to be timed: what they compute, and how they are made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amc_env import onnx as onnx_files

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    found[1].running_mean.normal_()
    found[1].running_var.uniform_(0.5, 2.0)
    return found.eval()


def test_a_file_for_one_batch_computes_what_the_network_does() -> None:
    model, example = network(), torch.randn(3, 3, 8, 8)
    content = onnx_files.fixed(*onnx_files.plain_copy(model, example))
    (found,) = onnx_files.session(content, threads=1)(example)
    assert torch.allclose(torch.from_numpy(found), model(example), atol=1e-5)
    shape = onnx.load_from_string(content).graph.input[0].type.tensor_type.shape
    assert [axis.dim_value for axis in shape.dim] == [3, 3, 8, 8]


def test_a_plain_copy_leaves_the_network_alone() -> None:
    model = network().train().double()
    copied, example = onnx_files.plain_copy(model, torch.ones(1, 2, dtype=torch.long))
    assert not copied.training
    assert model.training
    assert copied[0].weight.dtype == torch.float32
    assert model[0].weight.dtype == torch.float64
    assert example.dtype == torch.long


def test_the_newer_exporter_follows_where_the_older_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []

    def export(_: nn.Module, __: Any, path: Path, *, dynamo: bool, **___: Any) -> None:
        tried.append(dynamo)
        if not dynamo:
            raise RuntimeError("unknown operation")
        path.write_bytes(b"file")

    monkeypatch.setattr(torch.onnx, "export", export)
    assert onnx_files.fixed(network(), torch.zeros(1, 3, 8, 8)) == b"file"
    assert tried == [False, True]
