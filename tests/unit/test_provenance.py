"""The record of a run says what made it."""

import hashlib
import json
import platform
import shutil
import subprocess
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from snakemake.iocontainers import Namedlist

from biojepa.jobs import recorded_job
from biojepa.provenance import (
    PACKAGES,
    commit_of,
    environment,
    inputs_from_outside,
    jobs_behind,
    machine,
    package_versions,
    record_of_run,
)

REPO = Path(__file__).resolve().parents[2]


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
    assert set(environment()) == {"commit", "packages", "machine"}


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


def test_a_copy_inside_another_checkout_has_no_commit_of_its_own(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "theirs").write_text("x", encoding="utf-8")
    git(tmp_path, "add", "theirs")
    git(tmp_path, "commit", "-q", "-m", "first")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "library.py").write_text("x", encoding="utf-8")
    assert commit_of(tmp_path / "copy") == "not a git checkout"
    git(tmp_path, "add", "copy")
    git(tmp_path, "commit", "-q", "-m", "second")
    assert commit_of(tmp_path / "copy") == git(tmp_path, "rev-parse", "HEAD")[:12]


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("git", 20), PermissionError("git")])
def test_git_that_does_not_answer_stops_no_job(tmp_path, monkeypatch, error):
    def stuck(*_, **__):
        raise error

    monkeypatch.setattr("subprocess.run", stuck)
    assert commit_of(tmp_path) == "not a git checkout"


def test_the_packages_of_every_environment_are_named():
    named = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    known = {named.get(package, package) for package in PACKAGES}
    for path in sorted(REPO.glob("envs/*.yaml")):
        declared = yaml.safe_load(path.read_text(encoding="utf-8"))["dependencies"]
        assert {line.split(" ")[0] for line in declared} - {"python"} <= known, path.name


def test_a_folder_outside_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of(tmp_path) == "not a git checkout"


def test_a_machine_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) == "not a git checkout"


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Work:
    """A chain of jobs in a folder, each given to the recorder as Snakemake would."""

    folder: Path

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    def job(self, rule, sources, made, wildcards=None, params=None, **facts):
        """Run a job that writes files, name to text, or folders of them; return the path of its record."""
        outputs = [str(self.folder / name) for name in made]
        record = str(Path(outputs[0]).parent / "provenance" / f"{rule}.json")
        listed = Namedlist([*outputs, record])
        listed._set_name("record", len(outputs))
        snakemake = SimpleNamespace(
            rule=rule,
            input=sources,
            output=listed,
            params=params or {},
            wildcards=wildcards or {},
            config={"run": ["demo"]},
            threads=3,
            log=[str(self.folder / f"{rule}.log")],
        )
        with recorded_job(snakemake) as known:
            for path, content in zip(outputs, made.values(), strict=True):
                inner = content.items() if isinstance(content, dict) else [("", content)]
                for name, text in inner:
                    self.write(Path(path, name).relative_to(self.folder), text)
            known.update(facts)
        return Path(record)


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_a_job_leaves_a_record_beside_its_files(work):
    source = work.write("raw/screen.mtx", "cells")
    params = {
        "settings": {"seed": 7, "deep": {"half_seed": 8}, "share": np.float32(0.5), "n": np.int64(3)},
        "runs": [{"model": "a", "seed": 4}],
        "library": "digest of the code",
        "ratio": float("nan"),
    }
    path = work.job(
        "pair",
        [source],
        {"pair/pairs.h5": "pairs"},
        {"dataset": "demo", "seed": "2"},
        params,
        device="cuda (X)",
    )
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path == work.folder / "pair" / "provenance" / "pair.json"
    assert record["inputs"] == {source: sha256("cells")}
    (made,) = record["outputs"].items()
    assert made[0] == str(work.folder / "pair/pairs.h5") and made[1]["sha256"] == sha256("pairs")
    seeds = {"seed": "2", "settings.seed": 7, "settings.deep.half_seed": 8, "runs.0.seed": 4}
    assert record["seeds"] == seeds
    assert record["settings"] == {
        "settings": {"seed": 7, "deep": {"half_seed": 8}, "share": 0.5, "n": 3},
        "runs": [{"model": "a", "seed": 4}],
        "ratio": "nan",
    }
    assert record["config"] == {"run": ["demo"]}
    assert (record["rule"], record["threads"], record["device"]) == ("pair", 3, "cuda (X)")
    assert record["commit"] == environment()["commit"] and record["packages"] == package_versions()
    assert 0 <= record["seconds"] < 60 and record["peak_memory_mb"] > 10
    assert datetime.fromisoformat(record["finished"]).utcoffset() == timedelta(0)


