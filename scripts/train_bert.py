"""Train a small BERT that tells which library a sentence of a docstring is from: `python scripts/train_bert.py FOLDER`.

The texts are those of installed packages, so nothing is downloaded. Needs the extra `hf`. To prune it:

    amc-search model=hf model.name=FOLDER/bert data=text data.name=FOLDER/sentences
"""

import argparse
import csv
import importlib
import inspect
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

LIBRARIES = {
    "numpy": ["numpy", "numpy.linalg"],
    "scipy": ["scipy.stats", "scipy.optimize"],
    "torch": ["torch", "torch.nn"],
}
LENGTH = 24  # tokens of a sentence


def sentences(modules: list[str]) -> list[str]:
    """Sentences of the docstrings of what modules export, without the library's name."""
    found: set[str] = set()
    for module in map(importlib.import_module, modules):
        for name in sorted(dir(module)):
            text = inspect.getdoc(getattr(module, name)) or ""
            for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
                words = re.findall(r"[a-z]+", re.sub(r"numpy|scipy|torch|np\.|sp\.", " ", sentence.lower()))
                if 6 <= len(words) <= LENGTH:
                    found.add(" ".join(words))
    return sorted(found)


class Sentences(Dataset[dict[str, Tensor]]):
    """Tokens and labels, as Hugging Face's models take them."""

    def __init__(self, rows: list[tuple[str, int]], tokenizer: PreTrainedTokenizerFast):
        texts = [text for text, _ in rows]
        self.tokens = tokenizer(
            texts, truncation=True, padding="max_length", max_length=LENGTH, return_tensors="pt"
        )
        self.labels = torch.tensor([label for _, label in rows])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        names = "input_ids", "attention_mask"
        return {**{name: self.tokens[name][index] for name in names}, "labels": self.labels[index]}


def make_rows() -> list[tuple[str, int]]:
    """The same number of sentences of each library, in random order."""
    found = [sentences(modules) for modules in LIBRARIES.values()]
    count = min(1500, *map(len, found))
    draw = random.Random(0)
    rows = [(text, label) for label, texts in enumerate(found) for text in draw.sample(texts, count)]
    draw.shuffle(rows)
    return rows


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Whole words, the most frequent ones."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=["[PAD]", "[UNK]"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def train(model: nn.Module, loader: DataLoader[dict[str, Tensor]], epochs: int) -> None:
    """AdamW with one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, epochs * len(loader))
    model.train()
    for batch in (batch for _ in range(epochs) for batch in loader):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def main() -> None:
    """Trains, says the accuracy on an eighth that was not trained on, and writes the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = make_rows()
    tokenizer = make_tokenizer([text for text, _ in rows])
    eighth = len(rows) // 8
    held_out, trained_on = Sentences(rows[:eighth], tokenizer), Sentences(rows[eighth:], tokenizer)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        num_labels=len(LIBRARIES),
        id2label=dict(enumerate(LIBRARIES)),
        label2id={name: label for label, name in enumerate(LIBRARIES)},
    )
    bert = BertForSequenceClassification(config)
    train(bert, DataLoader(trained_on, 64, shuffle=True), options.epochs)
    with torch.no_grad():
        hits = [
            (bert(**batch).logits.argmax(1) == batch["labels"]).float() for batch in DataLoader(held_out, 256)
        ]
    print(f"{len(rows)} sentences, accuracy on {eighth} held out: {100 * torch.cat(hits).mean():.2f}%")
    write(options.folder, bert, tokenizer, rows, eighth)


def write(
    folder: Path,
    bert: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[tuple[str, int]],
    held_out: int,
) -> None:
    """The network, its tokenizer, and the texts: test.csv is what was held out."""
    bert.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    (folder / "sentences").mkdir(exist_ok=True)
    for name, part in (("train", rows[held_out:]), ("test", rows[:held_out])):
        with (folder / "sentences" / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows((text, list(LIBRARIES)[label]) for text, label in part)


if __name__ == "__main__":
    main()
