"""``check`` on the tiny screen as run.sh calls it: the jobs of a run, and cells that are there already."""

import json
import subprocess

import anndata as ad
import pandas as pd
import pytest
import yaml

from biojepa.check import as_text, check_config, plan
from biojepa.check.__main__ import main
from biojepa.check.report import SNAKEFILE
from biojepa.check.text import TO_PREPROCESSED
from biojepa.config import load_config
from biojepa.pairing import PairSettings, build_pairs, freeze_split
from biojepa.preprocess import PreprocessSettings, preprocess_file
from biojepa.raw import ScreenSource
from biojepa.simulate import (
    PARAMETERS_FILE,
    ScreenFiles,
    ScreenParameters,
    SimulatorSettings,
    simulate_screen,
)
from workflow_case import ALL_JOBS, FOLDS, REPO, TINY, Pipeline

SETTINGS = yaml.safe_load(TINY.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a fresh folder with the table of datasets of the tiny screen."""
    monkeypatch.chdir(tmp_path)
    return Pipeline(REPO, tmp_path).folder


def test_before_a_run_snakemake_plans_every_job_of_it(folder, capsys):
    assert main(["--directory", str(folder), "--configfile", str(TINY), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["jobs"] == ALL_JOBS
    assert report["datasets"]["tiny"]["simulated"]["n_cells"] == 1500
    # The networks of this config are smaller than those that were measured.
    assert "train" in report["estimate"]["not_measured"]
    assert set(report["estimate"]["rules"]) == {"preprocess", "pair", "embed"}
    assert not (folder / "results").exists()
    said = f"{sum(ALL_JOBS.values())} to run, 3 of them for `preprocessed`: simulate 1"
    assert said in as_text(report)


def test_the_config_of_the_repository_is_read_where_none_is_named(folder, capsys):
    assert main(["--directory", str(folder)]) == 1
    assert "config/config.yaml" in capsys.readouterr().out


def test_the_screen_before_it_is_preprocessed_and_after(folder):
    config = load_config(SETTINGS, REPO / "workflow" / "schemas")
    raw = folder / "resources" / "datasets" / "tiny"
    raw.mkdir(parents=True)
    names = {"raw": "raw.h5ad", "guides": "guides.csv", "network": "network.tsv.gz"}
    names |= {"gene_sets": "gene_sets.gmt", "truth": "truth.h5ad", "truth_cells": "cells.tsv"}
    simulate_screen(
        SimulatorSettings.from_dict(config.settings("tiny", "download")["simulator"]),
        ScreenFiles(**{key: raw / name for key, name in names.items()}),
        parameters=ScreenParameters.read(PARAMETERS_FILE),
    )
    said = check_config(SETTINGS)["datasets"]["tiny"]
    assert said["cells"] == 1500
    assert said["labels_from"] == "guide counts"
    assert said["folds"] == {}
    targets = ad.read_h5ad(raw / "raw.h5ad").var
    assert said["genes"] == (targets.feature_types == "Gene Expression").sum() == 120

    made = folder / "results" / "tiny" / "preprocess"
    made.mkdir(parents=True)
    preprocess_file(
        ScreenSource.from_mapping(config.source("tiny").screen),
        PreprocessSettings.from_mapping(config.settings("tiny", "preprocess")),
        made / "cells.h5ad",
        made / "qc.tsv",
        made / "perturbations.tsv",
        made / "guides.tsv",
    )
    report = check_config(SETTINGS)
    assert report["problems"] == []
    said = report["datasets"]["tiny"]
    assert said["labels_from"] == "earlier run"
    labels = ad.read_h5ad(made / "cells.h5ad").obs.perturbation.value_counts()
    assert said["control_cells"] == labels["control"]
    assert said["perturbations"] == len(labels) - 1
    pair = PairSettings(**config.settings("tiny", "pair"))
    for fold in FOLDS:
        freeze_split(made / "cells.h5ad", folder / "split.tsv", "tiny", "perturbation", fold, pair)
        frozen = json.loads((folder / "split.json").read_text())
        sizes = {name: frozen[f"n_{name}"] for name in ("train", "val", "test")}
        assert said["folds"]["perturbation"][fold] == {"fold": fold, **sizes}
    facts = {"dataset": "tiny", "scheme": "perturbation", "fold": FOLDS[-1], "seed": 0, "split_sha256": ""}
    files = [raw / "network.tsv.gz"], [raw / "gene_sets.gmt"]
    tables = build_pairs(made / "cells.h5ad", "split.tsv", "pairs.h5", *files, pair, facts)
    coverage = tables.coverage
    assert {one["name"]: one["covers"] for one in said["coverage"]["sources"]} == {
        name: coverage[name].sum() for name in ("network", "gene_sets")
    }


def test_files_of_predictions_that_are_not_there_are_one_problem(folder, capsys):
    entry = {"name": "mine", "predictions": "mine/fold{fold}.h5ad"}
    (folder / "extra.json").write_text(json.dumps({"models": ["mean", "biojepa", entry]}))
    assert main(["--configfile", str(TINY), "extra.json"]) == 1
    said = capsys.readouterr().out
    assert said.count("config, models, mine: no file mine/fold0.h5ad") == 1
    assert "jobs are counted, and what else may be wrong is looked for, once" in said


def test_what_snakemake_cannot_plan_is_a_problem(folder, monkeypatch):
    asked = []

    def refuse(command, **_):
        asked.append(command)
        said = "Building DAG of jobs...\nMissingInputException in rule pair:\nno file x\n"
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(plan.subprocess, "run", refuse)
    report = check_config(SETTINGS, ["--configfile", str(TINY)])
    assert report["problems"] == [
        "Snakemake cannot plan the run: MissingInputException in rule pair:\nno file x"
    ]
    assert report["jobs"] == {}
    (command,) = asked
    assert "--dry-run" in command and command[-2:] == ["--configfile", str(TINY)]


def test_jobs_are_counted_in_spite_of_a_misspelt_column(folder, monkeypatch):
    (folder / "table.tsv").write_text("dataset\tsource\tbatch_colum\ntiny\tsimulator\tlane\n")
    asked = []

    def plan_alone(arguments, _):
        asked.append(arguments)
        table = pd.read_csv(arguments[-1].removeprefix("datasets="), sep="\t")
        return {"preprocess": table.batch_column.eq("lane").sum()}, ""

    monkeypatch.setattr("biojepa.check.report.count_jobs", plan_alone)
    wrong = SETTINGS | {"datasets": "table.tsv"}
    said = check_config(wrong, ["--configfile", str(TINY), "--config", "run=[tiny]"])
    assert len(said["problems"]) == 1
    assert said["jobs"] == {"preprocess": 1}
    assert asked[0][:-1] == ["--configfile", str(TINY), "--config", "run=[tiny]"]
    assert (
        "jobs are those of a table whose unknown columns are spelt as proposed, or left out" in said["notes"]
    )
    # With another problem, Snakemake would only say that one once more.
    said = check_config(wrong | {"trian": 1}, ["--configfile", str(TINY)])
    assert (len(asked), said["jobs"]) == (1, {})


def test_the_jobs_of_the_target_preprocessed_are_those_that_snakemake_plans_for_it(folder):
    # With the rule of the target itself, as `all` is in a run.
    planned, said = plan.count_jobs(["--configfile", str(TINY), "--", "preprocessed"], SNAKEFILE)
    assert said == ""
    assert set(planned) - {"preprocessed"} == {"simulate", "preprocess", "qc_report"} <= TO_PREPROCESSED
