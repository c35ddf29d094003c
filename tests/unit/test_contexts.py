"""Claims about a held-out context: whose controls count, what a change is against, what is left out."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from training_case import KnownEffects, pairs_of, tiny_settings

from biojepa.baselines import fit_baselines
from biojepa.contracts import TEST, TRAIN, VAL
from biojepa.embedding import Outputs, Screen, embed_and_predict
from biojepa.errors import InputError
from biojepa.evaluation.leakage import check_training_cells
from biojepa.evaluation.references import duplicates
from biojepa.evaluation.splits import check_split_covers_cells, read_split
from biojepa.evaluation.truth import assemble_fold, collect_moments
from biojepa.files import sha256_of
from biojepa.halves import half_b
from biojepa.map import map_embedding
from biojepa.pairing import PairSettings, build_pairs, freeze_split
from biojepa.pairs import match_controls, read_pairs, relocate
from biojepa.predictions import cells_per_label, predicted_rows
from biojepa.splits import LeakageError, labels_in, read_facts
from biojepa.training import load_model, train_model
from biojepa.training import run as run_module
from biojepa.training.cells import Populations
from biojepa.training.run import label_means

GENES = [f"G{i}" for i in range(24)]
LABELS = [*[f"G{i}" for i in range(8)], "G0+G1", "G2+G3"]
SETTINGS = PairSettings(
    validation_share=0.2,
    n_genes=18,
    prior_dim=4,
    context_column="cell_type",
    contexts=["K562", "RPE1"],
    min_cells_in_context=6,
)


class Cells:
    """A screen of three contexts with different controls; RARE is in too few cells, HEK has no control."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        design = [(label, place, 12) for label in LABELS for place in ("K562", "RPE1")]
        design += [("control", "K562", 40), ("control", "RPE1", 50), ("G0", "HEK", 7), ("G4", "HEK", 8)]
        design += [("RARE", "RPE1", 4), ("RARE", "K562", 9), ("G7", "JURKAT", 3), ("control", "JURKAT", 1)]
        cells = [(label, place) for label, place, n in design for _ in range(n)]
        cells = [cells[i] for i in rng.permutation(len(cells))]
        self.labels, self.context = (np.array(part, dtype=object) for part in zip(*cells, strict=True))
        shift = {place: rng.normal(0, 0.5, 24) for place in sorted(set(self.context))}
        effect = {label: rng.normal(0, 0.5, 24) for label in [*LABELS, "RARE"]} | {"control": np.zeros(24)}
        # Perturbing anything lowers a gene that the held-out context hardly expresses.
        shift["RPE1"][23] = -2.45
        for label in set(effect) - {"control"}:
            effect[label][23] = -1.5
        noise = 0.3 * rng.normal(size=(len(cells), 24))
        means = np.stack([2.5 + shift[place] + effect[label] for label, place in cells])
        self.X = np.maximum(means + noise, 0).astype(np.float32)
        self.names = np.array([f"cell{i}" for i in rng.permutation(len(cells))])
        # Batches cross the contexts, and one holds no control.
        self.batch = np.array(["b0", "b1", "b2"])[rng.integers(3, size=len(cells))]
        self.batch[(self.batch == "b2") & (self.labels == "control")] = "b0"
        self.library = rng.uniform(2000, 9000, len(cells))
        self.folder, self.path, self.split_path = folder, folder / "cells.h5ad", folder / "split.tsv"
        self.write(self.path, self.X)
        self.table = freeze_split(self.path, self.split_path, "made", "context", 1, SETTINGS)
        self.split = read_split(self.split_path, folder / "split.json", 1)

    def write(self, path: Path, X: np.ndarray) -> None:
        obs = pd.DataFrame(
            {
                "perturbation": pd.Categorical(self.labels),
                "is_control": self.labels == "control",
                "batch": pd.Categorical(self.batch),
                "cell_type": pd.Categorical(self.context),
                "library_size": self.library,
            },
            index=self.names,
        )
        ad.AnnData(sparse.csr_matrix(X), obs, pd.DataFrame(index=GENES)).write_h5ad(path)

    def pairs(self, name="pairs.h5"):
        network = self.folder / "net.tsv"
        network.write_text("gene_a\tgene_b\n" + "".join(f"G{i}\tG{(i + 1) % 8}\n" for i in range(8)))
        facts = {"dataset": "made", "fold": 1, "split_sha256": sha256_of(self.split_path)}
        build_pairs(self.path, self.split_path, self.folder / name, [network], [], SETTINGS, facts)
        return read_pairs(self.folder / name)

    def mean(self, label: str, place: str | None = None, among=None) -> np.ndarray:
        chosen = self.labels == label
        chosen &= True if place is None else self.context == place
        chosen &= True if among is None else among
        return self.X[chosen].astype(float).mean(axis=0)

    def control(self, place: str) -> np.ndarray:
        """Mean of the controls of a context, of all contexts where it has none."""
        return self.mean("control", place if place != "HEK" else None)

    def expected(self, label: str, among=None, held_out="RPE1") -> np.ndarray:
        """Control of the held-out context plus the change against the controls of the label's contexts."""
        chosen = (self.labels == label) & (self.context != held_out)
        chosen &= True if among is None else among
        changes = [
            self.X[cell].astype(float) - self.control(self.context[cell]) for cell in np.flatnonzero(chosen)
        ]
        return self.control(held_out) + np.mean(changes, axis=0)


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Cells:
    return Cells(tmp_path_factory.mktemp("contexts"))


