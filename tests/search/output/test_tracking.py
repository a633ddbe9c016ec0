"""Trackers: what they write, what a resumed run makes of it, and that W&B never ends a search."""

import builtins
import csv
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, UnidentifiedImageError
from refusals import refused

from search.output import tracking
from search.output.tracking import (
    CsvTracker,
    NoTracker,
    Outcome,
    TensorboardTracker,
    Trackers,
    WandbTracker,
    _opened,
    phase_of,
)


def episode_row(episode: int) -> dict[str, float]:
    return {"episode/reward": -1.0 / (episode + 1), "best/reward": -0.1}


def log_run(tracker: tracking.Tracker, episodes: range, epochs: range = range(0)) -> None:
    for episode in episodes:
        tracker.log(episode_row(episode), episode)
    for epoch in epochs:
        tracker.log({"finetune/loss": 1.0 / (epoch + 1)}, epoch)


def outcome(folder: Path) -> Outcome:
    """A finished run's, with one layer, one picture and one file of the network."""
    picture, weights = folder / "channels.png", folder / "model.safetensors"
    Image.new("RGB", (8, 6), "red").save(picture)
    weights.write_bytes(b"weights")
    return Outcome({"pruned/accuracy": 0.9}, ("layer", "MACs left"), [("conv", "50%")], [picture], [weights])


def read_rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B without an account, whatever the machine has: no key, no mode, no netrc."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def test_phase_is_told_by_the_names_and_never_mixed() -> None:
    assert phase_of({"episode/reward": 0.0, "best/reward": 0.0}) == "search"
    assert phase_of({"finetune/loss": 0.0}) == "finetune"
    with pytest.raises(ValueError, match="belong to 2"):
        phase_of({"episode/reward": 0.0, "finetune/loss": 0.0})


