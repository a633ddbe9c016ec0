"""The journal: what it keeps, what it reads back, and whom it keeps out."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from amc_env.errors import UserError
from amc_env.evaluation.evaluator import Key
from amc_env.evaluation.pruner import ORIGINAL
from amc_env.space import Grid, SearchSpace, Trial
from search.files import sealed
from search.study.journal import FILE, Journal

HEADER: Mapping[str, Any] = {"config": {"seed": 1, "search": {"episodes": 10}}, "weights": "abc"}


class Kept:
    """A cost: units that stay of 8 and 4."""

    name = "kept"
    unit = "units"

    def __call__(self, removed: Any) -> float:
        return float(12 - sum(removed))


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace([Grid("a", 8, 1, 7), Grid("b", 4, 1, 3)], [Kept()], [])


def trial(space: SearchSpace, removed: tuple[int, ...], repair: str = "none", number: int = 1) -> Trial:
    accuracy = 1.0 - 0.1 * sum(removed) / 3
    strategy, costs = space.strategy(removed), space.cost(removed)
    return Trial(number, strategy, ORIGINAL, repair, accuracy, costs, True, accuracy - 1)


def fill(journal: Journal, space: SearchSpace, *strategies: tuple[int, ...], repair: str = "none") -> None:
    for removed in strategies:
        key = Key(ORIGINAL, repair, removed)
        if journal.get(key) is None:
            journal[key] = trial(space, removed, repair, len(journal) + 1)


def open_(folder: Path, space: SearchSpace, **changes: Any) -> Journal:
    return Journal(folder, {**HEADER, **changes}, space, may_grow=("config.search.episodes",))


def test_lines_are_on_disk_at_once_and_read_back_equal(tmp_path: Path, space: SearchSpace) -> None:
    with open_(tmp_path, space) as journal:
        assert journal.get(Key(ORIGINAL, "none", (1, 2))) is None
        fill(journal, space, (1, 2), (3, 0))
        lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
        assert [line.get("removed") for line in lines] == [None, [1, 2], [3, 0]]
        assert [line.get("number") for line in lines] == [None, 1, 2]
    before = (tmp_path / FILE).read_bytes()
    with open_(tmp_path, space) as journal:
        assert (journal.replayed, len(journal)) == (2, 2)
        assert journal.get(Key(ORIGINAL, "none", (1, 2))) == trial(space, (1, 2))
        assert journal.get(Key(ORIGINAL, "other", (1, 2))) is None
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize("torn", ['{"number": 2, "st', "x", '{"number": 2}'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, space: SearchSpace, torn: str) -> None:
    with open_(tmp_path, space) as journal:
        fill(journal, space, (1, 2), (3, 0))
    before = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(before + torn)
    with open_(tmp_path, space) as journal:
        assert journal.replayed == 2
    assert (tmp_path / FILE).read_text() == before


def test_a_damaged_header_is_refused_and_left_as_it_is(tmp_path: Path, space: SearchSpace) -> None:
    with open_(tmp_path, space) as journal:
        fill(journal, space, (1, 2))
    damaged = (tmp_path / FILE).read_text().replace('"weights": "abc"', '"weights": "abd"')
    (tmp_path / FILE).write_text(damaged)
    for _ in range(2):  # the refusal lets go of the folder
        with refused("damaged", ""):
            open_(tmp_path, space)
    assert (tmp_path / FILE).read_text() == damaged


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("0.9", "0.8"),
        ('"score": 0.9', '"score": null'),
        ('"score": 0.9', '"score": "high"'),
        ('"costs": {"kept": 9.0}', '"costs": {}'),
        ('"costs": {"kept": 9.0}', f'"costs": {"[" * 100_000}'),
        ('"number": 2', f'"number": {"9" * 5000}'),
        ('"start": "original"', '"start": "\udcff"'),
        ('"check": ', '"chick": '),
        ("{", ""),
    ],
    ids=["digit", "null", "text", "no costs", "deep", "huge", "no UTF-8", "no checksum", "no object"],
)
def test_a_damaged_line_is_named_and_scored_again_in_its_place(
    tmp_path: Path, space: SearchSpace, caplog: pytest.LogCaptureFixture, good: str, bad: str
) -> None:
    strategies = (1, 2), (2, 1), (0, 3), (3, 0)
    with open_(tmp_path, space) as journal:
        fill(journal, space, *strategies)
    whole = (tmp_path / FILE).read_bytes()
    lines = whole.splitlines(keepends=True)
    changed = lines[2].replace(good.encode(), bad.encode("utf-8", "surrogateescape"))
    assert changed != lines[2]
    (tmp_path / FILE).write_bytes(b"".join([*lines[:2], changed, *lines[3:]]))
    for _ in range(2):  # a run that does not come so far leaves the line
        with open_(tmp_path, space) as journal:
            assert journal.replayed == 3
    with open_(tmp_path, space) as journal:
        fill(journal, space, *strategies)
    assert (tmp_path / FILE).read_bytes() == whole
    assert [message.rsplit(": ", 1)[1] for message in warnings(caplog)] == ["3"] * 3


def test_a_sound_line_of_another_network_is_scored_again(
    tmp_path: Path, space: SearchSpace, caplog: pytest.LogCaptureFixture
) -> None:
    with open_(tmp_path, space):
        pass
    with (tmp_path / FILE).open("a") as file:
        file.write(sealed({"start": "original", "repair": "none", "removed": [1, 2, 3]}))
    with open_(tmp_path, space) as journal:
        assert journal.replayed == 0
    assert len(warnings(caplog)) == 1


def test_a_folder_in_the_journal_s_place_is_refused(tmp_path: Path, space: SearchSpace) -> None:
    (tmp_path / FILE).mkdir()
    with refused("unreadable", ""):
        open_(tmp_path, space)


@pytest.mark.parametrize("lock", ["folder", "link"])
def test_a_lock_that_cannot_be_written_is_refused(tmp_path: Path, space: SearchSpace, lock: str) -> None:
    if lock == "folder":
        (tmp_path / ".lock").mkdir()
    else:
        (tmp_path / "other").write_text("kept")
        (tmp_path / ".lock").symlink_to(tmp_path / "other")
    with refused("unwritable", ""):
        open_(tmp_path, space)
    assert lock == "folder" or (tmp_path / "other").read_text() == "kept"


def test_a_second_run_is_kept_out_until_the_first_is_done(tmp_path: Path, space: SearchSpace) -> None:
    with open_(tmp_path, space), refused("in_use", ""):
        open_(tmp_path, space)
    with open_(tmp_path, space) as journal:
        assert len(journal) == 0


def test_every_difference_is_named_and_nothing_is_written(tmp_path: Path, space: SearchSpace) -> None:
    open_(tmp_path, space).close()
    before = (tmp_path / FILE).read_bytes()
    changed = {"config": {"seed": 2, "search": {"episodes": 10}, "new": True}, "weights": "xyz"}
    with pytest.raises(UserError) as error:
        open_(tmp_path, space, **changed)
    for part in (
        "config.seed: 1 then, 2 now",
        "config.new: None then, True now",
        "weights: abc then, xyz now",
    ):
        assert part in str(error.value)
    assert (tmp_path / FILE).read_bytes() == before


def test_episodes_may_grow_and_not_shrink(tmp_path: Path, space: SearchSpace) -> None:
    open_(tmp_path, space).close()
    open_(tmp_path, space, config={"seed": 1, "search": {"episodes": 20}}).close()
    with refused("other_configuration", ""):
        open_(tmp_path, space)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_replay_that_takes_another_way_says_so_once_and_goes_on(
    tmp_path: Path, space: SearchSpace, caplog: pytest.LogCaptureFixture
) -> None:
    with open_(tmp_path, space) as journal:
        fill(journal, space, (1, 0), (2, 0), (3, 0))
    with open_(tmp_path, space) as journal:
        fill(journal, space, (1, 0), (1, 1), (1, 2))
        assert len(journal) == 5
    (message,) = warnings(caplog)
    assert "after 1 of 3 evaluations" in message


def test_more_episodes_after_the_finalists_are_no_other_way(
    tmp_path: Path, space: SearchSpace, caplog: pytest.LogCaptureFixture
) -> None:
    with open_(tmp_path, space) as journal:
        fill(journal, space, (1, 0), (2, 0))
        fill(journal, space, (2, 0), (1, 0), repair="dear")
    with open_(tmp_path, space) as journal:
        fill(journal, space, (1, 0), (2, 0), (1, 0), (3, 0))
        fill(journal, space, (3, 0), repair="dear")
    assert warnings(caplog) == []
