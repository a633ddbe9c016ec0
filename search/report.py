"""report.html: one page that says what a run was asked and what came out, from the files the run left.

The page stands alone: pictures are data URIs, the style is inline, nothing is fetched and no script runs. A stage that
the run left out (no fine-tuning, no export) leaves its part of the page out.
"""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from amc_env.errors import UserError
from amc_env.evaluation.precision import FLOAT32
from search.formatting import (
    Comparison,
    amount,
    budget_lines,
    comparison,
    cost_name,
    duration,
    history_line,
    masked,
    pattern_line,
    percent,
    size,
    split_name,
    storage_rows,
)
from search.plots import Candidate, Width, plot_channels, plot_finetune, plot_reward, plot_tradeoff

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class RunFiles:
    """What a run left in its folder, parsed; an absent file is an empty value.

    Attributes:
        result: result.json.
        decisions: decision -> {"removed", "total"}, in forward order (strategy.json).
        header: the first line of evaluations.jsonl.
        evaluations: its other lines.
        metrics: the rows of metrics.csv, as text.
        configuration: the resolved configuration as YAML or JSON text.
        overrides: the choices made on the command line.
    """

    folder: Path
    result: dict[str, Any]
    decisions: dict[str, dict[str, Any]]
    header: dict[str, Any]
    evaluations: tuple[dict[str, Any], ...]
    metrics: tuple[dict[str, str], ...]
    configuration: str
    overrides: str

    def series(self, name: str) -> dict[int, float]:
        """Step -> value of one metric, in the order of steps; rows without it are left out."""
        found = {int(row["step"]): float(row[name]) for row in self.metrics if row.get(name)}
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Picture:
    """One figure of the page.

    Attributes:
        source: PNG as a data URI.
        shape: 'plain', or 'long' and 'longer' where it scrolls sideways on a small screen rather than shrink.
    """

    title: str
    caption: str
    source: str
    shape: str = "plain"


@dataclass(frozen=True)
class Snippet:
    """How to load the small network in one way."""

    title: str
    code: str


def write_report(folder: str | Path) -> Path:
    """Write plots/*.png and report.html into a run folder, from the files in it.

    Args:
        folder: run folder; result.json must be there, everything else may be missing.

    Returns:
        The page's path.

    Raises:
        UserError: if there is no readable result.json, as in a run that has not ended.
    """
    run = read_run(Path(folder))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(**_view(run))
    path = run.folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_run(folder: Path) -> RunFiles:
    """Read what a run left behind.

    Raises:
        UserError: if there is no readable result.json.
    """
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"no readable result.json in {folder} ({error}); a run writes it when it ends: "
            "start the same command with hydra.run.dir set to this folder to finish it"
        ) from error
    lines = list(_json_lines(folder / "evaluations.jsonl"))
    header: dict[str, Any] = next((line["header"] for line in lines if "header" in line), {})
    return RunFiles(
        folder=folder,
        result=result,
        decisions=_decisions(folder, result),
        header=header,
        evaluations=tuple(line for line in lines if "accuracy" in line),
        metrics=_csv_rows(folder / "metrics.csv"),
        configuration=_text(folder / ".hydra" / "config.yaml") or _json_text(header.get("config")),
        overrides=_text(folder / ".hydra" / "overrides.yaml"),
    )


def headline(result: Mapping[str, Any]) -> str:
    """One sentence: the network, the share of the cost that is left, and its accuracy before and after."""
    base, final = result.get("base"), result.get("finetuned") or result.get("pruned")
    model = result.get("model") or "The network"
    if not base or not final:
        return f"{model}: no pruned network was delivered."
    state = "after fine-tuning" if result.get("finetuned") else "without fine-tuning"
    before, after = percent(base["accuracy"]), percent(final["accuracy"])
    if base["split"] == final["split"]:
        accuracies = f"{before} → {after} accuracy on the {split_name(final['split'])}"
    else:
        accuracies = (
            f"{before} on the {split_name(base['split'])} → {after} on the {split_name(final['split'])}"
        )
    cost = (result.get("budget") or {}).get("cost", "params" if masked(result) else "macs")
    cost = cost if base.get(cost) and final.get(cost) is not None else "macs"
    share, name = percent(final[cost] / base[cost], 1), cost_name(cost, masked(result))
    return f"{model} to {share} of its {name}: {accuracies} {state}."


