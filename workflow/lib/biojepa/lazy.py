"""Names of a package that are imported when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, tuple[str, ...]]
) -> tuple[list[str], Callable[[str], Any]]:
    """Make the ``__all__`` and ``__getattr__`` of a package (PEP 562).

    The workflow imports the package in a process that runs no model, and torch takes seconds to import.

    Parameters
    ----------
    package
        Its ``__name__``.
    modules
        Full name of a module to the public names it defines.

    Returns
    -------
    The sorted public names, and a function that imports one of them.
    """
    home = {name: module for module, names in modules.items() for name in names}

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    return sorted(home), load
