"""What several test files share: where real data lies, a cache of the tests' own, and small random data."""

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# One thread, here and in the commands that tests start: networks are tiny, and threads that wait for each other on a
# busy machine cost tenfold. It must be said before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from running import Command, Ended

import search
from search import run_search
from search.data.base import Data, Split, fingerprint
from search.data.loaders import seeded

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Keep what tests decode or train in pytest's cache: not in the user's, and there for the next run."""
    if "PRUNING_CACHE" not in os.environ and hasattr(config, "cache"):
        os.environ["PRUNING_CACHE"] = str(config.cache.mkdir("pruning"))


@cache
def _importable_torchvision() -> torch.library.Library | None:
    """Declare the operators that a torchvision of another build than torch does not bring, so that it can be imported."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define(
            "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
            "int sampling_ratio, bool aligned) -> Tensor"
        )
        return library
    return None


@pytest.fixture(scope="session")
def optional() -> Callable[[str], Any]:
    """Gives torchvision, timm or transformers; the test is skipped where it is not installed."""

    def package(name: str) -> Any:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the optional package {name} is not installed")
        _importable_torchvision()
        return importlib.import_module(name)

    return package


def find_shared_data() -> Path | None:
    """The folder with real data (cifar10/, weights/): PRUNING_SHARED_DATA, else beside the repository."""
    named = os.environ.get("PRUNING_SHARED_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data; a test that asks for it is skipped where there is none."""
    folder = find_shared_data()
    if folder is None:
        pytest.skip("no real data: point PRUNING_SHARED_DATA at a folder with cifar10/ and weights/")
    return folder


def make_data(
    channels: int = 3, size: int = 8, classes: int = 4, count: int = 64, augment: bool = False
) -> Data:
    """Random uint8 images whose label is the quarter of the image that is bright: easy to learn."""
    generator = torch.Generator().manual_seed(7)

    def split(number: int) -> Split:
        images = torch.randint(0, 120, (number, channels, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.arange(number) % classes
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = divmod(label % 4, 2)
            half = size // 2
            image[:, row * half : (row + 1) * half, column * half : (column + 1) * half] += 130
        return Split(images, labels)

    train, search, test = split(count), split(count // 2), split(count // 2)
    return Data(
        name="random",
        train=train,
        search=search,
        test=test,
        classes=tuple(f"class {label}" for label in range(classes)),
        mean=(0.4,) * channels,
        std=(0.25,) * channels,
        augment=augment,
        fingerprint=fingerprint(train, search, test),
    )


@pytest.fixture
def small_data() -> Data:
    """64 training, 32 search and 32 test images of 3 x 8 x 8 in four classes."""
    return make_data()


@pytest.fixture(scope="session")
def tiny_vit(optional: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained vision transformer of transformers for 16 x 16 images in three classes."""
    transformers = optional("transformers")
    folder = tmp_path_factory.mktemp("tiny_vit")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **shape)
    with seeded(0):
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


WORDS = ("good", "bad", "film", "a", "very", "the", "story")


@pytest.fixture(scope="session")
def tiny_bert(optional: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained BERT of transformers for two classes, and a tokenizer that knows WORDS."""
    transformers = optional("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny_bert")
    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    split = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=split, **special).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, num_labels=2, **shape)
    with seeded(0):
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def amc_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """Runs amc-search with overrides in this process, which saves seconds of imports; folders are relative to tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0"))  # the command sets it
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def settle() -> None:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        GlobalHydra.instance().clear()

    def command(*overrides: str) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["amc-search", *overrides])
        try:
            with pytest.raises(SystemExit) as ended:
                run_search.main()
        finally:
            settle()
        written = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, written.out, written.err)

    yield command
    settle()


@pytest.fixture
def _quick_compress(monkeypatch: pytest.MonkeyPatch) -> None:
    """`search.compress` with at most six episodes and one epoch of fine-tuning."""
    compress = search.compress

    def quick(*given: Any, episodes: int, finetune: int, **more: Any) -> Any:
        return compress(*given, episodes=min(episodes, 6), finetune=min(finetune, 1), **more)

    monkeypatch.setattr(search, "compress", quick)
