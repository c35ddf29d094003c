"""What the machine has, found without importing torch: the workflow asks before any job."""

from __future__ import annotations

import os
from pathlib import Path

# Version 1 of control groups says so by the largest number of pages.
NO_LIMIT = 1 << 60


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
    ``admin-guide/cgroup-v2``, ``admin-guide/cgroup-v1/memory``).

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
    mount = root / "sys" / "fs" / "cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        # Version 2 has one hierarchy, number 0 without controllers; version 1 has one of memory.
        if number == "0" and not controllers:
            bytes_left += _left(mount, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            bytes_left += _left(mount / "memory", path, *files)
    return min(bytes_left)


def _left(mount: Path, path: str, limit_file: str, held_file: str, freed_name: str) -> list[int]:
    """Bytes that a control group and each of those above it may still take, where they have a limit."""
    found, here = [], mount / path.strip("/")
    for group in (here, *here.parents):
        limit, held = _number(group / limit_file), _number(group / held_file)
        if limit is not None and held is not None and limit < NO_LIMIT:
            freed = _named_number(group / "memory.stat", freed_name) or 0
            found.append(max(limit - held + freed, 0))
        if group == mount:
            break
    return found


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
