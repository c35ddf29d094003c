"""The chain end to end on a tiny simulated screen: every file keeps its contract, by value."""

import ast
import json
import re
import zipfile

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import sparse

from biojepa import contracts
from biojepa.contracts import OTHER_SCREEN
from biojepa.files import read_tsv, sha256_of
from biojepa.halves import half_b
from biojepa.pairs import read_pairs
from biojepa.training import load_model
from workflow_case import (
    ALL_JOBS,
    BASELINES,
    FOLDS,
    MODELS,
    TINY,
    TRAINED,
    expected_results,
    files_below,
)

TARGET_SUM = 100  # preprocess.target_sum of the tiny config


@pytest.fixture(scope="module")
def cells(finished):
    return finished.cells()


@pytest.fixture(scope="module")
def splits(finished):
    return {fold: read_tsv(finished.fold(fold, "pair", "split.tsv")).fillna("") for fold in FOLDS}


@pytest.fixture(scope="module")
def metrics(finished):
    return read_tsv(finished.path("perturbation", "evaluate", "metrics.tsv"))


def labels_of(split, *sets):
    return split.loc[split["set"].isin(sets), "perturbation"].tolist()


def mean_of(cells, genes, mask):
    return np.asarray(cells[mask, list(genes)].X.mean(axis=0), dtype=np.float64).ravel()


def test_the_chain_makes_every_file_and_leaves_nothing_else(finished):
    assert files_below(finished.folder / "results") == expected_results()
    made = files_below(finished.folder / "resources")
    names = ("raw.h5ad", "guides.csv", "network.tsv.gz", "gene_sets.gmt", "truth.h5ad", "truth_cells.tsv.gz")
    assert made == {f"datasets/tiny/{name}" for name in (*names, "provenance/simulate.json")}


def test_every_job_keeps_a_log_and_every_heavy_one_its_run_time(finished):
    logs = files_below(finished.folder / "logs", "benchmarks/")
    assert len(logs) == sum(ALL_JOBS.values())
    timed = files_below(finished.folder / "logs" / "benchmarks")
    for stage, count in (("/train.tsv", 8), ("embed/seed0.tsv", 2), ("/pairs.tsv", 2), ("/evaluate.tsv", 1)):
        found = [name for name in timed if name.endswith(stage)]
        assert len(found) == count, stage
        assert all(read_tsv(finished.folder / "logs/benchmarks" / name)["s"].item() > 0 for name in found)


def test_expression_is_log1p_of_counts_over_the_library(finished, cells):
    assert (cells.X.dtype, cells.layers["counts"].dtype) == (np.float32, np.float32)
    assert sparse.isspmatrix_csr(cells.X)
    counts = cells.layers["counts"].toarray()
    library = cells.obs["library_size"].to_numpy()
    np.testing.assert_allclose(
        cells.X.toarray(), np.log1p(counts / library[:, None] * TARGET_SUM), rtol=1e-5, atol=1e-6
    )
    raw = ad.read_h5ad(finished.folder / "resources/datasets/tiny/raw.h5ad")
    genes = (raw.var["feature_types"] == "Gene Expression").to_numpy()
    raw_counts = pd.DataFrame(
        np.asarray(raw[:, genes].X.todense() if sparse.issparse(raw.X) else raw[:, genes].X),
        index=raw.obs_names,
        columns=raw.var_names[genes],
    )
    np.testing.assert_array_equal(counts, raw_counts.loc[cells.obs_names, cells.var_names])
    # The library is counted before genes are dropped.
    np.testing.assert_array_equal(library, raw_counts.loc[cells.obs_names].sum(axis=1))
    assert cells.n_vars < genes.sum()