@pytest.fixture(scope="module")
def pairs(cells):
    return cells.pairs()


@pytest.fixture(scope="module")
def trained(cells, pairs):
    model, _, _ = train_model(pairs, tiny_settings(encoder={"steps": 10}, predictor={"steps": 20}), 0)
    model = replace(model, weight=0.5)  # whatever the gate said, the latent part shall count
    model.save(cells.folder / "model.pt")
    return model


@pytest.fixture(scope="module")
def embedded(cells, trained):
    """Embeddings, predictions and the oracle of the trained model: name to path."""
    paths = {name: cells.folder / f"{name}.h5ad" for name in ("embeddings", "predictions", "oracle")}
    outputs = Outputs("biojepa", paths["embeddings"], paths["predictions"], "oracle", paths["oracle"])
    embed_and_predict(cells.folder / "model.pt", cells.path, cells.split_path, outputs, half_seed=0)
    return paths


def columns(names):
    return [GENES.index(name) for name in names]


# --- what is held out ----------------------------------------------------------------------------


def test_the_frozen_split_names_the_context_and_what_it_leaves_out(cells):
    facts = read_facts(cells.split_path)
    # What stops a training in the other contexts is not unseen in this one.
    stopped_by = {f"{label} @ RPE1" for label in labels_in(cells.table, VAL)}
    assert stopped_by and facts["validation_elsewhere"] == sorted(stopped_by)
    n_cells = {
        label: int((cells.labels == label.split(" ")[0])[cells.context == "RPE1"].sum())
        for label in stopped_by
    }
    assert {key: facts[key] for key in ("scheme", "context", "context_column", "n_folds", "left_out")} == {
        "scheme": "context",
        "context": "RPE1",
        "context_column": "cell_type",
        "n_folds": 2,
        "left_out": {"RARE @ RPE1": 4, **n_cells},
    }
    assert set(labels_in(cells.table, TEST)) == {f"{label} @ RPE1" for label in LABELS} - stopped_by
    assert set(labels_in(cells.table, TRAIN, VAL)) == {*LABELS, "RARE"}


def test_the_log_says_why_a_label_is_left_out(cells, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "biojepa.pairing"):
        freeze_split(cells.path, tmp_path / "split.tsv", "made", "context", 1, SETTINGS)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == ["too few cells to be used: RARE @ RPE1 (4)"]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    listed = ", ".join(sorted(f"{label} @ RPE1" for label in labels_in(cells.table, VAL)))
    assert told == [f"not tested, since validation in the other contexts: {listed}"]


