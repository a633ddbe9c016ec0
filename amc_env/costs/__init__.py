"""What a strategy costs: one module per cost. All of them are imported here, so that they are registered."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
