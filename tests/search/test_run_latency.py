"""amc-latency from the command line, and its picture."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from run_folders import pixels, rows_of, share_of
from running import Command

from amc_env.costs.latency import Timing
from amc_env.costs.latency.table import LatencyTable
from amc_env.costs.latency.units import Unit
from amc_env.costs.memory import Activations
from amc_env.errors import UserError
from search import run_latency
from search.config.compose import input_of
from search.models.source import ModelSource
from search.output.plots import DPI, plot_latency_check
from search.output.progress import print_table
from search.run_latency import overrides_of
from search.study import latency, latency_table
from search.study.latency import described

QUICK = ("device=cpu", "model=digits_mlp", "latency.repeats=3", "latency.threads=1", "hydra.run.dir=run")


@pytest.fixture
def amc_latency(amc_search: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs amc-latency with overrides, as `amc_search` runs that."""
    monkeypatch.setattr("search.run_search.main", run_latency.main)
    return amc_search


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[Any, Any]]:
    """In place of a clock: layers take 1 ms, the whole network 4, the most pruned 3. Gives what was to be timed."""
    asked: list[Mapping[Any, Any]] = []
    known = {"original": Timing(4.0, 3.8, 4.2, 3), "most pruned": Timing(3.0, 3.0, 3.0, 3)}

    def timed(calls: Mapping[Any, Any], *, settle: int = 0, **_: Any) -> dict[Any, Timing]:
        assert settle == 1  # as everything is timed that these figures stand beside
        asked.append(calls)
        return {key: known.get(key, Timing(1.0, 0.9, 1.2, 3)) for key in calls}

    monkeypatch.setattr(latency, "interleaved", timed)
    return asked


def test_show_adds_layers_up_and_says_the_least_that_pruning_reaches(
    amc_latency: Command, tmp_path: Path, clock: list[Mapping[Any, Any]]
) -> None:
    ended = amc_latency(*QUICK)
    assert ended.code == 0
    rows = rows_of(tmp_path / "run" / "latency.csv")
    assert [(row["kind"], row["name"], row["ms"], row["share"]) for row in rows] == [
        ("layer", "1", "1", "0.25"),
        ("layer", "3", "1", "0.25"),
        ("layer", "5", "1", "0.25"),
        ("network", "original", "4", "1"),
        ("network", "most pruned", "3", "0.75"),
    ]
    assert float(rows[0]["spread"]) == pytest.approx(0.3)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "digits_mlp takes 4.000 ms." in page
    assert page.count("<td>1.000</td>") == 3
    assert "3.000 ms (75.0%)" in page
    assert [(row["in_channels"], row["out_channels"]) for row in rows[:3]] == [
        ("64", "128"),
        ("128", "64"),
        ("64", "10"),
    ]
    for text in (
        "linear",
        "64 → 128",
        "sum of the layers",
        "75.0%",
        "can reach here is 75.0%",
        "eager, 1 thread",
    ):
        assert text in ended.out
    assert "something else" not in ended.out


def test_equal_layers_are_timed_once_and_no_data_is_read_for_a_shape(
    amc_latency: Command, tmp_path: Path, clock: list[Mapping[Any, Any]]
) -> None:
    ended = amc_latency(*QUICK, "model=resnet20", "data=cifar10", "data.path=nowhere", "show")
    assert ended.code == 0
    rows = rows_of(tmp_path / "run" / "latency.csv")
    assert len(rows) == 20 + 2
    assert len(clock[0]) == 1 + 2 + 3 + 3 + 1 + 2  # first, three stages, linear; two networks
    assert rows[7]["unit"] == "conv 3x3 /2"