def test_training_reads_controls_of_all_contexts_and_no_perturbed_cell_of_the_held_out_one(cells, pairs):
    wanted = (cells.labels == "control") | (cells.context != "RPE1")
    assert set(pairs.cell_names) == set(cells.names[wanted])
    place = dict(zip(cells.names, cells.context, strict=True))
    assert [pairs.contexts[code] for code in pairs.context] == [place[name] for name in pairs.cell_names]
    assert pairs.facts["context"] == "RPE1" and pairs.facts["context_column"] == "cell_type"
    assert check_training_cells(cells.folder / "pairs.h5", cells.path, cells.split)[0]["passed"]


def test_a_perturbed_cell_of_the_held_out_context_in_the_training_file_is_caught(cells, pairs, tmp_path):
    import shutil

    import h5py

    planted = tmp_path / "pairs.h5"
    shutil.copy(cells.folder / "pairs.h5", planted)
    for victim in ("G0", "RARE"):  # one that is tested, one that is left out
        hidden = cells.names[(cells.labels == victim) & (cells.context == "RPE1")][0]
        with h5py.File(planted, "a") as file:
            names = file["names/cell_names"]
            names[0] = hidden
        with pytest.raises(LeakageError, match=hidden):
            check_training_cells(planted, cells.path, cells.split)


def test_a_split_that_lacks_a_label_of_the_context_is_refused(cells):
    obs = ad.read_h5ad(cells.path).obs
    check_split_covers_cells(cells.split, obs, cells.path)
    other = obs.assign(perturbation=obs["perturbation"].cat.rename_categories({"G5": "G55"}))
    with pytest.raises(InputError, match=r"2 perturbations that .* lacks, e\.g\. \['G5', 'G5 @ RPE1'\]"):
        check_split_covers_cells(cells.split, other, cells.path)


def test_a_context_without_its_column_is_refused(cells, tmp_path):
    settings = replace(SETTINGS, context_column="batch", contexts=["RPE1"])
    with pytest.raises(InputError, match=r"no cell whose batch is 'RPE1'; cells of each: b0"):
        freeze_split(cells.path, tmp_path / "split.tsv", "made", "context", 0, settings)
    with pytest.raises(InputError, match="no context to hold out"):
        freeze_split(cells.path, tmp_path / "split.tsv", "made", "context", 0, PairSettings())


# --- the change that is carried over -------------------------------------------------------------


def test_means_of_training_are_those_of_the_held_out_context_by_hand(cells, pairs):
    means, control = pairs.pseudobulk()
    order = columns(pairs.genes)
    np.testing.assert_allclose(control, cells.control("RPE1")[order], atol=1e-5)
    for row, label in enumerate(pairs.labels):
        if pairs.sets[row] == TEST:
            assert np.isnan(means[row]).all()
        else:
            np.testing.assert_allclose(means[row], cells.expected(label)[order], atol=1e-5)
    # G0 and G4 have cells in a context without controls, and all of these count.
    plain = cells.mean("G0", "K562") - cells.control("K562") + cells.control("RPE1")
    assert np.abs(means[pairs.labels.index("G0")] - plain[order]).max() > 0.05


def test_simple_models_predict_the_control_of_the_context_plus_the_change_elsewhere(cells, pairs):
    fitted = fit_baselines(pairs, ["mean", "additive", "matching_mean"])
    order, control = columns(pairs.genes), cells.control("RPE1")
    change = {name: (cells.expected(name) - control)[order] for name in labels_in(cells.table, TRAIN)}
    row = pairs.labels.index("G0+G1 @ RPE1")
    np.testing.assert_allclose(fitted["mean"].delta[row], np.mean(list(change.values()), axis=0), atol=1e-5)
    singles = [change[gene] for gene in ("G0", "G1") if gene in change]
    np.testing.assert_allclose(fitted["additive"].delta[row], np.sum(singles, axis=0), atol=1e-5)
    sharing = [change[name] for name in change if {"G0", "G1"} & set(name.split("+"))]
    np.testing.assert_allclose(fitted["matching_mean"].delta[row], np.mean(sharing, axis=0), atol=1e-5)


def test_a_label_of_the_held_out_context_stays_where_it_is():
    rng = np.random.default_rng(1)
    means, sums = rng.normal(size=(3, 4)), rng.normal(size=(2, 4))
    moved, control = relocate(means, np.array([[5, 0], [0, 3], [3, 1]]), sums, np.array([2, 4]), 0)
    np.testing.assert_array_equal(control, sums[0] / 2)
    np.testing.assert_allclose(moved[0], means[0], atol=1e-15)
    np.testing.assert_allclose(moved[1], means[1] + sums[0] / 2 - sums[1] / 4)
    np.testing.assert_allclose(moved[2], means[2] + 0.25 * (sums[0] / 2 - sums[1] / 4))


