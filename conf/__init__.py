"""The configuration: one primary YAML per command, one folder per choice, one file per option."""
