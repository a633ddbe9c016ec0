"""Search for a smaller network: the commands, and the same from Python.

`compress` is the main job on a network of one's own, `make_env` its search as a Gymnasium environment, `make_vec_env`
several of them side by side, `Settings` all that can be set, and `load_pruned` restores what a run left behind.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

_OURS = ("amc_env", "agents", "conf")


def _check_neighbours() -> None:
    """Refuses to work with another project's packages of the same names.

    Raises:
        ImportError: ``amc_env``, ``agents`` or ``conf`` would be imported from elsewhere.
    """
    home = Path(__file__).resolve().parent.parent
    for name in _OURS:
        spec = find_spec(name)
        found = None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent.parent
        if found != home:
            where = "is missing" if found is None else f"is imported from {found}"
            raise ImportError(
                f"the package {name!r} {where} instead of {home}: another project has a package of that name. "
                "Install this project into an environment of its own"
            )


_check_neighbours()

if TYPE_CHECKING:
    from search.api import Compressed as Compressed
    from search.api import compress as compress
    from search.api import make_env as make_env
    from search.api import make_vec_env as make_vec_env
    from search.output.weights import load_pruned as load_pruned
    from search.settings import Settings as Settings

_HOMES = {
    "Compressed": "search.api",
    "Settings": "search.settings",
    "compress": "search.api",
    "make_env": "search.api",
    "make_vec_env": "search.api",
    "load_pruned": "search.output.weights",
}

__all__ = ["Compressed", "Settings", "compress", "load_pruned", "make_env", "make_vec_env"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562): ``import search`` and ``--help`` need no PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
