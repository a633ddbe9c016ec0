"""Train model=vit_cifar10 on CIFAR-10: `python scripts/train_vit.py vit_cifar10.safetensors --data DIR`.

Weights are written in half precision; conf/weights has those of `--epochs 25 --bfloat16`. The search split is left out
of the training, so that it can judge candidates later. The state is kept beside the file after each epoch; the same
command continues an interrupted training.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from search.data.base import Data, Split
from search.data.cifar10 import cifar10
from search.data.loaders import seeded
from search.models.vit import vit_cifar10
from search.training.batches import AugmentedBatches
from search.training.finetune import LearningRate
from search.training.mixed_precision import mixed_precision
from search.training.training_file import TrainingFile

WARMUP = 0.1  # share of the steps
SMOOTHING = 0.1  # of the labels


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the safetensors file that is written at the end")
    parser.add_argument(
        "--data", help="folder with train-*.parquet and test-*.parquet; by default from the hub"
    )
    parser.add_argument("--epochs", type=int, default=30, help="about two minutes each on two cores")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--bfloat16", action="store_true", help="1.5 times as fast on processors with AMX")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="train on so many images only, to try the script")
    return parser.parse_args()


def weight_groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Parameters for AdamW: matrices decay; biases, norms and positions do not."""
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and name != "position"]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or name == "position"]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: AugmentedBatches,
    rates: list[float],
    bfloat16: bool,
) -> float:
    """Train on each batch once, at a learning rate each; the mean loss."""
    model.train()
    total = torch.zeros(())
    for (images, labels), rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with mixed_precision(torch.device("cpu"), torch.bfloat16 if bfloat16 else torch.float32):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total) / len(rates)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Data, split: Split) -> float:
    """Share of a split that the network classifies correctly."""
    model.eval()
    batches: list[Tensor] = list(split.inputs.split(500))
    predicted = torch.cat([model(data.normalise(images)).argmax(1) for images in batches])
    return (predicted == split.targets).double().mean().item()


def main() -> None:
    """Train, and write the weights."""
    given = arguments()
    data = cifar10(given.data)
    train = data.train.take(torch.arange(len(data.train))[: given.images])
    with seeded(given.seed):
        model = vit_cifar10().build(data.image_shape, len(data.classes))
    optimizer = torch.optim.AdamW(weight_groups(model, given.weight_decay), given.lr)
    steps = max(1, len(train) // given.batch)
    schedule = LearningRate(given.lr, given.epochs * steps, round(WARMUP * given.epochs * steps))
    scaler = torch.amp.GradScaler(enabled=False)
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "data")}
    file = TrainingFile(given.out.with_suffix(".state"), f"{settings} {data.fingerprint}")
    for done in range(file.load(model, optimizer, scaler), given.epochs):
        started = time.perf_counter()
        rates = [schedule(done * steps + step) for step in range(steps)]
        batches = AugmentedBatches(train, data, given.batch, given.seed * 10_000 + done, "cpu")
        loss = epoch(model, optimizer, batches, rates, given.bfloat16)
        seconds = time.perf_counter() - started
        file.save(done + 1, model, optimizer, scaler)
        score = accuracy(model, data, data.search)
        print(f"epoch {done + 1}: loss {loss:.4f}, search split {score:.4f}, {seconds:.0f} s", flush=True)
    kept = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(kept, given.out)
    model.load_state_dict(kept)
    assert data.test is not None
    print(f"test split {accuracy(model, data, data.test):.4f}")


if __name__ == "__main__":
    main()
