"""Every scheme of held-out perturbations in one run: what is held out stays out, and contexts add up."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from biojepa.files import read_tsv, sha256_of
from biojepa.halves import half_b
from biojepa.labels import genes_of
from biojepa.pairs import read_pairs
from biojepa.training import load_model
from workflow_case import Pipeline

# Two minutes, which the quick tests have no room for; .ci/run runs them.
pytestmark = pytest.mark.slow

SCHEMES = ("gene", "combination", "list")
CONTEXT = "batch2"
SIMPLE = ["no_change", "mean", "multihot"]
MODELS = [*SIMPLE, "kernel_ridge", "biojepa"]


@pytest.fixture(scope="module")
def run(checkout, tmp_path_factory):
    """A run of three schemes together and of a fourth with a trained model, a fold each, on one screen."""
    pipeline = Pipeline(checkout, tmp_path_factory.mktemp("schemes"))
    config = {
        "schemes": list(SCHEMES),
        "folds": [0],
        "models": SIMPLE,
        # A simple model under test saves the map and the measurements of the embedding.
        "evaluate": {"model": "multihot", "enrichment": {"max_perturbations": 2}},
        "download": {"simulator": {"n_cells": 2000, "n_batches": 3}},
        "preprocess": {"permutations": 5},
        "pair": {"context_column": "batch", "contexts": [CONTEXT], "list": "held_out.tsv", "n_folds": 4},
    }
    (pipeline.folder / "held_out.tsv").write_text("perturbation\tset\n", encoding="utf-8")
    answer = pipeline.run("preprocessed", "--until", "preprocess", config=config)
    assert answer.returncode == 0, answer.stdout
    labels = sorted(set(pipeline.cells().obs["perturbation"].astype(str)) - {"control"})
    singles = [label for label in labels if "+" not in label]
    combination = next(label for label in labels if "+" in label)
    swapped = "+".join(reversed(combination.split("+")))
    rows = [(swapped, "test"), (singles[0], "test"), (singles[1], "test"), (singles[2], "validation")]
    lines = ["perturbation\tset", *("\t".join(row) for row in rows)]
    (pipeline.folder / "held_out.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    answer = pipeline.run(config=config)
    assert answer.returncode == 0, answer.stdout
    of_context = config | {"schemes": ["context"], "models": MODELS}
    answer = pipeline.run("results/tiny/context/report.html", config=of_context)
    assert answer.returncode == 0, answer.stdout
    return pipeline, {"test": {combination, singles[0], singles[1]}, "val": {singles[2]}}


def split_of(pipeline, scheme):
    folder = pipeline.path(scheme, "fold0", "pair")
    info = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    assert info["sha256"] == sha256_of(folder / "split.tsv") and info["scheme"] == scheme
    table = read_tsv(folder / "split.tsv")
    counts = table["set"].value_counts()
    assert {name: info[f"n_{name}"] for name in ("train", "val", "test")} == counts.to_dict()
    return table, info


def labels_in(table, *sets):
    return set(table.loc[table["set"].isin(sets), "perturbation"])


def genes_in(labels):
    return {gene for label in labels for gene in genes_of(label)}


def test_every_scheme_has_its_report_and_the_summaries_name_them(run):
    pipeline, _ = run
    index = (pipeline.folder / "results" / "index.html").read_text(encoding="utf-8")
    provenance = json.loads((pipeline.folder / "results" / "provenance.json").read_text(encoding="utf-8"))
    for scheme in (*SCHEMES, "context"):
        report = pipeline.path(scheme, "report.html").read_text(encoding="utf-8")
        assert split_of(pipeline, scheme)[1]["sha256"] in report
        summary = read_tsv(pipeline.path(scheme, "evaluate", "summary.tsv"))
        assert {*(MODELS if scheme == "context" else SIMPLE), "duplicate"} <= set(summary["model"])
        if scheme in SCHEMES:
            assert f"tiny/{scheme}/report.html" in index
            frozen = f"results/tiny/{scheme}/fold0/pair/split.json"
            assert provenance["sha256"][frozen] == sha256_of(pipeline.folder / frozen)


def test_no_training_perturbation_carries_a_held_out_gene(run):
    pipeline, _ = run
    table, info = split_of(pipeline, "gene")
    held_out = set(info["held_out_genes"])
    assert not genes_in(labels_in(table, "train", "val")) & held_out
    assert not genes_in(labels_in(table, "train")) & set(info["validation_genes"])
    assert all(held_out & set(genes_of(label)) for label in labels_in(table, "test"))
    pairs = read_pairs(pipeline.path("gene", "fold0", "pair", "pairs.h5"))
    carried = {pairs.labels[code] for code in np.unique(pairs.perturbation) if code >= 0}
    assert carried == labels_in(table, "train", "val")


def test_the_other_half_of_the_combinations_is_held_out(run):
    pipeline, _ = run
    table, info = split_of(pipeline, "combination")
    combinations = {label for label in table["perturbation"] if "+" in label}
    assert info["protocol"] == "half_of_doubles"
    assert labels_in(table, "test", "val") <= combinations
    assert len(labels_in(table, "train") & combinations) == len(combinations) // 2


def test_what_the_user_lists_is_held_out(run):
    pipeline, listed = run
    table, info = split_of(pipeline, "list")
    assert {name: labels_in(table, name) for name in ("test", "val")} == listed
    assert info["listed_in"] == "held_out.tsv" and info["validation_drawn"] is False


def test_perturbed_cells_of_the_held_out_context_are_nowhere_in_training(run):
    pipeline, _ = run
    obs = pipeline.cells().obs
    label, inside = obs["perturbation"].astype(str), (obs["batch"].astype(str) == CONTEXT).to_numpy()
    control = (label == "control").to_numpy()
    table, info = split_of(pipeline, "context")
    assert (info["context"], info["context_column"]) == (CONTEXT, "batch")
    pairs = read_pairs(pipeline.path("context", "fold0", "pair", "pairs.h5"))
    names = set(pairs.cell_names)
    assert not names & set(obs.index[inside & ~control])
    assert set(obs.index[control]) <= names
    trained = labels_in(table, "train", "val")
    assert names == set(obs.index[control | (~inside & label.isin(trained).to_numpy())])
    counts = label[inside & ~control].value_counts()
    stopped_by = labels_in(table, "val")
    tested = {name for name in counts.index[counts >= 10] if name not in stopped_by}
    assert labels_in(table, "test") == {f"{name} @ {CONTEXT}" for name in tested}
    assert set(info["left_out"]) >= {f"{name} @ {CONTEXT}" for name in counts.index[counts < 10]}
    known = {name for name in labels_in(table, "test") if name.split(" @ ")[0] in labels_in(table, "train")}
    of_known = table.loc[table["perturbation"].isin(known), "category"]
    assert len(known) > 5 and set(of_known) == {"other_context"}


def test_a_prediction_in_a_context_is_its_control_plus_the_change_elsewhere(run):
    """The multi-hot ridge by hand: leave-one-out penalty, shrunken towards the mean training change."""
    pipeline, _ = run
    cells = pipeline.cells()
    label, batch = cells.obs["perturbation"].astype(str), cells.obs["batch"].astype(str)
    X = pd.DataFrame(cells.X.toarray().astype(float), cells.obs_names, cells.var_names)
    control = {name: X[(label == "control") & (batch == name)].mean() for name in sorted(set(batch))}
    table, _ = split_of(pipeline, "context")
    change = {}
    for name in sorted(labels_in(table, "train")):
        own = X[(label == name) & (batch != CONTEXT)]
        reference = pd.DataFrame([control[place] for place in batch[own.index]], own.index)
        change[name] = own.mean() - reference.mean()
    changes = pd.DataFrame(change).T
    genes = sorted(genes_in(table["perturbation"]))
    code = pd.DataFrame(0.0, [*changes.index, *labels_in(table, "val", "test")], genes)
    for name in code.index:
        code.loc[name, genes_of(name)] = 1.0
    folder = pipeline.path("context", "fold0")
    written = {m: ad.read_h5ad(folder / m / "seed0" / "embed" / "predictions.h5ad") for m in MODELS}
    multihot = written["multihot"]
    assert set(multihot.obs["context"]) == {CONTEXT, "all"}
    tested = multihot.obs["set"] == "test"
    assert (multihot.obs["context"][tested] == CONTEXT).all()
    changes = changes[multihot.var_names]
    expected = ridge_by_leave_one_out(code.loc[changes.index].to_numpy(), changes.to_numpy(),
                                      code.loc[multihot.obs_names].to_numpy())  # fmt: skip
    here = control[CONTEXT][multihot.var_names].to_numpy()
    np.testing.assert_allclose(multihot.X, np.maximum(here + expected, 0), atol=2e-5)
    np.testing.assert_allclose(written["no_change"].X, np.tile(here, (len(multihot), 1)), atol=1e-5)
    mean = np.maximum(here + changes.to_numpy().mean(axis=0), 0)
    np.testing.assert_allclose(written["mean"].X, np.tile(mean, (len(multihot), 1)), atol=1e-5)
    assert np.abs(control["batch1"] - control[CONTEXT]).max() > 0.1, "the contexts must differ to tell"
    observed = ad.read_h5ad(pipeline.path("context", "evaluate", "observed.h5ad"))
    order = multihot.var_names
    for name, value in (("control_mean", here), ("perturbed_mean", mean)):
        found = pd.Series(observed.uns[name]["fold0"], observed.var_names)[order]
        np.testing.assert_allclose(found, value, atol=1e-6)
    verdict = json.loads(pipeline.path("context", "evaluate", "verdict.json").read_text(encoding="utf-8"))
    assert all(check["passed"] is not False for check in verdict["sentinels"])


def ridge_by_leave_one_out(code, change, wanted):
    """Ridge with a free intercept; the penalty of the least leave-one-out error, each fit made anew."""
    centred = code - code.mean(axis=0)
    unit = (centred**2).sum() / len(code)

    def fit(x, y, new, penalty):
        middle, mean = x.mean(axis=0), y.mean(axis=0)
        gram = (x - middle).T @ (x - middle) + penalty * unit * np.eye(x.shape[1])
        return mean + (new - middle) @ np.linalg.solve(gram, (x - middle).T @ (y - mean))

    def error(penalty):
        rest = [np.delete(np.arange(len(code)), row) for row in range(len(code))]
        left_out = [fit(code[r], change[r], code[[row]], penalty)[0] for row, r in enumerate(rest)]
        return ((change - left_out) ** 2).sum()

    return fit(code, change, wanted, min(np.logspace(-3, 3, 13), key=error))


def test_the_trained_model_starts_from_the_controls_of_the_held_out_context(run):
    pipeline, _ = run
    cells, folder = pipeline.cells(), pipeline.path("context", "fold0")
    chosen = (cells.obs["perturbation"].astype(str) == "control") & (cells.obs["batch"] == CONTEXT)
    model = load_model(folder / "biojepa" / "seed0" / "train" / "model.pt")
    here = cells[chosen.to_numpy(), list(model.genes)]
    expression = here.X.toarray()
    np.testing.assert_allclose(model.control_expression, expression.mean(axis=0), atol=1e-5)
    tokens = model.encode(expression, np.log(here.obs["library_size"].to_numpy()).astype(np.float32))
    np.testing.assert_allclose(model.control_tokens, tokens.mean(axis=0), atol=1e-4)


def test_the_duplicate_in_a_context_is_half_of_its_own_cells(run):
    pipeline, _ = run
    cells = pipeline.cells()
    chosen = cells[(cells.obs["batch"] == CONTEXT).to_numpy()]
    labels = np.array([f"{name} @ {CONTEXT}" for name in chosen.obs["perturbation"].astype(str)])
    in_a = ~half_b(chosen.obs_names, 0, labels)
    duplicate = ad.read_h5ad(
        pipeline.path("context", "fold0", "duplicate", "seed0", "embed", "predictions.h5ad")
    )
    for row, (name, group) in enumerate(zip(duplicate.obs_names, duplicate.obs["set"], strict=True)):
        if group == "test":
            expected = np.asarray(chosen[(labels == name) & in_a, duplicate.var_names].X.mean(axis=0)).ravel()
            np.testing.assert_allclose(duplicate.X[row], expected, atol=1e-5)
            assert duplicate.obs["n_cells"].iloc[row] == (labels == name).sum()
