"""Nothing that is held out reaches training, and a leak that is planted is caught."""

import json
import shutil
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from biojepa import pairing
from biojepa.baselines import fit_baselines
from biojepa.embedding import Outputs, embed_and_predict
from biojepa.errors import InputError
from biojepa.evaluation.evaluate import evaluate
from biojepa.evaluation.leakage import check_training_cells
from biojepa.evaluation.predictions import PredictionFile
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.splits import read_split as read_fold
from biojepa.evaluation.splits import read_split as read_fold_split
from biojepa.evaluation.verdict import SUSPECTED
from biojepa.files import read_tsv, sha256_of
from biojepa.pairing import PairSettings, build_pairs
from biojepa.pairs import read_pairs
from biojepa.splits import LeakageError
from biojepa.training import TrainSettings, train_model
from workflow_case import FOLDS, Pipeline

SETTINGS = PairSettings(n_folds=3, prior_dim=16)


@pytest.fixture(scope="module")
def files(finished):
    """Paths that the stages of fold 0 read."""
    raw = finished.folder / "resources/datasets/tiny"
    return {
        "cells": finished.path("preprocess", "cells.h5ad"),
        "split": finished.fold(0, "pair", "split.tsv"),
        "info": finished.fold(0, "pair", "split.json"),
        "pairs": finished.fold(0, "pair", "pairs.h5"),
        "model": finished.fold(0, "biojepa", "seed0", "train", "model.pt"),
        "network": raw / "network.tsv.gz",
        "gene_sets": raw / "gene_sets.gmt",
    }


@pytest.fixture(scope="module")
def tested(files):
    """Test perturbations of fold 0."""
    return read_tsv(files["split"]).query("set == 'test'")["perturbation"].tolist()


@pytest.fixture(scope="module")
def altered(files, tested, tmp_path_factory):
    """Return a copy of the cells in which those of test perturbations express something else entirely."""
    path = tmp_path_factory.mktemp("altered") / "cells.h5ad"
    shutil.copy(files["cells"], path)
    held_out = ad.read_h5ad(path).obs["perturbation"].isin(tested).to_numpy()
    with h5py.File(path, "r+") as file:
        rows = np.repeat(held_out, np.diff(file["X/indptr"][:]))
        data = file["X/data"][:]
        data[rows] = np.random.default_rng(0).uniform(5, 9, rows.sum())
        file["X/data"][:] = data
    return path


def rebuild(files, path, settings=SETTINGS, gene_tables=(), **changes):
    source = {**files, **changes}
    build_pairs(
        source["cells"],
        source["split"],
        path,
        [source["network"]],
        [source["gene_sets"]],
        settings,
        {"split_sha256": sha256_of(source["split"])},
        gene_tables=gene_tables,
    )


def move_to_training(split, label):
    """Give a test perturbation to training in ``split.tsv``, as a careless hand would."""
    text = split.read_text(encoding="utf-8")
    assert f"{label}\ttest\t" in text
    split.write_text(text.replace(f"{label}\ttest\t", f"{label}\ttrain\t"), encoding="utf-8")