@pytest.mark.parametrize("at_a_time", [7, 1 << 16])
def test_mean_tokens_are_carried_over_like_mean_expression(cells, pairs, monkeypatch, at_a_time):
    """With the expression itself for tokens, both ways to average must agree."""
    monkeypatch.setattr(run_module, "SUMMED_CELLS", at_a_time)
    dense = torch.from_numpy(pairs.dense(np.arange(len(pairs.perturbation))))
    labels, control = label_means(pairs, dense.view(len(dense), 3, 6))
    means, expected = pairs.pseudobulk()
    np.testing.assert_allclose(control.flatten(), expected, atol=1e-5)
    np.testing.assert_allclose(labels.flatten(1), means, atol=1e-5)


def test_without_a_context_nothing_is_carried_over():
    plain = KnownEffects(seed=1, cells_per_label=8, n_controls=40).pairs
    one = replace(plain, contexts=("all",), context=np.zeros_like(plain.batch), facts={"context": "all"})
    for ours, theirs in zip(one.pseudobulk(), plain.pseudobulk(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


# --- controls of populations and pairs -----------------------------------------------------------


def test_controls_are_drawn_from_the_batch_and_context_of_the_cell(cells, pairs):
    torch.manual_seed(0)
    populations = Populations(pairs, torch.device("cpu"))
    trained = [row for row in range(len(pairs.labels)) if pairs.n_cells[row]]
    drawn, controls = populations.draw(torch.tensor(trained), 60)
    is_control = pairs.perturbation == -1
    assert is_control[controls.numpy()].all()
    places, batches = np.array(pairs.contexts)[pairs.context], np.array(pairs.batches)[pairs.batch]
    for cell, control in zip(drawn.flatten().tolist(), controls.flatten().tolist(), strict=True):
        if places[cell] == "HEK":
            continue  # without a control of its own
        assert places[control] == places[cell]
        if (is_control & (places == places[cell]) & (batches == batches[cell])).any():
            assert batches[control] == batches[cell]
    of_hek = controls[torch.from_numpy(places[drawn.numpy()] == "HEK")]
    assert len(set(places[of_hek.numpy()])) > 1
    partners = places[pairs.partner]
    assert (partners[places != "HEK"] == places[places != "HEK"]).all()


def test_batches_without_controls_borrow_within_their_context_first():
    perturbation = np.array([-1, -1, -1, 0, 0, 0])
    batch = np.array([0, 0, 1, 0, 1, 2])
    context = np.array([0, 1, 1, 0, 0, 1])
    for seed in range(5):
        partner, orphans = match_controls(perturbation, batch, np.random.default_rng(seed), context)
        assert partner[3] == 0 and partner[4] == 0 and partner[5] in (1, 2)
        assert orphans == [1, 2]


# --- truth ---------------------------------------------------------------------------------------


def test_the_truth_in_a_context_by_hand(cells):
    moments = collect_moments(cells.path, pd.Index(GENES), 0, cells.split.info)
    truth = assemble_fold(moments, cells.split, pd.Index(GENES))
    assert truth.perturbations == labels_in(cells.table, TEST) and len(truth.perturbations) > 2
    inside = cells.context == "RPE1"
    own = np.array([f"{label} @ RPE1" for label in cells.labels])
    in_b = half_b(cells.names[inside], 0, own[inside])
    for row, name in enumerate(truth.perturbations):
        chosen = own[inside] == name
        x = cells.X[inside].astype(float)
        for half, found in ((~in_b, truth.half_a), (in_b, truth.half_b), (in_b | ~in_b, truth.all_cells)):
            np.testing.assert_allclose(found[row], x[chosen & half].mean(axis=0))
        assert truth.n_a[row] + truth.n_b[row] == 12
    control = cells.X[inside & (cells.labels == "control")].astype(float)
    np.testing.assert_allclose(truth.control_mean, control.mean(axis=0))
    np.testing.assert_allclose(truth.control_var, control.var(axis=0, ddof=1))
    assert truth.n_control == 50
    trained = {name: cells.expected(name) for name in labels_in(cells.table, TRAIN)}
    expected = np.mean(list(trained.values()), axis=0)
    assert expected[23] < 0, "to tell that no mean is below 0"
    np.testing.assert_allclose(truth.perturbed_mean, np.maximum(expected, 0))
    for row, name in enumerate(truth.perturbations):
        genes = name.split(" @ ")[0].split("+")
        if len(genes) > 1 and all(gene in trained for gene in genes):
            changes = [trained[gene] - truth.control_mean for gene in genes]
            np.testing.assert_allclose(truth.additive[row], truth.control_mean + np.sum(changes, axis=0))
        else:
            assert np.isnan(truth.additive[row]).all()
        assert truth.target_columns[row].tolist() == [GENES.index(gene) for gene in genes]


def test_the_standard_error_of_the_additive_means_counts_every_group_of_controls(cells):
    moments = collect_moments(cells.path, pd.Index(GENES), 0, cells.split.info)
    table = cells.split.table.copy()
    table["set"] = np.where(table.index.str.contains("@"), "test", "train")
    truth = assemble_fold(moments, replace(cells.split, table=table), pd.Index(GENES))

    def square(label, place):
        x = cells.X[(cells.labels == label) & (cells.context == place)].astype(float)
        return x.var(axis=0, ddof=1) if len(x) > 1 else np.zeros(24), len(x)

    here, n_here = square("control", "RPE1")
    there, n_there = square("control", "K562")
    found = truth.additive_var[truth.perturbations.index("G2+G3 @ RPE1")]
    expected = here / n_here + 4 * there / n_there  # both partners are compared with the same controls
    for gene in ("G2", "G3"):
        variance, n = square(gene, "K562")
        expected = expected + np.maximum(variance, here) / n
    np.testing.assert_allclose(found, expected)


def test_perturbed_cells_of_the_held_out_context_never_reach_the_references(cells, tmp_path):
    altered = cells.X.copy()
    altered[(cells.context == "RPE1") & (cells.labels != "control")] = 9.0
    cells.write(tmp_path / "cells.h5ad", altered)
    truths = [
        assemble_fold(
            collect_moments(path, pd.Index(GENES), 0, cells.split.info), cells.split, pd.Index(GENES)
        )
        for path in (cells.path, tmp_path / "cells.h5ad")
    ]
    np.testing.assert_array_equal(truths[0].perturbed_mean, truths[1].perturbed_mean)
    np.testing.assert_array_equal(truths[0].control_mean, truths[1].control_mean)
    assert (truths[1].half_b == 9).all()


def test_duplicates_of_validation_perturbations_are_given_as_of_the_held_out_context(cells):
    rows = predicted_rows(cells.table)
    found = duplicates(cells.path, cells.table, rows, GENES, 0, cells.split.info)["duplicate"]
    own = np.where(cells.context == "RPE1", [f"{name} @ RPE1" for name in cells.labels], cells.labels)
    in_a = ~half_b(cells.names, 0, own)
    validation = labels_in(cells.table, VAL)
    assert len(validation) == 2
    for row, name in zip(found, cells.table["perturbation"].iloc[rows], strict=True):
        if name in validation:
            np.testing.assert_allclose(row, np.maximum(cells.expected(name, in_a), 0), atol=1e-6)
            assert row[23] == 0
        else:
            np.testing.assert_allclose(row, cells.mean(name.split(" @ ")[0], "RPE1", in_a), atol=1e-6)


# --- the trained model ---------------------------------------------------------------------------


def test_a_trained_model_starts_from_the_controls_of_the_held_out_context(cells, trained):
    order = columns(trained.genes)
    control = cells.control("RPE1")[order]
    np.testing.assert_allclose(trained.control_expression, control, atol=1e-5)
    chosen = (cells.labels == "control") & (cells.context == "RPE1")
    tokens = trained.encode(cells.X[chosen][:, order], np.log(cells.library[chosen]).astype(np.float32))
    np.testing.assert_allclose(trained.control_tokens, tokens.mean(axis=0), atol=1e-4)
    row = trained.labels.index("G0 @ RPE1")
    expression, _, moved = trained.predict(np.array([row]))
    expected = np.maximum(control + trained.change(*trained.asked(np.array([row])))[0], 0)
    np.testing.assert_allclose(expression[0], expected, atol=1e-4)
    assert np.abs(moved[0] - trained.control_tokens.numpy()).max() > 1e-3


def test_predictions_of_a_context_say_so_and_their_observed_tokens_are_comparable(cells, trained, embedded):
    written = ad.read_h5ad(embedded["predictions"])
    assert written.obs["context"].tolist() == ["RPE1" if "@" in name else "all" for name in written.obs_names]
    counts = cells_per_label(cells.path, cells.split.info)
    assert counts["control"] == 91 and counts["G0 @ RPE1"] == 12 and counts["G0"] == 19
    assert written.obs["n_cells"].tolist() == [counts[name] for name in written.obs_names]
    order = columns(trained.genes)
    tokens = trained.encode(cells.X[:, order], np.log(cells.library).astype(np.float32))
    control = {place: tokens[(cells.labels == "control") & (cells.context == place)].mean(axis=0)
               for place in ("K562", "RPE1", "JURKAT")}  # fmt: skip
    control["HEK"] = tokens[cells.labels == "control"].mean(axis=0)
    own = np.where(cells.context == "RPE1", [f"{name} @ RPE1" for name in cells.labels], cells.labels)
    in_a = ~half_b(cells.names, 0, own)
    oracle = ad.read_h5ad(embedded["oracle"])
    for row, name in enumerate(written.obs_names):
        moved = [tokens[cell] - control[cells.context[cell]] for cell in np.flatnonzero(own == name)]
        expected = control["RPE1"] + np.mean(moved, axis=0)
        np.testing.assert_allclose(written.obsm["z_true"][row], expected.mean(axis=0), atol=1e-4)
        half = [tokens[cell] - control[cells.context[cell]] for cell in np.flatnonzero((own == name) & in_a)]
        change = trained.readout.change(torch.from_numpy(np.mean(half, axis=0)[None])).numpy()[0]
        said = np.maximum(trained.control_expression.numpy() + change, 0)
        np.testing.assert_allclose(oracle.X[row], said, atol=1e-3)


def test_the_map_of_cells_shows_a_context_as_held_out(cells, embedded, monkeypatch):
    import sys
    import types

    class Layout:
        def __init__(self, **settings):
            pass

        def fit_transform(self, values):
            return np.asarray(values)[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Layout))
    table = map_embedding(embedded["embeddings"], cells.split_path).set_index("cell")
    own = np.where(cells.context == "RPE1", [f"{name} @ RPE1" for name in cells.labels], cells.labels)
    own = pd.Series(np.where(cells.labels == "control", "control", own), cells.names)
    sets = cells.split.table["set"]
    left_out = list(read_facts(cells.split_path)["left_out"])
    assert set(own.index) - set(table.index) == set(own.index[own.isin(left_out)])
    expected = own[table.index].map(sets).fillna("control")
    assert (table["set"] == expected).all() and (table["perturbation"] == own[table.index]).all()


def test_the_screen_of_a_fold_has_its_labels_and_its_controls(cells):
    screen = Screen.read(cells.path, cells.split.info)
    assert set(cells.names[screen.controls]) == set(
        cells.names[(cells.labels == "control") & (cells.context == "RPE1")]
    )
    assert Screen.read(cells.path).controls.sum() == 91


def test_the_stored_model_knows_the_context_of_its_fold(cells, trained):
    facts = load_model(cells.folder / "model.pt").facts
    assert (facts["context"], facts["context_column"]) == ("RPE1", "cell_type")
    assert facts["split_sha256"] == sha256_of(cells.split_path)


def test_made_pairs_without_a_context_refuse_to_be_asked_for_one():
    pairs = pairs_of(np.ones((4, 3)), ["control", "control", "A", "B"], {"A": "train", "B": "train"})
    with pytest.raises(ValueError, match="holds out no context"):
        pairs.context_of_controls()
