"""Labelled tables read with the `datasets` library: from the hub, from local files or from one folder per class."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amc_env.errors import UserError
from search import files
from search.data.library import datasets

log = logging.getLogger(__name__)

PARTS = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"validation", "valid", "val", "dev"},
}
"""Parts of a dataset, and the words in names of files, folders and splits that say which it is."""
_CLASS_FOLDERS = "imagefolder"
_SUFFIXES = {"parquet": (".parquet",), "csv": (".csv", ".tsv"), "json": (".json", ".jsonl")}
_LABELS = ("label", "labels", "target", "class")


@dataclass(frozen=True)
class Tables:
    """The parts of a dataset, which have the same columns.

    Attributes:
        name: What messages call it.
        parts: By the names of PARTS; ``train`` is always there.
        folders: Whether it consists of class folders, so that rows name image files.
    """

    name: str
    parts: dict[str, datasets.Dataset]
    folders: bool = False

    @property
    def train(self) -> datasets.Dataset:
        """The training part."""
        return self.parts["train"]

    def held_out(self, label: str, wanted: str | None = None) -> str | None:
        """The name of the part that is not trained on, ``test`` rather than ``validation``; None where there is none.

        Args:
            label: The column of labels. A part whose labels are all -1, as competitions publish it, is left out.
            wanted: The part to take.

        Raises:
            UserError: The wanted part is not there.
        """
        if wanted is not None and wanted not in self.parts:
            raise _wrong("test", wanted, f"{self.name} has no such part; there are {', '.join(self.parts)}")
        if wanted is not None:
            return wanted
        found = [part for part in ("test", "validation") if part in self.parts]
        return next((part for part in found if not _hidden(self.parts[part], label)), None)


def read(name: str, way_out: str, formats: Sequence[str], subset: str | None = None) -> Tables:
    """The tables of a local file or folder where the name is a path, else of a dataset on the hub.

    Args:
        name: Of the dataset.
        way_out: What to do where it cannot be read.
        formats: See `read_local`.
        subset: The configuration of a dataset on the hub that has several.

    Raises:
        UserError: As `read_hub` and `read_local`.
    """
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        return read_local(path, way_out, formats, field="data.name")
    return _loaded(name, way_out, path=name, name=subset)


def read_hub(repository: str, way_out: str, data_files: Mapping[str, str]) -> Tables:
    """The tables of a dataset on the hub.

    Args:
        repository: Its name.
        way_out: What to do where it cannot be read.
        data_files: A pattern of files for each part.

    Raises:
        UserError: It cannot be read.
    """
    return _loaded(repository, way_out, path=repository, data_files=data_files)


def read_local(
    path: Path,
    way_out: str,
    formats: Sequence[str] = (),
    needed: Sequence[str] = (),
    field: str = "data.path",
) -> Tables:
    """The tables of a file or of a folder; what is made of them goes to our cache folder.

    Args:
        path: The file or folder. Names of files, or of the folders that they are in, say which part they are.
        way_out: What to do where it cannot be read.
        formats: ``parquet``, ``csv`` or ``json``, the first that there are files of; else images in class folders.
        needed: Parts that must be there.
        field: The setting that gives the path.

    Raises:
        UserError: Files or parts are missing, or of another kind.
    """
    kind, found, options = _files_of(path, formats)
    missing = [f"{part}-*.{formats[0] if formats else '*'}" for part in needed if part not in found]
    if not found or missing:
        reason = (
            f"no {' and no '.join(missing or ['such files'])} in it" if path.exists() else "no such folder"
        )
        raise UserError(f"{{field}}={path}: {reason}; {way_out}", code="unreadable", field=field)
    cache = files.cache_folder() / "datasets"
    options |= {"path": kind, "data_files": found, "cache_dir": str(cache)}
    try:
        return _loaded(str(path), way_out, **options)
    except UserError as error:
        if not any(cache.rglob("*.arrow")):
            raise
        tables = _loaded(str(path), way_out, download_mode="force_redownload", **options)
        log.warning("%s was damaged and is made again: %s", cache, error)
        return tables


def _loaded(place: str, way_out: str, **options: Any) -> Tables:
    with files.reading(place, way_out):
        loaded = datasets.load_dataset(**options)
    parts: dict[str, datasets.Dataset] = {}
    for split, table in loaded.items():
        parts.setdefault(_part(str(split)) or str(split), table)
    if "train" not in parts:
        parts["train"] = parts.pop(next(iter(parts)))
    return Tables(place, parts, folders=parts["train"].info.builder_name == _CLASS_FOLDERS)


def _files_of(path: Path, formats: Sequence[str]) -> tuple[str, dict[str, list[str]], dict[str, Any]]:
    """A kind of files, these files by part, and options for reading them."""
    there = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for kind in formats:
        found = [file for file in there if file.suffix in _SUFFIXES[kind]]
        if found:
            base = path.parent if path.is_file() else path
            named = _by_part({str(file): str(file.relative_to(base)) for file in found})
            return kind, named, {"sep": "\t"} if found[0].suffix == ".tsv" else {}
    folders = [folder for folder in sorted(path.glob("*")) if folder.is_dir()]
    # a class may be called like a part, but it has no folders in it
    parts = {f"{each}/**": each.name for each in folders if any(inner.is_dir() for inner in each.iterdir())}
    named = _by_part(parts) if any(map(_part, parts.values())) else {"train": [f"{path}/**"]}
    return _CLASS_FOLDERS, named if folders else {}, {"drop_labels": False, "drop_metadata": True}


def _by_part(names: dict[str, str]) -> dict[str, list[str]]:
    """Paths by the part that their names say; those that say none are the training part if none says any."""
    parts: dict[str, list[str]] = {}
    for path, name in names.items():
        parts.setdefault(_part(name) or "", []).append(path)
    rest = parts.pop("", [])
    return parts or {"train": rest}


def _part(name: str) -> str | None:
    words = set(re.split("[^a-z]+", name.lower()))
    return next((part for part, known in PARTS.items() if words & known), None)


def _hidden(table: datasets.Dataset, label: str) -> bool:
    values = table.with_format("numpy")[label] if label in table.column_names else []
    return (
        len(values) > 0
        and np.issubdtype(np.asarray(values).dtype, np.integer)
        and bool((np.asarray(values) == -1).all())
    )


# -------------------------------------------------------------------------------------------------------- columns


def column(
    tables: Tables,
    setting: str,
    given: str | None,
    fits: Callable[[Any], bool],
    usual: Sequence[str] = (),
    but: str = "",
) -> str:
    """The column that a setting names, or the only one of a kind.

    Args:
        tables: The dataset.
        setting: Of ``data``, like ``image``.
        given: Its value.
        fits: Whether a column's feature is of the kind.
        usual: Names that are taken where several columns are of the kind.
        but: A column that it is not.

    Raises:
        UserError: There is no such column, or there are several.
    """
    features = tables.train.features
    if given is not None:
        if given not in features:
            raise UserError(
                f"no column {given} in {tables.name}; there are {', '.join(features)}",
                code="column",
                field=f"data.{setting}",
            )
        return given
    found = [name for name, feature in features.items() if name != but and fits(feature)]
    found = [name for name in usual if name in found][:1] or found
    if len(found) != 1:
        there = ", ".join(found or features)
        reason = (
            "is needed, as several columns may be meant" if found else "is needed, as no column looks like it"
        )
        raise _wrong(setting, None, f"{reason}; there are {there} in {tables.name}")
    return str(found[0])


def label_column(tables: Tables, given: str | None) -> str:
    """The column of labels: the given one, or the only one of classes, or one that is called so.

    Raises:
        UserError: As `column`.
    """
    classes = [
        name for name, feature in tables.train.features.items() if isinstance(feature, datasets.ClassLabel)
    ]
    if given is None and len(classes) == 1:
        return str(classes[0])
    if classes:
        return column(tables, "label", given, lambda feature: isinstance(feature, datasets.ClassLabel))
    return column(tables, "label", given, _may_be_label, _LABELS)


def _may_be_label(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(
        ("int", "uint", "bool", "string", "large_string")
    )


def class_names(tables: Tables, label: str) -> tuple[str, ...]:
    """Names of the classes: those that the column has, all its texts in order, or the numbers up to the largest."""
    feature = tables.train.features[label]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = {value for table in tables.parts.values() for value in table.unique(label) if value is not None}
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(values))
    if not all(isinstance(value, int) for value in values):
        raise _wrong("label", label, f"the column holds {feature}, not integers or texts")
    return tuple(map(str, range(1 + max(values, default=-1))))


def labels_of(name: str, table: datasets.Dataset, label: str, classes: Sequence[str]) -> Tensor:
    """The labels of a part, int64 [N] in 0..classes-1.

    Raises:
        UserError: It is empty, the column is missing or of another type, or labels are missing or outside the classes.
    """
    if label not in table.column_names:
        raise UserError(
            f"{name}: no column {label}; found {', '.join(table.column_names)}", code="missing_column"
        )
    if not len(table):
        raise UserError(f"{name} is empty: at least one example is needed", code="empty")
    column = table.select_columns([label]).with_format("arrow")[:][label]
    if column.null_count:
        raise UserError(f"{name}: {column.null_count} rows of column {label} have no value", code="labels")
    given = np.asarray(column.to_pylist())
    if given.dtype.kind not in "iubU":
        raise UserError(f"{name}: column {label} holds {column.type}, not integers", code="labels")
    numbers = {text: number for number, text in enumerate(classes)}
    values = (
        np.asarray([numbers.get(text, -1) for text in given]) if given.dtype.kind == "U" else given
    ).astype(np.int64)
    outside = np.flatnonzero((values < 0) | (values >= len(classes)))
    if len(outside):
        allowed = (
            f"0..{len(classes) - 1}" if given.dtype.kind != "U" else f"the classes {', '.join(classes[:8])}"
        )
        raise UserError(
            f"{name}: {len(outside)} labels outside {allowed}, the first is {given[outside[0]]} at row {outside[0]}",
            code="labels",
        )
    return torch.from_numpy(values)


def _wrong(setting: str, value: str | None, reason: str) -> UserError:
    shown = "" if value is None else f"={value}:"
    return UserError(f"{{field}}{shown} {reason}", code="column", field=f"data.{setting}")
