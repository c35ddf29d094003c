"""Predictions made elsewhere: what is accepted, and what is refused with a list of all that is off."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from biojepa.errors import InputError
from biojepa.evaluation.user_predictions import UserPredictions, Wanted, read_user_predictions
from biojepa.predictions import write_predictions
from biojepa.report.glossary import GROUP_TITLES, model_text
from workflow_case import REPO

TARGET = 1000.0
SHA = "a" * 64
GENES = [f"GENE{i}" for i in range(30)]
SETS = {
    "GENE0": "train",
    "GENE1": "test",
    "GENE2+GENE3": "test",
    "GENE4": "val",
    "GENE5": "test",
    "GENE6": "train",
}
PREDICTED = ["GENE1", "GENE2+GENE3", "GENE4", "GENE5"]
CELLS_EACH = 12


def counts_of(labels, rng):
    """UMI counts of one cell for each label, on 40 % of the library; a perturbation scales two genes."""
    rate = np.linspace(0.2, 12, len(GENES))
    rates = np.tile(rate, (len(labels), 1))
    for row, label in enumerate(labels):
        rates[row, [len(label) % 30, 3 * len(label) % 30]] *= 2.5
    return rng.poisson(rates).astype(float)


def log_expression(counts, target=TARGET):
    return np.log1p(counts / (counts.sum(axis=1, keepdims=True) / 0.4) * target)


@pytest.fixture(scope="module")
def wanted():
    rng = np.random.default_rng(0)
    split = pd.DataFrame({"perturbation": list(SETS), "set": list(SETS.values())})
    split = split.assign(category="single", n_genes_seen=0)
    control = log_expression(counts_of(["control"] * 200, rng)).mean(axis=0)
    return Wanted(split, GENES, control, TARGET, SHA)


def predicted_cells(labels=PREDICTED, n=CELLS_EACH):
    rng = np.random.default_rng(1)
    owner = np.repeat(labels, n)
    obs = pd.DataFrame({"perturbation": owner}, index=[f"cell{i}" for i in range(len(owner))])
    return ad.AnnData(counts_of(owner, rng), obs=obs, var=pd.DataFrame(index=GENES))


def means(labels=PREDICTED):
    cells = predicted_cells(labels)
    values = log_expression(cells.X).reshape(len(labels), CELLS_EACH, -1).mean(axis=1)
    obs = pd.DataFrame({"perturbation": labels}, index=[str(i) for i in range(len(labels))])
    return ad.AnnData(values.astype(np.float32), obs=obs, var=pd.DataFrame(index=GENES))


def single_cells(labels=PREDICTED, n=CELLS_EACH):
    cells = predicted_cells(labels, n)
    cells.X = sparse.csr_matrix(log_expression(cells.X).astype(np.float32))
    return cells


@pytest.fixture
def read(wanted, tmp_path):
    def reader(content, **options) -> UserPredictions:
        path = tmp_path / "mine.h5ad"
        content.write_h5ad(path)
        return read_user_predictions(path, wanted, **options)

    return reader


def test_means_are_taken_as_they_are_in_the_order_of_the_split(read):
    content = means()
    result = read(content[::-1].copy())
    assert [list(SETS)[row] for row in result.rows] == PREDICTED
    np.testing.assert_array_equal(result.mean.astype(np.float32), content.X)
    assert result.cells is None and result.sd is None


def test_row_names_serve_where_there_is_no_column(read):
    content = means()
    content.obs = pd.DataFrame(index=PREDICTED)
    np.testing.assert_array_equal(read(content).mean.astype(np.float32), means().X)


def test_labels_are_normalized_and_rows_and_genes_that_nobody_asked_for_are_left_out(read, caplog):
    content = means(["GENE3+GENE2", "GENE1+ctrl", "GENE5", "GENE6", "control", "OTHER", "GENE4"])
    more = ad.AnnData(
        np.hstack([np.full((7, 2), 1.0, dtype=np.float32), content.X[:, ::-1]]),
        obs=content.obs,
        var=pd.DataFrame(index=["MORE1", "MORE2", *GENES[::-1]]),
    )
    with caplog.at_level(logging.INFO):
        result = read(more)
    assert [list(SETS)[row] for row in result.rows] == PREDICTED
    np.testing.assert_array_equal(result.mean.astype(np.float32), content.X[[1, 0, 6, 2]])
    text = caplog.text
    assert "2 genes that this fold does not use" in text
    assert "1 rows of training perturbations" in text
    assert "2 rows of control or of perturbations outside the split" in text


@pytest.mark.parametrize("layout", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_cells_give_their_mean_and_a_sample(read, layout):
    content = single_cells()
    content.X = layout(content.X.toarray())
    result = read(content, max_cells=5, seed=3)
    values = log_expression(predicted_cells().X).astype(np.float32).astype(float)
    np.testing.assert_allclose(result.mean, values.reshape(4, CELLS_EACH, -1).mean(axis=1), rtol=1e-6)
    assert np.bincount(result.owner).tolist() == [5, 5, 5, 5]
    kept = result.cells.toarray()
    assert kept.dtype == np.float32
    for row in range(4):
        own = values.astype(np.float32)[row * CELLS_EACH : (row + 1) * CELLS_EACH]
        mine = {cell.tobytes() for cell in kept[result.owner == row]}
        assert len(mine) == 5 and mine <= {cell.tobytes() for cell in own}
    everything = read(content)
    np.testing.assert_array_equal(everything.cells.toarray(), values.astype(np.float32))
    np.testing.assert_array_equal(everything.owner, np.repeat(range(4), CELLS_EACH))


def test_many_blocks_give_what_one_gives(read, monkeypatch):
    content = single_cells()
    whole = read(content, max_cells=4)
    monkeypatch.setattr("biojepa.evaluation.user_predictions.BLOCK_VALUES", 7 * len(GENES))
    parts = read(content, max_cells=4)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-12)
    np.testing.assert_array_equal(parts.cells.toarray(), whole.cells.toarray())


def test_a_standard_deviation_of_means_is_kept_and_one_of_cells_is_not(read, caplog):
    content = means()
    content.layers["sd"] = np.full(content.shape, 0.25, dtype=np.float32)
    np.testing.assert_array_equal(read(content).sd, np.full(content.shape, 0.25))
    cells = single_cells()
    cells.layers["sd"] = cells.X.copy()
    with caplog.at_level(logging.WARNING):
        assert read(cells).sd is None
    assert "layers['sd'] of single cells is not used" in caplog.text


def test_validation_perturbations_may_be_left_out(read):
    content = means()
    assert len(read(content[content.obs["perturbation"] != "GENE4"].copy()).rows) == 3


@pytest.mark.parametrize("as_text", [True, False])
def test_what_is_declared_is_spelled_as_in_the_split(read, as_text):
    content = means()
    said = {"trained_on": ["GENE0", "GENE6+ctrl"], "selected_on": ["GENE4"]}
    content.uns["provenance"] = json.dumps(said) if as_text else said
    assert read(content).declared == {"trained_on": ["GENE0", "GENE6"], "selected_on": ["GENE4"]}


def test_the_same_split_and_what_trained_the_model_may_be_declared(read):
    content = means()
    content.obs["set"] = [SETS[label] for label in PREDICTED]
    content.uns["provenance"] = f'{{"split_sha256": "{SHA}", "trained_on": ["GENE0", "GENE6"]}}'
    assert read(content).declared == {"trained_on": ["GENE0", "GENE6"]}


def renamed(content, names):
    content.var_names = names
    return content


def with_column(content, **columns):
    for name, values in columns.items():
        content.obs[name] = values
    return content


def valued(content, change):
    content.X = change(content.X)
    return content


def declared(content, **uns):
    content.uns.update(uns)
    return content


def as_symbols_column(content):
    content.var["symbol"] = GENES
    return renamed(content, [f"ENSG{i:011d}" for i in range(30)])


def relabelled(content, **names):
    content.obs["perturbation"] = content.obs["perturbation"].replace(
        {name.replace("_", "+"): new for name, new in names.items()}
    )
    return content


def repeated(content, rows):
    more = content[[*range(content.n_obs), *rows]].copy()
    more.obs_names = [str(i) for i in range(more.n_obs)]
    return more


def at(values, row, column, value):
    values = np.array(values)
    values[row, column] = value
    return values


def counts():
    """Means of counts per cell, which are no whole numbers."""
    return predicted_cells().X.reshape(4, CELLS_EACH, -1).mean(axis=1)


def per_million(logged):
    raw = predicted_cells().X
    scaled = raw / (raw.sum(axis=1, keepdims=True) / 0.4) * 1e6
    scaled = np.log1p(scaled) if logged else scaled
    return scaled.reshape(4, CELLS_EACH, -1).mean(axis=1).astype(np.float32)


AS_CHANGES = r"as changes against control have.*add the control mean"
DAMAGED = {
    "a gene missing": (
        lambda w: means()[:, 1:].copy(),
        r"mine\.h5ad, var: found 1 of the 30 genes of this fold missing, e\.g\. \['GENE0'\].*predict these",
    ),
    "Ensembl": (
        lambda w: renamed(means(), [f"ENSG{i:011d}" for i in range(30)]),
        r"30 of the 30 genes of this fold missing.*Ensembl identifiers",
    ),
    "symbols in a column": (lambda w: as_symbols_column(means()), r"the column 'symbol' of var holds"),
    "case": (
        lambda w: renamed(means(), [name.capitalize() for name in GENES]),
        r"upper and lower case only, such as 'GENE0'",
    ),
    "transposed": (lambda w: means().T.copy(), r"the matrix is transposed"),
    "a gene twice": (
        lambda w: renamed(means(), ["GENE1", *GENES[1:]]),
        r"2 problems.*- var: found 1 genes twice, e\.g\. \['GENE1'\].*- var: found 1 of the 30 genes",
    ),
    "missing perturbation": (
        lambda w: means()[1:].copy(),
        r"column perturbation: found no row for 1 test perturbations, e\.g\. \['GENE1'\]; 0 names",
    ),
    "other spelling": (
        lambda w: relabelled(means(), GENE2_GENE3="GENE2_GENE3"),
        r"\('GENE2\+GENE3' is 'GENE2_GENE3' there\?\); 1 names that this split does not have",
    ),
    "barcodes for row names": (
        lambda w: ad.AnnData(means().X, pd.DataFrame(index=list("abcd")), pd.DataFrame(index=GENES)),
        r"row names \(there is no column perturbation\): found no row for 3 test perturbations",
    ),
    "counts of cells": (lambda w: predicted_cells(), r"X: found whole numbers only, which are counts"),
    "means of counts": (
        lambda w: valued(means(), lambda x: counts()),
        r"X: found .* for 'GENE.*', gene 'GENE\d+': counts or counts per million without a logarithm; "
        r"expected at most 6\.909",
    ),
    "CPM": (lambda w: valued(means(), lambda x: per_million(False)), r"without a logarithm"),
    "log CPM": (lambda w: valued(means(), lambda x: per_million(True)), r"without a logarithm|another total"),
    "log2": (
        lambda w: valued(means(), lambda x: x / np.log(2)),
        r"X: found an average of 1\.\d+ times that of control cells, and [3-9]\S* times their counts.*than e",
    ),
    "differences": (
        lambda w: valued(means(), lambda x: 0.2 * (x - w.control)),
        AS_CHANGES,
    ),
    "large differences": (
        lambda w: valued(means(), lambda x: at(x, 1, 2, -0.8)),
        r"X: found a lowest mean of -0\.8.*as changes against control have",
    ),
    "NaN": (
        lambda w: valued(means(), lambda x: at(x, 1, 2, np.nan)),
        r"X: found 1 missing or infinite values, the first for 'GENE2\+GENE3', gene 'GENE2'",
    ),
    "infinite": (lambda w: valued(means(), lambda x: at(x, 0, 0, np.inf)), r"1 missing or infinite"),
    "negative sd": (
        lambda w: declared_sd(-0.1),
        r"layers\['sd'\]: found negative or missing values",
    ),
    "another split by checksum": (
        lambda w: declared(means(), split_sha256="b" * 64),
        r"uns, split_sha256: found predictions made with a split of SHA-256 bbb.*expected aaa.*a leak",
    ),
    "another split by provenance": (
        lambda w: declared(means(), provenance='{"split_sha256": "' + "c" * 64 + '"}'),
        r"SHA-256 ccc.*a leak",
    ),
    "another split by its sets": (
        lambda w: with_column(means(), set=["train", "test", "val", "test"]),
        r"column set: found 1 perturbations in another set than in this split, such as 'GENE1' as 'train'; "
        r"expected 'test'.*a leak",
    ),
    "a training row that the file tests": (
        lambda w: with_column(means([*PREDICTED, "GENE0"]), set=["test", "test", "val", "test", "test"]),
        r"such as 'GENE0' as 'test'; expected 'train'",
    ),
    "provenance that is no JSON": (
        lambda w: declared(means(), provenance="{trained_on: [GENE5]}"),
        r"uns, provenance: found '\{trained_on: \[GENE5\]\}', which is no JSON.*expected a JSON object",
    ),
    "provenance that is no object": (
        lambda w: declared(means(), provenance='["GENE5"]'),
        r"uns, provenance: found \['GENE5'\]; expected a JSON object",
    ),
    "shares of the total": (
        lambda w: valued(means(), lambda x: (np.expm1(x) / TARGET).astype(np.float32)),
        r"X: found an average of 0\.0\d+ times that of control cells, with the same genes.*"
        r"share of the total.*write log1p",
    ),
    "log10": (
        lambda w: valued(means(), lambda x: at(x / np.log(10), 0, 0, -0.001)),
        r"X: found an average of 0\.4\d* times that of control cells, with the same genes.*base 10",
    ),
    "changes cut at zero": (
        lambda w: valued(means(), lambda x: np.maximum(x - w.control, 0)),
        AS_CHANGES,
    ),
    "no change at all": (
        lambda w: valued(means(), lambda x: 0 * x),
        AS_CHANGES,
    ),
    "a row twice": (
        lambda w: repeated(means(), [0]),
        r"1 perturbations with several rows, e\.g\. \['GENE1'\], and 3 with one",
    ),
    "all rows twice": (
        lambda w: repeated(means(), range(4)),
        r"4 perturbations whose rows are all the same.*write one row for each perturbation",
    ),
    "contexts": (
        lambda w: with_column(repeated(means(), [0]), context=["a", "a", "a", "a", "b"]),
        r"column context: found 1 perturbations in several contexts, such as 'GENE1' in \['a', 'b'\]",
    ),
}  # fmt: skip


def declared_sd(value):
    content = means()
    content.layers["sd"] = np.full(content.shape, value)
    return content


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_off_is_named(name, read, wanted):
    damaged, message = DAMAGED[name]
    with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
        read(damaged(wanted))


@pytest.mark.parametrize("name", ["a row twice", "all rows twice", "NaN", "cells with NaN"])
def test_one_mistake_is_one_problem(name, read, wanted):
    """What follows from a mistake that was named is not named beside it."""
    made = {"cells with NaN": lambda w: valued(single_cells(), lambda x: at(x.toarray(), 3, 2, np.nan))}
    make = made.get(name) or DAMAGED[name][0]
    with pytest.raises(InputError) as caught:
        read(make(wanted))
    assert "problems" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "labels", "leaked", "as_text"),
    [
        ("trained_on", ["GENE0", "GENE5"], r"\['GENE5'\]", True),
        ("trained_on", ["GENE3+GENE2"], r"\['GENE2\+GENE3'\]", True),
        ("selected_on", ["GENE4", "GENE1"], r"\['GENE1'\]", False),
    ],
    ids=["fitted to it", "in another order of genes", "chosen by it, declared in a group"],
)
def test_a_declared_test_perturbation_is_a_leak(read, key, labels, leaked, as_text):
    said = {key: labels}
    message = rf"provenance, {key}: found 1 test perturbations of this fold, e\.g\. {leaked}.*a leak"
    with pytest.raises(InputError, match=message):
        read(declared(means(), provenance=json.dumps(said) if as_text else said))


@pytest.mark.parametrize("key", ["trained_on", "selected_on"])
@pytest.mark.parametrize("labels", [5, None, "GENE5", ["GENE0", 3]], ids=str)
def test_what_is_declared_must_be_a_list_of_labels(read, key, labels):
    message = f"provenance, {key}: found {labels!r}; expected a list of perturbations"
    with pytest.raises(InputError, match=rf"{re.escape(message)}.*leave the key out"):
        read(declared(means(), provenance=json.dumps({key: labels})))


def test_nothing_is_said_of_the_scale_of_what_is_partly_missing(read):
    content = valued(means(), lambda x: at(100 * x, 1, 2, np.nan))
    with pytest.raises(InputError) as caught:
        read(content)
    assert "1 missing or infinite" in str(caught.value)
    assert "logarithm" not in str(caught.value)


def test_all_problems_are_in_one_message(read):
    content = relabelled(means(), GENE5="GENE5x")[:, 2:].copy()
    content.X[0, 0] = np.nan
    content.uns["split_sha256"] = "b" * 64
    with pytest.raises(InputError) as caught:
        read(content)
    message = str(caught.value)
    assert "found 4 problems" in message
    assert "section Evaluate predictions made elsewhere" in message
    for part in ("2 of the 30 genes", "'GENE5' is 'GENE5x' there?", "1 missing or infinite", "SHA-256 bbb"):
        assert message.count(part) == 1, part


@pytest.mark.parametrize(("content", "message"), [(b"no", "HDF5 cannot open"), (None, "no obs, var, X")])
def test_what_is_no_anndata_is_refused(tmp_path, wanted, content, message):
    path = tmp_path / "mine.h5ad"
    if content is None:
        h5py.File(path, "w").close()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_user_predictions(path, wanted)


def test_labels_of_a_held_out_context_are_found_by_label_or_by_column(tmp_path, wanted):
    labels = ["GENE1 @ K562", "GENE2+GENE3 @ K562"]
    split = pd.DataFrame(
        {"perturbation": ["GENE1", *labels, "GENE4"], "set": ["train", "test", "test", "val"]}
    )
    placed = Wanted(split, GENES, wanted.control, TARGET, SHA)
    written = means(["GENE1 @ K562", "GENE3+GENE2 @ K562"])
    by_column = with_column(means(["GENE1", "GENE3+GENE2", "GENE1"]), context=["K562", "K562", "RPE1"])
    both = with_column(means(["GENE1 @ K562", "GENE3+GENE2 @ K562"]), context=["K562", "K562"])
    # One row per perturbation and context, a validation perturbation in two of them, and in this one, where
    # the split leaves it out.
    all_contexts = with_column(
        means(["GENE1", "GENE3+GENE2", "GENE4", "GENE4", "GENE4", "GENE1"]),
        context=["K562", "K562", "RPE1", "HEK", "K562", "HEK"],
    )
    for content in (written, by_column, both, all_contexts):
        content.write_h5ad(tmp_path / "mine.h5ad")
        result = read_user_predictions(tmp_path / "mine.h5ad", placed)
        assert result.rows.tolist() == [1, 2]
        np.testing.assert_array_equal(result.mean.astype(np.float32), content.X[:2])


def test_a_label_of_the_split_is_taken_as_it_stands(tmp_path, wanted):
    # By the rules alone, NT would be a control.
    split = pd.DataFrame({"perturbation": ["GENE0", "NT"], "set": ["train", "test"]})
    means(["NT"]).write_h5ad(tmp_path / "mine.h5ad")
    result = read_user_predictions(tmp_path / "mine.h5ad", Wanted(split, GENES, wanted.control, TARGET, SHA))
    assert result.rows.tolist() == [1]


def test_predicted_cells_are_written_beside_the_means(tmp_path, read, wanted):
    result = read(single_cells(), max_cells=6)
    path = tmp_path / "predictions.h5ad"
    cells = (result.cells, result.owner)
    write_predictions(
        path, "mine", wanted.split, result.rows, {"GENE1": 40}, GENES, result.mean, {}, cells=cells
    )
    stored = ad.read_h5ad(path)
    assert stored.obs["perturbation"].tolist() == PREDICTED
    assert stored.obs["n_cells"].tolist() == [40, 0, 0, 0]
    beside = stored.uns["predicted_cells"]
    np.testing.assert_array_equal(beside["X"].toarray(), result.cells.toarray())
    np.testing.assert_array_equal(beside["row"], result.owner)


def test_the_snippet_of_the_manual_writes_a_file_that_is_accepted(tmp_path, monkeypatch, wanted):
    text = (REPO / "config" / "README.md").read_text(encoding="utf-8")
    part = text.split("## Evaluate predictions made elsewhere", 1)[1].split("\n## ", 1)[0]
    snippet = re.search(r"```python\n(.*?)```", part, flags=re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    fold = tmp_path / "results/my_screen/perturbation/fold0/pair"
    fold.mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    wanted.split.to_csv(fold / "split.tsv", sep="\t", index=False)
    with h5py.File(fold / "pairs.h5", "w") as file:
        file.create_dataset("names/genes", data=np.array(GENES, dtype=object), dtype=h5py.string_dtype())
    expected = dict(zip(PREDICTED, means().X, strict=True))
    model = SimpleNamespace(predict=lambda label, genes: expected[label])
    exec(snippet, {"model": model})
    result = read_user_predictions(tmp_path / "mine/my_screen_perturbation_fold0.h5ad", wanted)
    np.testing.assert_array_equal(result.mean.astype(np.float32), means().X)


def test_the_report_lists_such_models_under_their_name_in_a_group_of_their_own():
    for name in ("mine", "pca_mine", "biojepa_v2"):
        shown = model_text(name)
        assert shown.label == name
        assert GROUP_TITLES[shown.group] == "Your models (predictions made elsewhere)"
        assert "not known here" in shown.about
    assert model_text("mine", main_model="mine").group == "main"
    assert model_text("pca_knn_noprior").group == "ablation"
