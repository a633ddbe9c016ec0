"""The configuration: one primary YAML per command, one folder per choice, one file per option."""

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

# Hydra refuses keys that a YAML file does not have. `also` takes the name of any cost.
ConfigStore.instance().store(
    "open_also", OmegaConf.create({"also": OmegaConf.create({}, flags={"struct": False})}), package="_global_"
)