def _view(run: RunFiles) -> dict[str, Any]:
    """The names that the template uses."""
    result = run.result
    table: Comparison = comparison(result)
    return {
        "headline": headline(result),
        "asked": _asked(result),
        "table": table,
        "budgets": budget_lines(result),
        "masked": masked(result),
        "granularity": {"speed": "", "unit": ""} | (result.get("granularity") or {}),
        "history": history_line(result),
        "storage": storage_rows(result),
        "pattern": pattern_line(result),
        "pictures": _pictures(run),
        "decisions": [_decision_row(result, name, decision) for name, decision in run.decisions.items()],
        "skipped": _skipped(result),
        "exports": [(Path(e["path"]).name, size(e["bytes"])) for e in _kept_exports(result)],
        "failed": [(e["format"], e["error"]) for e in result.get("exports") or [] if e.get("error")],
        "snippets": _snippets(result),
        "command": result.get("command") or "",
        "configuration": run.configuration,
        "overrides": run.overrides,
        "facts": _facts(run),
        "folder": run.folder.name,
    }


def _asked(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Short facts about the search, as (what, value)."""
    search = result.get("search") or {}
    facts = [
        ("data", result.get("data")),
        ("granularity", _granularity_name(result)),
        ("agent", search.get("agent")),
        ("seed", search.get("seed")),
    ]
    if search.get("stages") or search.get("episodes") != 1:  # else nothing was searched
        facts += _of_the_search(search, resumed=bool(result.get("resumed")))
    return [(name, str(value)) for name, value in facts if value is not None]


def _of_the_search(search: Mapping[str, Any], resumed: bool) -> Iterator[tuple[str, Any]]:
    last = ", last stage" if search.get("stages") else ""
    if last:
        yield "stages", ", ".join(f"{100 * ratio:.3g}%" for ratio in search["stages"])
    yield f"episodes{last}", search.get("episodes")
    if search.get("precision") not in (None, FLOAT32):
        yield "scored in", search["precision"]
    if "evaluations" in search:
        again = f", {search['cache_hits']} met again" if search.get("cache_hits") is not None else ""
        yield f"evaluations{last}", f"{search['evaluations']}{again}"
    if search.get("seconds") is not None:
        yield f"search time{last}{', this session' if resumed else ''}", duration(search["seconds"])
    if search.get("best_reward") is not None:
        yield "best reward", f"{search['best_reward']:.4f}"


def _pictures(run: RunFiles) -> list[Picture]:
    made = (_channels_picture(run), _reward_picture(run), _tradeoff_picture(run), _finetune_picture(run))
    return [picture for picture in made if picture is not None]


def _channels_picture(run: RunFiles) -> Picture | None:
    zeros = masked(run.result)
    widths = _weights_kept(run) if zeros else _channels_kept(run)
    if not widths:
        return None
    unit = "weights" if zeros else "channels"
    path = plot_channels(widths, run.folder / "plots" / "channels.png", unit)
    caption = "Channels kept per decision, front to back, before the original network's. Coupled layers share one decision."
    if zeros:
        caption = (
            "Weights kept per layer, front to back, before all weights of the layer; the others are zero."
        )
        pattern = run.result.get("pattern")
        caption += f" A layer is dense or keeps {pattern['n']} of every {pattern['m']}." if pattern else ""
    shape = "plain" if len(widths) <= 12 else "long" if len(widths) <= 30 else "longer"
    return Picture("Weights kept" if zeros else "What was kept", caption, _data_uri(path), shape)


def _channels_kept(run: RunFiles) -> list[Width]:
    return [Width(name, d["total"] - d["removed"], d["total"]) for name, d in run.decisions.items()]


def _weights_kept(run: RunFiles) -> list[Width]:
    layers = run.result.get("layers") or {}
    return [Width(name, layers[name]["nonzero"], layers[name]["weights"]) for name in run.decisions]


def _reward_picture(run: RunFiles) -> Picture | None:
    rewards, search = run.series("episode/reward"), run.result.get("search") or {}
    if len(rewards) < 2 or rounds_begun(
        run
    ):  # rewards of other weights do not compare: the next picture has the rounds
        return None
    warmup = int(search.get("warmup") or 0)
    stages = _boundaries(list(rewards), search.get("stage_episodes") or math.inf)
    path = plot_reward(
        list(rewards.values()), run.folder / "plots" / "reward.png", warmup, _budget_note(run.result), stages
    )
    caption = "Reward of every episode and the best so far, from accuracies on the search split."
    if stages:
        caption += (
            " Each stage searches under its own budget, from the network that the one before left: rewards of "
            "different stages do not compare."
        )
    return Picture("The search", caption, _data_uri(path))


def _boundaries(steps: list[int], each: float) -> list[int]:
    """How many episodes lie before each further stage, whose steps begin after a multiple of ``each``."""
    numbers = [(step - 1) // each for step in steps]
    return [place for place in range(1, len(steps)) if numbers[place] != numbers[place - 1]]


def _tradeoff_picture(run: RunFiles) -> Picture | None:
    cost, whole, limit = _cost_axis(run.result)
    starts = (run.result.get("search") or {}).get("start") or ["original"]
    begun = rounds_begun(run)
    shown = starts if begun else starts[-1:]
    scored = [e for e in run.evaluations if cost in e["costs"] and e.get("start", shown[0]) in shown]
    if len({tuple(e["removed"]) for e in scored}) < 2 or not whole:
        return None
    points = [(e, _candidate(e, cost, whole)) for e in scored]
    delivered = [decision["removed"] for decision in run.decisions.values()]
    # The last of equals: a strategy may have been scored once more, by a dearer repair, before it was delivered.
    best = next((point for e, point in reversed(points) if e["removed"] == delivered), None)
    candidates, path = [point for _, point in points], run.folder / "plots" / "tradeoff.png"
    rounds = [_candidate(e, cost, whole) for e in begun]
    plot_tradeoff(candidates, path, cost, limit=limit, best=best, masked=masked(run.result), rounds=rounds)
    of = "that the last stage " if (run.result.get("search") or {}).get("stages") else ""
    caption = (
        f"All strategies {of}scored. Accuracies are on the search split, before fine-tuning: it was split off the "
        "training data, which a pretrained network has seen, so they compare strategies and do not predict the test "
        "accuracy."
    )
    return Picture("Accuracy against cost", caption, _data_uri(path))


def rounds_begun(run: RunFiles) -> list[Mapping[str, Any]]:
    """What each round of an agent that adopts weights began with: the first evaluation of its start."""
    starts = (run.result.get("search") or {}).get("start") or []
    if not any(start.startswith("round ") for start in starts):
        return []
    firsts: dict[str, Mapping[str, Any]] = {}
    for evaluation in run.evaluations:
        firsts.setdefault(evaluation.get("start", ""), evaluation)
    return [firsts[start] for start in starts if start in firsts]


def _finetune_picture(run: RunFiles) -> Picture | None:
    losses = run.series("finetune/loss")
    if not losses:
        return None
    path = plot_finetune(
        list(losses.values()), run.folder / "plots" / "finetune.png", run.series("finetune/accuracy") or None
    )
    caption = "Training loss per epoch; the last epoch is the one kept."
    search = run.result.get("search") or {}
    if search.get("stages") or search.get("rounds") or "start" in search:
        caption += " All trainings of the run follow one another: the loss jumps where more is pruned."
    return Picture("Fine-tuning", caption, _data_uri(path))


def _cost_axis(result: Mapping[str, Any]) -> tuple[str, float, float | None]:
    """The cost that the search was bounded on, the original's, and the limit as a share of it."""
    budget, base = result.get("budget") or {}, result.get("base") or {}
    cost = budget.get("cost", "macs")
    if not base.get(cost):
        return "macs", base.get("macs") or 0.0, None
    return cost, base[cost], budget["limit"] / base[cost] if budget else None


def _candidate(evaluation: Mapping[str, Any], cost: str, whole: float) -> Candidate:
    share = evaluation["costs"][cost] / whole if whole else math.nan
    return Candidate(evaluation["accuracy"], share, bool(evaluation["met"]))


def _budget_note(result: Mapping[str, Any]) -> str:
    budget = result.get("budget")
    if not budget:
        return ""
    name = cost_name(budget["cost"], masked(result))
    stages = (result.get("search") or {}).get("stages") or [budget.get("ratio")]
    if stages[-1] is not None:
        return f"budget {', '.join(f'{100 * ratio:.3g}%' for ratio in stages)} of {name}"
    return f"budget {amount(budget['cost'], budget['limit'])} {name}"


def _granularity_name(result: Mapping[str, Any]) -> str | None:
    """As conf has it; of n:m with its numbers."""
    granularity = result.get("granularity") or {}
    return f"{granularity['n']}:{granularity['m']}" if "n" in granularity else granularity.get("name")


def _decision_row(result: Mapping[str, Any], name: str, decision: Mapping[str, Any]) -> dict[str, Any]:
    removed, total = decision["removed"], decision["total"]
    kept = f"{total - removed:,} / {total:,}"
    if "pattern" in result:
        kept = f"{total - removed}:{total}" if removed else "dense"
    return {
        "name": name,
        "kept": kept,
        "ratio": percent(removed / total, 1),
        "share": 1 - removed / total,
    }


def _skipped(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Skipped layers, grouped by reason."""
    gathered: dict[str, list[str]] = {}
    for layer in result.get("skipped") or []:
        gathered.setdefault(layer["reason"], []).append(layer["name"])
    return list(gathered.items())


def _kept_exports(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [export for export in result.get("exports") or [] if not export.get("error")]


def _snippets(result: Mapping[str, Any]) -> list[Snippet]:
    paths = [Path(export["path"]).name for export in _kept_exports(result)]
    made = []
    for path in paths:
        if path.endswith(".safetensors"):
            made.append(Snippet("Onto the unpruned class (this project)", _LOAD_PRUNED))
        elif path.endswith(".pt2"):
            made.append(Snippet("With PyTorch alone", _LOAD_PT2.format(file=path)))
        elif path.endswith(".onnx"):
            made.append(Snippet("With ONNX Runtime", _LOAD_ONNX.format(file=path)))
    return made


_LOAD_PRUNED = """from search import load_pruned

module = ...  # the unpruned network, as you build it
load_pruned(module, "RUN_FOLDER")  # model.safetensors and channels.json
module.eval()
logits = module(images)  # float32 [N, C, H, W], normalised"""

_LOAD_PT2 = """import torch

module = torch.export.load("RUN_FOLDER/{file}").module()
logits = module(images)  # float32 [N, C, H, W], normalised"""

_LOAD_ONNX = """import onnxruntime

session = onnxruntime.InferenceSession("RUN_FOLDER/{file}")
name = session.get_inputs()[0].name
(logits,) = session.run(None, {{name: images}})  # NumPy float32 [N, C, H, W], normalised"""


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """Machine and versions, flattened to (dotted name, value)."""
    known = {"machine": run.result.get("machine"), "versions": run.header.get("versions")}
    # What the journal's header says besides: fingerprints, threads, layout. The configuration has its own part.
    rest = {name: value for name, value in run.header.items() if name not in ("config", "versions")}
    return [(name, value) for name, value in _flat(known | rest) if value]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _decisions(folder: Path, result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    path = folder / "strategy.json"
    if not path.exists():
        return {}
    decisions: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("decisions", {})
    # JSON objects keep their order, so the strategy is read front to back as it was written.
    return decisions if result.get("pruned") or result.get("finetuned") else {}


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in _text(path).splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the torn last line of a killed run
            return


def _csv_rows(path: Path) -> tuple[dict[str, str], ...]:
    return tuple(csv.DictReader(_text(path).splitlines()))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _json_text(value: object) -> str:
    return json.dumps(value, indent=2) if value else ""


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
