"""Disturbs runs of all commands and compares what they leave with undisturbed ones: `python scripts/soak.py OUT`.

Kills at random moments, then the same command again; files that may not grow, as on a full disk; a folder that may
not be written; a long search, whose memory and open files are printed. Exit code 1 where anything is not as it should be.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SMALL = ["device=cpu", "model=digits_mlp", "model.epochs=3", "search.images=100", "repair.images=100"]
RUN = [*SMALL, "latency.repeats=0", "export=[safetensors]", "finetune.epochs=5"]
CASES: dict[str, tuple[str, list[str]]] = {
    "search": ("run_search", [*RUN, "search.episodes=60", "finalists.count=4"]),
    "netadapt": ("run_search", [*RUN, "agent=netadapt", "budget.ratio=0.3", "short_term.steps=3"]),
    "stages": ("run_search", [*RUN, "search.stages=[0.7,0.5]", "budget.ratio=0.5", "search.episodes=20"]),
    "apply": ("run_apply", [*RUN, "ratio=0.5", "finetune.epochs=20"]),
    "sensitivity": ("run_sensitivity", SMALL),
    "latency": ("run_latency", ["device=cpu", "model=digits_mlp", "latency.repeats=20"]),
}
TIMES = {"seconds", "resumed", "command", "cache_hits", "evaluations"}
problems: list[str] = []


def check(right: bool, text: str) -> None:
    """Note a problem where something is not right."""
    if not right:
        problems.append(text)
        print("PROBLEM:", text, flush=True)


def start(case: str, folder: Path, *more: str, prepare: Callable[[], None] | None = None) -> Any:
    """A case's command in a folder, in a process of its own."""
    module, options = CASES[case]
    command = [sys.executable, "-m", f"search.{module}", *options, *more, f"hydra.run.dir={folder}"]
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, preexec_fn=prepare, **streams)


def finish(process: Any) -> tuple[int, str]:
    """The exit code of a process, and its last line on stderr."""
    err = process.communicate()[1]
    return process.returncode, f"traceback: {err}" if "Traceback" in err else (err.splitlines() or [""])[-1]


def timeless(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def left(folder: Path) -> dict[str, Any]:
    """What a finished run left, without times."""
    journal = folder / "evaluations.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]] if journal.exists() else []
    trials = [line for line in lines if "score" in line]  # others say which weights were kept
    scores = {
        str([trial.get(key) for key in ("start", "repair", "removed")]): trial["score"] for trial in trials
    }
    check(len(scores) == len(trials), f"{folder}: scored twice")
    rest = [file.name for file in folder.iterdir() if file.name.startswith(".tmp") or file.name == "training"]
    check(not rest, f"{folder}: {rest} are left over")
    weights = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    files = {file.name: timeless(json.loads(file.read_text())) for file in folder.glob("*.json")}
    return {"trials": scores, **weights, **files}


def compare(case: str, folder: Path, expected: dict[str, Any]) -> None:
    """Finish a disturbed run, and compare it with the undisturbed one."""
    code, line = finish(start(case, folder))
    check(code == 0, f"{folder}: exit code {code} on resuming: {line}")
    found = left(folder) if code == 0 else expected
    check(found == expected, f"{folder}: {[k for k in expected if found.get(k) != expected[k]]} differ")


def kill(case: str, folder: Path, kind: signal.Signals, after: float) -> None:
    """Run a case that gets a signal after so many seconds."""
    process = start(case, folder)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(kind)
    code, line = finish(process)
    right = {0, -kind, 128 + signal.SIGTERM}  # -SIGTERM before the handler stands
    check(code in right and "traceback" not in line, f"{folder}: {kind.name}: exit code {code}: {line}")


def refuse(case: str, folder: Path, prepare: Callable[[], None] | None = None) -> None:
    """Run a case that cannot write; it must end in one line."""
    code, line = finish(start(case, folder, prepare=prepare))
    check(code in (1, 2) and line.startswith("error: "), f"{folder}: exit code {code}: {line}")


def watch(folder: Path, episodes: int) -> None:
    """Print memory and open files of a long search at each fifth of its episodes; neither may grow by a fifth.

    The last fifth may take no more than twice as long as the second.
    """
    options = (
        "model=digits_cnn",
        "agent=ddpg",
        f"search.episodes={episodes}",
        "baselines=[]",
        "finetune.epochs=0",
    )
    process = start("search", folder, *options)
    seen: list[tuple[int, int]] = []
    times: list[float] = []
    metrics, proc, began = folder / "metrics.csv", Path(f"/proc/{process.pid}"), time.monotonic()
    wanted = [episodes * part // 5 for part in range(1, 6)]
    while process.poll() is None and wanted:
        time.sleep(0.2)
        done = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
        if done >= wanted[0]:
            memory = int((proc / "statm").read_text().split()[1]) * resource.getpagesize() // 2**20
            files, seconds = len(list((proc / "fd").iterdir())), time.monotonic() - began
            print(f"{done} episodes, {seconds:.0f} s: {memory} MiB, {files} open files", flush=True)
            wanted.pop(0)
            seen.append((memory, files))
            times.append(seconds)
    code, line = finish(process)
    check(code == 0, f"{folder}: exit code {code}: {line}")
    check(len(seen) == 5, f"{folder}: {len(seen)} of 5 looks at the search, which ended too soon")
    if len(times) == 5:
        second, last = times[1] - times[0], times[4] - times[3]
        check(last <= 2 * second, f"{folder}: a fifth took {second:.0f} s and the last one {last:.0f} s")
    for what, counts in zip(("MiB", "open files"), zip(*seen, strict=True), strict=False):
        check(counts[-1] <= 1.2 * counts[0], f"{folder}: {counts[0]} {what} grew to {counts[-1]}")


def main() -> None:
    """All disturbances."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a new folder for the runs")
    parser.add_argument("--kills", type=int, default=9, help="random moments for each command")
    parser.add_argument("--episodes", type=int, default=1500, help="of the long search; 0: none")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    given = parser.parse_args()
    moments = random.Random(0)
    for case in given.cases:
        out, began = given.out.absolute() / case, time.monotonic()
        check(finish(start(case, out / "undisturbed"))[0] == 0, f"{case} fails undisturbed")
        expected, seconds = left(out / "undisturbed"), time.monotonic() - began
        for number in range(given.kills):
            kind, folder = (signal.SIGKILL, signal.SIGTERM)[number % 2], out / f"kill_{number}"
            kill(case, folder, kind, moments.uniform(0.2, 1) * seconds)
            compare(case, folder, expected)
        for size in (200, 5_000):
            full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
            refuse(case, out / f"full_{size}", full)
            compare(case, out / f"full_{size}", expected)
        (out / "read_only").mkdir(mode=0o555)
        refuse(case, Path("/sys/soak") if os.geteuid() == 0 else out / "read_only")
        print(
            f"{case}: {seconds:.0f} s undisturbed, {given.kills} kills, full disk, read-only folder",
            flush=True,
        )
    if given.episodes:
        watch(given.out.absolute() / "long", given.episodes)
    print(f"{len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
