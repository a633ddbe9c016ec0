"""Images and labels: where they come from, how they are split, and what is wrong with them if anything is.

Three splits with three uses. `train`: calibration and fine-tuning. `search`: split off the training images,
judges candidates and nothing else. `test`: read once, for the final figures.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amc_env.errors import UserError
from search.draws import Reseeded
from search.files import cache_folder, write

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_HUB = "uoft-cs/cifar10"
CIFAR10_SIZE = (32, 32)
DIGITS_DEFAULT_SEARCH = 300
CIFAR10_DEFAULT_SEARCH = 5000
# The way out that every message about a CIFAR-10 source ends with.
LOCAL_FILES = (
    "data.path=DIR with train-*.parquet and test-*.parquet (columns img, label) is the way without the hub"
)


@dataclass(frozen=True)
class Split:
    """Images of one use.

    Attributes:
        images: [N, C, H, W]; uint8 pixels 0..255, or float32 that is normalised already.
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Split":
        """The images and labels at `indices` (int64), in that order, as a copy."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Data:
    """All that a search reads of a dataset.

    Attributes:
        classes: names, in the order of the labels.
        mean, std: per channel, of pixels scaled to [0, 1]; empty where the images are normalised already.
        augment: whether fine-tuning may crop and flip the images.
        fingerprint: short SHA-256 of all pixels, labels and the split.
        loader: the user's own training batches (images, labels), used for fine-tuning in place of `train`.
        stream: makes such batches of a batch size and a seed, where the training images do not fit in memory.
    """

    name: str
    train: Split
    search: Split
    test: Split | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool
    fingerprint: str
    loader: Iterable[Any] | None = None
    stream: Callable[[int, int], Iterable[Any]] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def normalise(self, images: Tensor) -> Tensor:
        """Float32 network input from uint8 pixels [N, C, H, W]; float images pass as they are."""
        return images if images.is_floating_point() else scaled(images, self.mean, self.std)


def scaled(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float32 [N, C, H, W] from uint8 pixels: scaled to [0, 1], less the mean, by the standard deviation."""
    means = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    deviations = torch.tensor(std, device=images.device).view(-1, 1, 1)
    return images.to(torch.float32).mul_(1 / (255 * deviations)).sub_(means / deviations)


