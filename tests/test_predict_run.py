"""What the config asks to predict: only what is needed runs, and the table says what it should."""

import json
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from biojepa.contracts import PREDICTED_COLUMNS
from biojepa.evaluation.trust import TrustModel
from biojepa.files import read_tsv, sha256_of
from biojepa.pairs import read_pairs
from biojepa.splits import SeenGenes
from biojepa.training import load_model
from workflow_case import TRAINED, Pipeline, expected_results, files_below

JOBS = {"freeze_split": 1, "pair": 1, "train": 1, "predict": 1}
# What is asked for is part of the settings that a report and the record of a run show.
RECORDED = {"report": 1, "provenance": 1}
UNCOVERED = "NOSUCHGENE"


@pytest.fixture(scope="module")
def asked(finished, tmp_path_factory):
    """A finished run that is continued with requests of every kind."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    shutil.copytree(finished.folder, folder, symlinks=True)
    pipeline = Pipeline(finished.checkout, folder)
    measured = pipeline.cells().obs["perturbation"].astype(str).unique()
    singles = sorted(label for label in measured if "+" not in label and label != "control")
    network = read_tsv(folder / "resources/datasets/tiny/network.tsv.gz")
    known = sorted(set(network["gene_a"]) - {gene for label in measured for gene in label.split("+")})
    requests = [singles[0], known[0], f"{known[1]}+{singles[1]}", UNCOVERED]
    (folder / "genes.txt").write_text("# asked for\n" + "\n".join(requests) + "\n", encoding="utf-8")
    config = {"predict": "genes.txt"}
    assert pipeline.planned("predicted", config=config) == JOBS | {"predicted": 1}
    assert pipeline.planned(config=config) == JOBS | RECORDED
    answer = pipeline.run("predicted", config=config)
    assert answer.returncode == 0, answer.stdout
    return pipeline, config, requests


@pytest.fixture(scope="module")
def table(asked):
    pipeline, _, _ = asked
    return read_tsv(pipeline.path("predict", "predictions.tsv"))


def test_nothing_is_made_for_prediction_but_its_own_files(asked):
    pipeline, config, _ = asked
    none = "tiny/none/fold0"
    paired = ("split.tsv", "split.json", "pairs.h5", "coverage.tsv", "training_cells.tsv", "balance.tsv")
    made = {f"{none}/pair/{name}" for name in paired}
    made |= {f"{none}/biojepa/seed0/train/{name}" for name in ("model.pt", "history.tsv", "metrics.json")}
    made |= {f"tiny/predict/{name}" for name in ("predictions.tsv", "predictions.h5ad")}
    made |= {f"{none}/pair/provenance/{rule}.json" for rule in ("freeze_split", "pair")}
    made |= {f"{none}/biojepa/seed0/train/provenance/train.json", "tiny/predict/provenance/predict.json"}
    assert files_below(pipeline.folder / "results") == expected_results(TRAINED) | made
    assert pipeline.planned("predicted", config=config) == {}
    (pipeline.folder / "more.txt").write_text("# another file\nGENE001\n", encoding="utf-8")
    again = pipeline.planned("predicted", config={"predict": "more.txt"})
    assert again == dict.fromkeys(("pair", "train", "predict", "predicted"), 1)


def test_the_model_was_trained_on_every_perturbation(asked):
    pipeline, _, _ = asked
    pairs = read_pairs(pipeline.path("none", "fold0", "pair", "pairs.h5"))
    cells = pipeline.cells()
    assert set(pairs.sets) == {"train"}
    assert pairs.cell_names == tuple(cells.obs_names)
    assert dict(zip(pairs.labels, pairs.n_cells, strict=True)) == (
        cells.obs["perturbation"].astype(str).value_counts().drop("control").to_dict()
    )


def test_every_request_is_answered_in_its_own_way(asked, table):
    pipeline, _, requests = asked
    trained, unseen, pair, _ = requests
    assert list(table.columns) == list(PREDICTED_COLUMNS)
    rows = table.set_index("perturbation")
    training = read_tsv(pipeline.path("none", "fold0", "pair", "split.tsv"))["perturbation"].tolist()
    assert sorted(rows.index) == sorted("+".join(sorted(name.split("+"))) for name in requests)
    assert table["perturbation"].iloc[-1] == UNCOVERED
    assert table["rank"].tolist()[:3] == [1, 2, 3] and pd.isna(table["rank"].iloc[3])
    assert rows.loc[UNCOVERED, "trust"] == f"not predicted: no prior source knows {UNCOVERED}"
    assert rows.loc[trained, "category"] == "measured"
    for label in (unseen, "+".join(sorted(pair.split("+")))):
        assert rows.loc[label, "category"] == SeenGenes.of(training).categorize(label)[0]
        assert 0 < rows.loc[label, "nearest_similarity"] <= 1
        assert set(rows.loc[label, "nearest_training_gene"].split(";")) <= {
            gene for name in training for gene in name.split("+")
        }


def test_held_out_accuracy_is_that_of_the_evaluation(asked, table):
    pipeline, _, requests = asked
    row = table.set_index("perturbation").loc[requests[1]]
    summary = read_tsv(pipeline.path("perturbation", "evaluate", "summary.tsv")).query(
        "metric == 'pearson_delta_perturbed_mean' and category == @row.category"
    )
    scores = summary.set_index("model")["mean"]
    assert row["heldout_accuracy"] == pytest.approx(scores["biojepa"])
    assert row["baseline"] == summary.query("model == 'biojepa'")["best_baseline"].item()
    assert row["baseline_accuracy"] == pytest.approx(scores[row["baseline"]])
    assert row["gain"] == pytest.approx(scores["biojepa"] - scores[row["baseline"]], abs=1e-8)
    assert row["heldout_n"] == summary.query("model == 'biojepa'")["n"].item()


def test_expected_accuracy_follows_from_the_held_out_perturbations(asked, table):
    pipeline, _, requests = asked
    evaluated = pipeline.path("perturbation", "evaluate")
    trust = read_tsv(evaluated / "trust.tsv")
    held_out = read_tsv(evaluated / "metrics.tsv").query(
        "model == 'biojepa' and metric == 'pearson_delta_perturbed_mean'"
    )
    assert trust.set_index("perturbation")["observed"].to_dict() == pytest.approx(
        held_out.groupby("perturbation")["value"].mean().to_dict()
    )
    judged = json.loads((evaluated / "verdict.json").read_text(encoding="utf-8"))["trust"]
    assert judged["n"] == len(trust)
    columns = ["expected_accuracy", "expected_low", "expected_high"]
    rows = table.set_index("perturbation")
    assert rows.loc[[requests[0], UNCOVERED], [*columns, "expected_from"]].isna().all().all()
    row = rows.loc[requests[1]]
    assert row["expected_from"] == ("features" if judged["skill"] else "kind")
    expected, low, high = row[columns]
    if judged["skill"]:
        features = [{"category": row["category"], "n_genes_seen": 0, "predicted_effect": row["effect_size"],
                     "predicted_effect_sd": row["effect_size_sd"],
                     "nearest_similarity": row["nearest_similarity"],
                     "prior_coverage": 1.0}]  # fmt: skip
        assert row["prior_coverage"].split("/")[0] == row["prior_coverage"].split("/")[1]
        assert expected == pytest.approx(TrustModel.fit(trust).expected(pd.DataFrame(features)).item())
    else:
        kind = trust[(trust["category"] == row["category"]) & (trust["n_genes_seen"] == 0)]
        assert expected == pytest.approx(kind["observed"].mean())
    assert low <= expected <= high


def test_the_expression_is_what_the_model_says_of_those_genes(asked, table):
    pipeline, _, _ = asked
    path = pipeline.path("none", "fold0", "biojepa", "seed0", "train", "model.pt")
    model, content = load_model(path), ad.read_h5ad(pipeline.path("predict", "predictions.h5ad"))
    assert content.obs_names.tolist() == table["perturbation"].tolist()[:3]
    assert tuple(content.var_names) == model.genes
    membership = np.zeros((3, len(model.perturbed_genes)))
    for row, label in enumerate(content.obs_names):
        for gene in label.split("+"):
            membership[row, model.perturbed_genes.index(gene)] = 1
    expression, sd, _ = model.predict_membership(membership)
    np.testing.assert_allclose(content.X, expression, atol=1e-5)
    np.testing.assert_allclose(content.layers["sd"], sd, atol=1e-5)
    size = np.linalg.norm(expression - model.control_expression.numpy(), axis=1)
    np.testing.assert_allclose(table["effect_size"][:3], size, rtol=1e-4)
    assert size.min() > 0, "a gene that was never perturbed must not be predicted as control"
    assert json.loads(content.uns["provenance"])["model_sha256"] == sha256_of(path)


def test_asking_for_predictions_without_saying_of_what_is_refused(finished):
    answer = finished.run("predicted", "--dry-run")
    assert answer.returncode != 0
    assert "config, key predict: found nothing to predict" in answer.stdout
