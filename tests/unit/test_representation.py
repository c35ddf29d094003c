"""Claims about the measurements of an embedding on cells that training never saw."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats
from sklearn.decomposition import PCA
from training_case import tiny_settings

from biojepa import representation
from biojepa.contracts import REPRESENTATION_COLUMNS, TEST, TRAIN
from biojepa.files import sha256_of, write_tsv
from biojepa.pairing import PairSettings, build_pairs, freeze_split
from biojepa.pairs import read_pairs
from biojepa.representation import (
    ComparedCells,
    components,
    measure_representation,
    read_cells,
    sample_cells,
    untrained_embedding,
)
from biojepa.retrieval import DISTINCTIVENESS, retrieve
from biojepa.splits import LeakageError, labels_in, read_split
from biojepa.training import train_model

GENES = [f"G{i}" for i in range(24)]
LABELS = [f"G{i}" for i in range(12)]
SETTINGS = PairSettings(n_folds=2, validation_share=0.2, n_genes=18, prior_dim=4)
RUN = {"model": "biojepa", "fold": 0, "seed": 3}


class Case:
    """Cells on disk with clear effects and two batches, a frozen split, and a trained model."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.labels = rng.permutation(["control"] * 60 + [label for label in LABELS for _ in range(20)])
        effects = {label: rng.normal(0, 0.5, 24) for label in LABELS} | {"control": np.zeros(24)}
        shift = np.stack([effects[label] for label in self.labels])
        self.X = np.maximum(1.0 + shift + 0.5 * rng.normal(size=shift.shape), 0).astype(np.float32)
        self.obs = pd.DataFrame(
            {
                "perturbation": pd.Categorical(self.labels),
                "is_control": self.labels == "control",
                "batch": pd.Categorical(rng.choice(["b0", "b1"], len(self.labels))),
                "cell_type": "made",
                "library_size": rng.uniform(2000, 9000, len(self.labels)),
            },
            index=[f"cell{i}" for i in range(len(self.labels))],
        )
        self.folder, self.cells, self.split_path = folder, folder / "cells.h5ad", folder / "split.tsv"
        self.write(self.cells, self.obs)
        freeze_split(self.cells, self.split_path, "made", "perturbation", 0, SETTINGS)
        self.split = read_split(self.split_path)
        self.test = labels_in(self.split, TEST)
        facts = {"dataset": "made", "fold": 0, "split_sha256": sha256_of(self.split_path)}
        build_pairs(self.cells, self.split_path, folder / "pairs.h5", [], [], SETTINGS, facts)
        self.pairs = read_pairs(folder / "pairs.h5")
        self.model, _, _ = train_model(
            self.pairs, tiny_settings(encoder={"steps": 5}, predictor={"steps": 5}), seed=3
        )
        self.model_path = folder / "model.pt"
        self.model.save(self.model_path)
        self.columns = [GENES.index(gene) for gene in self.model.genes]
        self.table = self.measure(self.cells)

    def write(self, path: Path, obs: pd.DataFrame) -> None:
        ad.AnnData(sparse.csr_matrix(self.X), obs, pd.DataFrame(index=GENES)).write_h5ad(path)

    def measure(self, cells: Path) -> pd.DataFrame:
        return measure_representation(self.model_path, cells, self.split_path, RUN)

    def value(self, embedding: str, metric: str) -> float:
        rows = self.table[(self.table["embedding"] == embedding) & (self.table["metric"] == metric)]
        return rows["value"].item()


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("representation"))


# --- which cells ------------------------------------------------------------------------------------


def made_groups(*counts: int, controls: int = 30) -> tuple[np.ndarray, np.ndarray]:
    groups = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.full(controls, -1)])
    groups = np.random.default_rng(9).permutation(groups)
    return groups, groups < 0


def test_axes_are_fitted_on_training_cells_and_judged_on_test_cells_alone():
    groups, is_control = made_groups(40, 40, 40, 40)
    sample = sample_cells(groups, is_control, np.array(["train", "test", "val", "test"]))
    assert set(groups[sample.held_out]) == {1, 3}
    assert set(groups[sample.fitted]) == {-1, 0}
    assert set(groups[sample.controls]) == {-1}
    assert (len(sample.held_out), len(sample.controls), len(sample.fitted)) == (80, 30, 70)