def test_cells_carry_the_columns_of_the_contract(finished, cells):
    obs = cells.obs
    assert [name for name in contracts.CELLS_OBS if name not in obs] == []
    labels = obs["perturbation"].astype(str)
    assert obs.index.is_unique
    assert cells.var_names.is_unique
    np.testing.assert_array_equal(obs["is_control"], labels == "control")
    assert all("+".join(sorted(label.split("+"))) == label for label in labels.unique())
    genes = [0 if label == "control" else label.count("+") + 1 for label in labels]
    np.testing.assert_array_equal(obs["n_perturbed_genes"], genes)
    assert set(obs["perturbation_type"]) == {"CRISPRi"}
    assert set(obs["batch"]) == {"batch1", "batch2"}
    assert cells.var["gene_id"].str.startswith("SIMG").all()
    flags = [name for name in obs if name.startswith("flag_")]
    assert flags
    assert all(obs[name].dtype == bool for name in flags)
    provenance = json.loads(cells.uns["provenance"])
    raw = finished.folder / "resources/datasets/tiny/raw.h5ad"
    assert provenance["inputs"]["raw.h5ad"] == sha256_of(raw)
    assert provenance["settings"]["target_sum"] == TARGET_SUM


def test_labels_called_from_guides_are_the_true_ones(finished, cells):
    truth = read_tsv(finished.folder / "resources/datasets/tiny/truth_cells.tsv.gz").set_index("barcode")
    true = truth.loc[cells.obs_names]
    single = (true["status"] == "singlet").to_numpy()
    agree = (true["perturbation"].to_numpy() == cells.obs["perturbation"].astype(str).to_numpy())[single]
    assert agree.mean() > 0.97
    assert single.mean() > 0.9


def test_qc_accounts_for_every_cell(finished, cells):
    qc = read_tsv(finished.path("preprocess", "qc.tsv"))
    assert list(qc.columns) == list(contracts.QC_COLUMNS)
    assert qc["cells_before"].iloc[0] == 1500
    assert qc["cells_after"].iloc[-1] == cells.n_obs
    np.testing.assert_array_equal(qc["cells_before"] - qc["cells_removed"], qc["cells_after"])
    np.testing.assert_array_equal(qc["cells_before"].iloc[1:], qc["cells_after"].iloc[:-1])


def test_the_table_of_perturbations_describes_every_label(finished, cells):
    table = read_tsv(finished.path("preprocess", "perturbations.tsv")).set_index("perturbation")
    assert ["perturbation", *table.columns] == list(contracts.PERTURBATION_TABLE_COLUMNS)
    counts = cells.obs["perturbation"].astype(str).value_counts()
    assert table["n_cells"].to_dict() == counts.drop("control", errors="ignore").to_dict()
    singles = table[table["n_perturbed_genes"] == 1]
    assert (singles["on_target_log2fc"].astype(float) < 0).mean() > 0.9, "the simulator knocks genes down"
    posterior = cells.obs.groupby("perturbation", observed=True)["responding_posterior"].mean()
    expected = posterior.reindex(table.index).astype(float)
    np.testing.assert_allclose(table["responding_share"], expected, rtol=1e-9)


def test_the_table_of_guides_has_every_guide_of_single_perturbations(finished, cells):
    table = read_tsv(finished.path("preprocess", "guides.tsv"))
    assert list(table.columns) == list(contracts.GUIDE_TABLE_COLUMNS)
    one_guide = ~cells.obs["guide_id"].astype(str).str.contains(";")
    obs = cells.obs[(cells.obs["n_perturbed_genes"] == 1) & one_guide]
    counts = obs.groupby(["perturbation", "guide_id"], observed=True).size()
    assert table.set_index(["perturbation", "guide_id"])["n_cells"].to_dict() == counts.to_dict()
    flagged = table.loc[table["flag"].fillna("").str.contains("discordant"), "guide_id"]
    assert set(cells.obs.loc[cells.obs["flag_discordant_guide"], "guide_id"].astype(str)) == set(flagged)


def test_splits_are_frozen_and_test_every_perturbation_once_over_the_folds(finished, splits, cells):
    known = set(cells.obs["perturbation"].astype(str)) - {"control"}
    tested = []
    for fold, split in splits.items():
        info = json.loads(finished.fold(fold, "pair", "split.json").read_text(encoding="utf-8"))
        assert list(split.columns) == list(contracts.SPLIT_COLUMNS)
        assert info["sha256"] == sha256_of(finished.fold(fold, "pair", "split.tsv"))
        assert (info["scheme"], info["fold"], info["n_folds"]) == ("perturbation", fold, 3)
        assert set(split["perturbation"]) == known
        for name in contracts.SETS:
            assert info[f"n_{name}"] == len(labels_of(split, name)) > 0
        tested += labels_of(split, "test")
    assert len(tested) == len(set(tested))
    assert len(tested) == pytest.approx(2 * len(known) / 3, abs=2)


