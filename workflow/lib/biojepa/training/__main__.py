"""Train a model from ``pairs.h5`` without Snakemake.

    python -m biojepa.training pairs.h5 OUT_DIR [--settings JSON] [--seed 0] [--encoder-from model.pt]

Writes ``model.pt``, ``history.tsv`` and ``metrics.json``. The same command continues an interrupted run
from ``OUT_DIR/checkpoint``. For several GPUs, start it by torchrun:

    torchrun --standalone --nproc-per-node 4 -m biojepa.training pairs.h5 OUT_DIR
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import biojepa
from biojepa.errors import InputError, StoppedRun
from biojepa.files import write_json, write_tsv
from biojepa.pairs import read_pairs
from biojepa.provenance import environment
from biojepa.training.checkpoint import discard
from biojepa.training.distributed import is_main, process_group, wait_for_all, world_size
from biojepa.training.run import train_model
from biojepa.training.settings import TrainSettings
from biojepa.training.trained import load_model

log = logging.getLogger(__name__)

MESSAGE = "biojepa: "


def train_to_folder(
    pairs: str | Path,
    folder: str | Path,
    settings: TrainSettings,
    seed: int = 0,
    encoder_from: str | Path | None = None,
) -> None:
    """Train, and let the first process write ``model.pt``, ``history.tsv`` and ``metrics.json``.

    Parameters
    ----------
    pairs
        ``pairs.h5`` of a fold.
    folder
        Where the files go, and the resume state, which is removed at the end.
    settings, seed
        Of the run.
    encoder_from
        ``model.pt`` of the same fold and seed whose encoder is reused.
    """
    folder = Path(folder)
    checkpoint = folder / "checkpoint"
    reused = load_model(encoder_from) if encoder_from else None
    model, history, metrics = train_model(read_pairs(pairs), settings, seed, reused, checkpoint)
    if is_main():
        model.save(folder / "model.pt")
        write_tsv(history, folder / "history.tsv")
        write_json({**environment(), "torch_cuda": torch.version.cuda, **metrics}, folder / "metrics.json")
    wait_for_all()
    if is_main():
        discard(checkpoint)


def train_in_processes(
    pairs: str | Path,
    folder: str | Path,
    settings: TrainSettings,
    seed: int = 0,
    encoder_from: str | Path | None = None,
) -> None:
    """Train with ``settings.processes`` processes on this machine, started by torchrun.

    Parameters and files are those of :func:`train_to_folder`. What the processes say goes to the terminal
    and to the log as it comes.

    Raises
    ------
    StoppedRun
        When a process failed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "checkpoint" / "settings.json"
    write_json(asdict(settings), written)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(settings.processes), "-m", "biojepa.training"]
    command += [str(pairs), str(folder), "--settings", str(written), "--seed", str(seed)]
    command += ["--encoder-from", str(encoder_from)] if encoder_from else []
    library = str(Path(biojepa.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (library, os.environ.get("PYTHONPATH"))))
    threads = {"OMP_NUM_THREADS": str(settings.torch_threads), "PYTHONPATH": path}
    said: deque[str] = deque(maxlen=200)
    with subprocess.Popen(
        command, env={**os.environ, **threads}, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as running:
        for line in running.stderr or ():
            sys.stderr.write(line)
            if line.strip() and "%|" not in line:  # a progress bar is no news for the log
                said.append(line)
                log.info("%s", line.rstrip())
    if running.returncode:
        own = [line for line in said if line.startswith(MESSAGE)]
        raise StoppedRun(
            own[0].removeprefix(MESSAGE).strip()
            if own
            else f"one of {settings.processes} training processes failed with status {running.returncode}; "
            "what it said is in the log"
        )


def _read_settings(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(path, str(error), "a JSON object", "give the keys of the section train") from error
    if not isinstance(settings, dict):
        raise InputError(path, type(settings).__name__, "a JSON object", "give the keys of the section train")
    settings.pop("baselines", None)
    return settings


def _settings(path: Path | None) -> TrainSettings:
    try:
        return TrainSettings.from_config(_read_settings(path))
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            str(path), str(error), "keys of the section train of the config", "correct the key"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m biojepa.training", description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path, help="pairs.h5 of a fold")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="where the files go")
    parser.add_argument(
        "--settings", type=Path, help="JSON file with keys of the section train of the config"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder-from", type=Path, help="model.pt whose encoder is reused")
    given = parser.parse_args(arguments)
    try:
        settings = _settings(given.settings)
        with process_group(settings.device):
            settings = replace(settings, processes=world_size())
            train_to_folder(given.pairs, given.folder, settings, given.seed, given.encoder_from)
    except (InputError, StoppedRun) as error:
        # Every process stops for the same reason; one message is enough.
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{MESSAGE}{error}\n", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
