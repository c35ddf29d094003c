"""``python -m biojepa.check --configfile my_screen.yaml``: say what a run would do, and all that is wrong."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snakemake.cli import parse_config
from snakemake.common.configfile import load_configfile
from snakemake.exceptions import WorkflowError
from snakemake.utils import update_config

from biojepa.check import as_text, check_config

DEFAULT = "config/config.yaml"


def main(given: Sequence[str] | None = None) -> int:
    """Check, print, and return the exit status: 0, or 1 with any problem."""
    parser = argparse.ArgumentParser(prog="./run.sh check", description=__doc__)
    parser.add_argument("--configfile", "--configfiles", nargs="+", default=[], type=Path, metavar="FILE")
    parser.add_argument("--config", "-C", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--directory", "-d", type=Path, help="folder of the run (default: this one)")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.add_argument("--no-jobs", action="store_true", help="do not count jobs, which takes seconds")
    parser.add_argument("--cores", "-c", nargs="?", help=argparse.SUPPRESS)  # of the command of a run
    options = parser.parse_args(given)
    # What the library logs is in the report; without a handler, Python would print its warnings.
    logging.getLogger("biojepa").addHandler(logging.NullHandler())
    files = [path.resolve() for path in options.configfile]
    if options.directory is not None:
        os.chdir(options.directory)
    # As the Snakefile does: the demo's settings only where no file is named.
    files = files or [Path(DEFAULT).resolve()]
    try:
        content = _read(files, options.config)
    except (WorkflowError, OSError, ValueError) as error:
        report: dict[str, Any] = {"problems": [f"config: {error}"], "notes": [], "datasets": {}, "jobs": {}}
    else:
        arguments = ["--configfile", *map(str, files)]
        arguments += ["--config", *options.config] if options.config else []
        report = check_config(content, None if options.no_jobs else arguments)
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else as_text(report), end="")
    return 1 if report["problems"] else 0


def _read(files: Sequence[Path], values: Sequence[str]) -> dict[str, Any]:
    """Read config files and values of the command line as Snakemake does: later ones win."""
    content: dict[str, Any] = {}
    for path in files:
        update_config(content, load_configfile(str(path)))
    update_config(content, parse_config(list(values)))
    return content


if __name__ == "__main__":
    sys.exit(main())
