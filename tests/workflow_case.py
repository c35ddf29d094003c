"""Run the workflow from tests as a user does: in a folder of its own, by the command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import anndata as ad
import pytest
import yaml

REPO = Path(__file__).resolve().parents[1]
CONFIGS = REPO / "tests" / "config"
TINY = CONFIGS / "tiny.yaml"
RESOURCES = ("simulator.json", "catalogue.tsv", "cell_cycle_genes.tsv")
TRACKED = ("Snakefile", "workflow", "envs", "profiles", *(f"resources/{name}" for name in RESOURCES))
# Set where the screens have to be there, so that a run without them is no success.
REQUIRE_DATA = "BIOJEPA_REQUIRE_DATA"


def missing_data(message: str) -> NoReturn:
    """Skip for lack of real screens; fail where ``BIOJEPA_REQUIRE_DATA`` says that they are there."""
    if os.environ.get(REQUIRE_DATA):
        pytest.fail(f"{REQUIRE_DATA} is set, but {message}")
    pytest.skip(message)


# The models of the default config, by who writes their predictions.
BASELINES = (
    "no_change",
    "mean",
    "target_only",
    "additive",
    "matching_mean",
    "linear",
    "multihot",
    "ridge",
    "kernel_ridge",
    "knn",
    "mlp",
    "shuffled_labels",
    "random_codes",
)
TRAINED = ("biojepa", "biojepa_predictor", "pca_predictor", "shuffled_priors")
ORACLES = ("oracle", "oracle_pca")
REFERENCES = ("duplicate", "interpolated_duplicate")
MODELS = (*BASELINES, *TRAINED, *ORACLES, *REFERENCES)
FOLDS = (0, 1)
# Jobs of the whole chain on the tiny config, by rule.
ALL_JOBS = {
    "simulate": 1,
    "preprocess": 1,
    "qc_report": 1,
    "freeze_split": 2,
    "pair": 2,
    "train": 8,
    "baselines": 2,
    "embed": 2,
    "references": 2,
    "representation": 2,
    "umap": 1,
    "evaluate": 1,
    "report": 1,
    "index": 1,
    "provenance": 1,
}


@dataclass
class Pipeline:
    """A copy of the workflow, and a folder that it runs in.

    Attributes
    ----------
    checkout
        Folder with the Snakefile.
    folder
        Working folder: config, resources, results and logs.
    """

    checkout: Path
    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "config").mkdir(parents=True, exist_ok=True)
        shutil.copy(CONFIGS / "datasets.tsv", self.folder / "config" / "datasets.tsv")

    @staticmethod
    def copy_workflow(folder: Path) -> Path:
        """Copy what the workflow consists of, a megabyte of text."""
        for name in TRACKED:
            source, target = REPO / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                # With its time: a newer file would make Snakemake run what reads it again.
                shutil.copy2(source, target)
        return folder

    def run(
        self,
        *arguments: str,
        config: Mapping[str, Any] | None = None,
        base: Path | None = TINY,
        cores: int = 2,
    ) -> subprocess.CompletedProcess[str]:
        """Call snakemake; ``config`` is merged into the config file ``base``. Output holds both streams."""
        files = [str(base)] if base else []
        if config is not None:
            extra = self.folder / "config" / "extra.yaml"
            extra.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
            files.append(str(extra))
        command = [sys.executable, "-m", "snakemake", *arguments]
        command += ["--snakefile", str(self.checkout / "Snakefile"), "--directory", str(self.folder)]
        command += ["--cores", str(cores), *(["--configfile", *files] if files else [])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return call(command, self.folder, environment)

    def planned(self, *arguments: str, config: Mapping[str, Any] | None = None) -> dict[str, int]:
        """Count the jobs of each rule that a run would execute; the collecting rule ``all`` left out."""
        answer = self.run(*arguments, "--dry-run", "--quiet", "rules", config=config)
        assert answer.returncode == 0, answer.stdout
        return jobs_of(answer.stdout)

    def path(self, *parts: str | int) -> Path:
        """Return a path below ``results/tiny``."""
        return self.folder.joinpath("results", "tiny", *map(str, parts))

    def fold(self, fold: int, *parts: str | int) -> Path:
        """Return a path below a fold's folder."""
        return self.path("perturbation", f"fold{fold}", *parts)

    def predictions(self, fold: int, model: str) -> ad.AnnData:
        """Read the predictions of a model."""
        return ad.read_h5ad(self.fold(fold, model, "seed0", "embed", "predictions.h5ad"))

    def cells(self) -> ad.AnnData:
        """Read the preprocessed cells."""
        return ad.read_h5ad(self.path("preprocess", "cells.h5ad"))