def digits(search_images: int | None = None, split_seed: int = 0) -> Data:
    """The 1,797 handwritten digits that come with scikit-learn (1 x 8 x 8, ten classes).

    A fifth of each class is the test split, the same for every seed; the search split is taken off the rest.

    Args:
        search_images: size of the search split; 300 where None.
        split_seed: which training images it consists of. Not the run's seed: runs must be comparable.

    Raises:
        UserError: `search_images` out of reach.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    everything = Split(pixels, torch.from_numpy(bunch.target).to(torch.int64))
    order = stratified(everything.labels, seed=0)
    held_out = len(everything) // 5
    test, rest = (
        everything.take(order[:held_out].sort().values),
        everything.take(order[held_out:].sort().values),
    )
    train, search = split_off("digits", rest, _default(search_images, DIGITS_DEFAULT_SEARCH), split_seed)
    return Data(
        name="digits",
        train=train,
        search=search,
        test=test,
        classes=tuple(str(name) for name in bunch.target_names),
        mean=(0.3053,),
        std=(0.3760,),
        augment=False,
        fingerprint=fingerprint(train, search, test),
    )


def cifar10(
    path: str | None = None,
    search_images: int | None = None,
    split_seed: int = 0,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> Data:
    """CIFAR-10 from local parquet files, or from the dataset hub where no path is given.

    Pixels are decoded once and kept in the cache folder; later runs read them in about a second.

    Args:
        path: folder with train-*.parquet and test-*.parquet (columns `img`: struct with bytes, and `label`).
        search_images: size of the search split; 5,000 where None.
        split_seed: which training images it consists of. Not the run's seed: runs must be comparable.
        mean, std: per channel, of pixels in [0, 1]: what the pretrained weights were trained with.

    Raises:
        UserError: files or columns missing, undecodable or wrong images, labels outside the classes,
            hub out of reach, `search_images` out of reach.
    """
    check_scaling(mean, std)
    tables = _hub_tables() if path is None else _local_tables(Path(path))
    train, test = (_decoded(f"cifar10 {part}", tables.pop(part)) for part in ("train", "test"))
    _release_arrow()
    train, search = split_off("cifar10", train, _default(search_images, CIFAR10_DEFAULT_SEARCH), split_seed)
    return Data(
        name="cifar10",
        train=train,
        search=search,
        test=test,
        classes=CIFAR10_CLASSES,
        mean=tuple(mean),
        std=tuple(std),
        augment=True,
        fingerprint=fingerprint(train, search, test),
    )


def from_loaders(
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    calibration_images: int = 2000,
    classes: int | None = None,
) -> Data:
    """Data from the user's own loaders of (images, labels) batches, normalised as the network wants them.

    Args:
        train_loader: kept for fine-tuning as it is; its first `calibration_images` become the train split.
        val_loader: judges candidates; read whole, once.
        test_loader: for the final figures; None leaves them on the validation images.
        classes: number of the network's outputs; the largest label plus one where None.

    Raises:
        UserError: an empty loader, batches of another form, NaN or infinite pixels, labels outside classes,
            images of different shapes.
    """
    if calibration_images < 1:
        raise UserError(f"calibration_images={calibration_images}: at least 1 is needed")
    train = _gather("train_loader", train_loader, limit=calibration_images)
    search = _gather("val_loader", val_loader)
    test = None if test_loader is None else _gather("test_loader", test_loader)
    parts = {"train_loader": train, "val_loader": search} | ({} if test is None else {"test_loader": test})
    count = classes if classes is not None else 1 + max(int(part.labels.max()) for part in parts.values())
    for name, part in parts.items():
        check_split(name, part, count)
    shapes = {name: tuple(part.images.shape[1:]) for name, part in parts.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"images of several shapes, where all loaders must give one: {shapes}")
    return Data(
        name="loaders",
        train=train,
        search=search,
        test=test,
        classes=tuple(str(label) for label in range(count)),
        mean=(),
        std=(),
        augment=False,
        fingerprint=fingerprint(train, search, test),
        loader=train_loader,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's draws inside come from `seed`; afterwards the global state is as if nothing had been drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def split_off(name: str, split: Split, search_images: int, seed: int) -> tuple[Split, Split]:
    """(what remains, the search split): `search_images` images, every class in its share, drawn by `seed`.

    Splits of one seed are nested: the images of a smaller one are in every larger one.

    Raises:
        UserError: `search_images` below 1, or none left for training.
    """
    if not 1 <= search_images < len(split):
        raise UserError(
            f"search.images={search_images}: {name} has {len(split)} training images, "
            f"from 1 to {len(split) - 1} can be split off for the search"
        )
    order = stratified(split.labels, seed)
    chosen, rest = order[:search_images].sort().values, order[search_images:].sort().values
    return split.take(rest), split.take(chosen)


def check_scaling(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse what pixels of three channels cannot be scaled with.

    Raises:
        UserError: not three numbers each, or a deviation that is not above 0.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f"data.mean={list(mean)}, data.std={list(std)}: needs 3 numbers each, std above 0")


def check_split(name: str, split: Split, classes: int) -> None:
    """Refuse a split that is empty, not [N, C, H, W], not finite, or labelled outside 0..classes-1.

    Raises:
        UserError: with the split's name, the value found and what is allowed.
    """
    if len(split) == 0:
        raise UserError(f"{name} is empty: at least one image is needed")
    if split.images.dim() != 4 or split.labels.dim() != 1 or len(split.images) != len(split.labels):
        raise UserError(
            f"{name} has images {tuple(split.images.shape)} and labels {tuple(split.labels.shape)}: "
            f"[N, C, H, W] and [N] are needed"
        )
    if split.images.is_floating_point() and not bool(split.images.isfinite().all()):
        broken = (~split.images.isfinite().flatten(1).all(1)).nonzero().flatten()
        raise UserError(
            f"{name}: NaN or infinite pixels in {len(broken)} images, the first at {int(broken[0])}"
        )
    outside = ((split.labels < 0) | (split.labels >= classes)).nonzero().flatten()
    if len(outside):
        first = int(outside[0])
        raise UserError(
            f"{name}: {len(outside)} labels outside 0..{classes - 1}, "
            f"the first is {int(split.labels[first])} at row {first}"
        )


def fingerprint(*splits: Split | None) -> str:
    """First 16 hex digits of the SHA-256 of all pixels and labels, in order, with their shapes and types."""
    digest = hashlib.sha256()
    for split in splits:
        for tensor in () if split is None else (split.images, split.labels):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(np.ascontiguousarray(tensor.numpy()))
        digest.update(b"|")
    return digest.hexdigest()[:16]


def _default(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def stratified(labels: Tensor, seed: int) -> Tensor:
    """A random order of all images, by `seed`; every part of it in a row holds the classes in their shares."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    _, classes, counts = labels[shuffled].unique(return_inverse=True, return_counts=True)
    by_class = classes.argsort(stable=True)
    number = torch.empty_like(by_class)  # of each image among those of its class, in the random order
    number[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    # Spread over [0, 1): sorting all classes by it interleaves them evenly.
    position = (number.to(torch.float64) + 0.5) / counts[classes]
    return shuffled[position.argsort(stable=True)]


def _local_tables(folder: Path) -> dict[str, Any]:
    """{'train', 'test'}: Arrow tables of the parquet files in `folder`, in the order of their names."""
    if not folder.is_dir():
        raise UserError(f"data.path={folder}: no such folder; {LOCAL_FILES}")
    import pyarrow as arrow
    from pyarrow import parquet

    tables = {}
    for part in ("train", "test"):
        files = sorted(folder.glob(f"{part}-*.parquet"))
        if not files:
            raise UserError(f"data.path={folder}: no {part}-*.parquet in it; {LOCAL_FILES}")
        for file in files:
            try:
                names = parquet.read_schema(file).names
            except (OSError, arrow.ArrowException) as error:
                raise UserError(f"{file} is not a parquet file: {error}") from error
            _check_columns(str(file), names)
        tables[part] = arrow.concat_tables(
            [parquet.read_table(file, columns=["img", "label"]) for file in files]
        )
    return tables


def _hub_tables() -> dict[str, Any]:
    """{'train', 'test'}: Arrow tables of the published dataset, downloaded once into the hub's own cache."""
    try:
        import datasets as hub
    except ImportError as error:
        raise UserError(
            f"data=cifar10 without data.path needs `pip install datasets`; {LOCAL_FILES}"
        ) from error
    try:
        parts = hub.load_dataset(CIFAR10_HUB)
    except (
        Exception
    ) as error:  # the hub's clients raise their own, the network's and the file system's errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the dataset hub did not give {CIFAR10_HUB} ({reason}); {LOCAL_FILES}") from error
    tables = {}
    for part in ("train", "test"):
        _check_columns(f"{CIFAR10_HUB} {part}", parts[part].column_names)
        tables[part] = parts[part].cast_column("img", hub.Image(decode=False)).with_format("arrow")[:]
    return tables


def _release_arrow() -> None:
    """Gives back what Arrow holds of tables that are gone: as much again as the pixels."""
    import pyarrow as arrow

    arrow.default_memory_pool().release_unused()


def _check_columns(source: str, found: Sequence[str]) -> None:
    missing = [name for name in ("img", "label") if name not in found]
    if missing:
        raise UserError(
            f"{source}: no column {', '.join(missing)}; needed are img, label; found {', '.join(found)}"
        )


def _decoded(name: str, table: Any) -> Split:
    """The images of an Arrow table as uint8 [N, 3, 32, 32], from the cache where they were decoded before."""
    labels = _labels(name, table)
    try:
        encoded: list[bytes] = table.column("img").combine_chunks().field("bytes").to_pylist()
    except (KeyError, AttributeError) as error:
        raise UserError(
            f"{name}: column img is {table.schema.field('img').type}, not a struct with bytes"
        ) from error
    digest = hashlib.sha256()
    for item in encoded:
        digest.update(item or b"")
    file = cache_folder() / "data" / f"pixels-{digest.hexdigest()[:32]}.safetensors"
    if not file.exists():
        pixels = torch.from_numpy(_decode_all(name, encoded))
        write(file, lambda unfinished: save_file({"images": pixels}, unfinished))
    split = Split(load_file(file)["images"], labels)
    check_split(name, split, len(CIFAR10_CLASSES))
    return split


def _labels(name: str, table: Any) -> Tensor:
    column = table.column("label")
    if len(column) == 0:
        raise UserError(f"{name} is empty: at least one image is needed")
    if column.null_count:
        raise UserError(f"{name}: {column.null_count} rows of column label have no value")
    values = column.to_numpy()
    if not np.issubdtype(values.dtype, np.integer):
        raise UserError(f"{name}: column label holds {column.type}, not integers")
    return torch.from_numpy(values.astype(np.int64))


def _decode_all(name: str, encoded: Sequence[bytes]) -> np.ndarray:
    """Uint8 [N, 3, 32, 32]. Threads, since Pillow gives up the interpreter's lock while it decodes."""
    height, width = CIFAR10_SIZE
    pixels = np.empty((len(encoded), 3, height, width), dtype=np.uint8)
    chunks = [range(start, min(start + 500, len(encoded))) for start in range(0, len(encoded), 500)]

    def decode(rows: range) -> None:
        for row in rows:
            pixels[row] = _decode(name, row, encoded[row])

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, chunks):
            pass
    return pixels


