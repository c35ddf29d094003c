"""Save the state of a stage, so that the same command continues an interrupted run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from biojepa.files import atomic_path
from biojepa.training.distributed import is_main

log = logging.getLogger(__name__)


class Checkpoint:
    """State of one training stage in a folder that Snakemake does not know of.

    Snakemake deletes the declared outputs of a job before it reruns it, so the resume state lives
    elsewhere. A state belongs to a fingerprint of everything that determines the run; a state of
    another run is ignored and overwritten.

    Parameters
    ----------
    folder
        Where to keep the state; ``None`` keeps none.
    stage
        Name of the stage.
    fingerprint
        Digest of data, settings and seed.
    """

    def __init__(self, folder: str | Path | None, stage: str, fingerprint: str) -> None:
        self.path = None if folder is None else Path(folder) / f"{stage}.pt"
        self.stage, self.fingerprint, self.resumed_at = stage, fingerprint, 0

    def load(self) -> dict[str, Any] | None:
        """Return the saved state of this very run, or ``None``."""
        if self.path is None or not self.path.exists():
            return None
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != self.fingerprint:
            log.info("%s: checkpoint of another run ignored", self.stage)
            return None
        log.info("%s: continuing from step %d", self.stage, state["step"])
        self.resumed_at = int(state["step"])
        return state

    def save(self, step: int, **state: Any) -> None:
        """Write the state after ``step`` finished steps; of several processes the first one does."""
        if self.path is not None and is_main():
            with atomic_path(self.path) as temporary:
                torch.save({"fingerprint": self.fingerprint, "step": step, **state}, temporary)


def discard(folder: str | Path | None) -> None:
    """Remove the resume state of a finished run."""
    if folder is not None and Path(folder).exists():
        shutil.rmtree(folder)
