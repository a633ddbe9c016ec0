"""How images are brought to one size, and what their pixels are scaled with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from PIL.Image import Resampling

from search.data.base import check_scaling

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in [0, 1], by channel: most published weights were trained with them."""
Interpolation = Literal["bilinear", "bicubic"]
_METHODS = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}
_ROUNDING = 1e-6  # 224 / (224 / 232) is a little below 232


@dataclass(frozen=True)
class Look:
    """The shorter side is resized to ``size / crop`` pixels, and the middle ``size`` x ``size`` are cut out.

    Attributes:
        size: Height and width of the result.
        crop: In (0, 1]; None: images have that size already, and are left as they are.
        squash: Whether both sides are resized, which changes proportions but cuts off less.
        interpolation: ``bilinear`` or ``bicubic``.
        mean: Of the pixels in [0, 1], by channel.
        std: The same.

    Raises:
        UserError: Mean and deviation are not three numbers each, or a deviation is not above 0.
    """

    size: int
    crop: float | None = None
    squash: bool = False
    interpolation: Interpolation = "bilinear"
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    def __post_init__(self) -> None:
        check_scaling(self.mean, self.std)

    @property
    def key(self) -> str:
        """Names all that the pixels depend on."""
        return f"{self.size} {self.crop} {self.squash} {self.interpolation}"

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The image in its new size."""
        if self.crop is None:
            return picture
        side, short = math.floor(self.size / self.crop + _ROUNDING), min(picture.size)
        width, height = (side, side) if self.squash else (side * edge // short for edge in picture.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        resized = picture.resize((width, height), _METHODS[self.interpolation])
        return resized.crop((left, top, left + self.size, top + self.size))
