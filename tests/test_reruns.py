"""What runs again: nothing without a change, and after a change the stages that it touches."""

import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from workflow_case import ALL_JOBS, Pipeline, jobs_of

AFTER_TRAINING = {name: ALL_JOBS[name] for name in ("embed", "representation", "umap")}
SHOWN = {"report": 1, "provenance": 1}
SCORED = {"evaluate": 1, "index": 1, **SHOWN}


def test_a_dry_run_lists_every_stage(checkout, tmp_path):
    assert Pipeline(checkout, tmp_path).planned() == ALL_JOBS


def test_a_second_run_has_nothing_to_do(finished):
    answer = finished.run()
    assert answer.returncode == 0
    assert "Nothing to be done" in answer.stdout


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"evaluate": {"draws": 150}}, SCORED),
        ({"embed": {"umap_seed": 1}}, {"umap": 1, **SHOWN}),
        ({"train": {"baselines": {"neighbours": 3}}}, {"baselines": 2, **SCORED}),
        ({"train": {"predictor": {"steps": 31}}}, {"train": 8, **AFTER_TRAINING, **SCORED}),
        (
            {"pair": {"prior_dim": 8}},
            {k: n for k, n in ALL_JOBS.items() if k not in ("simulate", "preprocess", "qc_report")},
        ),
        ({"preprocess": {"permutations": 21}}, {k: n for k, n in ALL_JOBS.items() if k != "simulate"}),
        (
            {"folds": [0, 1, 2]},
            {**{k: n // 2 for k, n in ALL_JOBS.items() if n > 1}, **SCORED},
        ),
    ],
    ids=["draws", "umap_seed", "neighbours", "predictor_steps", "prior_dim", "permutations", "third_fold"],
)
def test_a_changed_setting_reruns_the_stages_that_use_it(finished, change, expected):
    assert finished.planned(config=change) == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("report/style.css", {"qc_report": 1, "report": 1, "index": 1, "provenance": 1}),
        ("evaluation/verdict.py", {"qc_report": 1, **SCORED}),  # the package of reports knows verdicts
        ("model/predictor.py", {"train": 8, **AFTER_TRAINING, **SCORED}),
        ("simulate/network.py", ALL_JOBS),
    ],
)
def test_a_changed_library_module_reruns_the_stages_that_import_it(finished, module, expected):
    path = finished.checkout / "workflow" / "lib" / "biojepa" / module
    before = path.read_bytes()
    try:
        path.write_bytes(before + (b"/* changed */\n" if path.suffix == ".css" else b"# changed\n"))
        assert finished.planned() == expected
    finally:
        path.write_bytes(before)


def test_a_deleted_page_is_made_again_alone(finished, tmp_path):
    page, kept = finished.path("perturbation", "report.html"), tmp_path / "report.html"
    shutil.move(page, kept)
    try:
        assert finished.planned() == SHOWN
    finally:
        shutil.move(kept, page)


@pytest.mark.slow
def test_another_folder_and_number_of_cores_give_the_same_results(finished, checkout, tmp_path):
    again = Pipeline(checkout, tmp_path)
    answer = again.run("results/tiny/perturbation/fold0/biojepa/seed0/train/model.pt", cores=1)
    assert answer.returncode == 0, answer.stdout
    same = [f"preprocess/{name}" for name in ("qc.tsv", "perturbations.tsv", "guides.tsv")]
    same += [f"perturbation/fold0/pair/{name}" for name in ("split.tsv", "split.json")]
    same.append("perturbation/fold0/biojepa/seed0/train/history.tsv")
    for name in same:
        assert again.path(name).read_bytes() == finished.path(name).read_bytes(), name
    first, second = finished.cells(), again.cells()
    assert (first.X != second.X).nnz == 0
    pd.testing.assert_frame_equal(first.obs, second.obs)
    one, two = (p.fold(0, "pair", "pairs.h5") for p in (finished, again))
    for key in ("cells/partner", "cells/data", "codes/network", "codes/gene_sets"):
        with h5py.File(one) as file, h5py.File(two) as other:
            np.testing.assert_array_equal(file[key][:], other[key][:], err_msg=key)
    one, two = (
        torch.load(p.fold(0, "biojepa", "seed0", "train", "model.pt"), weights_only=True)
        for p in (finished, again)
    )
    for part in ("embedding", "predictor"):
        assert all(torch.equal(value, two[part][key]) for key, value in one[part].items()), part


def test_simple_models_alone_make_a_report(checkout, tmp_path):
    change = {"models": ["mean", "ridge", "kernel_ridge"], "evaluate": {"model": "kernel_ridge"}}
    expected = {name: count for name, count in ALL_JOBS.items() if name not in ("train", *AFTER_TRAINING)}
    assert Pipeline(checkout, tmp_path).planned(config=change) == expected


def test_stage_targets_stop_where_they_say(finished, checkout, tmp_path):
    expected = {"simulate": 1, "preprocess": 1, "freeze_split": 2, "pair": 2}
    answer = Pipeline(checkout, tmp_path).run("paired", "--dry-run", "--quiet", "rules")
    found = jobs_of(answer.stdout)
    found.pop("paired", None)
    assert found == expected
