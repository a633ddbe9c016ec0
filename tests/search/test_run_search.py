"""amc-search from the command line: what it leaves behind, how it repeats and resumes, how mistakes end."""

import csv
import io
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from journals import content
from omegaconf import DictConfig
from PIL import Image
from pyarrow import parquet
from run_folders import journal_of, read
from running import QUICK, SMALL, Command, Ended
from safetensors.torch import save_file

from amc_env.evaluation.pruner import Pruner
from search import load_pruned
from search.job import run_job
from search.models.resnet import ResNet

RANDOM = (
    *SMALL,
    "agent=random",
    "search.episodes=6",
    "finalists.count=0",
    "finetune.epochs=0",
    "latency.repeats=0",
    "export=[]",
)


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """What must be the same when a run is repeated: all but times."""
    kept = {name: result[name] for name in ("budget", "budgets", "strategy", "skipped")}
    for stage in ("base", "pruned", "finetuned"):
        kept[stage] = {k: v for k, v in (result[stage] or {}).items() if not k.startswith("latency_")}
    return kept | {"search": {k: v for k, v in result["search"].items() if k != "seconds"}}


def assert_refused(ended: Ended, *says: str) -> None:
    lines = ended.err.splitlines()
    assert ended.code == 2
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    for text in says:
        assert text in lines[0]
    assert "Error executing job" not in ended.out + ended.err
    assert "HYDRA_FULL_ERROR" not in ended.out + ended.err


# -------------------------------------------------------------------------------------------- whole runs


@pytest.mark.plots
def test_a_run_leaves_behind_all_that_the_design_names(amc_search: Command, tmp_path: Path) -> None:
    ended = amc_search(*QUICK, "model=digits_cnn", "export=[safetensors,pt2]", "hydra.run.dir=run")
    assert ended.code == 0
    run = tmp_path / "run"
    for name in (
        "config.yaml",
        "evaluations.jsonl",
        "metrics.csv",
        "strategy.json",
        "result.json",
        "model.safetensors",
        "channels.json",
        "model.pt2",
        "report.html",
        "run_search.log",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "plots").glob("*.png"))
    result = read(run)
    keys = {"accuracy", "macs", "params", "latency_ms", "latency_spread", "split"}
    for stage in ("base", "pruned", "finetuned"):
        assert keys <= set(result[stage]), stage
        assert result[stage]["split"] == "test"
        assert 0 <= result[stage]["accuracy"] <= 1
    assert set(result["budget"]) == {"cost", "ratio", "limit", "value", "met"}
    assert result["budget"]["met"]
    assert result["pruned"]["macs"] == result["budget"]["value"] <= result["budget"]["limit"]
    assert {"agent", "episodes", "evaluations", "cache_hits", "seconds", "seed", "best_reward"} <= set(
        result["search"]
    )
    assert (result["search"]["agent"], result["search"]["episodes"]) == ("ddpg", 8)
    assert all(0 <= ratio < 1 for ratio in result["strategy"].values())
    removed = json.loads((run / "strategy.json").read_text())
    assert removed
    restored = load_pruned(ResNet(8, "conv", in_channels=1), run)
    assert sum(p.numel() for p in restored.parameters()) == result["finetuned"]["params"]
    assert "fine-tuned" in ended.out
    assert "report.html" in ended.out
    assert "resume an interrupted run: amc-search" in ended.out


