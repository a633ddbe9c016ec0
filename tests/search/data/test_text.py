"""Texts become the token numbers of a tokenizer; columns, classes and parts are found."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from refusals import refused

from search.data.base import Data
from search.data.text import texts

WORDS = ["good film", "bad film", "a very very good story", "the bad story"]
NUMBERS = [[4, 6, 0, 0, 0], [5, 6, 0, 0, 0], [7, 8, 8, 4, 10], [9, 5, 10, 0, 0]]
"""Of WORDS in tiny_bert's tokenizer, which adds nothing; 0 is padding."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))


def write(file: Path, **columns: list[Any]) -> str:
    """A file of any kind that is read."""
    if file.suffix == ".parquet":
        parquet.write_table(pa.table(columns), file)
    rows = list(zip(*columns.values(), strict=True))
    if file.suffix in (".csv", ".tsv"):
        between = "," if file.suffix == ".csv" else "\t"
        file.write_text("\n".join(between.join(map(str, row)) for row in (columns, *rows)) + "\n")
    if file.suffix in (".json", ".jsonl"):
        file.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return str(file)


def check(data: Data) -> None:
    """Every text has its numbers and its label, whose number is that of the text."""
    for split in (data.train, data.search, data.test):
        assert split is not None
        inputs = split.inputs
        assert isinstance(inputs, dict)
        assert isinstance(split.targets, torch.Tensor)
        assert inputs["input_ids"].tolist() == [NUMBERS[target] for target in split.targets.tolist()]
        assert torch.equal(inputs["attention_mask"], (inputs["input_ids"] > 0).to(torch.int64))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_texts_of_every_kind_of_file_are_read(suffix: str, tmp_path: Path, tiny_bert: Path) -> None:
    name = write(tmp_path / f"reviews.{suffix}", text=WORDS * 5, label=[0, 1, 2, 3] * 5)
    data = texts(name, tokenizer=str(tiny_bert), search_images=4)
    assert [len(split) for split in (data.train, data.search, data.test)] == [12, 4, 4]
    assert data.classes == ("0", "1", "2", "3")
    check(data)


def test_parts_and_names_of_classes_are_found(tmp_path: Path, tiny_bert: Path) -> None:
    kinds = ["first", "second", "third", "zeroth"]  # in the order of their names
    columns = {"id": [1] * 4, "sentence": WORDS, "other": ["x"] * 4, "label": kinds}
    write(tmp_path / "train.csv", **{name: values * 2 for name, values in columns.items()})
    write(tmp_path / "dev.csv", **columns)
    data = texts(str(tmp_path), tokenizer=str(tiny_bert), search_images=4, test_images=4)
    assert data.classes == tuple(kinds)
    check(data)
    assert texts(str(tmp_path), tokenizer=str(tiny_bert)).fingerprint != data.fingerprint
    with refused("column", "data.text"):
        texts(str(tmp_path), text="words", tokenizer=str(tiny_bert))


def test_long_texts_are_cut_and_pairs_joined(tmp_path: Path, tiny_bert: Path) -> None:
    name = write(tmp_path / "x.csv", first=WORDS * 5, second=["good"] * 20, label=[0, 1, 2, 3] * 5)
    cut = texts(name, text="first", tokenizer=str(tiny_bert), max_length=3)
    assert isinstance(cut.train.inputs, dict)
    assert cut.train.inputs["input_ids"].shape[1] == 3
    pairs = texts(name, text=["first", "second"], tokenizer=str(tiny_bert)).train.inputs
    assert isinstance(pairs, dict)
    assert pairs["input_ids"].shape[1] == 6
    with refused("column", "data.text"):
        texts(name, tokenizer=str(tiny_bert))
    with refused("column", "data.text"):
        texts(name, text=["first"], tokenizer=str(tiny_bert))


def test_what_is_missing_is_named(tmp_path: Path, tiny_bert: Path) -> None:
    name = write(tmp_path / "x.parquet", text=["good", None, "bad", "film", "a"] * 2, label=[0, 1] * 5)
    with refused("no_text", ""):
        texts(name, tokenizer=str(tiny_bert))
    with refused("unreadable", "data.tokenizer"):
        texts(name, tokenizer=str(tmp_path))
    with refused("missing", "data.tokenizer"):
        texts(name)
    with refused("missing", "data.name"):
        texts(tokenizer=str(tiny_bert))
    with refused("unreadable", "data.name"):
        texts(str(tmp_path / "nothing.csv"), tokenizer=str(tiny_bert))
