"""Automated network pruning as a Gymnasium environment; importing this registers ``amc_env/Pruning-v0``.

The entry points are strings, so that registration costs no import of the environment or of PyTorch.
"""

import gymnasium

__version__ = "0.1.0"

gymnasium.register(
    id="amc_env/Pruning-v0",
    entry_point="amc_env.env:PruningEnv",
    vector_entry_point="amc_env.env:PruningVectorEnv",
)