def test_the_same_seed_gives_the_same_files_to_the_byte(amc_search: Command, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        assert amc_search(*QUICK, "seed=3", f"hydra.run.dir={folder}").code == 0
    for name in ("evaluations.jsonl", "metrics.csv", "strategy.json"):
        assert content(tmp_path / "one" / name) == content(tmp_path / "two" / name), name
    assert figures(read(tmp_path / "one")) == figures(read(tmp_path / "two"))
    assert amc_search(*QUICK, "seed=4", "hydra.run.dir=three").code == 0
    assert journal_of(tmp_path / "one")[1:] != journal_of(tmp_path / "three")[1:]


def test_stages_can_be_left_out_and_the_journal_names_no_place(amc_search: Command, tmp_path: Path) -> None:
    assert amc_search(*RANDOM, "hydra.run.dir=run").code == 0
    result = read(tmp_path / "run")
    assert result["finetuned"] is None
    assert result["pruned"]["latency_ms"] is None
    assert result["exports"] == []
    assert not list((tmp_path / "run").glob("model.*"))
    assert (tmp_path / "run" / "report.html").exists()
    assert result["search"]["evaluations"] == 6 == len(journal_of(tmp_path / "run")) - 1
    first = journal_of(tmp_path / "run")[0]
    for text in (str(tmp_path), str(Path.home()), os.uname().nodename, "hydra", "cuda"):
        assert text not in json.dumps(first), text
    assert first["header"]["device"] in ("cpu", "cuda")
    assert not {"finetune", "export", "latency"} & set(first["header"])


@pytest.mark.parametrize(
    ("overrides", "cost"),
    [
        (("budget=params", "budget.ratio=0.4"), "params"),
        (("budget=flops", "budget.limit=200000"), "macs"),
        (("model=digits_cnn", "repair=both"), "macs"),
        (("repair=sequential", "budget.ratio=0.3"), "macs"),
        (("repair=none", "criterion=l1", "finalists.count=2"), "macs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_choices_of_cost_network_and_repair_work(
    amc_search: Command, tmp_path: Path, overrides: tuple[str, ...], cost: str
) -> None:
    assert amc_search(*RANDOM, "search.episodes=2", *overrides, "hydra.run.dir=run").code == 0
    result = read(tmp_path / "run")
    assert result["budget"]["cost"] == cost
    assert result["budget"]["value"] == result["pruned"][cost] <= result["budget"]["limit"]
    assert result["budget"]["met"]


def test_the_accuracy_guaranteed_search_needs_no_budget(amc_search: Command, tmp_path: Path) -> None:
    ended = amc_search(*QUICK, "budget=none", "reward=error_flops", "hydra.run.dir=run")
    assert ended.code == 0
    result = read(tmp_path / "run")
    assert (result["budget"], result["budgets"]) == (None, [])
    assert result["search"]["best_reward"] <= 0


def test_the_lecture_s_reward_runs_with_the_bound_off(amc_search: Command, tmp_path: Path) -> None:
    options = ("reward=infinity", "enforce_budget=false", "search.episodes=12", "hydra.run.dir=run")
    assert amc_search(*QUICK, *options).code == 0
    assert read(tmp_path / "run")["budget"]["met"]
    assert {line["met"] for line in journal_of(tmp_path / "run")[1:]} <= {True, False}


def test_uniform_scores_one_strategy(amc_search: Command, tmp_path: Path) -> None:
    assert amc_search(*RANDOM, "agent=uniform", "hydra.run.dir=run").code == 0
    result = read(tmp_path / "run")
    assert (result["search"]["agent"], result["search"]["evaluations"]) == ("uniform", 1)
    assert len(journal_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("preset", ["amc_paper", "amc_release"])
def test_presets_run(amc_search: Command, tmp_path: Path, preset: str) -> None:
    quick = [o for o in QUICK if "warmup" not in o]
    ended = amc_search(*quick, f"preset={preset}", "search.episodes=5", "hydra.run.dir=run")
    assert ended.code == 0
    result = read(tmp_path / "run")
    assert result["search"]["episodes"] == 5
    assert max(result["strategy"].values()) <= 0.8
    assert journal_of(tmp_path / "run")[0]["header"]["granularity"]["multiple"] == 8


def test_a_multirun_gives_each_job_its_own_folder_and_lets_those_run_that_are_not_refused(
    amc_search: Command, tmp_path: Path
) -> None:
    grid = ("seed=1,2", "budget.ratio=7,0.7", "hydra.sweep.dir=sweep")
    ended = amc_search("--multirun", *RANDOM, "search.episodes=2", *grid)
    assert ended.code == 2
    first, second = ended.err.splitlines()[-2:]
    assert first.startswith("error: job 0: ")
    assert second.startswith("error: job 2: ")
    for seed, folder in ((1, "1"), (2, "3")):
        result = read(tmp_path / "sweep" / folder)
        assert (result["search"]["seed"], result["budget"]["ratio"]) == (seed, 0.7)
        assert len(journal_of(tmp_path / "sweep" / folder)) == 3


@pytest.mark.filterwarnings("ignore")  # the plug-ins' own
@pytest.mark.parametrize(
    ("plugin", "options"),
    [
        ("hydra_joblib_launcher", ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "budget.ratio=7,0.7")),
        (
            "hydra_optuna_sweeper",
            (
                "hydra/sweeper=optuna",
                "hydra/sweeper/sampler=grid",
                "hydra.sweeper.direction=maximize",
                "hydra.sweeper.n_trials=2",
                "budget.ratio=choice(7,0.7)",
            ),
        ),
    ],
)
def test_launchers_and_sweepers_of_hydra(
    amc_search: Command, tmp_path: Path, plugin: str, options: tuple[str, ...]
) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}", reason=f"{plugin} is not installed")
    ended = amc_search("--multirun", *options, *RANDOM, "search.episodes=2", "hydra.sweep.dir=sweep")
    results = [read(file.parent) for file in (tmp_path / "sweep").glob("*/result.json")]
    assert (ended.code, len(results)) == (2, 1)
    assert sum(line.startswith("error: job") for line in ended.err.splitlines()) == 1
    if plugin == "hydra_optuna_sweeper":
        best = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
        assert f"best_value: {results[0]['search']['search_accuracy']}" in best


@pytest.mark.plots
def test_a_run_says_what_can_be_reached_and_its_report_has_all_parts(
    amc_search: Command, tmp_path: Path
) -> None:
    options = [option for option in QUICK if option != "baselines=[]"]
    ended = amc_search(*options, "repair=least_squares", "finetune.epochs=2", "hydra.run.dir=run")
    assert "MACs: " in ended.out
    assert "least reachable" in ended.out
    page = (tmp_path / "run" / "report.html").read_text()
    for text in (
        "Beside the baselines",
        "Layers, original → pruned",
        "were scored again with repair=sequential: the best reward that is stated",
        "Best strategies",
    ):
        assert text in page
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["finetune/accuracy"]]) == 2


