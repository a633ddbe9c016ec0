"""What of each architecture can be pruned: `python scripts/coverage.py OUT.jsonl > docs/coverage.md`.

Networks of torchvision, timm and transformers, with random weights. Rows are kept in OUT.jsonl; the same command
continues an interrupted run. Where a package is missing, its networks are left out.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from amc_env.costs.counts import Macs
from amc_env.errors import UserError
from amc_env.graph.preparing import prepared
from amc_env.graph.tracing import trace
from amc_env.inputs import Inputs
from amc_env.pruning.candidate import Candidates
from amc_env.pruning.granularity import Channel
from search.output.export import Small, export_all

HEADER = """# Coverage

Printed by `python scripts/coverage.py OUT.jsonl`, with random weights. `decisions` counts channel
groups, in brackets those of attention heads. `MACs within reach` is the share that is gone with 99%
of every decision removed. What remains is the classifier, the first inputs, one head of each
attention, and layers that are not pruned ([why](networks.md)). Networks with LayerNorm keep their
width here: with `granularity.residual=true` more is within reach. `seconds` is the time to trace on
one thread. Every network was cut to about half of each decision; its exports in the last column were
loaded and compared with it. `symbolic trace` says whether torch.fx follows the network: then
batch norms are folded for scoring, and sequential repair corrects the error of shortcuts. Networks
of transformers are small: two layers of width 64 where their configuration allows.
"""

Made = tuple[nn.Module, Inputs]

TORCHVISION = """alexnet vgg16_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 googlenet inception_v3
squeezenet1_1 mobilenet_v2 mobilenet_v3_large mnasnet1_0 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s
regnet_y_400mf convnext_tiny vit_b_16 swin_t swin_v2_t maxvit_t"""
SEGMENTATION = "fcn_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large"
TIMM = """vit_tiny_patch16_224 deit_tiny_patch16_224 swin_tiny_patch4_window7_224 beit_base_patch16_224 cait_xxs24_224
xcit_nano_12_p16_224 levit_128s mobilevit_s efficientformer_l1 coat_tiny pvt_v2_b0 twins_pcpvt_small davit_tiny
poolformer_s12 edgenext_xx_small efficientvit_b0 mixer_s32_224 resmlp_12_224 gmlp_s16_224 convnext_atto ghostnet_100
ghostnetv2_100 nf_regnet_b1 resnetv2_50x1_bit skresnet18 seresnet18 eca_resnet33ts resnest14d res2net50_14w_8s
cspresnet50 dla34 hrnet_w18_small repvgg_a0 rexnet_100 tresnet_m mobileone_s0 mobilenetv4_conv_small fastvit_t8
tf_efficientnetv2_b0"""
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
WORDS = {**SMALL, "vocab_size": 99}
PIXELS = {**SMALL, "image_size": 32, "patch_size": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
TEXTS: dict[str, dict[str, Any]] = {
    "Bert": WORDS,
    "Roberta": WORDS,
    "Electra": WORDS,
    "Albert": WORDS,
    "DebertaV2": WORDS,
    "MobileBert": {"vocab_size": 99, "num_hidden_layers": 2},
    "DistilBert": {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    "GPT2": {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, **SPECIAL},
    "Llama": {**WORDS, "num_key_value_heads": 2, **SPECIAL},
}
IMAGES: dict[str, dict[str, Any]] = {
    "ViT": PIXELS,
    "DeiT": PIXELS,
    "Swin": {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "ConvNext": {"image_size": 64},
    "Segformer": {"image_size": 64},
}


def image(size: int) -> torch.Tensor:
    """Two random images."""
    return torch.randn(2, 3, size, size)


def networks() -> dict[str, Callable[[], Made]]:
    """What makes each network and its example."""
    found: dict[str, Callable[[], Made]] = {}
    for package, add in (
        ("torchvision", from_torchvision),
        ("timm", from_timm),
        ("transformers", from_transformers),
    ):
        try:
            found |= add()
        except (ImportError, RuntimeError) as error:
            print(f"{package} is left out: {error}", file=sys.stderr)
    return found


def from_torchvision() -> dict[str, Callable[[], Made]]:
    """Classifiers at their usual sizes, segmentation at 64 pixels."""
    from torchvision import models

    found: dict[str, Callable[[], Made]] = {}
    for name in TORCHVISION.split():
        size = 299 if name == "inception_v3" else 224
        found[f"torchvision {name}"] = lambda name=name, size=size: (
            models.get_model(name, weights=None),
            image(size),
        )
    for name in SEGMENTATION.split():
        found[f"torchvision {name}"] = lambda name=name: (
            models.get_model(name, weights=None, weights_backbone=None),
            image(64),
        )
    return found


def from_timm() -> dict[str, Callable[[], Made]]:
    """Classifiers at 224 pixels."""
    import timm

    return {f"timm {name}": lambda name=name: (timm.create_model(name), image(224)) for name in TIMM.split()}


def from_transformers() -> dict[str, Callable[[], Made]]:
    """Classifiers of texts and images, two layers each."""
    import transformers

    transformers.logging.set_verbosity_error()

    def made(name: str, task: str, options: Mapping[str, Any]) -> Made:
        config = getattr(transformers, f"{name}Config")(**options)
        network = getattr(transformers, f"{name}For{task}Classification")(config)
        if task == "Image":
            return network, {"pixel_values": image(options["image_size"])}
        ids = torch.randint(2, 99, (2, 12))
        return network, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    tasks = {"Sequence": TEXTS, "Image": IMAGES}
    return {
        f"transformers {name}": lambda name=name, task=task, options=options: made(name, task, options)
        for task, kinds in tasks.items()
        for name, options in kinds.items()
    }


def row(make: Callable[[], Made], formats: Sequence[str]) -> dict[str, Any]:
    """What is found out about a network."""
    torch.manual_seed(0)
    network, example = make()
    model = prepared(network)
    began = time.perf_counter()
    try:
        graph = trace(model, example)
    except UserError as error:
        return {"refused": str(error)[:200]}
    seconds = time.perf_counter() - began
    reasons = Counter(skipped.reason for skipped in graph.skipped).most_common(1)
    layers = len(graph.layers)
    graph, grids = Channel(multiple=1, max_ratio=0.99).decisions(graph)
    macs = Macs(graph)
    most = [grid.count(grid.size - 1) for grid in grids]
    heads = len(graph.heads())
    orders = [torch.arange(group.total) for group in graph.groups]
    cut = Candidates(model, graph, orders).build([count // 2 for count in most])
    return {
        "layers": layers,
        "decisions": len(grids),
        "heads": heads,
        "reach": 1 - macs(most) / macs([0] * len(grids)),
        "seconds": seconds,
        "traced": graph.topology.graph is not None,
        "reason": reasons[0][0] if reasons else "",
        "exports": exported(model, cut, example, formats),
    }


def exported(model: nn.Module, cut: nn.Module, example: Inputs, formats: Sequence[str]) -> dict[str, bool]:
    """Whether each format holds a network that computes what the half-pruned one does."""
    small = Small(cut, example, original=model)
    with TemporaryDirectory() as folder:
        done = export_all(small, Path(folder), formats)
    return {each.format: not each.error for each in done}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| network | decisions (of heads) | MACs within reach | seconds | symbolic trace | exports |",
        "|---|---:|---:|---:|---|---|",
    ]
    for name, found in rows.items():
        if "refused" in found:
            lines.append(f"| {name} | refused | | | | |")
            continue
        formats = ", ".join(kind for kind, fine in found["exports"].items() if fine) or "none"
        lines.append(
            f"| {name} | {found['decisions']} ({found['heads']}) | {100 * found['reach']:.1f}% | {found['seconds']:.1f} "
            f"| {'yes' if found['traced'] else 'no'} | {formats} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Adds the rows that are missing, then prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the file of rows")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--formats", nargs="*", default=["pt2"], help="exports that are tried; also onnx")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows: dict[str, dict[str, Any]] = dict(json.loads(line) for line in lines)
    for name, make in networks().items():
        if options.only in name and name not in rows:
            rows[name] = row(make, options.formats)
            with options.out.open("a") as file:
                file.write(json.dumps([name, rows[name]]) + "\n")
            print(name, rows[name], file=sys.stderr)
    print(HEADER)
    print(table(rows))


if __name__ == "__main__":
    main()
