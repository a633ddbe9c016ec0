"""scikit-learn's handwritten digits: a dataset that needs no download."""

import torch

from amc_env.validation import Count, SplitSeed
from search.data.base import Data, Split, fingerprint, split_off, stratified

DEFAULT_SEARCH = 300
INPUT = ((1, 8, 8), 10)
"""Shape of an image, [C, H, W], and the number of classes."""


def digits(search_images: Count | None = None, split_seed: SplitSeed = 0) -> Data:
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
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    everything = Split(pixels, labels)
    order = stratified(labels, seed=0)
    held_out = len(everything) // 5
    test, rest = (
        everything.take(order[:held_out].sort().values),
        everything.take(order[held_out:].sort().values),
    )
    train, search = split_off(
        "digits", rest, DEFAULT_SEARCH if search_images is None else search_images, split_seed
    )
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