def test_the_version_is_printed(amc_search: Command) -> None:
    ended = amc_search("--version")
    assert (ended.code, ended.out) == (0, f"amc-netadapt {version('amc-netadapt')}\n")


def test_a_job_gives_sweepers_its_search_score(
    amc_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    monkeypatch.setattr("search.job.run_job", lambda *parts: given.append(run_job(*parts)) or given[-1])
    assert amc_search(*RANDOM, "search.images=50", "hydra.run.dir=run").code == 0
    result = read(tmp_path / "run")
    assert given == [result["search"]["search_accuracy"]]
    assert given[0] not in {result[stage]["accuracy"] for stage in ("base", "pruned")}  # of the test split


def test_a_job_of_a_sweep_without_memory_lets_the_others_run(
    amc_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(cfg: DictConfig, *parts: Any) -> float:
        if cfg.seed == 1:
            raise MemoryError("no more")
        return 0.5

    monkeypatch.setattr("search.job.run_job", scarce)
    ended = amc_search("--multirun", "seed=1,2", *RANDOM, "hydra.sweep.dir=sweep")
    assert ended.code == 2
    assert "error: job 0: out of memory (no more)" in ended.err
    assert [file.parent.name for file in (tmp_path / "sweep").glob("*/failure.json")] == ["0"]


def test_a_refused_run_leaves_no_folder(amc_search: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for folder in ("runs/first/a", "mine/b", "mine"):
        assert amc_search(*RANDOM, "budget.ratio=7", f"hydra.run.dir={folder}").code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # which was there before
    assert not (tmp_path / "mine" / "b").exists()


def test_nothing_is_written_through_links_in_a_run_folder(amc_search: Command, tmp_path: Path) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    precious.mkdir()
    links = {run / ".hydra" / "config.yaml": "a.yaml", run / "run_search.log": "a.log", run / "plots": ""}
    for link, name in links.items():
        link.symlink_to(precious / name)
        if name:
            (precious / name).write_text("keep me")
    assert amc_search(*RANDOM, "hydra.run.dir=run").code == 0
    assert {file.name: file.read_text() for file in precious.iterdir()} == dict.fromkeys(
        ("a.yaml", "a.log"), "keep me"
    )
    assert not any(link.is_symlink() for link in links)


def test_an_export_that_failed_is_exit_code_1(
    amc_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("search.output.export.TorchExport.save", refuses)
    ended = amc_search(*RANDOM, "export=[safetensors,pt2]", "hydra.run.dir=run")
    assert ended.code == 1
    line = ended.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "model.pt2" in line
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_wandb_offline_keeps_its_run(
    amc_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    options = (*RANDOM, "search.episodes=4", "tracker=wandb", "hydra.run.dir=run")
    run = tmp_path / "run"
    assert amc_search(*options).code == 0
    identity = (run / "wandb_id.txt").read_text().split()[0]
    assert amc_search(*options, "search.episodes=6").code == 0
    assert (run / "wandb_id.txt").read_text().split()[0] == identity
    assert {file.name for file in run.glob("wandb/offline-run-*/*.wandb")} == {f"run-{identity}.wandb"}
    kept = [*run.glob("wandb/offline-run-*/files/media/**/*")]
    assert {path.suffix for path in kept if path.is_file()} == {
        ".png",
        ".json",
    }  # pictures and the layers' table
    table = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in table] == ["1", "2", "3", "4", "5", "6"]


# -------------------------------------------------------------------------------------------- resumption


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "search.run_search", *overrides, f'hydra.run.dir="{folder}"']
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        command,
        cwd=folder.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background ignores Ctrl-C
    )


def wait_for_lines(folder: Path, count: int, process: subprocess.Popen[str], text: str = "") -> None:
    """Waits until the journal has so many lines with a text, the process being alive."""
    file, deadline = folder / "evaluations.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        whole = file.read_text().split("\n")[:-1] if file.exists() else []
        if sum(text in line for line in whole) >= count:
            return
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"the run did not write {count} lines: {process.communicate()}")


LONGER = (*QUICK, "search.episodes=40", "finetune.epochs=0")


def killed(folder: Path, options: tuple[str, ...], count: int, text: str = "") -> str:
    """The journal of a run that was killed when its journal had so many lines with a text."""
    process = start(folder, *options)
    wait_for_lines(folder, count, process, text)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return content(folder / "evaluations.jsonl").decode()


def test_a_killed_run_ends_as_one_that_was_not_and_scores_nothing_again(
    amc_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert amc_search(*LONGER, "hydra.run.dir=whole").code == 0
    before = killed(tmp_path / "killed", LONGER, 10)
    assert 10 <= before.count("\n") < len(journal_of(tmp_path / "whole"))
    with (tmp_path / "killed" / "evaluations.jsonl").open("ab") as file:
        file.write(b'{"index": 99, "star')
    ended = amc_search(*LONGER, "hydra.run.dir=killed")
    assert ended.code == 0
    assert "torn last line" in ended.out
    assert "differs from the journal" not in ended.out
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    keys = [(line["start"], line["repair"], *line["removed"]) for line in journal_of(tmp_path / "killed")[1:]]
    assert len(keys) == len(set(keys)) == read(tmp_path / "killed")["search"]["evaluations"]
    scored: list[object] = []

    def note(_: object, model: object) -> float:
        scored.append(model)
        return 0.9

    monkeypatch.setattr("amc_env.evaluation.prefix.PrefixScorer.__call__", note)
    assert amc_search(*LONGER, "hydra.run.dir=killed").code == 0
    assert len(scored) == 1  # the original, whose accuracy the log states
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("evaluations.jsonl", "metrics.csv", "strategy.json"):
        assert content(one / name) == content(other / name), name
    assert figures(read(one)) == figures(read(other))


ADAPTING = (
    *(*SMALL, "agent=netadapt", "agent.reduction=0.1", "short_term.steps=5"),
    *("finetune.epochs=1", "export=[]", "latency.repeats=0"),
)


def test_a_run_killed_in_its_second_round_ends_as_one_that_was_not(
    amc_search: Command, tmp_path: Path
) -> None:
    assert amc_search(*ADAPTING, "hydra.run.dir=whole").code == 0
    before = killed(tmp_path / "killed", ADAPTING, 2, '"start": "round 1"')
    weights = tmp_path / "killed" / "starts" / "round-1.safetensors"
    made = weights.stat().st_mtime_ns
    assert len(before) < len(content(tmp_path / "whole" / "evaluations.jsonl"))
    assert amc_search(*ADAPTING, "hydra.run.dir=killed").code == 0
    assert weights.stat().st_mtime_ns == made  # what the first ended with is not trained again
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_episodes_may_grow_and_not_shrink_and_no_other_change_is_taken(
    amc_search: Command, tmp_path: Path
) -> None:
    run, options = tmp_path / "run", (*RANDOM, "finalists.count=2", "hydra.run.dir=run")
    assert amc_search(*options).code == 0
    names = ("evaluations.jsonl", "metrics.csv", "result.json", "config.yaml", "report.html")
    files = [run / name for name in names]
    before, first = [content(file) for file in files], journal_of(run)[1:]
    ended = amc_search(*options, "seed=5", "max_ratio=0.8")
    assert_refused(ended, "seed: 0 then, 5 now", "max_ratio: 0.9 then, 0.8 now", "another hydra.run.dir")
    assert [content(file) for file in files] == before
    grown = amc_search(*options, "search.episodes=9", "finetune.lr_fraction=0.05")  # no part of the search
    assert grown.code == 0
    assert "differs from the journal" not in grown.out
    assert journal_of(run)[1 : len(first) + 1] == first
    assert read(run)["search"]["episodes"] == 9
    assert_refused(amc_search(*options), "episodes: 9 then, 6 now")


def resumes(line: str) -> list[str]:
    """The overrides of the command with which a stopped run says that it is resumed."""
    program, *overrides = shlex.split(line.split("resume with: ")[1])
    assert program == "amc-search"
    return overrides


def test_a_signal_says_how_to_go_on_and_a_second_run_is_kept_out(amc_search: Command, tmp_path: Path) -> None:
    run = tmp_path / "a run's folder"
    process = start(run, *LONGER, "search.episodes=4000")
    wait_for_lines(run, 6, process)
    second = amc_search(*LONGER, "search.episodes=4000", f'hydra.run.dir="{run}"')
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in out + err
    assert_refused(second, "another run is using", str(run))
    (line,) = [text for text in out.splitlines() if text.startswith("stopped")]
    fewer = [override for override in resumes(line) if "episodes" not in override]
    ended = amc_search(*fewer, f"search.episodes={len(journal_of(run))}")
    assert_refused(ended, "episodes: 4000 then")  # the right folder, and its lock is free again


def test_ctrl_c_waits_for_the_candidate_and_says_how_to_go_on(
    amc_search: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores Ctrl-C
    score, asked = Pruner.score, itertools.count(1)

    def interrupted(self: Pruner, *given: Any) -> Any:
        if next(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return score(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Pruner, "score", interrupted)
        ended = amc_search(*RANDOM, "hydra.run.dir=run")
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)
    assert ended.code == 130
    assert len(journal_of(tmp_path / "run")) - 1 == 3
    (line,) = [text for text in ended.out.splitlines() if text.startswith("stopped")]
    assert amc_search(*resumes(line)).code == 0
    assert len(journal_of(tmp_path / "run")) - 1 == 6


@pytest.mark.parametrize("pause", [0.0, 0.5])
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, pause: float) -> None:
    run = tmp_path / "run"
    process = start(run, *LONGER, "search.episodes=4000")
    wait_for_lines(run, 6, process)
    process.send_signal(signal.SIGINT)
    time.sleep(pause)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # the latter while Python itself ends
    assert "Traceback" not in out + err
    assert not list(run.glob("**/.tmp-*"))


# ---------------------------------------------------------------------------------------------- mistakes


def test_weights_that_do_not_fit_are_listed(amc_search: Command, tmp_path: Path) -> None:
    state = ResNet(8, "conv", in_channels=1).state_dict()
    state["conv1.weight"] = torch.zeros(16, 3, 3, 3)
    state["more"] = state.pop("bn1.weight")
    save_file(state, tmp_path / "other.safetensors")
    ended = amc_search("model.weights=other.safetensors")
    assert_refused(
        ended,
        "conv1.weight [16, 3, 3, 3] instead of [16, 1, 3, 3]",
        "missing: bn1.weight",
        "unexpected: more",
    )


def write_parquet(folder: Path, labels: list[int], label: str = "label") -> None:
    pixels = io.BytesIO()
    Image.new("RGB", (32, 32)).save(pixels, format="PNG")
    images = [{"bytes": pixels.getvalue(), "path": None} for _ in labels]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"img": pyarrow.array(images, kind), label: pyarrow.array(labels, pyarrow.int64())}
    for part in ("train", "test"):
        parquet.write_table(pyarrow.table(columns), folder / f"{part}-0.parquet")


@pytest.mark.parametrize(
    ("labels", "column", "says"),
    [([0, 1], "fine_label", "no column label"), ([], "label", "cannot be read"), ([0, 10], "label", "10")],
    ids=["wrong column", "empty", "label outside"],
)
def test_data_that_cannot_be_used_is_refused(
    amc_search: Command, tmp_path: Path, labels: list[int], column: str, says: str
) -> None:
    write_parquet(tmp_path, labels, column)
    ended = amc_search("model=resnet20", "data=cifar10", f"data.path={tmp_path}", "search.images=1")
    assert_refused(ended, says)


def test_a_target_replaces_the_default_of_its_group(amc_search: Command) -> None:
    """Hydra alone would merge the two, and the default's settings would not be known to the other class."""
    agent = "agent={_target_: agents.baselines.Random, redraws: 7}"
    ended = amc_search(*RANDOM[:5], *RANDOM[6:], agent, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert read(Path("run"))["search"]["agent"] == "random"


def test_a_trained_policy_is_kept_and_asked_at_another_budget(amc_search: Command) -> None:
    policy = [*RANDOM, "agent=policy"]
    assert amc_search(*policy, "agent.group=3", "hydra.run.dir=trained").code == 0
    ended = amc_search(
        *policy, "agent.policy=trained", "agent.learn=false", "budget.ratio=0.4", "hydra.run.dir=asked"
    )
    assert ended.code == 0, ended.err
    result = read(Path("asked"))
    assert (result["search"]["evaluations"], result["budget"]["met"]) == (1, True)
    assert not (Path("asked") / "policy.safetensors").exists()


def no_number(accuracy: float, costs: object, met: bool) -> float:
    return float("nan")


def nan_reward() -> object:
    return no_number


def test_a_reward_of_nan_ends_the_search(amc_search: Command) -> None:
    ended = amc_search(*RANDOM, f"reward={{_target_:{__name__}.nan_reward}}", f"trusted=[{__name__}]")
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("error: the reward of score")
    assert "Traceback" not in ended.err


def broken_data(**settings: object) -> object:
    raise ValueError("a bug of ours")


def test_a_bug_keeps_its_traceback(amc_search: Command) -> None:
    with pytest.raises(ValueError, match="a bug of ours"):
        amc_search(f"data={{_target_:{__name__}.broken_data}}", f"trusted=[{__name__}]")


def test_mistakes_in_a_process_of_their_own(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "budget.ratio=2")
    out, err = process.communicate(timeout=60)
    assert_refused(Ended(process.returncode, out, err), "budget.ratio=2 must be")


def test_help_says_what_it_does_and_what_there_is(amc_search: Command) -> None:
    ended = amc_search("--help")
    assert ended.code == 0
    for text in (
        "under a budget",
        "AMC's DDPG",
        "search.episodes=300",
        "budget.ratio",
        "--multirun",
        "digits_cnn",
    ):
        assert text in ended.out
    assert "Powered by Hydra" not in ended.out


def test_output_that_nobody_reads_ends_without_a_traceback() -> None:
    command = f"{sys.executable} -m search.run_search --help | head -1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert ended.stdout.startswith("amc-search makes")
    assert ended.stderr == ""
