"""Follow the imports of a script, so that a changed library module reruns the stages that use it.

Snakemake watches scripts, not what they import. Rules pass :func:`code_digest` as a parameter.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "biojepa"
LIBRARY = Path(__file__).resolve().parent


def code_digest(script: str | Path) -> str:
    """Digest of all library files that a script can reach: 16 hexadecimal digits.

    Besides Python modules it covers the templates, styles and scripts that lie in the package of a
    reached module.
    """
    digest = hashlib.sha256()
    for path in sorted(reachable_files(script)):
        digest.update(path.relative_to(LIBRARY).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def reachable_files(script: str | Path) -> set[Path]:
    """Library files that a script imports, directly or not, wherever in the file the import stands."""
    found: set[Path] = set()
    waiting = list(_imported_modules(Path(script)))
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        waiting.extend(_imported_modules(module))
    for folder in {path.parent for path in found} - {LIBRARY}:
        found.update(path for path in folder.iterdir() if path.suffix in {".j2", ".css", ".js"})
    return found


def third_party_imports(script: str | Path) -> set[str]:
    """Top-level names of the packages that a script and the library modules it reaches import."""
    names: set[str] = set()
    for path in {Path(script), *(p for p in reachable_files(script) if p.suffix == ".py")}:
        names.update(name.split(".")[0] for name in _imported_names(path))
    return names - {PACKAGE}


@cache
def _imported_names(path: Path) -> tuple[str, ...]:
    """Dotted names that a file imports; ``from a import b`` gives ``a`` and ``a.b``."""
    names = []
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield all statements, at any depth; nine of ten nodes are expressions, which hold no import."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, part, None)
            if isinstance(inner, list):
                waiting.extend(inner)


@cache
def _imported_modules(path: Path) -> tuple[Path, ...]:
    modules: list[Path] = []
    for name in _imported_names(path):
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        # Importing a.b.c runs the __init__ of a and of a.b as well.
        for depth in range(len(parts)):
            modules += _files_of(LIBRARY.joinpath(*parts[1 : depth + 1]))
    return tuple(modules)


@cache
def _files_of(base: Path) -> tuple[Path, ...]:
    return tuple(file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file())