@pytest.mark.parametrize("fold", FOLDS)
def test_pairs_hold_all_cells_but_those_of_test_perturbations(finished, splits, cells, fold):
    pairs = read_pairs(finished.fold(fold, "pair", "pairs.h5"))
    label = cells.obs["perturbation"].astype(str).to_numpy()
    allowed = np.isin(label, [*labels_of(splits[fold], "train", "val"), "control"])
    assert list(pairs.cell_names) == cells.obs_names[allowed].tolist()
    names = np.array([*pairs.labels, "control"])[pairs.perturbation]
    np.testing.assert_array_equal(names, label[allowed])
    np.testing.assert_array_equal(
        pairs.dense(np.arange(allowed.sum())), cells[allowed, list(pairs.genes)].X.toarray()
    )
    np.testing.assert_allclose(
        np.exp(pairs.log_library_size), cells.obs["library_size"].to_numpy()[allowed], rtol=1e-5
    )
    batch = cells.obs["batch"].astype(str).to_numpy()[allowed]
    assert set(names[pairs.partner]) == {"control"}
    np.testing.assert_array_equal(batch[pairs.partner], batch)
    assert pairs.facts["split_sha256"] == sha256_of(finished.fold(fold, "pair", "split.tsv"))
    assert set(pairs.perturbed_genes) == {gene for name in pairs.labels for gene in name.split("+")}
    assert set(pairs.codes) == {"network", "gene_sets"}
    for codes in pairs.codes.values():
        assert codes.shape[0] == len(pairs.perturbed_genes)
        np.testing.assert_allclose(np.linalg.norm(codes[codes.any(axis=1)], axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("model", TRAINED)
def test_training_writes_a_model_its_curves_and_its_figures(finished, model):
    folder = finished.fold(0, model, "seed0", "train")
    content = torch.load(folder / "model.pt", weights_only=True)
    assert content["facts"]["fold"] == 0
    assert content["settings"]["predictor"]["steps"] == 30
    history = read_tsv(folder / "history.tsv")
    assert {"stage", "step", "loss"} <= set(history.columns)
    assert history.loc[history["stage"] == "predictor", "step"].max() == 30
    figures = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert {"device", "seconds", "cells_per_second", "peak_memory_mb", "embedding"} <= set(figures)
    assert figures["embedding"]["rankme"] > 1


def test_only_the_model_that_trains_an_encoder_has_curves_of_one(finished):
    stages = {
        model: set(read_tsv(finished.fold(0, model, "seed0", "train", "history.tsv"))["stage"])
        for model in TRAINED
    }
    assert stages.pop("biojepa") == {"encoder", "predictor"}
    assert all(found == {"predictor"} for found in stages.values()), stages


def test_models_that_reuse_an_encoder_embed_alike(finished):
    embeddings = {
        model: ad.read_h5ad(finished.fold(0, model, "seed0", "embed", "embeddings.h5ad")).obsm["X_biojepa"]
        for model in TRAINED
    }
    np.testing.assert_array_equal(embeddings["biojepa"], embeddings["shuffled_priors"])
    assert not np.allclose(embeddings["biojepa"][:, :8], embeddings["pca_predictor"][:, :8])


@pytest.mark.parametrize("model", TRAINED)
def test_every_cell_is_embedded(finished, cells, model):
    embeddings = ad.read_h5ad(finished.fold(1, model, "seed0", "embed", "embeddings.h5ad"))
    assert embeddings.obs_names.equals(cells.obs_names)
    values = embeddings.obsm["X_biojepa"]
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert (values.std(axis=0) > 0).all()


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_writes_the_same_kind_of_predictions(finished, splits, cells, model, fold):
    predictions, split = finished.predictions(fold, model), splits[fold]
    assert list(predictions.obs.columns) == list(contracts.PREDICTIONS_OBS)
    expected = split[split["set"].isin(["val", "test"])]
    assert predictions.obs["perturbation"].tolist() == expected["perturbation"].tolist()
    assert predictions.obs["set"].tolist() == expected["set"].tolist()
    assert set(predictions.obs["context"]) == {"all"}
    counts = cells.obs["perturbation"].astype(str).value_counts()
    assert predictions.obs["n_cells"].tolist() == counts[expected["perturbation"]].tolist()
    assert predictions.var_names.tolist() == list(read_pairs(finished.fold(fold, "pair", "pairs.h5")).genes)
    assert predictions.X.dtype == np.float32
    assert np.isfinite(predictions.X).all()
    assert (predictions.X >= 0).all()
    assert predictions.uns["model"] == model
    provenance = json.loads(predictions.uns["provenance"])
    assert provenance["split_sha256"] == sha256_of(finished.fold(fold, "pair", "split.tsv"))
    if "sd" in predictions.layers:
        assert (predictions.layers["sd"] > 0).all()


def test_simple_predictions_are_means_of_cells(finished, splits, cells):
    split, label = splits[0], cells.obs["perturbation"].astype(str).to_numpy()
    genes = finished.predictions(0, "mean").var_names
    control = mean_of(cells, genes, label == "control")
    np.testing.assert_allclose(
        finished.predictions(0, "no_change").X[0], control, rtol=1e-4, atol=1e-6, err_msg="no_change"
    )
    training = np.mean([mean_of(cells, genes, label == name) for name in labels_of(split, "train")], axis=0)
    for row in finished.predictions(0, "mean").X:
        np.testing.assert_allclose(row, training, rtol=1e-4, atol=1e-6)
    in_b = half_b(cells.obs_names, 0, label)
    duplicate = finished.predictions(0, "duplicate")
    for name, row in zip(duplicate.obs["perturbation"], duplicate.X, strict=True):
        np.testing.assert_allclose(
            row, mean_of(cells, genes, (label == name) & ~in_b), rtol=1e-4, atol=1e-6, err_msg=name
        )


def test_observed_embeddings_beside_the_predicted_ones_are_means_over_cells(finished, cells):
    label = cells.obs["perturbation"].astype(str).to_numpy()
    embeddings = ad.read_h5ad(finished.fold(0, "biojepa", "seed0", "embed", "embeddings.h5ad"))
    predictions = finished.predictions(0, "biojepa")
    for name, observed in zip(predictions.obs["perturbation"], predictions.obsm["z_true"], strict=True):
        mean = embeddings.obsm["X_biojepa"][label == name].mean(axis=0)
        np.testing.assert_allclose(observed, mean, rtol=1e-3, atol=1e-5, err_msg=name)
    assert predictions.obsm["z_pred"].shape == predictions.obsm["z_true"].shape


def test_the_embedding_is_measured_on_cells_of_test_perturbations(finished, splits, cells):
    for fold in FOLDS:
        table = read_tsv(finished.fold(fold, "biojepa", "seed0", "embed", "representation.tsv"))
        tested = labels_of(splits[fold], "test")
        assert set(table["perturbation"]) == {*tested, "*"}
        n = int(cells.obs["perturbation"].isin(tested).sum())
        assert set(table.loc[table["cells"] == "test", "n_cells"]) == {n}
        assert set(table["embedding"]) >= {"trained", "untrained", "pca50"}
        training = json.loads(finished.fold(fold, "biojepa", "seed0", "train", "metrics.json").read_text())
        spread = table.query("embedding == 'trained' and metric == 'std_cells'")["value"].item()
        # Of other cells than in training, and of the same encoder.
        assert spread == pytest.approx(training["embedding"]["std_cells"], rel=0.2)
    page = finished.path("perturbation", "report.html").read_text(encoding="utf-8")
    assert "PCA-50" in page.split('<section id="representation">', 1)[1].split("</section>", 1)[0]


def test_scores_are_of_test_perturbations_only_and_each_is_there_once(splits, metrics):
    assert list(metrics.columns) == list(contracts.METRICS_COLUMNS)
    assert set(metrics["model"]) == set(MODELS)
    scored = metrics[metrics["perturbation"] != "*"]
    assert not scored.duplicated(["model", "fold", "seed", "perturbation", "metric"]).any()
    for (model, fold), rows in scored[scored["metric"] == "mse"].groupby(["model", "fold"]):
        assert sorted(rows["perturbation"]) == sorted(labels_of(splits[fold], "test")), model


@pytest.mark.parametrize("model", ["biojepa", "kernel_ridge", "duplicate"])
def test_scores_follow_from_cells_and_predictions(finished, splits, cells, metrics, model):
    label = cells.obs["perturbation"].astype(str).to_numpy()
    in_b = half_b(cells.obs_names, 0, label)
    for fold, split in splits.items():
        predictions = finished.predictions(fold, model)
        genes = predictions.var_names
        training = [mean_of(cells, genes, label == name) for name in labels_of(split, "train")]
        zero = np.mean(training, axis=0)
        for name in labels_of(split, "test"):
            predicted = np.asarray(
                predictions[predictions.obs["perturbation"] == name].X, dtype=float
            ).ravel()
            truth = mean_of(cells, genes, (label == name) & in_b)
            everything = mean_of(cells, genes, label == name)
            expected = {
                "pearson_delta_perturbed_mean": np.corrcoef(predicted - zero, truth - zero)[0, 1],
                "mse": np.mean((predicted - everything) ** 2),
            }
            here = metrics.query("model == @model and fold == @fold and perturbation == @name")
            here = here.set_index("metric")["value"]
            for metric, value in expected.items():
                assert here[metric] == pytest.approx(value, rel=1e-3, abs=1e-4), (name, metric)


def test_the_summary_pools_the_folds(finished, metrics):
    summary = read_tsv(finished.path("perturbation", "evaluate", "summary.tsv"))
    assert list(summary.columns) == list(contracts.SUMMARY_COLUMNS)
    row = summary.query("model == 'ridge' and category == 'all' and metric == 'rank_l2'").iloc[0]
    values = metrics.query("model == 'ridge' and metric == 'rank_l2'")["value"]
    assert row["n"] == len(values)
    assert row["mean"] == pytest.approx(values.mean())
    assert row["ci_low"] <= row["mean"] <= row["ci_high"]
    assert row["mean"] <= summary.query("category == 'all' and metric == 'rank_l2'")["mean"].max()
    zero = summary.query("metric == 'mse' and category == 'all'").set_index("model")["gap_closed"]
    assert (zero["mean"], zero["duplicate"]) == (0.0, 1.0)


def test_predictions_are_the_linear_branch_plus_what_the_gate_lets_through(finished):
    for fold in FOLDS:
        folder = finished.fold(fold, "biojepa", "seed0")
        model = load_model(folder / "train" / "model.pt")
        figures = json.loads((folder / "train" / "metrics.json").read_text(encoding="utf-8"))
        assert model.weight == figures["latent_weight"]
        written = ad.read_h5ad(folder / "embed" / "predictions.h5ad")
        position = {label: row for row, label in enumerate(model.labels)}
        asked = model.asked(np.array([position[label] for label in written.obs["perturbation"]]))
        change = model.linear_change(asked[0]) + model.weight * model.latent_change(*asked)
        assert model.scale == figures["scale"]
        expected = np.maximum(model.control_expression.numpy() + model.scale * change, 0)
        np.testing.assert_allclose(written.X, expected, atol=1e-5)
        # The linear branch is not that of the baseline: half of it looks at the embedding.
        alone = ad.read_h5ad(finished.fold(fold, "kernel_ridge", "seed0", "embed", "predictions.h5ad"))
        assert np.abs(written.X - alone[written.obs_names].X).max() > 1e-3


def test_enrichment_compares_the_model_with_its_references(finished, splits):
    table = read_tsv(finished.path("perturbation", "evaluate", "enrichment.tsv"))
    assert {"model", "perturbation", "gene_set", "nes_pred", "nes_true"} <= set(table.columns)
    assert {"biojepa", "mean", "duplicate"} <= set(table["model"])
    tested = {name for split in splits.values() for name in labels_of(split, "test")}
    assert set(table["perturbation"]) <= tested


def test_tables_hold_no_wall_clock(finished):
    for name in sorted(files_below(finished.folder / "results")):
        if name.endswith(".tsv"):
            columns = read_tsv(finished.folder / "results" / name).columns
            assert not {column for column in columns if re.search(r"second|time|date", column)}, name


def test_pages_open_without_a_network(finished):
    page = finished.path("perturbation", "report.html").read_text(encoding="utf-8")
    sources = r"<(?:script|img|iframe|source)[^>]+src=[\"'](?!data:)[^\"']+"
    loaded = rf"{sources}|<link[^>]+href=[\"'](?!data:)[^\"']+|@import"
    assert re.findall(loaded, page) == []
    verdict = json.loads(
        finished.path("perturbation", "evaluate", "verdict.json").read_text(encoding="utf-8")
    )
    assert verdict["outcome"] in page
    index = (finished.folder / "results" / "index.html").read_text(encoding="utf-8")
    assert re.findall(loaded, index) == []
    assert "tiny/perturbation/report.html" in index


def test_provenance_names_settings_files_and_run_times(finished):
    record = json.loads((finished.folder / "results/provenance.json").read_text(encoding="utf-8"))
    assert record["config"]["tiny"]["evaluate"]["draws"] == 100
    assert record["config"]["tiny"]["source"]["source"] == "simulator"
    assert record["packages"]["torch"] == torch.__version__
    results = {f"results/{name}" for name in expected_results() if "provenance" not in name}
    # Besides the files that reports are made of: what one may look at, and nothing else reads.
    ends = ("embeddings.h5ad", "qc.tsv", "guides.tsv", "history.tsv")
    unread = {name for name in results if name.endswith(ends)}
    assert results - unread <= record["sha256"].keys()
    for name, digest in record["sha256"].items():
        if (finished.folder / name).exists():  # the parameters of the simulator are in the checkout
            assert sha256_of(finished.folder / name) == digest, name
    assert len(record["jobs"]) == sum(ALL_JOBS[rule] for rule in ALL_JOBS.keys() - {"provenance"})
    assert record["unrecorded"] == []
    job = record["jobs"]["tiny/perturbation/0/biojepa/0/train"]
    assert job["seconds"] > 0 and job["peak_memory_mb"] > 0
    assert job["device"].startswith("cpu") and job["threads"] == 1
    assert job["seeds"]["seed"] == "0"
    pairs = "results/tiny/perturbation/fold0/pair/pairs.h5"
    assert job["inputs"] == {pairs: sha256_of(finished.folder / pairs)}


def test_every_result_has_a_record_of_the_job_that_made_it(finished):
    """The record names the file and its content, the code, the settings, the seeds and the inputs."""
    for name in expected_results():
        if "provenance" in name:
            continue
        path = finished.folder / "results" / name
        records = [json.loads(file.read_text("utf-8")) for file in (path.parent / "provenance").iterdir()]
        (record,) = [record for record in records if f"results/{name}" in record["outputs"]]
        assert record["outputs"][f"results/{name}"]["sha256"] == sha256_of(path)
        assert {"commit", "packages", "machine", "device", "seconds", "seeds", "config"} <= record.keys()
        assert record["config"]["run"] == ["tiny"]
        for source, digest in record["inputs"].items():
            if (finished.folder / source).exists():
                assert sha256_of(finished.folder / source) == digest, (name, source)
        if "fold" in name and "pair/" not in name and "/train/" not in name:
            assert any(source.endswith("pair/split.tsv") for source in record["inputs"]), name


def test_snakemakes_own_report_carries_the_items(finished, tmp_path):
    target = tmp_path / "report.zip"
    answer = finished.run("--report", str(target))
    assert answer.returncode == 0, answer.stdout
    with zipfile.ZipFile(target) as archive:
        names = {name.rsplit("/", 1)[1] for name in archive.namelist()}
    assert {"report.html", "headline.tsv", "calibration.svg", "scatter.svg"} <= names
    assert {"index.html", "provenance.json", "summary.tsv", "strata.tsv", "trust.tsv"} <= names


def test_scripts_can_carry_the_preamble_of_snakemake(repo):
    # Snakemake writes lines before a script's own, and a __future__ import must be the first.
    for script in sorted((repo / "workflow" / "scripts").glob("*.py")):
        tree = ast.parse(script.read_text(encoding="utf-8"))
        futures = [
            node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"
        ]
        assert not futures, script.name


def test_the_tiny_config_runs_the_default_models(repo):
    schema = yaml.safe_load((repo / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8"))
    assert set(schema["properties"]["models"]["default"]) == {*BASELINES, *TRAINED, OTHER_SCREEN}
    assert "models" not in yaml.safe_load(TINY.read_text(encoding="utf-8"))
