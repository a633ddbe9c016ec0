"""What worker processes score a run's candidates with: the same as in the run's own process."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import network, random_removed, same_state
from small_runs import go, small

from amc_env.evaluator import Bench, Removed, Start
from amc_env.prefix import ROOM
from amc_env.staging import Score, Staged
from amc_env.workers import _read, _write
from search.data import Data
from search.judging import Materials, start_of
from search.preparation import prepare
from search.ranking import Prepared
from search.settings import FinalistSettings, ScoringSettings, ShortTermSettings

SHORT = ShortTermSettings(steps=2, batch_size=16)


def ready(data: Data, granularity: str = "channel", steps: int = 2) -> Prepared:
    return prepare(network("concat"), data, small(granularity, short_term=replace(SHORT, steps=steps)))


@pytest.mark.parametrize("repair", ["none", "least_squares", "short_term"])
@pytest.mark.parametrize("granularity", ["channel", "fine_grained"])
def test_what_was_written_and_read_makes_the_same_networks(
    granularity: str, repair: str, small_data: Data, tmp_path: Path
) -> None:
    prepared = ready(small_data, granularity)
    start = start_of(prepared, "round 1", prepared.builder)
    here = Bench(Materials.of(prepared).scorer())
    _write(Materials.of(prepared), tmp_path / "materials.pt")
    _write((start.name, start.candidates, start.removed), tmp_path / "start.pt")
    materials = _read(tmp_path / "materials.pt")
    there, again = Bench(materials.scorer()), materials.start(*_read(tmp_path / "start.pt"))
    assert torch.equal(here.scorer.images, there.scorer.images)
    for seed in range(2):
        job = repair, random_removed(prepared.grids, seed)
        assert same_state(there.pruned(again, *job).network, here.pruned(start, *job).network)
        assert there.score(again, *job) == here.score(start, *job)


def test_what_only_the_run_s_own_process_needs_stays_there(small_data: Data) -> None:
    data = replace(small_data, loader=[(small_data.train.images.float(), small_data.train.labels)])
    untrained, trained = (Materials.of(ready(data, steps=steps)).run for steps in (0, 2))
    assert untrained.data.test is trained.data.test is None
    assert untrained.data.loader is None
    assert trained.data.loader is data.loader  # candidates are trained on it
    assert "builder" not in vars(trained)


def test_processes_share_the_room_for_what_candidates_share(small_data: Data) -> None:
    prepared = ready(small_data)
    settings = replace(prepared.settings, scoring=ScoringSettings(workers=3))
    crowded = Materials.of(replace(prepared, settings=settings)).scorer()
    assert Materials.of(prepared).scorer()._shared._kept.room == ROOM
    assert crowded._shared._kept.room == ROOM // 4


def test_stages_take_images_by_lot_and_all_of_them(small_data: Data) -> None:
    prepared = ready(small_data)
    search = prepared.data.search
    settings = replace(prepared.settings, scoring=ScoringSettings(first_images=10), seed=3)
    materials = Materials.of(replace(prepared, settings=settings))
    scorer = materials.scorer()
    assert isinstance(scorer, Staged)
    order = torch.randperm(len(search), generator=torch.Generator().manual_seed(3))
    assert torch.equal(materials.labels, search.labels[order])
    assert torch.equal(scorer.images, prepared.images(search)[order])
    assert scorer(prepared.model) == Materials.of(prepared).scorer()(prepared.model)
    again = replace(materials, images=scorer.images).scorer()  # as in a worker
    assert torch.equal(again.images, scorer.images)


def test_workers_score_finalists_too_and_end_with_the_search(
    small_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    class Handed:
        """Workers that are none."""

        def __init__(self, materials: Materials, count: int, threads: int | None):
            self.materials = materials

        @contextmanager
        def scoring(
            self, start: Start, repair: str, strategies: Mapping[Removed, float]
        ) -> Iterator[Callable[[Removed], Score]]:
            notes.append(repair)
            yield lambda removed: Score(sum(removed) / 1000)

        def close(self) -> None:
            notes.append("closed")

    monkeypatch.setattr("search.judging.Workers", Handed)
    finalists = FinalistSettings(2, "none")
    go(tmp_path, small_data, small("channel", scoring=ScoringSettings(workers=2), finalists=finalists))
    assert notes == ["batch_norm", "none", "closed"]