def call(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, whatever its exit status. Output holds both streams."""
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; yields its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def jobs_of(output: str) -> dict[str, int]:
    """Read Snakemake's table of job counts."""
    rows = re.findall(r"^(\w+)\s+(\d+)\s*$", output, flags=re.MULTILINE)
    return {rule: int(count) for rule, count in rows if rule not in ("all", "total", "job")}


def files_below(folder: Path, *ignored: str) -> set[str]:
    """List the files below a folder, relative to it."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in found if not path.startswith(tuple(ignored))} if ignored else set(found)


def expected_results(trained: Sequence[str] = TRAINED) -> set[str]:
    """List every file below ``results`` that the chain makes of the tiny config."""
    expected = {"index.html", "provenance.json", "provenance/index.json"}
    described = ("qc", "perturbations", "guides", "guide_calls", "guides_per_cell", "guide_umis", "batches")
    described += ("distributions",)
    expected |= {f"tiny/preprocess/{name}.tsv" for name in described}
    expected |= {f"tiny/preprocess/{name}" for name in ("cells.h5ad", "qc.html")}
    expected |= {f"tiny/preprocess/provenance/{rule}.json" for rule in ("preprocess", "qc_report")}
    scheme = "tiny/perturbation"
    evaluated = ("metrics.tsv", "summary.tsv", "enrichment.tsv", "strata.tsv", "trust.tsv", "verdict.json")
    evaluated += ("observed.h5ad",)
    expected |= {f"{scheme}/evaluate/{name}" for name in evaluated}
    shown = ("report.html", "report/headline.tsv", "report/calibration.svg", "report/scatter.svg")
    expected |= {f"{scheme}/{name}" for name in shown}
    records = ("evaluate/provenance/evaluate.json", "provenance/report.json", "report/provenance/report.json")
    expected |= {f"{scheme}/{name}" for name in records}
    for fold in FOLDS:
        place = f"{scheme}/fold{fold}"
        paired = ("split.tsv", "split.json", "pairs.h5", "coverage.tsv", "balance.tsv", "training_cells.tsv")
        paired += ("provenance/freeze_split.json", "provenance/pair.json")
        expected |= {f"{place}/pair/{name}" for name in paired}
        expected |= {f"{place}/{model}/seed0/embed/predictions.h5ad" for model in MODELS}
        writers = dict.fromkeys(BASELINES, "baselines") | dict.fromkeys(REFERENCES, "references")
        for model in MODELS:
            writer = writers.get(model, "embed")
            expected.add(f"{place}/{model}/seed0/embed/provenance/{writer}.json")
        for model in trained:
            run = f"{place}/{model}/seed0"
            trains = ("model.pt", "history.tsv", "metrics.json", "provenance/train.json")
            expected |= {f"{run}/train/{name}" for name in trains}
            expected.add(f"{run}/embed/embeddings.h5ad")
        measured = ("representation.tsv", "provenance/representation.json")
        expected |= {f"{place}/biojepa/seed0/embed/{name}" for name in measured}
    drawn = ("umap.tsv", "provenance/umap.json")
    expected |= {f"{scheme}/fold0/biojepa/seed0/embed/{name}" for name in drawn}
    return expected
