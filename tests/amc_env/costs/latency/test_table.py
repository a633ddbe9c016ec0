"""The table: interpolation, monotony, its file, and where it may be used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused
from test_units import CONV

from amc_env.costs.latency.table import Conditions, Correction, LatencyTable, Lookup, Times, monotone
from amc_env.errors import UserError

HERE = Conditions("eager", 1, 1, "a processor, 2 cores", {"torch": "2.13.0"})


def table(**changes: Any) -> LatencyTable:
    """A table of one unit."""
    times = Times.fitted([8, 16], [8, 24], [[1.0, 2.0], [3.0, 5.0]])
    return LatencyTable(
        HERE, {CONV: times}, Correction(1.1, 1e-6, 1e-7, -0.1), points=4, forwards=140, **changes
    )


def at(times: Times, inputs: int, outputs: int) -> float:
    return float(Lookup([("unit", times)])(np.array([inputs]), np.array([outputs]))[0])


def test_bilinear_by_hand_and_exact_at_the_points() -> None:
    times = table().units[CONV]
    assert [at(times, i, o) for i in (8, 16) for o in (8, 24)] == [1.0, 2.0, 3.0, 5.0]
    assert at(times, 12, 8) == 2.0
    assert at(times, 8, 12) == 1.25
    assert at(times, 12, 16) == 2.75  # the mean of all four


def test_many_grids_of_different_sizes_at_once() -> None:
    one = Times.fitted([1], [4, 8, 16], [[1.0, 2.0, 6.0]])
    other = Times.fitted([2, 4], [10], [[1.0], [2.0]])
    found = Lookup([("a", one), ("b", other), ("c", one)])(np.array([1, 3, 1]), np.array([12, 10, 16]))
    assert found.tolist() == [4.0, 1.5, 6.0]


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 8), (17, 8), (8, 7), (8, 25)])
def test_outside_of_the_grid_is_refused(inputs: int, outputs: int) -> None:
    says = rf"does not reach unit with {inputs} inputs \(the table has 8 to 16\) and {outputs} outputs"
    with pytest.raises(UserError, match=says):
        at(table().units[CONV], inputs, outputs)


def test_monotone_shares_the_error_in_ratios() -> None:
    found = monotone(np.array([[1.0, 4.0, 1.0, 5.0]]))
    assert found == pytest.approx(np.array([[1.0, 2.0, 2.0, 5.0]]))
    assert monotone(np.array([[1.0], [9.0], [4.0]])) == pytest.approx(np.array([[1.0], [6.0], [6.0]]))


def test_monotone_in_both_directions_and_no_further_off_than_need_be() -> None:
    generator = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(1, 7), np.arange(1, 9)).astype(float)
    noisy = smooth * generator.uniform(0.9, 1.1, smooth.shape)
    found = monotone(noisy)
    assert (np.diff(found, axis=0) >= 0).all()
    assert (np.diff(found, axis=1) >= 0).all()
    assert np.abs(np.log(found / noisy)).max() <= np.log(1.1 / 0.9) / 2 + 1e-9
    assert (monotone(found) == found).all()
    assert (monotone(smooth) == smooth).all()


@pytest.mark.parametrize(
    ("inputs", "outputs", "ms", "says"),
    [
        ([8, 8], [8], [[1.0], [1.0]], "must ascend"),
        ([0], [8], [[1.0]], "must ascend from 1 on"),
        ([8], [8, 16], [[1.0]], "1 by 2 channel counts have shape"),
        ([8], [8], [[0.0]], "above 0 ms"),
        ([8], [8], [[float("nan")]], "finite"),
    ],
)
def test_what_is_no_grid_is_refused(inputs: list[int], outputs: list[int], ms: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Times.fitted(inputs, outputs, ms)


def test_saved_and_loaded(tmp_path: Path) -> None:
    before = table(seconds=1.5)
    before.save(tmp_path / "there" / "latency.json")
    after = LatencyTable.load(tmp_path / "there" / "latency.json")
    assert (after.conditions, after.correction) == (before.conditions, before.correction)
    assert (after.points, after.forwards, after.seconds) == (4, 140, 1.5)
    assert list(after.units) == [CONV]
    assert (after.units[CONV].inputs, after.units[CONV].outputs) == ((8, 16), (8, 24))
    assert (after.units[CONV].ms == before.units[CONV].ms).all()


def test_a_table_written_elsewhere_needs_no_more_than_times_and_conditions(tmp_path: Path) -> None:
    table().save(tmp_path / "latency.json")
    content = json.loads((tmp_path / "latency.json").read_text())
    for name in ("correction", "points", "forwards", "seconds"):
        del content[name]
    content["units"][0]["ms"] = [[1.0, 2.0], [3.0, 1.5]]
    (tmp_path / "latency.json").write_text(json.dumps(content))
    after = LatencyTable.load(tmp_path / "latency.json")
    assert after.correction == Correction(1.0, 0.0, 0.0, 0.0)
    assert (np.diff(after.units[CONV].ms, axis=1) >= 0).all()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("times", "cannot be read"),
        ("[]", 'a JSON object with "format": "latency table 1" is needed'),
        ('{"format": "latency table 1"}', "'units' is missing"),
        ('{"format": "latency table 1", "units": [3]}', "not subscriptable"),
        ('{"format": "latency table 1", "units": [], "conditions": {"runtime": "eager"}}', "threads"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "latency.json").write_text(content)
    with pytest.raises(UserError, match=says):
        LatencyTable.load(tmp_path / "latency.json")


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with refused("unreadable", ""):
        LatencyTable.load(tmp_path / "latency.json")


def test_other_conditions_are_refused_with_every_difference() -> None:
    table().refuses(Conditions("eager", 1, 1, "a processor, 2 cores", {"torch": "2.13.0"}))
    other = Conditions("onnx", 4, 1, "a phone", {"torch": "2.13.0", "onnxruntime": "1.30"})
    with pytest.raises(UserError) as refused:
        table().refuses(other, "table=x.json")
    for part in (
        "table=x.json",
        "runtime eager there, onnx here",
        "threads 1 there, 4 here",
        "machine a processor, 2 cores there, a phone here",
        "versions",
        "budget.elsewhere=true",
    ):
        assert part in str(refused.value)
    assert "batch" not in str(refused.value)


def test_the_conditions_here_name_versions_that_matter() -> None:
    eager, onnx = (Conditions.here(runtime, 1, 1) for runtime in ("eager", "onnx"))
    assert set(eager.versions) == {"torch"}
    assert set(onnx.versions) == {"torch", "onnxruntime"}
    assert eager.machine


def test_onnx_runs_on_the_processor_wherever_the_network_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"a GPU at {device}")
    assert Conditions.here("onnx", 1, 1, "cuda:1") == Conditions.here("onnx", 1, 1, "cpu")
    assert Conditions.here("eager", 1, 1, "cuda:1").machine.startswith("a GPU at cuda:1, ")
    assert Conditions.here("cuda", 1, 1, "cpu").machine.startswith("a GPU at cuda, ")


def test_a_table_half_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "latency.json", Path.write_bytes
    table(seconds=1.5).save(path)

    def killed(self: Path, content: bytes) -> None:
        whole(self, content[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        table(seconds=2.5).save(path)
    assert LatencyTable.load(path).seconds == 1.5


def test_a_correction_that_could_rise_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        Correction(scale=-1.0)
