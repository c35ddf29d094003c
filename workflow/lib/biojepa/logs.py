"""Send what a job says to its log, and an error a user can mend to the terminal as one message."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from biojepa.errors import InputError, StoppedRun

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def log_to(path: str | Path) -> Iterator[None]:
    """Log to ``path``, and warnings of this library to the terminal too; write tracebacks to the log.

    An :class:`~biojepa.errors.InputError` and a :class:`~biojepa.errors.StoppedRun`, such as a collapse
    or a leak, print their one message on the terminal, without a traceback, because their reader is the
    user and not a developer.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    before = root.level
    to_file = logging.FileHandler(path, mode="w", encoding="utf-8")
    to_file.setFormatter(logging.Formatter(FORMAT))
    root.addHandler(to_file)
    own = logging.getLogger("biojepa")
    to_terminal = logging.StreamHandler()
    to_terminal.setFormatter(logging.Formatter("biojepa: %(message)s"))
    # Errors are printed below.
    to_terminal.addFilter(lambda record: record.levelno == logging.WARNING)
    own.addHandler(to_terminal)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except (InputError, StoppedRun) as error:
        logging.getLogger("biojepa").error("%s", error)
        print(f"\nbiojepa: {error}\n(log: {path})\n", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    except Exception:
        # Not swallowed: the traceback goes to the log that Snakemake names, then the job fails.
        logging.getLogger("biojepa").error("%s", traceback.format_exc())
        raise
    finally:
        logging.captureWarnings(False)
        own.removeHandler(to_terminal)
        root.removeHandler(to_file)
        root.setLevel(before)
        to_file.close()