class TestCsv:
    def test_rows_are_on_disk_at_once_and_columns_grow(self, tmp_path: Path) -> None:
        tracker = CsvTracker(tmp_path)
        tracker.log({"episode/reward": -0.5}, 0)
        assert (tmp_path / "metrics.csv").read_text() == "phase,step,episode/reward\nsearch,0,-0.5\n"
        tracker.log({"episode/reward": -0.25, "episode/accuracy": 0.75}, 1)
        tracker.log({"finetune/loss": 2.0}, 0)
        rows = read_rows(tmp_path)
        assert [row["phase"] for row in rows] == ["search", "search", "finetune"]
        assert rows[0]["episode/accuracy"] == ""
        assert rows[2] == {
            "phase": "finetune",
            "step": "0",
            "episode/reward": "",
            "episode/accuracy": "",
            "finetune/loss": "2.0",
        }

    @pytest.mark.parametrize("torn", ["", "search,7,-0.1"])
    def test_a_resumed_run_ends_with_the_file_of_one_that_was_not_cut(
        self, tmp_path: Path, torn: str
    ) -> None:
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        log_run(CsvTracker(whole), range(10), range(3))
        log_run(CsvTracker(cut), range(7))
        with (cut / "metrics.csv").open("a") as file:
            file.write(torn)
        log_run(CsvTracker(cut), range(10), range(3))
        assert (cut / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()

    def test_a_row_that_changed_is_replaced_in_its_place(self, tmp_path: Path) -> None:
        log_run(CsvTracker(tmp_path), range(3))
        again = CsvTracker(tmp_path)
        again.log({"episode/reward": 7.0, "best/reward": 7.0}, 1)
        steps = [(row["step"], row["episode/reward"]) for row in read_rows(tmp_path)]
        assert steps == [("0", "-1.0"), ("1", "7.0"), ("2", repr(-1 / 3))]

    def test_infinite_and_missing_numbers_survive_resumption(self, tmp_path: Path) -> None:
        CsvTracker(tmp_path).log({"episode/reward": -math.inf, "episode/accuracy": math.nan}, 0)
        before = (tmp_path / "metrics.csv").read_text()
        CsvTracker(tmp_path).log({"episode/reward": -math.inf, "episode/accuracy": math.nan}, 0)
        assert (tmp_path / "metrics.csv").read_text() == before
        assert "search,0,-inf,nan" in before


class FakeRun:
    """A W&B run that notes what it is given; `held` is the summary that the server has of it."""

    def __init__(
        self, run_id: str = "abc", held: Mapping[str, float] | None = None, broken: str = ""
    ) -> None:
        import wandb

        self.id, self.broken = run_id, broken
        self.summary = dict(held or {})
        self.settings = wandb.Settings(mode="offline")
        self.rows: list[dict[str, Any]] = []
        self.artifacts: list[Any] = []

    def log_artifact(self, artifact: object) -> None:
        self.artifacts.append(artifact)

    def define_metric(self, *args: object, **kwargs: object) -> None:
        pass

    def log(self, row: dict[str, float]) -> None:
        if self.broken == "log":
            raise OSError("disk\nfull")
        self.rows.append(row)

    def finish(self) -> None:
        if self.broken == "finish":
            raise TimeoutError("no answer")


class TestWandb:
    def test_a_resumed_run_keeps_its_id(self, tmp_path: Path) -> None:
        for episodes in (range(5), range(8)):
            tracker = WandbTracker(tmp_path)
            log_run(tracker, episodes, range(2))
            tracker.outcome(outcome(tmp_path))
            tracker.close()
        run_id = (tmp_path / "wandb_id.txt").read_text().split()[0]
        assert {file.name for file in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {f"run-{run_id}.wandb"}

    def test_rows_that_the_run_has_are_not_logged_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import wandb

        run = FakeRun(held={"episode": 5, "epoch": 0})
        asked: dict[str, object] = {}
        monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or run)
        monkeypatch.setenv("WANDB_RUN_ID", "given")
        log_run(WandbTracker(tmp_path), range(8), range(2))
        assert [row.get("episode") for row in run.rows] == [6, 7, None]
        assert run.rows[-1] == {"epoch": 1, "finetune/loss": 0.5}
        assert (asked["id"], asked["resume"]) == ("given", "allow")
        WandbTracker(tmp_path)
        assert asked["id"] == run.id == (tmp_path / "wandb_id.txt").read_text().split()[0]
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
        WandbTracker(tmp_path)
        assert asked["id"] == "given"

    def test_offline_no_row_is_logged_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import wandb

        logged = []
        for name, episodes in (("same", 5), ("same", 8), ("another", 3)):
            run = FakeRun(name)
            monkeypatch.setattr(wandb, "init", lambda run=run, **options: run)
            log_run(WandbTracker(tmp_path), range(episodes), range(2))
            logged.append([row.get("episode") for row in run.rows])
        assert logged == [[0, 1, 2, 3, 4, None, None], [5, 6, 7], [0, 1, 2, None, None]]

    def test_a_finished_run_has_its_figures_layers_pictures_and_network(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import wandb

        run, asked = FakeRun(), {}
        monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or run)
        tracker = WandbTracker(tmp_path, group="seeds", tags=("half",))
        tracker.outcome(outcome(tmp_path))
        assert (asked["group"], asked["tags"]) == ("seeds", ["half"])
        assert run.summary["pruned/accuracy"] == 0.9
        (shown,) = run.rows
        assert (shown["layers"].columns, shown["layers"].data) == (["layer", "MACs left"], [["conv", "50%"]])
        assert isinstance(shown["plots/channels"], wandb.Image)
        (artifact,) = run.artifacts
        assert (artifact.type, artifact.name) == ("model", "network-abc")
        assert artifact.metadata == {"pruned/accuracy": 0.9}
        assert set(artifact.manifest.entries) == {"model.safetensors"}

    def test_offline_files_hold_the_pictures_and_the_table_and_nothing_is_printed(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        import agents  # a package of this name makes W&B advertise another product

        assert agents
        tracker = WandbTracker(tmp_path)
        tracker.outcome(outcome(tmp_path))
        tracker.close()
        media = {
            path.suffix for path in tmp_path.glob("wandb/offline-run-*/files/media/**/*") if path.is_file()
        }
        assert media == {".png", ".json"}
        assert capfd.readouterr() == ("", "")

    def test_a_picture_of_another_kind_is_not_decoded(self, tmp_path: Path) -> None:
        picture = tmp_path / "plots" / "x.png"
        picture.parent.mkdir()
        picture.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        with pytest.raises(UnidentifiedImageError):
            _opened(picture)

    def test_without_wandb_a_search_goes_on_with_one_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        real = builtins.__import__

        def refuse(name: str, *args: object, **kwargs: object) -> object:
            if name.startswith("wandb"):
                raise ImportError("no wandb here")
            return real(name, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(builtins, "__import__", refuse)
        with caplog.at_level(logging.WARNING, "search.output.tracking"):
            tracker = WandbTracker(tmp_path)
            log_run(tracker, range(3))
            tracker.outcome(Outcome({"a": 1}))
            tracker.close()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "no wandb here" in caplog.text

    @pytest.mark.parametrize("broken", ["init", "log", "finish"])
    def test_no_failure_inside_wandb_is_raised(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
    ) -> None:
        import wandb

        def init(**kwargs: object) -> FakeRun:
            if broken == "init":
                raise wandb.errors.CommError("no route")
            return FakeRun(broken=broken)

        monkeypatch.setattr(wandb, "init", init)
        with caplog.at_level(logging.WARNING, "search.output.tracking"):
            tracker = WandbTracker(tmp_path)
            log_run(tracker, range(3))
            tracker.close()
            tracker.close()
        assert len(caplog.records) == 1
        assert "\n" not in caplog.records[0].getMessage()

    def test_a_key_comes_from_the_environment_or_netrc(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        import wandb

        monkeypatch.setenv("WANDB_BASE_URL", "https://metrics.example")
        wandb.teardown()
        assert not tracking._has_key(wandb)
        (tmp_path / "no_netrc").write_text("machine metrics.example login user password secret\n")
        assert tracking._has_key(wandb)
        (tmp_path / "no_netrc").unlink()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()
        assert tracking._has_key(wandb)
        monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.delenv("WANDB_BASE_URL")
        wandb.teardown()


class TestTensorboard:
    def test_without_tensorboard_the_way_out_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with refused("missing_package", "tracker"):
            TensorboardTracker(tmp_path)

    def test_a_resumed_run_holds_each_step_once(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        for episodes in (range(3), range(5)):
            tracker = TensorboardTracker(tmp_path)
            log_run(tracker, episodes)
            tracker.outcome(outcome(tmp_path))
            tracker.close()
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("episode/reward")] == list(range(5))
        assert [(image.width, image.height) for image in events.Images("plots/channels")] == [(8, 6)]
        (layers,) = events.Tensors("layers/text_summary")
        assert b"| conv | 50% |" in layers.tensor_proto.string_val[0]


def test_trackers_pass_every_call_on_in_order(tmp_path: Path) -> None:
    calls: list[str] = []

    class Recorder(NoTracker):
        def log(self, metrics: object, step: int) -> None:
            calls.append(f"log {step}")

        def outcome(self, outcome: object) -> None:
            calls.append("outcome")

        def close(self) -> None:
            calls.append("close")

    with Trackers([Recorder(), CsvTracker(tmp_path), Recorder()]) as trackers:
        trackers.log(episode_row(0), 0)
        trackers.outcome(Outcome({"a": 1}))
    assert calls == ["log 0"] * 2 + ["outcome"] * 2 + ["close"] * 2


@pytest.mark.parametrize("option", ["none", "wandb", "tensorboard"])
def test_every_option_names_a_tracker_that_takes_its_keys(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml
    from hydra.utils import instantiate

    conf = Path(tracking.__file__).parents[2] / "conf" / "tracker" / f"{option}.yaml"
    chosen = yaml.safe_load(conf.read_text())
    if option == "tensorboard":
        pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    if option == "wandb":
        chosen["mode"] = "disabled"
    tracker = instantiate(chosen, folder=str(tmp_path))
    log_run(tracker, range(2))
    tracker.close()
    assert type(tracker).__name__ == chosen["_target_"].rsplit(".", 1)[1]
