"""``check`` on the tiny screen, before a run and after it: what it says is what the run makes."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from workflow_case import ALL_JOBS, FOLDS, TINY, Pipeline


def check(pipeline, *arguments):
    """Call the check as run.sh does."""
    answer = subprocess.run(
        [sys.executable, "-m", "biojepa.check", "--directory", str(pipeline.folder), *arguments],
        env=os.environ | {"PYTHONPATH": str(pipeline.checkout / "workflow" / "lib"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert answer.returncode in (0, 1), answer.stderr
    return answer


@pytest.fixture(scope="module")
def fresh(checkout, tmp_path_factory):
    return Pipeline(checkout, tmp_path_factory.mktemp("fresh"))


def test_before_a_run(fresh):
    answer = check(fresh, "--configfile", str(TINY), "--json")
    report = json.loads(answer.stdout)
    assert answer.returncode == 0
    assert report["problems"] == []
    assert report["jobs"] == ALL_JOBS
    assert report["datasets"]["tiny"]["simulated"]["n_cells"] == 1500
    # The networks of this config are smaller than those that were measured.
    assert "train" in report["estimate"]["not_measured"]
    assert set(report["estimate"]["rules"]) == {"preprocess", "pair", "embed"}
    assert not (fresh.folder / "results").exists()


def test_the_config_of_the_repository_is_read_where_none_is_named(fresh):
    answer = check(fresh)
    assert answer.returncode == 1
    assert "config/config.yaml" in answer.stdout


def test_after_a_run(finished):
    answer = check(finished, "--configfile", str(TINY), "--json")
    report = json.loads(answer.stdout)
    assert (answer.returncode, report["problems"], report["jobs"]) == (0, [], {})
    said = report["datasets"]["tiny"]
    labels = finished.cells().obs.perturbation.value_counts()
    assert said["control_cells"] == labels["control"]
    assert said["perturbations"] == len(labels) - 1
    for fold in FOLDS:
        frozen = json.loads(finished.fold(fold, "pair", "split.json").read_text())
        sizes = {name: frozen[f"n_{name}"] for name in ("train", "val", "test")}
        assert said["folds"]["perturbation"][fold] == {"fold": fold, **sizes}
    coverage = pd.read_csv(finished.fold(0, "pair", "coverage.tsv"), sep="\t")
    assert {one["name"]: one["covers"] for one in said["coverage"]["sources"]} == {
        name: coverage[name].sum() for name in ("network", "gene_sets")
    }


def test_what_snakemake_cannot_plan_is_a_problem(fresh, tmp_path):
    entry = {"name": "mine", "predictions": "mine/fold{fold}.h5ad"}
    (tmp_path / "extra.json").write_text(json.dumps({"models": ["mean", "biojepa", entry]}))
    answer = check(fresh, "--configfile", str(TINY), str(tmp_path / "extra.json"))
    assert answer.returncode == 1
    assert answer.stdout.count("config, models, mine: no file mine/fold0.h5ad") == 1