def test_a_job_that_fails_leaves_no_record(work):
    with pytest.raises(TypeError):
        work.job("pair", [], {"pair/pairs.h5": None})
    assert not (work.folder / "pair" / "provenance").exists()


def test_every_file_of_an_input_folder_is_recorded(work):
    files = [work.write(f"raw/{name}", name) for name in ("matrix.mtx", "barcodes.tsv")]
    work.write("raw/inner/other", "not of the screen")
    record = work.job("preprocess", [str(work.folder / "raw"), files[0]], {"cells.h5ad": "x"})
    inputs = json.loads(record.read_text(encoding="utf-8"))["inputs"]
    assert inputs == {path: sha256(Path(path).name) for path in files}


def test_a_folder_that_a_job_made_is_recorded_and_followed_at_every_depth(work, monkeypatch):
    archive = work.write("raw/a.tar", "archive")
    content = {"one/matrix.mtx": "1", "two/matrix.mtx": "2", ".snakemake_timestamp": ""}
    unpack = work.job("unpack", [archive], {"raw/unpacked": content})
    assert unpack == work.folder / "raw/provenance/unpack.json"
    folder = work.folder / "raw/unpacked"
    digests = {str(folder / name): sha256(text) for name, text in content.items() if text}
    outputs = json.loads(unpack.read_text(encoding="utf-8"))["outputs"]
    assert {path: made["sha256"] for path, made in outputs.items()} == digests
    read = []
    monkeypatch.setattr("biojepa.jobs.sha256_of", lambda path: read.append(Path(path).name) or sha256("x"))
    record = work.job("preprocess", [str(folder)], {"preprocess/cells.h5ad": "x"})
    assert json.loads(record.read_text(encoding="utf-8"))["inputs"] == digests
    # The sums of the inputs came from the record of the job that made them.
    assert read == ["cells.h5ad"]
    assert list(jobs_behind([work.folder / "preprocess/cells.h5ad"])) == ["preprocess", "unpack"]


def test_a_recorded_input_is_read_again_only_if_it_has_changed(work, monkeypatch):
    work.job("preprocess", [], {"preprocess/cells.h5ad": "cells"})
    cells = work.folder / "preprocess" / "cells.h5ad"
    read = []
    monkeypatch.setattr("biojepa.jobs.sha256_of", lambda path: read.append(Path(path).name) or sha256("new"))
    first = work.job("pair", [str(cells)], {"pair/pairs.h5": "pairs"})
    assert read == ["pairs.h5"]
    assert json.loads(first.read_text("utf-8"))["inputs"] == {str(cells): sha256("cells")}
    cells.write_text("CELLS", encoding="utf-8")  # of the same length
    second = work.job("pair", [str(cells)], {"pair/pairs.h5": "pairs"})
    assert read == ["pairs.h5", "cells.h5ad", "pairs.h5"]
    assert json.loads(second.read_text("utf-8"))["inputs"] == {str(cells): sha256("new")}


