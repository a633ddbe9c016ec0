"""Labelled images of any source, made into splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from search.data.base import Data, Split, fingerprint
from search.data.crops import training_loader
from search.data.images import Images
from search.data.library import datasets
from search.data.look import Look
from search.data.rows import Sizes, chosen_rows
from search.data.tables import Tables, class_names, column, label_column, labels_of


@dataclass(frozen=True)
class Labelled:
    """The images of a dataset.

    Attributes:
        training: Those to train on.
        held_out: Those that are the test split; None where a share of the training images is.
        classes: Names, in the order of the labels.
    """

    training: Images
    held_out: Images | None
    classes: tuple[str, ...]


def labelled(
    tables: Tables,
    image: str | None = None,
    label: str | None = None,
    held_out: str | None = None,
    classes: Sequence[str] | None = None,
) -> Labelled:
    """The images and labels of tables.

    Args:
        tables: The dataset.
        image: The column of images; None: the only one.
        label: The column of labels; None: the only one.
        held_out: The part that is the test split; None: ``test``, else ``validation``.
        classes: Names of the classes; None: what the labels say.

    Raises:
        UserError: Columns are not there, or there are several; labels are missing or outside the classes.
    """
    image = column(tables, "image", image, _is_image)
    label = label_column(tables, label)
    names = tuple(classes) if classes is not None else class_names(tables, label)

    def images(part: str) -> Images:
        name, table = f"{tables.name} {part}", tables.parts[part]
        return Images(name, table, image, labels_of(name, table, label, names), by_path=tables.folders)

    other = tables.held_out(label, held_out)
    return Labelled(images("train"), None if other is None else images(other), names)


def _is_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def image_data(name: str, source: Labelled, look: Look, sizes: Sizes) -> Data:
    """The splits, decoded once into the cache folder.

    Args:
        name: Of the data.
        source: The images.
        look: How they are brought to one size.
        sizes: How many each split has.

    Raises:
        UserError: Splits are out of reach, an image cannot be decoded or has the wrong size, or there is no room.
    """
    training, other = source.training, source.held_out
    rows = chosen_rows(name, training.labels, None if other is None else other.labels, sizes)
    train, search, test = (
        Split(images.pixels(some, look), images.labels[some])
        for images, some in ((training, rows.train), (training, rows.search), (other or training, rows.test))
    )
    return Data(
        name=name,
        train=train,
        search=search,
        test=test,
        classes=source.classes,
        mean=tuple(look.mean),
        std=tuple(look.std),
        augment=True,
        fingerprint=fingerprint(train, search, test),
        stream=None if sizes.calibration is None else partial(training_loader, training, rows.rest, look),
    )
