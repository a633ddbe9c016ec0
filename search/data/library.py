"""The package datasets, which is optional: it reads tables, and images from the hub. It is imported here only."""

from __future__ import annotations

from amc_env.errors import missing_package

try:
    import datasets as datasets
except ImportError as error:
    raise missing_package("data", "datasets", "data", error) from error

datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs errors that it raises as well
datasets.disable_progress_bars()  # the terminal belongs to the display of the run
