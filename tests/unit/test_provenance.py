"""The record of a run says what made it."""

import hashlib
import platform
import subprocess

import numpy as np
import pytest

from biojepa.provenance import commit_of, environment, machine, package_versions, record_of_run


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_versions_are_those_that_are_imported():
    versions = package_versions()
    assert versions["python"] == platform.python_version()
    assert versions["numpy"] == np.__version__
    assert "not-a-package" not in versions


def test_the_environment_holds_nothing_that_changes_between_runs():
    assert environment() == environment()
    assert set(environment()) == {"packages", "machine"}


def test_the_machine_is_named_with_processor_cores_and_memory(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor : 0\nmodel name\t: Some  CPU @ 2.0GHz\nmodel name\t: Other\n", encoding="utf-8"
    )
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 6 * 2**18, "SC_PAGE_SIZE": 4096}.__getitem__)
    system = f"{platform.system()} {platform.machine()}"
    assert machine(cpuinfo) == f"{system}, Some CPU @ 2.0GHz, 1 core, 6 GiB of memory"
    monkeypatch.setattr("platform.processor", platform.machine)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    monkeypatch.delattr("os.sysconf")
    assert machine(tmp_path / "none") == system


def test_the_commit_says_whether_files_were_changed(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "f").write_text("one", encoding="utf-8")
    git(tmp_path, "add", "f")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(tmp_path) == commit[:12]
    (tmp_path / "f").write_text("two", encoding="utf-8")
    assert commit_of(tmp_path) == f"{commit[:12]}-dirty"


def test_a_folder_outside_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of(tmp_path) == "not a git checkout"


def test_a_machine_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) == "not a git checkout"


@pytest.mark.parametrize(("memory", "expected"), [("512.5", 512.5), ("-", None), ("NA", None)])
def test_run_times_come_from_the_benchmark_tables(tmp_path, memory, expected):
    table = tmp_path / "logs" / "tiny" / "train.tsv"
    table.parent.mkdir(parents=True)
    # Short jobs end before memory is looked at; Snakemake then writes a dash or NA.
    table.write_text(f"s\th:m:s\tmax_rss\n1.5\t0:00:01\t9\n2.5\t0:00:02\t{memory}\n", encoding="utf-8")
    result = tmp_path / "metrics.tsv"
    result.write_bytes(b"x\n")
    record = record_of_run({"tiny": {"pair": 1}}, [result], tmp_path / "logs", tmp_path)
    assert record["jobs"] == {"tiny/train": {"seconds": 2.5, "max_rss_mb": expected}}
    assert record["sha256"] == {str(result): hashlib.sha256(b"x\n").hexdigest()}
    assert record["config"] == {"tiny": {"pair": 1}}
