"""Make a conda channel out of the Python packages that are installed here.

A package of the channel holds one ``.pth`` file, which leads to a folder of links to what the installed
distribution owns and to nothing else, so that an environment made from the channel imports what it was
given and nothing besides. Names, versions and requirements are those of the installed metadata.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
"""Distributions whose conda package is called otherwise."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def build_channel(folder: Path) -> Path:
    """Write a channel with one package per installed distribution, and one for Python itself.

    Parameters
    ----------
    folder
        A new folder. Packages go to ``noarch`` and ``linux-64``, links to what they hold to ``content``.

    Returns
    -------
    The folder, indexed.
    """
    from rattler import Subdir
    from rattler.index import index_fs

    subdir = str(Subdir.current())
    for name in ("noarch", subdir, "content"):
        (folder / name).mkdir(parents=True)
    installed = {canonicalize_name(found.name): found for found in metadata.distributions()}
    for name, distribution in sorted(installed.items()):
        links = folder / "content" / name
        _link(distribution, links)
        conda = conda_name(name)
        _write_package(
            folder / "noarch",
            {
                "name": conda,
                "version": _conda_version(distribution.version),
                "depends": [f"python {PYTHON}.*", *_requirements(distribution, installed)],
                "noarch": "python",
                "subdir": "noarch",
            },
            {f"site-packages/{conda}.pth": f"{links}\n"},
        )
    _write_python(folder / subdir, subdir)
    asyncio.run(index_fs(folder, write_zst=False, write_shards=False))
    return folder


def conda_name(distribution: str) -> str:
    """Name of a distribution on conda-forge."""
    return CONDA_NAMES.get(canonicalize_name(distribution), canonicalize_name(distribution))


def _conda_version(version: str) -> str:
    # A local part such as +cpu names a build, and a dash separates the parts of a file name.
    return version.split("+")[0].replace("-", "_")


def _link(distribution: metadata.Distribution, folder: Path) -> None:
    """Link the files and folders that a distribution owns in site-packages."""
    folder.mkdir()
    site = Path(str(distribution.locate_file("")))
    for top in sorted({file.parts[0] for file in distribution.files or ()}):
        source = site / top
        if top not in ("..", "__pycache__") and source.exists():
            (folder / top).symlink_to(source)


def _requirements(
    distribution: metadata.Distribution, installed: dict[str, metadata.Distribution]
) -> Iterator[str]:
    """Requirements as conda writes them, with those of the extras that they ask for."""
    asked: list[tuple[metadata.Distribution, str]] = [(distribution, "")]
    done: set[tuple[str, str]] = set()
    while asked:
        owner, extra = asked.pop()
        for line in owner.requires or ():
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            if extra and not requirement.marker:
                continue
            name = canonicalize_name(requirement.name)
            if name not in installed:
                continue  # for another platform, or not needed by what is installed
            if name != canonicalize_name(distribution.name):
                yield f"{conda_name(name)} {conda_specifier(str(requirement.specifier))}".strip()
            for wanted in requirement.extras:
                if (name, wanted) not in done:
                    done.add((name, wanted))
                    asked.append((installed[name], wanted))


def conda_specifier(specifier: str) -> str:
    """Translate ``>=1,<2,!=1.5`` and ``==1.4.*``; conda has no triple equals sign."""
    parts = [part.strip() for part in specifier.split(",") if part.strip()]
    return ",".join(re.sub(r"^===?(?=.*\.\*$)", "", part).replace("===", "==") for part in parts)


def _write_python(folder: Path, subdir: str) -> None:
    """Write the package of the interpreter: a virtual environment without anything in it."""
    version = ".".join(map(str, sys.version_info[:3]))
    home = Path(sysconfig.get_config_var("BINDIR") or Path(sys.base_prefix) / "bin")
    interpreter = next(path for path in (home / f"python{PYTHON}", home / "python3") if path.exists())
    configuration = f"home = {home}\ninclude-system-site-packages = false\nversion = {version}\n"
    site = f"lib/python{PYTHON}/site-packages/README.txt"
    _write_package(
        folder,
        {"name": "python", "version": version, "depends": [], "subdir": subdir},
        {"pyvenv.cfg": configuration, site: "Packages of this environment.\n"},
        links={f"bin/{name}": str(interpreter) for name in ("python", "python3", f"python{PYTHON}")},
    )


def _write_package(
    folder: Path, record: dict[str, object], files: dict[str, str], links: dict[str, str] | None = None
) -> None:
    """Write a ``.tar.bz2`` package with its metadata."""
    build = "0"
    record = {"build": build, "build_number": 0, "timestamp": 1_600_000_000_000, **record}
    paths = [{"_path": path, "path_type": "hardlink"} for path in files]
    paths += [{"_path": path, "path_type": "softlink"} for path in links or {}]
    info = {
        "info/index.json": json.dumps(record),
        "info/paths.json": json.dumps({"paths": paths, "paths_version": 1}),
        "info/files": "\n".join([*files, *(links or {})]) + "\n",
    }
    if record.get("noarch") == "python":
        content = {"noarch": {"type": "python", "entry_points": []}, "package_metadata_version": 1}
        info["info/link.json"] = json.dumps(content)
    with tarfile.open(folder / f"{record['name']}-{record['version']}-{build}.tar.bz2", "w:bz2") as archive:
        for path, text in {**info, **files}.items():
            member = tarfile.TarInfo(path)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        for path, target in (links or {}).items():
            member = tarfile.TarInfo(path)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
