"""amc-search: search, apply, fine-tune, export, report."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from search.config.command import application, run_command


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="search")
@application
def main_job(cfg: DictConfig) -> float:
    """One run of the main job.

    Returns:
        The search score of the delivered strategy in [0, 1], for Hydra's sweepers (to be maximised).
    """
    from search.job import run_job  # PyTorch and all else, which --help does without

    return run_job(cfg, "amc-search")


def main() -> None:
    """The console script."""
    sys.exit(run_command(main_job))


if __name__ == "__main__":
    main()