def _decode(name: str, row: int, encoded: bytes) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            array = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise what they like on a broken file
        raise UserError(f"{name}: the image of row {row} cannot be decoded: {error}") from error
    if array.shape[:2] != CIFAR10_SIZE:
        raise UserError(
            f"{name}: the image of row {row} has {array.shape[:2]} pixels, needed are {CIFAR10_SIZE}"
        )
    return array.transpose(2, 0, 1)


def _gather(name: str, loader: Iterable[Any], limit: int | None = None) -> Split:
    """The loader's images (float32) and labels in one tensor each, at most `limit` of them."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    gathered = 0
    for batch in Reseeded(loader, 0):
        if not (
            isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)
        ):
            raise UserError(
                f"{name} gives batches of {type(batch).__name__}: (images, labels) tensors are needed"
            )
        images.append(batch[0].detach().to("cpu", torch.float32))
        labels.append(batch[1].detach().to("cpu", torch.int64))
        gathered += len(batch[0])
        if limit is not None and gathered >= limit:
            break
    if not gathered:
        raise UserError(f"{name} is empty: at least one image is needed")
    try:
        return Split(torch.cat(images)[:limit], torch.cat(labels)[:limit])
    except RuntimeError as error:
        raise UserError(f"{name}: its batches do not fit together: {error}") from error
