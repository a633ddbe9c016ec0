"""Search for a smaller network: the commands, and the same from Python.

`compress` is the main job on a network of one's own, `make_env` its search as a Gymnasium environment, `make_vec_env`
several of them side by side, and `load_pruned` restores what a run left behind.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

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

from search.api import Compressed, compress, make_env, make_vec_env  # noqa: E402 -- the check must come first
from search.output.export import load_pruned

__all__ = ["Compressed", "compress", "load_pruned", "make_env", "make_vec_env"]