def test_the_jobs_behind_a_file_are_found_and_no_others(work):
    made_of = work.write("parameters.json", "parameters")
    work.job("simulate", [made_of], {"raw.h5": "raw"}, {"dataset": "demo"})
    raw = str(work.folder / "raw.h5")
    work.job("preprocess", [raw], {"results/cells.h5ad": "cells"}, {"dataset": "demo"})
    cells = str(work.folder / "results" / "cells.h5ad")
    for fold in "01":
        # Snakemake gives wildcards in the order of the file name, JSON sorts them.
        wildcards = {"seed": "0", "fold": fold, "dataset": "demo", "split": "gene"}
        work.job("train", [cells], {f"results/fold{fold}/model.pt": fold}, wildcards)
    work.write("results/fold0/provenance/broken.json", "{")
    work.write("results/fold0/provenance/other.json", '["no record"]')
    model = work.folder / "results" / "fold0" / "model.pt"
    jobs = jobs_behind([model])
    assert list(jobs) == ["demo/gene/0/0/train", "demo/preprocess", "demo/simulate"]
    assert inputs_from_outside([model], work.folder / "results") == {raw: sha256("raw")}

    page = work.write("results/index.html", "page")
    record = record_of_run({"demo": {"pair": 1}}, [model, page], work.folder / "results")
    assert record["config"] == {"demo": {"pair": 1}}
    texts = {made_of: "parameters", raw: "raw", cells: "cells", str(model): "0", page: "page"}
    assert record["sha256"] == {path: sha256(text) for path, text in texts.items()}
    for job in jobs.values():
        assert job.pop("config") == {"run": ["demo"]}
    assert record["unrecorded"] == [page]
    assert record["jobs"] == jobs and record["commit"] == environment()["commit"]


def test_a_record_speaks_of_the_start_of_its_job(work, monkeypatch):
    """What a user commits or overwrites while a training runs is not what it ran with."""
    source = work.write("pairs.h5", "before")
    commits = iter(["commit at the start"])
    monkeypatch.setattr("biojepa.provenance.commit_of", lambda folder: next(commits))
    record = work.job("train", [source], {"pairs.h5": "after", "model.pt": "weights"})
    content = json.loads(record.read_text(encoding="utf-8"))
    assert content["commit"] == "commit at the start"
    assert content["inputs"][source] == sha256("before")
    assert content["outputs"][source]["sha256"] == sha256("after")


def test_results_that_were_moved_keep_their_records(work, monkeypatch):
    monkeypatch.chdir(work.folder)
    here = Work(Path("screen"))
    here.job("preprocess", ["/data/raw.h5"], {"results/cells.h5ad": "cells"}, {"dataset": "demo"})
    cells = "screen/results/cells.h5ad"
    here.job(
        "train", [cells], {"results/fold0/model.pt": "0", "results/fold1/model.pt": "1"}, {"dataset": "demo"}
    )
    before = jobs_behind(["screen/results/fold0/model.pt"])
    assert list(before) == ["demo/preprocess", "demo/train"]
    assert before["demo/train"]["inputs"] == {cells: sha256("cells")}

    shutil.move("screen/results", "results")
    after = jobs_behind(["results/fold0/model.pt"])
    assert list(after) == ["demo/preprocess", "demo/train"]
    assert after["demo/train"]["inputs"] == {"results/cells.h5ad": sha256("cells")}
    assert set(after["demo/train"]["outputs"]) == {f"results/fold{fold}/model.pt" for fold in "01"}

    somewhere = work.folder / "archive"
    (somewhere / "screen").mkdir(parents=True)
    shutil.move("results", somewhere / "screen" / "results")
    model = somewhere / "screen" / "results" / "fold0" / "model.pt"
    after = jobs_behind([model])
    assert after["demo/train"]["inputs"] == {str(somewhere / cells): sha256("cells")}


def test_a_lost_record_ends_a_branch(work):
    lost = work.job("preprocess", [], {"cells/cells.h5ad": "cells"}, {"dataset": "demo"})
    work.job("pair", [str(work.folder / "cells" / "cells.h5ad")], {"pairs.h5": "x"}, {"dataset": "demo"})
    lost.unlink()
    assert list(jobs_behind([work.folder / "pairs.h5"])) == ["demo/pair"]
