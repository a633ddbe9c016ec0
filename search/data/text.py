"""Texts and their classes, from the hub or local files, as the token numbers of a tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amc_env.errors import UserError
from amc_env.validation import Count, Listed, SplitSeed
from search import huggingface
from search.data.base import Data, Split, fingerprint
from search.data.library import datasets
from search.data.rows import Sizes, chosen_rows
from search.data.tables import Tables, class_names, column, label_column, labels_of, read

_TEXTS = ("text", "sentence", "content", "review")
_WAY_OUT = (
    "give the name of a dataset on the hub, or a file or folder of parquet, csv or json with a column of texts and one of "
    "labels"
)
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def texts(
    name: str | None = None,
    subset: str | None = None,
    text: str | Listed[str] | None = None,
    label: str | None = None,
    test: str | None = None,
    tokenizer: str | None = None,
    max_length: Count = 128,
    search_images: Count | None = None,
    split_seed: SplitSeed = 0,
    test_images: Count | None = None,
) -> Data:
    """Texts of a dataset on the hub or of local files.

    Inputs are ``input_ids`` and ``attention_mask``, and ``token_type_ids`` where the tokenizer gives them: int64 [N, L],
    with L the tokens of the longest text.

    Args:
        name: On the hub, or a file or folder of parquet, csv or json.
        subset: The configuration of a dataset on the hub that has several.
        text: The column of texts, or two for pairs of texts; the only one where None.
        label: The column of labels; the only one where None.
        test: The part that is the test split; ``test``, else ``validation`` where None.
        tokenizer: A name on the hub or a folder, see `search.huggingface`; that of the network where None.
        max_length: Tokens that are kept of a text.
        search_images: Size of the search split; a tenth of the training texts, at most 5,000, where None.
        split_seed: Which training texts it consists of. Not the run's seed: runs must be comparable.
        test_images: Size of the test split, every class in its share; None for all.

    Raises:
        UserError: Files or columns are missing or several are meant, texts or labels have no value, the tokenizer cannot be
            read or has no padding token, the hub is out of reach, or splits are out of reach.
    """
    name = _needed(name, "data.name", _WAY_OUT)
    tokenizer = _needed(tokenizer, "data.tokenizer", "a name on the hub or a folder; model=hf brings its own")
    tables = read(name, _WAY_OUT, ("parquet", "csv", "json"), subset)
    label = label_column(tables, label)
    columns = _text_columns(tables, text, label)
    classes = class_names(tables, label)
    other = tables.held_out(label, test)
    parts = {part: tables.parts[part] for part in ("train", other) if part is not None}
    labels = {part: labels_of(f"{name} {part}", table, label, classes) for part, table in parts.items()}
    tokens = _tokens(parts, columns, huggingface.tokenizer(tokenizer), max_length)
    sizes = Sizes(search_images, split_seed, test=test_images)
    rows = chosen_rows(name, labels["train"], None if other is None else labels[other], sizes)
    train, search, held_out = (
        Split({key: values[chosen] for key, values in tokens[part].items()}, labels[part][chosen])
        for part, chosen in (("train", rows.train), ("train", rows.search), (other or "train", rows.test))
    )
    return Data(
        name=name,
        train=train,
        search=search,
        test=held_out,
        classes=classes,
        mean=(),
        std=(),
        augment=False,
        fingerprint=fingerprint(train, search, held_out),
    )


def _needed(value: str | None, field: str, way_out: str) -> str:
    if value is None:
        raise UserError(f"{{field}} is needed: {way_out}", code="missing", field=field)
    return value


def _text_columns(tables: Tables, given: str | Sequence[str] | None, label: str) -> list[str]:
    """The columns of texts, one or two."""
    if given is None or isinstance(given, str):
        return [column(tables, "text", given, _is_text, _TEXTS, but=label)]
    if len(given) != 2:
        raise UserError(
            f"{{field}}={list(given)}: one column, or two for pairs of texts",
            code="column",
            field="data.text",
        )
    return [column(tables, "text", each, _is_text) for each in given]


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _tokens(
    parts: Mapping[str, datasets.Dataset], columns: Sequence[str], tokenizer: Any, max_length: int
) -> dict[str, dict[str, Tensor]]:
    """The inputs of each part, int64 [N, L] by name, padded to the longest text of all parts.

    Raises:
        UserError: A text has no value, or the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(
            "{field} has no padding token, and texts of a batch must have one length",
            code="padding",
            field="data.tokenizer",
        )
    found = {}
    for part, table in parts.items():
        lists = [list(table[name]) for name in columns]
        for name, values in zip(columns, lists, strict=True):
            if None in values:
                raise UserError(
                    f"column {name} of {part}: the text of row {values.index(None)} has no value",
                    code="no_text",
                )
        found[part] = tokenizer(*lists, truncation=True, max_length=max_length)
    longest = max(len(row) for encoded in found.values() for row in encoded["input_ids"])
    filling = {"input_ids": tokenizer.pad_token_id}
    return {
        part: {
            name: _padded(encoded[name], longest, filling.get(name, 0)) for name in _INPUTS if name in encoded
        }
        for part, encoded in found.items()
    }


def _padded(rows: Sequence[Sequence[int]], length: int, filling: int) -> Tensor:
    return torch.tensor([[*row, *[filling] * (length - len(row))] for row in rows], dtype=torch.int64)