def test_a_cell_of_no_known_perturbation_is_neither_control_nor_anything_else():
    groups, is_control = made_groups(10, 10)
    lost = np.flatnonzero(groups == 0)[:4]
    groups[lost] = -1  # no control either
    sample = sample_cells(groups, is_control, np.array(["train", "test"]))
    everything = np.concatenate([sample.judged, sample.fitted])
    assert not np.isin(lost, everything).any()


def test_cells_of_a_held_out_context_are_judged_beside_its_own_controls():
    groups, is_control = made_groups(20, 20, controls=40)
    own = is_control & (np.arange(len(groups)) % 2 == 0)
    sample = sample_cells(groups, is_control, np.array(["train", "test"]), 0, own)
    assert set(sample.controls) == set(np.flatnonzero(own))
    assert set(np.flatnonzero(is_control)) <= set(sample.fitted)


def test_the_same_seed_draws_the_same_cells_and_another_one_others():
    groups, is_control = made_groups(400, 400)
    sets = np.array(["train", "test"])
    first, again, other = (sample_cells(groups, is_control, sets, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.judged, again.judged)
    np.testing.assert_array_equal(first.fitted, again.fitted)
    assert set(first.held_out) != set(other.held_out)
    assert len(first.held_out) == 100


def test_a_bound_on_cells_is_shared_evenly_over_perturbations(monkeypatch):
    groups, is_control = made_groups(10, 50, 200)
    monkeypatch.setattr(representation, "MAX_HELD_OUT", 120)
    sample = sample_cells(groups, is_control, np.array(["test"] * 3))
    assert np.bincount(groups[sample.held_out]).tolist() == [10, 50, 60]
    assert (np.diff(groups[sample.held_out]) >= 0).all()
    monkeypatch.setattr(representation, "MAX_HELD_OUT", 30)  # room for six perturbations of five cells
    groups, is_control = made_groups(*[8] * 20)
    sample = sample_cells(groups, is_control, np.array(["test"] * 20))
    assert sorted(np.unique(groups[sample.held_out], return_counts=True)[1]) == [5] * 6


def test_rows_are_read_in_any_order_and_from_anywhere(case, monkeypatch):
    column_of = np.full(24, -1)
    column_of[[5, 0, 17]] = [0, 1, 2]
    cells = np.random.default_rng(0).permutation(len(case.labels))[:37]
    for gap in (0, 3, 10_000):
        monkeypatch.setattr(representation, "GAP", gap)
        np.testing.assert_array_equal(
            read_cells(case.cells, cells, column_of, 3), case.X[cells][:, [5, 0, 17]]
        )
    assert read_cells(case.cells, cells[:0], column_of, 3).shape == (0, 3)


# --- what is measured -------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [30, 200])
def test_components_are_those_of_sklearn_up_to_sign(features):
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((features, features)) * np.linspace(3, 0.1, features)
    fitted, judged = (rng.standard_normal((n, features)) @ mixing for n in (90, 40))
    ours = components(torch.from_numpy(fitted), torch.from_numpy(judged), 8).numpy()
    theirs = PCA(8, svd_solver="full").fit(fitted).transform(judged)
    signs = np.sign((ours * theirs).sum(axis=0))
    np.testing.assert_allclose(ours * signs, theirs, atol=1e-8)


def test_the_untrained_encoder_is_the_one_that_training_starts_from(case):
    settings = tiny_settings(embedding="untrained", linear_branch=False, predictor={"steps": 5})
    start, _, _ = train_model(case.pairs, settings, seed=3)
    ours = untrained_embedding(case.model, 3)
    for name in ("gene_mean", "gene_scale", "library"):
        assert torch.equal(getattr(ours, name), getattr(start.embedding, name))
    weights, expected = ours.body.state_dict(), start.embedding.body.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    trained, other = case.model.embedding.body.state_dict(), untrained_embedding(case.model, 4)
    assert not torch.equal(weights["to_tokens.weight"], trained["to_tokens.weight"])
    assert not torch.equal(weights["to_tokens.weight"], other.body.state_dict()["to_tokens.weight"])


def test_the_table_has_every_embedding_on_the_same_cells(case):
    table = case.table
    assert tuple(table.columns) == REPRESENTATION_COLUMNS
    embeddings = ["trained", "trained_pooled", "untrained", "untrained_pooled", "pca50"]
    assert list(table["embedding"].unique()) == embeddings
    assert (table[["model", "fold", "seed"]] == ["biojepa", 0, 3]).all(axis=None)
    n_test = int(np.isin(case.labels, case.test).sum())
    sizes = table.groupby("cells")["n_cells"].unique().map(list).to_dict()
    assert sizes == {"test": [n_test], "test and control": [n_test + 60]}
    for embedding in embeddings:
        rows = table[table["embedding"] == embedding]
        for kind in ("activity", "distinctiveness"):
            scored = rows[rows["metric"] == f"knn_map_{kind}"]
            assert sorted(scored["perturbation"]) == sorted(case.test)
        whole = set(rows.loc[rows["perturbation"] == "*", "metric"])
        spread = set() if embedding == "pca50" else {"std_cells"}
        assert whole - spread == {"rankme", "lidar", "probe_perturbation", "probe_batch", "probe_depth"}
        assert spread <= whole
    assert table["value"].notna().all()


def test_principal_components_are_measured_by_value(case):
    tested = np.isin(case.labels, case.test)
    trained = np.isin(case.labels, [*labels_in(case.split, TRAIN), "control"])
    X = case.X[:, case.columns].astype(float)
    z = PCA(len(case.columns), svd_solver="full").fit(X[trained]).transform(X)
    scored = case.table[
        (case.table["embedding"] == "pca50") & (case.table["metric"] == "knn_map_distinctiveness")
    ].set_index("perturbation")
    codes = np.array([list(case.test).index(label) for label in case.labels[tested]])
    for found in retrieve(z[tested], codes):
        if found.kind == DISTINCTIVENESS:
            row = scored.loc[case.test[found.label]]
            assert (row["value"], row["chance"]) == pytest.approx((found.value, found.chance), abs=1e-6)
    # Effects are clear, so cells do find each other.
    assert (scored["value"] > 2 * scored["chance"]).all()
    singular = np.linalg.svd(z[tested] - z[tested].mean(axis=0), compute_uv=False)
    entropy = stats.entropy(singular / singular.sum())
    assert case.value("pca50", "rankme") == pytest.approx(math.exp(entropy), rel=1e-5)


def test_encoders_are_measured_by_value_on_standardized_tokens(case):
    tested = np.isin(case.labels, case.test)
    trained = np.isin(case.labels, [*labels_in(case.split, TRAIN), "control"])
    x = torch.from_numpy(case.X[:, case.columns])
    library = torch.from_numpy(np.log(case.obs["library_size"].to_numpy())).float()
    codes = np.array([list(case.test).index(label) for label in case.labels[tested]])
    for name, embedding in (
        ("trained", case.model.embedding),
        ("untrained", untrained_embedding(case.model, 3)),
    ):
        with torch.no_grad():
            tokens = embedding.raw_tokens(x, library).numpy().astype(float)
        scale = np.maximum(tokens[trained].std(axis=0, ddof=1), 1e-3)
        tokens = (tokens - tokens[trained].mean(axis=0)) / scale
        for kind, flat in ((name, tokens.reshape(len(tokens), -1)), (f"{name}_pooled", tokens.mean(axis=1))):
            size = min(50, flat.shape[1])
            z = PCA(size, svd_solver="full").fit(flat[trained]).transform(flat[tested])
            expected = {f.label: f.value for f in retrieve(z, codes) if f.kind == DISTINCTIVENESS}
            rows = case.table[
                (case.table["embedding"] == kind) & (case.table["metric"] == "knn_map_distinctiveness")
            ].set_index("perturbation")["value"]
            for label, value in expected.items():
                assert rows[case.test[label]] == pytest.approx(value, abs=1e-3), (kind, label)


def test_spread_is_that_of_tokens_before_they_are_standardized(case):
    tested = np.isin(case.labels, case.test)
    x = torch.from_numpy(case.X[tested][:, case.columns])
    library = torch.from_numpy(np.log(case.obs["library_size"].to_numpy()[tested])).float()
    for name, embedding in (
        ("trained", case.model.embedding),
        ("untrained", untrained_embedding(case.model, 3)),
    ):
        with torch.no_grad():
            tokens = embedding.raw_tokens(x, library).numpy().astype(float)
        assert case.value(name, "std_cells") == pytest.approx(tokens.std(axis=0, ddof=1).mean(), rel=1e-4)
        pooled = tokens.mean(axis=1).std(axis=0, ddof=1).mean()
        assert case.value(f"{name}_pooled", "std_cells") == pytest.approx(pooled, rel=1e-4)


def test_the_cells_of_the_axes_and_the_judged_ones_have_none_in_common_but_controls(case):
    cells = ComparedCells.read(case.model, case.cells, case.split_path)
    judged = cells.expression[cells.judged[cells.held_out]]
    shown = {row.tobytes() for row in case.X[np.isin(case.labels, case.test)][:, case.columns]}
    assert {row.tobytes() for row in judged} == shown
    fitted = {row.tobytes() for row in cells.expression[cells.fitted]}
    assert fitted and not fitted & shown


def test_in_a_fold_that_holds_out_a_context_its_cells_are_judged_beside_its_controls(case, tmp_path):
    path = tmp_path / "split.tsv"
    settings = replace(SETTINGS, context_column="batch", contexts=["b0"], min_cells_in_context=3)
    freeze_split(case.cells, path, "made", "context", 0, settings)
    cells = ComparedCells.read(case.model, case.cells, path)
    here, control = (case.obs["batch"] == "b0").to_numpy(), (case.labels == "control")

    def rows(which):
        return {row.tobytes() for row in case.X[which][:, case.columns]}

    held_out = rows(here & ~control)
    judged = {row.tobytes() for row in cells.expression[cells.judged[cells.held_out]]}
    assert judged and judged <= held_out
    assert {row.tobytes() for row in cells.expression[cells.judged[~cells.held_out]]} == rows(here & control)
    fitted = {row.tobytes() for row in cells.expression[cells.fitted]}
    assert not fitted & held_out
    assert rows(control) <= fitted


def test_labels_dealt_at_random_score_like_a_random_order(case, tmp_path):
    obs, tested = case.obs.copy(), np.isin(case.labels, case.test)
    labels = case.labels.copy()
    labels[tested] = np.random.default_rng(5).permutation(labels[tested])
    obs["perturbation"] = pd.Categorical(labels)
    case.write(tmp_path / "cells.h5ad", obs)
    table = case.measure(tmp_path / "cells.h5ad")
    rows = table[table["metric"] == "knn_map_distinctiveness"]
    excess = (rows["value"] - rows["chance"]).groupby(rows["embedding"]).mean()
    assert (excess.abs() < 0.05).all()
    real = case.table[case.table["metric"] == "knn_map_distinctiveness"]
    assert ((real["value"] - real["chance"]).groupby(real["embedding"]).mean()["pca50"]) > 0.2


def test_one_batch_has_no_probe_and_the_same_input_gives_the_same_bytes(case, tmp_path):
    case.write(tmp_path / "cells.h5ad", case.obs.assign(batch="only"))
    table = case.measure(tmp_path / "cells.h5ad")
    probe = table[table["metric"] == "probe_batch"]
    assert probe["value"].isna().all()
    others = table["metric"] != "probe_batch"
    pd.testing.assert_frame_equal(table[others], case.table[others])
    for name, content in (("a", case.table), ("b", case.measure(case.cells))):
        write_tsv(content, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_test_cells_nothing_is_measured(case, tmp_path):
    obs = case.obs[~np.isin(case.labels, case.test)]
    X = case.X[~np.isin(case.labels, case.test)]
    ad.AnnData(sparse.csr_matrix(X), obs, pd.DataFrame(index=GENES)).write_h5ad(tmp_path / "cells.h5ad")
    assert case.measure(tmp_path / "cells.h5ad").empty


def test_a_model_of_another_split_is_refused(case, tmp_path):
    other = tmp_path / "split.tsv"
    freeze_split(case.cells, other, "made", "perturbation", 1, SETTINGS)
    with pytest.raises(LeakageError):
        measure_representation(case.model_path, case.cells, other, RUN)
