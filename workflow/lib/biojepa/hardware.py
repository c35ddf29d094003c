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


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a process may still take, ``None`` where the system does not tell (it is no Linux).

    The limit of a container, or of a scheduler's job, counts: what its control group and those above it may
    take, less what they hold and could not give back (files of the kernel: ``filesystems/proc``,
    ``admin-guide/cgroup-v2``).

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are.
    """
    found = _named_number(root / "proc" / "meminfo", "MemAvailable")
    if found is None:
        return None
    bytes_left = [1024 * found]
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    # Version 2 has one hierarchy, number 0.
    path = next((line.partition("::")[2] for line in lines if line.startswith("0::")), None)
    if path is not None:
        mount = root / "sys" / "fs" / "cgroup"
        here = mount / path.strip("/")
        for group in (here, *here.parents):
            limit, held = _number(group / "memory.max"), _number(group / "memory.current")
            if limit is not None and held is not None:
                freed = _named_number(group / "memory.stat", "inactive_file") or 0
                bytes_left.append(max(limit - held + freed, 0))
            if group == mount:
                break
    return min(bytes_left)


def _number(path: Path) -> int | None:
    """Read a file that holds a number; ``None`` where it holds none, such as ``max``."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _named_number(path: Path, name: str) -> int | None:
    """Read the number behind a name in a file of lines ``name number unit``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = (line.replace(":", " ").split() for line in lines)
    return next((int(words[1]) for words in fields if len(words) > 1 and words[0] == name), None)
