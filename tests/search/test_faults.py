"""Damaged and unwritable files end in one line: every kind, by error code."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from image_parquets import IMAGES, grey
from networks import network
from pyarrow import parquet
from refusals import refused
from running import SMALL, Command
from small_runs import go, small

from amc_env.costs.latency.table import LatencyTable
from amc_env.errors import UserError
from search import files
from search.api import compress
from search.data.base import Data
from search.data.cifar10 import cifar10
from search.output.report import write_report
from search.output.tracking import CsvTracker
from search.output.weights import load_pruned
from search.study.apply import Given, read_strategy

DEEP = "[" * 100_000
HUGE = "9" * 5000


@pytest.mark.parametrize(
    "text", ["", "{", DEEP, HUGE, "\udcff"], ids=["empty", "cut", "deep", "huge", "bytes"]
)
@pytest.mark.parametrize("read", [read_strategy, lambda path: LatencyTable.load(Path(path))])
def test_json_that_cannot_be_read(tmp_path: Path, text: str, read: Callable[[str], object]) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with refused("unreadable", ""):
        read(str(file))


# ---------------------------------------------------------------------------------------- the run folder


@pytest.mark.parametrize("folder", ["taken", "taken/inside", "long" * 100])
def test_a_run_folder_that_cannot_be_made(
    amc_search: Command, tmp_path: Path, small_data: Data, folder: str
) -> None:
    (tmp_path / "taken").write_text("a file")
    ended = amc_search(*SMALL, f"hydra.run.dir={folder}")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1), ended.err
    assert ended.err.startswith("error: ")
    with refused("unwritable", ""):
        compress(network("concat"), small_data, folder=tmp_path / folder)


@pytest.mark.parametrize("name", [".hydra", "run_search.log", ".lock", "config.yaml"])
def test_a_command_whose_file_is_taken_by_a_folder(amc_search: Command, tmp_path: Path, name: str) -> None:
    taken = tmp_path / "run" / name
    if name == ".hydra":
        taken.parent.mkdir()
        taken.write_text("a file")
    else:
        taken.mkdir(parents=True)
    ended = amc_search(*SMALL, "hydra.run.dir=run")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1), ended.err
    assert ended.err.startswith("error: ")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), MemoryError("full"), torch.OutOfMemoryError("full")],
)
def test_a_full_disk_or_memory_ends_in_one_line(
    amc_search: Command, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("hydra.core.utils._save_config", full)
    ended = amc_search(*SMALL, "hydra.run.dir=run")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1), ended.err
    assert ended.err.startswith("error: ")


@pytest.mark.parametrize("name", [".lock", "config.yaml", "strategy.json", "result.json"])
def test_a_file_of_a_run_that_may_not_be_written(tmp_path: Path, small_data: Data, name: str) -> None:
    (tmp_path / name).mkdir()
    with refused("unwritable", ""):
        go(tmp_path, small_data, small())
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


@pytest.mark.plots
@pytest.mark.parametrize("name", ["report.html", "plots"])
def test_a_report_that_may_not_be_written(tmp_path: Path, small_data: Data, name: str) -> None:
    go(tmp_path, small_data, small())
    (tmp_path / name).mkdir() if name == "report.html" else (tmp_path / name).write_text("a file")
    with refused("unwritable", ""):
        write_report(tmp_path)


@pytest.mark.parametrize("override", ["hydra.run.dir=", "hydra.run.dir=''", "hydra.sweep.dir=null"])
def test_an_empty_run_folder_is_not_the_current_one(
    amc_search: Command, tmp_path: Path, override: str
) -> None:
    ended = amc_search(*SMALL, override)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1), ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_a_run_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "report.html").symlink_to(tmp_path / "precious")
    files.write(tmp_path / "report.html", "page")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "report.html").read_text() == "page"


# ---------------------------------------------------------------------------------------- files of a run


@pytest.mark.parametrize(
    "text",
    [
        "phase,step\nsearch,one\n",
        "phase,step\nsearch,1,2,3\n",
        "a,b\n1,2\n",
        "phase,step\nsearch,\n",
        f"phase,step\nsearch,{HUGE}\n",
        "phase,step\n\0search,\0\n",
        "phase,step\n\udcff,1\n",
    ],
    ids=["text", "cells", "columns", "no step", "huge", "null", "bytes"],
)
def test_damaged_metrics(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with refused("unreadable", ""):
        CsvTracker(tmp_path)


def test_metrics_that_may_not_be_written(tmp_path: Path) -> None:
    tracker = CsvTracker(tmp_path)
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").mkdir()
    with refused("unwritable", ""):
        tracker.log({"episode/reward": 1.0}, 1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.csv", "phase,step,episode/reward\nsearch,1,<b>high</b>\n"),
        ("metrics.csv", "phase,step,episode/reward\nsearch,<script>,1\n"),
        ("strategy.json", "{}"),
        ("strategy.json", '{"decisions": {"a": {"removed": "many", "total": 3}}}'),
        ("strategy.json", DEEP),
        ("strategy.json", '{"decisions": {"a": {"removed": 0, "total": 0}}}'),
        ("result.json", DEEP),
    ],
)
def test_a_report_of_damaged_files(tmp_path: Path, small_data: Data, name: str, text: str) -> None:
    go(tmp_path, small_data, small())
    write_report(tmp_path)
    (tmp_path / name).write_text(text)
    with refused("unreadable", ""):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"delivered_network": "<b>other</b>"},
        {"base": {"costs": {"macs": 0}}},
        {"base": {"costs": {"macs": "many"}}},
        {"budgets": 3},
    ],
    ids=str,
)
def test_a_report_of_a_result_with_wrong_values(
    tmp_path: Path, small_data: Data, change: dict[str, Any]
) -> None:
    go(tmp_path, small_data, small())
    file = tmp_path / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with refused("unreadable", ""):
        write_report(tmp_path)


def test_a_report_of_a_journal_whose_right_checksums_hide_wrong_lines(
    tmp_path: Path, small_data: Data
) -> None:
    go(tmp_path, small_data, small())
    journal = tmp_path / "evaluations.jsonl"
    head, first, *rest = journal.read_bytes().splitlines(keepends=True)
    entry = files.unsealed(first)
    assert entry is not None
    for change in ({"costs": {"macs": "many"}}, {"score": None}, {"removed": 3}):
        wrong = files.sealed(entry | change).encode()
        journal.write_bytes(b"".join([head, wrong, *rest]))
        with refused("unreadable", ""):
            write_report(tmp_path)


@pytest.mark.parametrize("entry", [[1], "text", 3, None])
def test_channels_whose_entry_is_no_object(tmp_path: Path, entry: Any) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "channels.json").write_text(json.dumps({"format": 1, "channels": {"first": entry}}))
    with refused("unreadable", ""):
        load_pruned(network("mlp"), tmp_path)


# ---------------------------------------------------------------------------------- what users hand over


@pytest.mark.parametrize(
    "correction", [{"per_weight_ms": -1}, {"scale": int("9" * 400)}, {"scale": "1"}, {"scale": float("inf")}]
)
def test_a_latency_table_whose_predictions_make_no_sense(tmp_path: Path, correction: dict[str, Any]) -> None:
    unit = {"kind": "linear", "kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    unit |= {"groups": 1, "bias": False, "in_size": [1, 1], "norm": False, "activation": ""}
    content = {
        "format": "latency table 1",
        "conditions": {"runtime": "eager", "threads": 1, "batch": 1, "machine": "m", "versions": {}},
        "units": [{"unit": unit, "inputs": [8], "outputs": [8], "ms": [[0.05]]}],
    }
    file = tmp_path / "table.json"
    file.write_text(json.dumps(content))
    LatencyTable.load(file)
    file.write_text(json.dumps(content | {"correction": correction}))
    with refused("unreadable", ""):
        LatencyTable.load(file)


@pytest.mark.parametrize("start", [5, None, "original", [["deep"]], {"a": 1}])
def test_a_strategy_whose_start_is_no_list_of_names(tmp_path: Path, start: Any) -> None:
    content = {"decisions": {"a": {"removed": 1, "total": 4}}, "start": start}
    (tmp_path / "strategy.json").write_text(json.dumps(content))
    with refused("wrong_type", "start"):
        Given.read(str(tmp_path))


def write(folder: Path, image: pa.Array, names: tuple[str, ...] = ("img", "label")) -> None:
    labels = pa.array(range(10))
    columns = [image if name == "img" else labels for name in names]
    for part in ("train-0", "test-0"):
        parquet.write_table(pa.Table.from_arrays(columns, names=list(names)), folder / f"{part}.parquet")


def pictures(value: object, kind: pa.DataType) -> pa.Array:
    return pa.array([{"bytes": value, "path": "x"}] * 10, pa.struct([("bytes", kind), ("path", pa.string())]))


@pytest.mark.parametrize(
    ("image", "names"),
    [
        (pictures(grey(3, 32, 32), pa.binary()), ("img", "label", "label")),
        (pictures(grey(3, 32, 32), pa.binary()), ("img", "img", "label")),
        (pictures("text", pa.string()), ("img", "label")),
        (pictures(5, pa.int64()), ("img", "label")),
        (pa.array([5] * 10), ("img", "label")),
        (pa.array(["text"] * 10), ("img", "label")),
    ],
    ids=["label twice", "image twice", "text", "numbers", "number", "path"],
)
def test_parquet_files_of_another_form(tmp_path: Path, image: pa.Array, names: tuple[str, ...]) -> None:
    write(tmp_path, image, names)
    with refused("unreadable", ""):
        cifar10(str(tmp_path), search_images=2)


def test_parquet_files_of_different_schemas(tmp_path: Path) -> None:
    images = pa.array([{"bytes": grey(3, 32, 32), "path": "x"}] * 10, IMAGES)
    write(tmp_path, images)
    other = pa.Table.from_arrays([images, pa.array(range(10))], names=["image", "label"])
    parquet.write_table(other, tmp_path / "train-1.parquet")
    with refused("unreadable", ""):
        cifar10(str(tmp_path), search_images=2)


# --------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"text", None])
def test_decoded_images_that_are_damaged_are_named_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    write(tmp_path, pa.array([{"bytes": grey(3, 32, 32), "path": "x"}] * 10, IMAGES))
    before = cifar10(str(tmp_path), search_images=2).fingerprint
    for file in (tmp_path / "cache" / "data").iterdir():
        file.write_bytes(file.read_bytes()[:-5] if damage is None else damage)
    np.testing.assert_equal(cifar10(str(tmp_path), search_images=2).fingerprint, before)
    assert len([r for r in caplog.records if "is damaged and is made again" in r.getMessage()]) == 2


def test_a_cache_that_cannot_be_read_back_is_refused(tmp_path: Path) -> None:
    def read(path: Path) -> str:
        raise UserError("never right", code="unreadable")

    with refused("unreadable", ""):
        files.cached(tmp_path / "file", lambda path: path.write_text("x"), read)


@pytest.mark.parametrize("damage", [b"", b"text", None], ids=["empty", "text", "cut"])
def test_tables_in_the_cache_that_are_damaged_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    write(tmp_path, pa.array([{"bytes": grey(3, 32, 32), "path": "x"}] * 10, IMAGES))
    before = cifar10(str(tmp_path), search_images=2).fingerprint
    tables = [*(tmp_path / "cache" / "datasets").rglob("*.arrow")]
    for file in tables:
        file.write_bytes(file.read_bytes()[:-300] if damage is None else damage)
    shutil.rmtree(tmp_path / "cache" / "data")  # or the decoded images are read
    assert cifar10(str(tmp_path), search_images=2).fingerprint == before
    assert tables
    assert "is made again" in caplog.text


def test_what_killed_runs_left_in_the_cache_is_swept_once_it_is_an_hour_old(tmp_path: Path) -> None:
    left = [tmp_path / ".tmp-0a0a0a0a-old", tmp_path / ".tmp-0b0b0b0b-young"]
    for path, age in zip(left, (3700, 3500), strict=True):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    (tmp_path / "file").write_text("x")
    assert files.cached(tmp_path / "file", lambda path: None, Path.read_text) == "x"
    assert [path.exists() for path in left] == [False, True]
