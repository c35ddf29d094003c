"""Claims about what the machine is said to have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from biojepa.hardware import available_memory

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def meminfo(gib: int) -> dict[str, str]:
    rows = f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 17 kB\nMemAvailable:   {gib * GIB // 1024} kB\n"
    return {"proc/meminfo": rows}


def group(path: str, limit: int | str, held: int, cache: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}"
    stat = f"anon 5\nfile 9\ninactive_file {cache}\nactive_file 3\n"
    return {f"{folder}/memory.max": f"{limit}\n", f"{folder}/memory.current": f"{held}\n",
            f"{folder}/memory.stat": stat}  # fmt: skip


def test_without_control_groups_it_is_what_the_system_says(tmp_path):
    assert available_memory(tmp_path) is None
    write(tmp_path, meminfo(20))
    assert available_memory(tmp_path) == 20 * GIB
    write(tmp_path, {"proc/self/cgroup": "7:memory:/old\n3:cpu,cpuacct:/\n0::/\n"})
    assert available_memory(tmp_path) == 20 * GIB


@pytest.mark.parametrize("limited", ["slurm/job", "slurm"])
def test_the_limit_of_a_job_or_of_what_is_above_it_counts(tmp_path, limited):
    write(tmp_path, meminfo(20) | {"proc/self/cgroup": "0::/slurm/job\n"})
    write(tmp_path, group("slurm/job", "max", 7 * GIB, 0) | group("slurm", "max", 8 * GIB, 0))
    assert available_memory(tmp_path) == 20 * GIB
    # What is held of files that nobody uses would be given back.
    write(tmp_path, group(limited, 9 * GIB, 7 * GIB, GIB))
    assert available_memory(tmp_path) == 3 * GIB
    write(tmp_path, group(limited, 9 * GIB, 10 * GIB, GIB // 2))
    assert available_memory(tmp_path) == 0


def test_limits_of_the_older_control_groups_count_too(tmp_path):
    write(tmp_path, meminfo(20) | {"proc/self/cgroup": "7:hugetlb,memory:/slurm/job\n0::/elsewhere\n"})
    folder = "sys/fs/cgroup/memory/slurm"
    none = {f"{folder}/job/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            f"{folder}/job/memory.usage_in_bytes": "5\n"}  # fmt: skip
    write(tmp_path, none)
    assert available_memory(tmp_path) == 20 * GIB
    write(tmp_path, {f"{folder}/memory.limit_in_bytes": f"{8 * GIB}\n",
                     f"{folder}/memory.usage_in_bytes": f"{6 * GIB}\n",
                     f"{folder}/memory.stat": f"inactive_file 3\ntotal_inactive_file {GIB}\n"})  # fmt: skip
    assert available_memory(tmp_path) == 3 * GIB


def test_of_this_machine_it_is_a_part_of_its_memory():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    left = available_memory()
    assert left is None or 0 <= left <= total