def test_times_that_spread_are_warned_of(
    amc_latency: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Timing(4.0, 3.0, 6.0, 3)
    monkeypatch.setattr(latency, "interleaved", lambda calls, **_: dict.fromkeys(calls, wide))
    ended = amc_latency(*QUICK)
    assert ended.code == 0
    assert ended.out.count("measured latency is not reliable") == 1
    assert "the least that pruning can reach" not in ended.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Warning: measured latency is not reliable" in page
    assert "(100.0%)" not in page  # no shares


def test_show_really_measures(amc_latency: Command, tmp_path: Path) -> None:
    assert amc_latency("show", *QUICK).code == 0
    rows = rows_of(tmp_path / "run" / "latency.csv")
    assert all(1e-4 < float(row["low_ms"]) <= float(row["ms"]) <= float(row["high_ms"]) for row in rows)
    assert {row["runs"] for row in rows} == {"3"}


@pytest.mark.plots
def test_a_table_is_built_then_checked_and_refused_elsewhere(amc_latency: Command, tmp_path: Path) -> None:
    ended = amc_latency("build", *QUICK, "table=tables/mlp.json")
    assert ended.code == 0
    assert "the table is in tables/mlp.json" in ended.out
    assert "2 distinct layers" in ended.out
    table = LatencyTable.load(tmp_path / "tables" / "mlp.json")
    assert (table.conditions.runtime, table.conditions.threads, table.conditions.batch) == ("eager", 1, 1)
    assert f"{table.points} points, {table.forwards} passes" in ended.out
    assert not (tmp_path / "run" / "latency.json").exists()

    ended = amc_latency("check", *QUICK, "table=tables/mlp.json", "check.networks=6")
    assert ended.code == 0
    assert "units" not in ended.err  # nothing is built
    rows = rows_of(tmp_path / "run" / "check.csv")
    assert 3 <= len(rows) <= 6
    for row in rows:
        assert float(row["error"]) == pytest.approx(
            float(row["predicted_ms"]) / float(row["ms"]) - 1, abs=1e-4
        )
        assert 0 <= int(row["1"]) < 128
    errors = np.abs([float(row["error"]) for row in rows])
    assert f"{len(rows)} networks cut at random" in ended.out
    assert (
        f"median error {100 * np.median(errors):.1f}% (of shares"
        in (tmp_path / "run" / "report.html").read_text()
    )
    assert f"median error {100 * np.median(errors):.1f}% (of shares" in ended.out
    assert f"largest {100 * errors.max():.1f}%" in ended.out
    assert (tmp_path / "run" / "plots" / "latency_check.png").stat().st_size > 10_000

    ended = amc_latency("check", *QUICK, "table=tables/mlp.json", "latency.batch=2")
    (line,) = ended.err.splitlines()
    assert ended.code == 2
    assert line.startswith("error: table=tables/mlp.json")
    assert "batch" in line


def test_a_check_without_a_table_builds_one(
    amc_latency: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[object] = []

    def uncountable(*arguments: object) -> Activations:
        counts.append(arguments)
        raise UserError("no trace", code="test")

    monkeypatch.setattr(latency_table, "Activations", uncountable)
    ended = amc_latency("check", *QUICK, "check.networks=4")
    assert ended.code == 0
    assert len(counts) == ended.out.count("predicted as a constant: no trace") == 1
    assert "units" in ended.err
    assert LatencyTable.load(tmp_path / "run" / "latency.json").points > 0
    assert "rank correlation" in ended.out


def test_times_of_a_check_that_spread_are_warned_of_once(
    amc_latency: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert amc_latency("build", *QUICK, "table=mlp.json").code == 0

    def wide(calls: Mapping[Any, Any], **_: Any) -> dict[Any, Timing]:
        return {key: Timing(ms, 0.5 * ms, 1.5 * ms, 3) for ms, key in enumerate(calls, start=1)}

    monkeypatch.setattr("amc_env.costs.latency.sampling.interleaved", wide)
    ended = amc_latency("check", *QUICK, "table=mlp.json")
    assert ended.code == 0
    assert ended.out.count("of their median") == 1


def test_a_cap_on_points(amc_latency: Command, tmp_path: Path) -> None:
    """Two units of two axes: the ends and the middles, and nothing between them."""
    assert amc_latency("build", *QUICK, "points=0", "tolerance=1e-6").code == 0
    table = LatencyTable.load(tmp_path / "run" / "latency.json")
    assert all(len(times.inputs) <= 3 and len(times.outputs) <= 3 for times in table.units.values())


@pytest.mark.parametrize("table", ["a_file/mlp.json", "a_file/sub/mlp.json", "full/mlp.json"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_timed(
    amc_latency: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    def full(dir: Path) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a_file").write_text("")
    if table.startswith("full"):
        monkeypatch.setattr("search.study.latency_table.tempfile.TemporaryFile", full)
    monkeypatch.setattr("search.study.latency_table.build_table", lambda *_, **more: pytest.fail("timed"))
    ended = amc_latency("build", *QUICK, f"table={table}")
    (line,) = ended.err.splitlines()
    assert ended.code == 2
    assert line.startswith(f"error: table={table} cannot be written (")


def test_help_says_what_it_does_and_what_there_is(amc_latency: Command) -> None:
    ended = amc_latency("--help")
    assert ended.code == 0
    for text in (
        "amc-latency show",
        "amc-latency build",
        "amc-latency check",
        "latency.runtime=",
        "table=FILE",
    ):
        assert text in ended.out
    assert "Powered by Hydra" not in ended.out


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        ([], []),
        (["show"], ["do=show"]),
        (["build", "seed=1"], ["do=build", "seed=1"]),
        (["model=resnet20", "check"], ["model=resnet20", "do=check"]),
        (["--help"], ["--help"]),
        (["--cfg", "job", "seed=1"], ["--cfg", "job", "seed=1"]),
        (["table=build"], ["table=build"]),
    ],
    ids=" ".join,
)
def test_the_word_becomes_a_setting(arguments: list[str], overrides: list[str]) -> None:
    assert overrides_of(arguments) == overrides


@pytest.mark.parametrize(
    ("runtime", "device", "place"),
    [
        ("eager", "cpu", "cpu"),
        ("compile", "cuda:1", "cuda:1"),
        ("onnx", "cuda", "cpu"),
        ("cuda_graph", "cpu", "cuda"),
        ("cuda", "cuda:1", "cuda:1"),
    ],
)
def test_a_runtime_with_one_place_runs_there(runtime: str, device: str, place: str) -> None:
    assert run_latency._device_of(runtime, device) == place


def test_the_shape_is_known_for_our_data_and_read_from_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = OmegaConf.create({"data": {"_target_": "search.data.imagenet.imagenet", "classes": 100}})
    source = ModelSource("x", lambda *_: torch.nn.Identity(), 0.1, data_settings={"size": 96})
    assert input_of(ours, source) == ((3, 224, 224), 100)
    ours.data.size = None
    assert input_of(ours, source) == ((3, 96, 96), 100)
    theirs = SimpleNamespace(image_shape=(2, 9, 9), classes=("a", "b", "c"))
    monkeypatch.setattr("search.config.compose.data_of", lambda *_: theirs)
    assert input_of(
        OmegaConf.create({"data": {"_target_": "types.SimpleNamespace"}, "trusted": ["types"]}), source
    ) == ((2, 9, 9), 3)


def unit(**other: Any) -> Unit:
    conv: dict[str, Any] = {"kind": "conv", "kernel": (3, 3), "stride": (1, 1), "padding": (1, 1)}
    return Unit(**(conv | {"dilation": (1, 1), "groups": 1, "bias": False, "in_size": (8, 8)} | other))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (unit(), "conv 3x3"),
        (unit(stride=(2, 2), kernel=(1, 1)), "conv 1x1 /2"),
        (unit(groups="depthwise", stride=(2, 2)), "dw 3x3 /2"),
        (unit(groups=4), "conv 3x3, 4 groups"),
        (unit(kind="linear", kernel=(1, 1)), "linear"),
    ],
    ids=str,
)
def test_a_layer_in_words(what: Unit, words: str) -> None:
    assert described(what) == words


def test_a_table_in_a_file_is_not_squeezed(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("layer", "what", "ms"), [("a" * 60, "b" * 60, "1.5")], [("whole", "", "2")], words=2)
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if "1.5" in line]
    assert "a" * 60 in row
    assert "b" * 60 in row
    assert lines[-3].startswith("+--")  # a line between the rows and what is below


# --------------------------------------------------------------------------------------------- the picture


@pytest.mark.plots
def test_the_picture_has_points_about_the_diagonal(tmp_path: Path) -> None:
    measured = [Timing(ms, 0.98 * ms, 1.03 * ms, 30) for ms in np.linspace(1.0, 2.0, 30)]
    near = pixels(
        plot_latency_check([t.median_ms for t in measured], measured, tmp_path / "plots" / "a.png", "good")
    )
    assert near.shape[1] / DPI == pytest.approx(5.0, abs=0.1)
    blue = (0, 114, 178)
    rows, columns = np.nonzero(np.abs(near - blue).sum(axis=2) < 60)
    assert np.corrcoef(rows, columns)[0, 1] < -0.9  # rows count from the top
    over = pixels(plot_latency_check([1.5 * t.median_ms for t in measured], measured, tmp_path / "b.png"))
    band, ink = (236, 237, 238), (48, 52, 58)
    for image in (near, over):
        assert share_of(image, band, 40) > 0.02
        assert share_of(image, ink, 40) > 1e-3
    right = slice(3 * near.shape[1] // 4, None)  # what takes longest, unless more is predicted than that
    assert share_of(near[:, right], blue, 40) > 0
    assert share_of(over[:, right], blue, 40) == 0
