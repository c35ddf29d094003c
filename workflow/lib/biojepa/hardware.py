"""What the machine has, found without importing torch: the workflow asks before any job."""

from __future__ import annotations

from pathlib import Path


def machine_has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
