"""What the machine has, found without importing torch: the workflow asks before any job."""

from __future__ import annotations

import os
from pathlib import Path


def machine_has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that a job may see."""
    # Schedulers and users hide GPUs by this variable; the driver stops at the first impossible number.
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))
