"""Show the curves of a run in TensorBoard, where it is installed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biojepa.training.distributed import is_main

log = logging.getLogger(__name__)


class Tracker:
    """Writes the rows of the history to TensorBoard; without a folder it writes nothing.

    Parameters
    ----------
    folder
        Where the event files go. They hold wall-clock times, so they are no output of the pipeline.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._writer: Any = None
        if folder is None or not is_main():
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.warning(
                "train.tensorboard is set, but the package tensorboard is not installed: no event files are "
                "written. The same numbers are in history.tsv. Fix: pip install tensorboard"
            )
            return
        self._writer = SummaryWriter(str(folder))
        log.info("curves: tensorboard --logdir %s", folder)

    def add(self, stage: str, row: Mapping[str, float]) -> None:
        """Write one row of the history of a stage."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(f"{stage}/{name}", value, int(row["step"]))
        self._writer.flush()