def test_what_training_reads_does_not_depend_on_test_cells(files, altered, tmp_path):
    rebuild(files, tmp_path / "first.h5")
    rebuild(files, tmp_path / "second.h5", cells=altered)
    first, second = read_pairs(tmp_path / "first.h5"), read_pairs(tmp_path / "second.h5")
    for name in ("data", "indices", "indptr", "perturbation", "partner", "log_library_size"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    assert (first.genes, first.cell_names) == (second.genes, second.cell_names)
    for name, codes in first.codes.items():
        np.testing.assert_array_equal(codes, second.codes[name])


def test_predictions_do_not_depend_on_test_cells(files, altered, tested, tmp_path):
    made = []
    for name, cells in (("as measured", files["cells"]), ("altered", altered)):
        target = tmp_path / f"{name}.h5ad"
        outputs = Outputs("biojepa", tmp_path / f"{name}.emb.h5ad", target)
        embed_and_predict(files["model"], cells, files["split"], outputs)
        made.append(ad.read_h5ad(target))
    np.testing.assert_array_equal(made[0].X, made[1].X)
    np.testing.assert_array_equal(made[0].layers["sd"], made[1].layers["sd"])
    np.testing.assert_array_equal(made[0].obsm["z_pred"], made[1].obsm["z_pred"])
    # The observed embedding, which is there to be compared with, must see the change.
    rows = made[0].obs["perturbation"].isin(tested).to_numpy()
    assert np.abs(made[0].obsm["z_true"] - made[1].obsm["z_true"])[rows].max() > 0.1
    np.testing.assert_array_equal(made[0].obsm["z_true"][~rows], made[1].obsm["z_true"][~rows])


def test_a_test_perturbation_in_the_pairing_is_a_leak(files, tested, tmp_path, monkeypatch):
    honest = pairing.labels_in

    def careless(table, *sets):
        return [*honest(table, *sets), tested[0]]

    monkeypatch.setattr(pairing, "labels_in", careless)
    with pytest.raises(LeakageError, match=rf"gene selection would use 1 perturbation.*{tested[0]}"):
        rebuild(files, tmp_path / "pairs.h5")
    assert not list(tmp_path.iterdir())


def leaked(files, label_set="train"):
    """Pairs that carry the cells of a label which the split tests, and that label."""
    pairs = read_pairs(files["pairs"])
    place = pairs.sets.index(label_set)
    return replace(pairs, sets=(*pairs.sets[:place], "test", *pairs.sets[place + 1 :])), pairs.labels[place]


@pytest.mark.parametrize("label_set", ["train", "val"])
def test_training_refuses_pairs_with_cells_of_a_test_perturbation(files, label_set):
    pairs, label = leaked(files, label_set)
    with pytest.raises(LeakageError, match=rf"1 test perturbation\(s\): {label}\. Fix: delete pairs\.h5"):
        train_model(pairs, TrainSettings(device="cpu"))


def test_baselines_refuse_pairs_with_cells_of_a_test_perturbation(files):
    pairs, label = leaked(files)
    with pytest.raises(LeakageError, match=label.replace("+", r"\+")):
        fit_baselines(pairs, ["mean"])


def test_a_model_of_another_fold_may_not_predict_this_one(finished, files, tmp_path):
    other = finished.fold(1, "pair", "split.tsv")
    targets = [tmp_path / "embeddings.h5ad", tmp_path / "predictions.h5ad"]
    with pytest.raises(LeakageError, match=r"model\.pt was made with a split.*fold1.*may have seen"):
        embed_and_predict(files["model"], files["cells"], other, Outputs("biojepa", *targets))
    assert not any(target.exists() for target in targets)


def test_an_edited_split_stops_every_stage_that_reads_it(finished, files, tested, checkout, tmp_path):
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    pipeline = Pipeline(checkout, tmp_path)
    split = pipeline.fold(0, "pair", "split.tsv")
    move_to_training(split, tested[0])
    scores = pipeline.path("perturbation", "evaluate", "metrics.tsv")
    answer = pipeline.run(
        "evaluated", "--keep-going", "--rerun-triggers", "mtime",
        "--forcerun", "pair", "baselines", "evaluate",
        "--omit-from", "train", "embed", "references",
    )  # fmt: skip
    assert answer.returncode != 0
    message = "fold0/pair/split.tsv: found SHA-256"
    assert message in answer.stdout
    assert "a split must not be edited" in answer.stdout
    assert not scores.exists() or sha256_of(scores) == sha256_of(
        finished.path("perturbation", "evaluate", "metrics.tsv")
    )


def scored(files, predictions):
    folds = [read_fold(files["split"], files["info"], 0)]
    return evaluate(files["cells"], folds, [PredictionFile("mine", 0, 0, predictions)])


@pytest.fixture
def predictions(finished, tmp_path):
    """Return a copy of a model's predictions that a test may spoil."""
    path = tmp_path / "predictions.h5ad"
    shutil.copy(finished.fold(0, "ridge", "seed0", "embed", "predictions.h5ad"), path)
    return path


def test_predictions_that_call_a_test_perturbation_training_are_refused(files, tested, predictions):
    content = ad.read_h5ad(predictions)
    content.obs["set"] = (
        content.obs["set"].astype(str).where(content.obs["perturbation"] != tested[0], "train")
    )
    content.write_h5ad(predictions)
    with pytest.raises(InputError, match=rf"predictions\.h5ad, perturbation '{tested[0]}'.*'train'.*'test'"):
        scored(files, predictions)


def test_predictions_made_with_another_split_are_refused(finished, files, predictions):
    content = ad.read_h5ad(predictions)
    frozen, other = (sha256_of(finished.fold(fold, "pair", "split.tsv")) for fold in (0, 1))
    content.uns["provenance"] = content.uns["provenance"].replace(frozen, other)
    content.write_h5ad(predictions)
    with pytest.raises(InputError, match=rf"uns\['provenance'\].*{other}.*{frozen}"):
        scored(files, predictions)


def test_predictions_without_provenance_are_welcome(files, predictions):
    content = ad.read_h5ad(predictions)
    del content.uns["provenance"]
    content.write_h5ad(predictions)
    result = scored(files, predictions)
    assert "mine" in set(result.metrics["model"])


def test_an_edited_split_is_refused_before_it_is_used(files, tested, tmp_path):
    copy = {name: tmp_path / files[name].name for name in ("split", "info")}
    for name, path in copy.items():
        shutil.copy(files[name], path)
    move_to_training(copy["split"], tested[0])
    for attempt in (
        lambda: rebuild(files, tmp_path / "pairs.h5", **copy),
        lambda: scored({**files, **copy}, files["pairs"]),
    ):
        with pytest.raises(InputError, match=r"split\.tsv: found SHA-256 .* frozen in .*split\.json"):
            attempt()
    assert sorted(tmp_path.iterdir()) == sorted(copy.values())


@pytest.mark.parametrize(
    ("hide_as", "message"),
    [("control", r"test perturbations were read by training"), ("train", "another label")],
)
def test_a_cell_that_hides_under_another_label_is_found(finished, files, tested, tmp_path, hide_as, message):
    """``pairs.h5`` alone cannot know: it takes the comparison with ``cells.h5ad``, cell by cell."""
    planted = tmp_path / "pairs.h5"
    shutil.copy2(files["pairs"], planted)
    cells = ad.read_h5ad(files["cells"], backed="r")
    held_out = cells.obs_names[cells.obs["perturbation"] == tested[0]][0]
    with h5py.File(planted, "r+") as file:
        codes = file["cells/perturbation"]
        if hide_as == "control":
            row = int(np.flatnonzero(codes[:] == -1)[0])
            file["names/cell_names"][row] = held_out
        else:
            row = int(np.flatnonzero(codes[:] == -1)[0])
            codes[row] = int(codes[:].max())
    split = read_fold_split(files["split"], files["split"].with_suffix(".json"), 0)
    assert check_training_cells(files["pairs"], files["cells"], split)[0]["passed"]
    with pytest.raises(LeakageError, match=message):
        check_training_cells(planted, files["cells"], split)


def evaluated(finished, pairs, models=("mean", "ridge", "biojepa", "duplicate"), predictions=None):
    """Evaluate both folds with what training is said to have read."""
    splits = [
        read_fold(finished.fold(fold, "pair", "split.tsv"), finished.fold(fold, "pair", "split.json"), fold)
        for fold in FOLDS
    ]
    files = [
        PredictionFile(model, fold, 0, finished.fold(fold, model, "seed0", "embed", "predictions.h5ad"))
        for fold in FOLDS
        for model in models
    ]
    settings = EvaluationSettings(draws=100, min_perturbations=6)
    cells = finished.path("preprocess", "cells.h5ad")
    return evaluate(cells, splits, [*files, *(predictions or [])], settings, pairs=pairs)


def honest_pairs(finished):
    return [finished.fold(fold, "pair", "pairs.h5") for fold in FOLDS]


def test_every_check_runs_on_an_honest_run_and_passes(finished):
    sentinels = evaluated(finished, honest_pairs(finished)).verdict["sentinels"]
    assert all(item["passed"] for item in sentinels)
    checks = "\n".join(item["check"] for item in sentinels)
    for words in (
        "no cell that training read belongs to a test perturbation",
        "early stopping and selection have the sets of split.tsv",
        "the genes are those that training cells and controls alone choose",
        "it is on record what every source was read from",
        "no model was trained, stopped or selected on a test perturbation",
        "duplicate and truth share no cell",
        "prior sources do not look like the responses of held-out perturbations",
    ):
        assert words in checks, words
    kinds = [item["kind"] for item in sentinels]
    assert kinds.count("statistical") == 1
    # What models declare in each fold, what prior codes were read from, and who reads pairs.h5 alone.
    assert kinds.count("stated") == len(FOLDS) + 2


def test_models_of_the_pipeline_declare_what_they_used(finished, files):
    table = read_tsv(files["split"]).groupby("set")["perturbation"].apply(sorted)
    for model in ("biojepa", "pca_predictor", "biojepa_predictor", "ridge", "mean"):
        content = finished.predictions(0, model)
        provenance = json.loads(content.uns["provenance"])
        assert provenance["trained_on"] == table["train"], model
        assert provenance["selected_on"] == table["val"], model


def test_an_evaluation_without_pairs_says_what_it_could_not_check(finished):
    verdict = evaluated(finished, None).verdict
    (row,) = [item for item in verdict["sentinels"] if item["passed"] is None]
    assert row["check"].startswith("what training read")


@pytest.mark.parametrize(
    ("leak", "message"),
    [
        ("training", "was trained on 1 test perturbation"),
        ("early stopping", "was selected or stopped by 1 test perturbation"),
        ("sets", "early stopping and selection would use it so"),
        ("genes", "genes are not those that the training cells"),
        ("genes by batch", "genes are not those that the training cells"),
    ],
)
def test_a_planted_leak_stops_the_evaluation(finished, files, tested, tmp_path, monkeypatch, leak, message):
    pairs, predictions = honest_pairs(finished), []
    planted = tmp_path / "pairs.h5"
    if leak in ("training", "early stopping"):
        content = finished.predictions(0, "ridge")
        provenance = json.loads(content.uns["provenance"])
        provenance["trained_on" if leak == "training" else "selected_on"].append(tested[0])
        content.uns["provenance"] = json.dumps(provenance)
        content.write_h5ad(tmp_path / "leaky.h5ad")
        # Fold 1 holds the honest file under the same name.
        honest = finished.fold(1, "ridge", "seed0", "embed", "predictions.h5ad")
        predictions = [
            PredictionFile("leaky", 0, 0, tmp_path / "leaky.h5ad"),
            PredictionFile("leaky", 1, 0, honest),
        ]
    elif leak == "sets":
        shutil.copy2(pairs[0], planted)
        with h5py.File(planted, "r+") as file:
            file["names/sets"][list(file["names/labels"].asstr()[:]).index(tested[0])] = "val"
        pairs[0] = planted
    else:
        # All cells choose the genes, those of test perturbations too.
        honest_moments, honest_batches = pairing.gene_moments, pairing.batches_that_choose
        monkeypatch.setattr(
            pairing, "gene_moments", lambda matrix, keep, n: honest_moments(matrix, np.ones_like(keep), n)
        )
        monkeypatch.setattr(
            pairing, "batches_that_choose", lambda batch, keep: honest_batches(batch, np.ones_like(keep))
        )
        by_batch = leak == "genes by batch"
        rebuild(files, planted, settings=replace(SETTINGS, n_genes=60, genes_by_batch=by_batch))
        pairs[0] = planted
    with pytest.raises(LeakageError, match=message):
        evaluated(finished, pairs, predictions=predictions)


def test_a_gene_table_made_from_the_screen_itself_is_suspected(finished, files, tmp_path):
    """The realistic leak: the responses of all cells, held-out ones included, given as gene features."""
    cells = ad.read_h5ad(files["cells"])
    labels = cells.obs["perturbation"].astype(str)
    mean = {
        label: np.asarray(cells.X[(labels == label).to_numpy()].mean(axis=0)).ravel() for label in set(labels)
    }
    genes = sorted({gene for label in mean if label != "control" for gene in label.split("+")})
    rows = {
        gene: mean.get(gene, np.mean([mean[k] for k in mean if gene in k.split("+")], axis=0))
        for gene in genes
    }
    table = pd.DataFrame(rows).T - mean["control"]
    table.rename_axis("gene").to_csv(tmp_path / "embedding.tsv", sep="\t")
    pairs = []
    for fold in FOLDS:
        changed = {
            name: finished.fold(fold, "pair", f"split.{end}")
            for name, end in (("split", "tsv"), ("info", "json"))
        }
        pairs.append(tmp_path / f"pairs{fold}.h5")
        rebuild(files, pairs[-1], gene_tables=[tmp_path / "embedding.tsv"], **changed)
    verdict = evaluated(finished, pairs).verdict
    assert verdict["outcome"] == SUSPECTED
    failed = [item for item in verdict["sentinels"] if item["passed"] is False]
    assert [item["kind"] for item in failed] == ["statistical"]
    assert failed[0]["check"].startswith("prior source embedding looks like the responses")
    assert verdict["unless_leaked"]["outcome"] != SUSPECTED
