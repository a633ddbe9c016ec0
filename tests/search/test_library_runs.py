"""Networks and data by name from the command line: data is prepared as the network wants, and a search runs."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from image_parquets import photos, write_part
from refusals import refused
from running import Command

from search.config import compose as wiring

QUICK = ("agent=uniform", "finetune.epochs=0", "finalists.count=0", "latency.repeats=0", "export=[]")


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a folder with a parquet file of 20 photos of several sizes in three classes."""
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    write_part(tmp_path / "pictures", photos(20), [row % 3 for row in range(20)])
    return str(tmp_path / "pictures")


def test_data_is_prepared_as_the_network_s_weights_want(pictures: str, tiny_vit: Path) -> None:
    overrides = ["model=hf", f"model.name={tiny_vit}", "data=hub", f"data.name={pictures}"]
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("search", overrides)
    source = wiring.model_source(cfg)
    data = wiring.data_of(cfg, source)
    assert (data.image_shape, data.mean) == ((3, 16, 16), (0.5, 0.5, 0.5))
    assert source.load(data).config.num_labels == 3
    cfg.data.size, cfg.data.std = 12, [0.1, 0.2, 0.3]
    data = wiring.data_of(cfg, source)
    assert (data.image_shape, data.mean, data.std) == ((3, 12, 12), (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    with refused("does_not_run", "model"):
        source.load(data)


def test_a_sequence_classifier_is_searched_on_texts(
    amc_search: Command, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    lines = [f"{'good' if row % 2 else 'bad'} film,{row % 2}" for row in range(40)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *lines]))
    ended = amc_search(
        *("model=hf", f"model.name={tiny_bert}", "data=text", "data.name=./reviews.csv", *QUICK),
        *("keep=['*attention*']", "budget.ratio=0.9", "hydra.run.dir=run"),
    )
    assert ended.code == 0, ended.err
    assert (tmp_path / "run" / "report.html").exists()
