"""Cut attention, norms and free parameters are restored onto a new instance of the class that was pruned."""

from pathlib import Path

import pytest
import torch
from constructs import CONSTRUCTS

from amc_env.graph.preparing import prepared
from amc_env.graph.tracing import trace
from amc_env.inputs import call, output_of
from amc_env.pruning.candidate import Candidates
from search.output.export import Small, export_all
from search.output.weights import load_pruned, save_pruned

NAMES = (
    "torch's attention",
    "fused attention",
    "grouped queries",
    "group norm",
    "frozen batch norm",
    "U-Net",
)


@pytest.mark.parametrize("name", [*NAMES, "residual stream", "standardised weights"])
def test_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    construct = CONSTRUCTS[name]
    model, example = prepared(construct.build()), construct.example()
    graph = trace(model, example, residual=construct.residual)
    candidates = Candidates(model, graph, [torch.arange(group.total) for group in graph.groups])
    removed = [group.total // 2 for group in graph.groups]
    small, keeps = candidates.build(removed), candidates.keeps(removed)
    save_pruned(small, keeps, tmp_path, name=name, original=model)
    loaded = load_pruned(construct.build(), tmp_path)
    with torch.no_grad():
        assert torch.equal(output_of(call(loaded, example)), output_of(call(small, example)))


def test_attention_is_exported(tmp_path: Path) -> None:
    construct = CONSTRUCTS["torch's attention"]
    model, example = prepared(construct.build()), construct.example()
    graph = trace(model, example)
    small = Candidates(model, graph, [torch.arange(4)]).build([2])
    for done in export_all(Small(small, example), tmp_path, ["pt2", "onnx"]):
        assert done.error is None
        assert done.max_difference is not None
        assert done.max_difference < 1e-5
