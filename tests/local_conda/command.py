"""The part of the command ``conda`` that Snakemake calls, on the solver and installer of py-rattler."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

VERSION = "25.1.1"
ACTIVATE = """# Put an environment first on the PATH, as the activate script of conda does.
export CONDA_PREFIX="$1"
export PATH="$1/bin:$PATH"
unset PYTHONHOME PYTHONPATH
"""


def install_command(folder: Path, channel: Path) -> Path:
    """Write ``bin/conda`` and ``bin/activate`` under a folder; return the folder to put on the PATH."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    conda = binaries / "conda"
    conda.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" --root "{folder}" '
        f'--channel "{channel}" "$@"\n',
        encoding="utf-8",
    )
    conda.chmod(conda.stat().st_mode | stat.S_IXUSR)
    (binaries / "activate").write_text(ACTIVATE, encoding="utf-8")
    return binaries


def create(prefix: Path, specs: Sequence[str], channel: Path, cache: Path) -> list[str]:
    """Solve and install an environment.

    Returns
    -------
    Names and versions of what was installed.

    Raises
    ------
    rattler.exceptions.SolverError
        When no choice of packages of the channel meets the specs.
    """
    from rattler import Channel, Gateway, Subdir, VirtualPackage, install, solve

    async def make() -> list[str]:
        records = await solve(
            [Channel(channel.as_uri())],
            list(specs),
            gateway=Gateway(cache_dir=cache / "repodata"),
            platforms=[Subdir.current(), "noarch"],
            virtual_packages=VirtualPackage.detect(),
        )
        await install(records, target_prefix=prefix, cache_dir=cache / "packages", show_progress=False)
        return [f"{record.name.normalized} {record.version}" for record in records]

    return asyncio.run(make())


def specs_of(environment: Path) -> list[str]:
    """Dependencies of an environment file, which must be conda's alone."""
    content = yaml.safe_load(environment.read_text(encoding="utf-8"))
    others = [entry for entry in content["dependencies"] if not isinstance(entry, str)]
    if others:
        raise SystemExit(f"{environment}: only conda packages are understood here, found {others}")
    return content["dependencies"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="conda")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--channel", type=Path, required=True)
    parser.add_argument("--version", action="version", version=f"conda {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info").add_argument("--json", action="store_true")
    config = commands.add_parser("config")
    config.add_argument("--get")
    config.add_argument("--json", action="store_true")
    clean = commands.add_parser("clean")
    clean.add_argument("-y", "--yes", action="store_true")
    clean.add_argument("--tarballs", action="store_true")
    env = commands.add_parser("env").add_subparsers(dest="action", required=True).add_parser("create")
    env.add_argument("--file", type=Path, required=True)
    env.add_argument("--prefix", type=Path, required=True)
    for flag in ("--quiet", "--no-default-packages", "--yes", "-y"):
        env.add_argument(flag, action="store_true")
    given = parser.parse_args()
    if given.command == "info":
        print(json.dumps({"conda_prefix": str(given.root), "platform": "linux-64", "conda_version": VERSION}))
    elif given.command == "config":
        print(json.dumps({"get": {"channel_priority": "strict"}}))
    elif given.command == "env":
        try:
            installed = create(given.prefix, specs_of(given.file), given.channel, given.root / "cache")
        except Exception as error:
            shutil.rmtree(given.prefix, ignore_errors=True)
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        print("\n".join(installed))
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's end: the threads of the installer may still run, and abort in it.
    os._exit(status)
