"""From a Hydra configuration to plain settings; with the commands, the only code that knows Hydra."""
