"""Claims about what a trained model hands on: embeddings, predictions, and the references beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats
from statsmodels.stats.multitest import multipletests
from training_case import tiny_settings

from biojepa.contracts import CELL_TYPE, EMBEDDING, IS_CONTROL, PREDICTIONS_OBS, SET, TEST, TRAIN, VAL
from biojepa.embedding import Outputs, embed_and_predict, embed_screen
from biojepa.errors import InputError
from biojepa.evaluation.references import duplicates
from biojepa.files import sha256_of
from biojepa.halves import half_b
from biojepa.map import map_embedding
from biojepa.pairing import PairSettings, build_pairs, freeze_split
from biojepa.pairs import read_pairs
from biojepa.predictions import cells_per_label, predicted_rows, write_predictions
from biojepa.splits import LeakageError, labels_in, read_split
from biojepa.training import TrainedModel, train_model

GENES = [f"G{i}" for i in range(24)]
LABELS = [*[f"G{i}" for i in range(8)], "G0+G1", "G2+G3"]
SETTINGS = PairSettings(n_folds=2, validation_share=0.2, n_genes=18, prior_dim=4)


class Screen:
    """Cells on disk, a frozen split, and a model trained on what it allows."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.labels = rng.permutation(["control"] * 60 + [label for label in LABELS for _ in range(15)])
        effects = {label: rng.normal(0, 0.4, 24) for label in LABELS} | {"control": np.zeros(24)}
        # Perturbed cells scatter more than controls, in every gene.
        spread = np.where(self.labels == "control", 0.1, 0.5)[:, None]
        shift = np.stack([effects[label] for label in self.labels])
        expression = 2.5 + shift + spread * rng.normal(size=shift.shape)
        self.X = np.maximum(expression, 0).astype(np.float32)
        self.names = np.array([f"cell{i}" for i in rng.permutation(len(self.labels))])
        self.library = rng.uniform(2000, 9000, len(self.labels))
        self.cells, self.split_path = folder / "cells.h5ad", folder / "split.tsv"
        self.write(self.cells, self.X)
        freeze_split(self.cells, self.split_path, "made", "perturbation", 0, SETTINGS)
        self.split = read_split(self.split_path)
        network = folder / "net.tsv"
        network.write_text("gene_a\tgene_b\n" + "".join(f"G{i}\tG{(i + 1) % 8}\n" for i in range(8)))
        facts = {"dataset": "made", "fold": 0, "split_sha256": sha256_of(self.split_path)}
        build_pairs(self.cells, self.split_path, folder / "pairs.h5", [network], [], SETTINGS, facts)
        self.pairs = read_pairs(folder / "pairs.h5")
        self.model, _, _ = train_model(
            self.pairs, tiny_settings(encoder={"steps": 5}, predictor={"steps": 20}), 0
        )
        self.model = replace(self.model, weight=0.5)  # whatever the gate said, the latent part shall count
        self.model_path = folder / "model.pt"
        self.model.save(self.model_path)
        self.rows = predicted_rows(self.split)
        self.written = self.predict(folder / "as_is", self.cells)

    def write(self, path: Path, X: np.ndarray, genes=GENES) -> None:
        obs = pd.DataFrame(
            {
                "perturbation": pd.Categorical(self.labels),
                IS_CONTROL: self.labels == "control",
                "batch": pd.Categorical(np.where(np.arange(len(self.labels)) % 2, "b1", "b0")),
                CELL_TYPE: "made",
                "library_size": self.library,
            },
            index=self.names,
        )
        ad.AnnData(sparse.csr_matrix(X), obs, pd.DataFrame(index=list(genes))).write_h5ad(path)

    def predict(self, folder: Path, cells: Path) -> dict[str, ad.AnnData]:
        paths = {name: folder / f"{name}.h5ad" for name in ("embeddings", "predictions", "oracle")}
        outputs = Outputs("biojepa", paths["embeddings"], paths["predictions"], "oracle", paths["oracle"])
        embed_and_predict(self.model_path, cells, self.split_path, outputs, half_seed=0)
        return {name: ad.read_h5ad(path) for name, path in paths.items()}

    def tokens(self, cells: np.ndarray) -> np.ndarray:
        """Tokens of cells by the model itself, from the dense matrix."""
        columns = [GENES.index(gene) for gene in self.model.genes]
        x = torch.from_numpy(self.X[cells][:, columns])
        library = torch.from_numpy(np.log(self.library[cells]).astype(np.float32))
        with torch.no_grad():
            return self.model.embedding(x, library).numpy()

    def half_a(self) -> np.ndarray:
        return ~half_b(self.names, 0, self.labels)


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Screen:
    return Screen(tmp_path_factory.mktemp("screen"))


def embed(screen: Screen, path: Path, genes=GENES, model: TrainedModel | None = None, block: int = 2048):
    groups = screen.split.set_index("perturbation").index.get_indexer(screen.labels)
    n = len(screen.split)
    return embed_screen(model or screen.model, path, genes, np.log(screen.library), groups, n + 1, block)


@pytest.mark.parametrize("block", [2048, 50, 7])
def test_embedding_a_screen_is_embedding_its_dense_matrix_in_any_blocks(screen, block):
    pooled, means = embed(screen, screen.cells, block=block)
    tokens = screen.tokens(np.arange(len(screen.labels)))
    np.testing.assert_allclose(pooled, tokens.mean(axis=1), atol=1e-5)
    for row, label in enumerate(screen.split["perturbation"]):
        np.testing.assert_allclose(means[row], tokens[screen.labels == label].mean(axis=0), atol=1e-5)
    assert np.isnan(means[-1]).all()  # a group without cells


def test_the_order_of_genes_in_the_file_and_genes_beside_the_models_change_nothing(screen, tmp_path):
    order = np.random.default_rng(1).permutation(24)
    wider = np.hstack([screen.X[:, order], np.full((len(screen.X), 2), 9, dtype=np.float32)])
    genes = [*np.array(GENES)[order], "EXTRA1", "EXTRA2"]
    screen.write(tmp_path / "wider.h5ad", wider, genes)
    for ours, theirs in zip(
        embed(screen, tmp_path / "wider.h5ad", genes), embed(screen, screen.cells), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_screen_that_lacks_genes_of_the_model_is_refused(screen, tmp_path):
    lost = screen.model.genes[0]
    rest = [gene for gene in GENES if gene != lost]
    screen.write(tmp_path / "less.h5ad", screen.X[:, [GENES.index(g) for g in rest]], rest)
    with pytest.raises(
        InputError, match=rf"less\.h5ad: found 1 of the model's 18 genes missing, such as \['{lost}'\]"
    ):
        embed(screen, tmp_path / "less.h5ad", rest)


def test_predictions_have_one_row_per_validation_and_test_perturbation(screen):
    predictions = screen.written["predictions"]
    expected = screen.split[screen.split[SET].isin([VAL, TEST])]
    assert tuple(predictions.obs.columns) == PREDICTIONS_OBS
    assert predictions.obs_names.tolist() == expected["perturbation"].tolist()
    assert predictions.obs["perturbation"].tolist() == expected["perturbation"].tolist()
    assert predictions.obs["set"].tolist() == expected[SET].tolist()
    assert set(predictions.obs["context"]) == {"all"} and set(predictions.obs["n_cells"]) == {15}
    assert tuple(predictions.var_names) == screen.model.genes
    assert predictions.X.dtype == np.float32 and (predictions.X >= 0).all()
    assert predictions.uns["model"] == "biojepa"
    assert json.loads(predictions.uns["provenance"])["split_sha256"] == sha256_of(screen.split_path)


def test_predictions_are_those_of_the_model(screen):
    expression, sd, tokens = screen.model.predict(screen.rows)
    predictions = screen.written["predictions"]
    np.testing.assert_array_equal(predictions.X, expression)
    np.testing.assert_array_equal(predictions.layers["sd"], sd)
    np.testing.assert_allclose(predictions.obsm["z_pred"], tokens.mean(axis=1), atol=1e-6)


def test_observed_embeddings_are_means_over_the_perturbations_cells(screen):
    embeddings, predictions = screen.written["embeddings"], screen.written["predictions"]
    for row, label in enumerate(predictions.obs["perturbation"]):
        mean = embeddings.obsm[EMBEDDING][screen.labels == label].mean(axis=0)
        np.testing.assert_allclose(predictions.obsm["z_true"][row], mean, atol=1e-5)


def test_every_cell_is_embedded_test_cells_included(screen):
    embeddings = screen.written["embeddings"]
    assert embeddings.obs_names.tolist() == screen.names.tolist()
    assert embeddings.obs["perturbation"].tolist() == screen.labels.tolist()
    assert list(embeddings.obs) == ["perturbation", "is_control", "batch", "cell_type"]
    assert embeddings.obsm[EMBEDDING].dtype == np.float32
    tokens = screen.tokens(np.arange(len(screen.labels)))
    np.testing.assert_allclose(embeddings.obsm[EMBEDDING], tokens.mean(axis=1), atol=1e-5)


def test_the_oracle_reads_out_the_observed_tokens_of_half_a(screen):
    oracle, half_a, model = screen.written["oracle"], screen.half_a(), screen.model
    for row, label in enumerate(oracle.obs["perturbation"]):
        tokens = screen.tokens(np.flatnonzero(half_a & (screen.labels == label))).mean(axis=0)
        change = (tokens - model.control_tokens.numpy()).ravel() @ model.readout.weight.numpy()
        expected = np.maximum(model.control_expression.numpy() + change, 0)
        np.testing.assert_allclose(oracle.X[row], expected, atol=1e-4)


def test_predictions_do_not_look_at_test_cells_and_the_oracle_not_at_half_b(screen, tmp_path):
    test = np.isin(screen.labels, labels_in(screen.split, TEST))
    changed = screen.X.copy()
    changed[test & ~screen.half_a()] += 3
    screen.write(tmp_path / "changed.h5ad", changed)
    written = screen.predict(tmp_path, tmp_path / "changed.h5ad")
    np.testing.assert_array_equal(written["predictions"].X, screen.written["predictions"].X)
    np.testing.assert_array_equal(
        written["predictions"].obsm["z_pred"], screen.written["predictions"].obsm["z_pred"]
    )
    np.testing.assert_array_equal(written["oracle"].X, screen.written["oracle"].X)
    is_test = (written["predictions"].obs["set"] == TEST).to_numpy()
    moved = np.abs(written["predictions"].obsm["z_true"] - screen.written["predictions"].obsm["z_true"]).max(
        axis=1
    )
    assert (moved[is_test] > 1e-3).all() and (moved[~is_test] == 0).all()


def test_a_model_of_another_split_is_refused_and_nothing_is_written(screen, tmp_path):
    replace(screen.model, facts={**screen.model.facts, "split_sha256": "f" * 64}).save(tmp_path / "model.pt")
    outputs = Outputs("biojepa", tmp_path / "embeddings.h5ad", tmp_path / "predictions.h5ad")
    with pytest.raises(LeakageError, match=r"model\.pt was made with a split of SHA-256 ffff"):
        embed_and_predict(tmp_path / "model.pt", screen.cells, screen.split_path, outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_table_of_another_shape_is_refused(screen, tmp_path):
    arguments = (tmp_path / "p.h5ad", "mean", screen.split, screen.rows, {}, ["A", "B"])
    with pytest.raises(
        ValueError, match=rf"expression has shape \(1, 2\); expected \({len(screen.rows)}, 2\)"
    ):
        write_predictions(*arguments, np.zeros((1, 2)), {})
    assert not list(tmp_path.iterdir())


def test_a_model_without_uncertainty_or_embedding_writes_expression_alone(screen, tmp_path):
    values = np.arange(2.0 * len(screen.rows)).reshape(-1, 2)
    path = tmp_path / "mean" / "predictions.h5ad"
    write_predictions(path, "mean", screen.split, screen.rows, {"G0": 3}, ["A", "B"], values, {"seed": 1})
    written = ad.read_h5ad(path)
    np.testing.assert_array_equal(written.X, values.astype(np.float32))
    assert not list(written.layers) and not list(written.obsm)
    assert json.loads(written.uns["provenance"]) == {"seed": 1}


def test_cells_are_counted_per_label(screen):
    assert cells_per_label(screen.cells) == {"control": 60, **dict.fromkeys(LABELS, 15)}


def test_the_duplicate_is_half_a_and_its_interpolation_shrinks_what_is_not_significant(screen):
    genes = list(screen.pairs.genes)
    result = duplicates(screen.cells, screen.split, screen.rows, genes)
    X, half_a = screen.X[:, [GENES.index(g) for g in genes]].astype(float), screen.half_a()
    training = np.mean([X[screen.labels == x].mean(axis=0) for x in labels_in(screen.split, TRAIN)], axis=0)
    control = X[screen.labels == "control"]
    shrunken = []
    for row, label in enumerate(screen.split["perturbation"].iloc[screen.rows]):
        cells = X[half_a & (screen.labels == label)]
        assert (cells.var(axis=0, ddof=1) > control.var(axis=0, ddof=1)).all()
        np.testing.assert_allclose(result["duplicate"][row], cells.mean(axis=0), rtol=1e-6)
        p = stats.ttest_ind(cells, control, equal_var=False).pvalue
        alpha = 1 - multipletests(p, method="fdr_bh")[1]
        expected = alpha * cells.mean(axis=0) + (1 - alpha) * training
        np.testing.assert_allclose(result["interpolated_duplicate"][row], expected, rtol=1e-6)
        shrunken += list(1 - alpha)
    assert min(shrunken) < 0.01 and max(shrunken) > 0.3


def test_the_duplicate_never_sees_half_b(screen, tmp_path):
    changed = screen.X.copy()
    changed[np.isin(screen.labels, labels_in(screen.split, TEST)) & ~screen.half_a()] += 3
    screen.write(tmp_path / "changed.h5ad", changed)
    genes = list(screen.pairs.genes)
    before, after = (
        duplicates(p, screen.split, screen.rows, genes) for p in (screen.cells, tmp_path / "changed.h5ad")
    )
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


@pytest.mark.slow
def test_the_map_is_a_repeatable_layout_of_a_sample_of_cells(screen, tmp_path):
    path = tmp_path / "embeddings.h5ad"
    screen.written["embeddings"].write_h5ad(path)
    shown = map_embedding(path, screen.split_path, seed=1, max_cells=90)
    assert list(shown) == ["cell", "umap_1", "umap_2", "perturbation", "set", "batch"]
    position = {name: i for i, name in enumerate(screen.names)}
    order = [position[cell] for cell in shown["cell"]]
    assert len(order) == 90 and order == sorted(set(order))
    assert shown["perturbation"].tolist() == screen.labels[order].tolist()
    sets = screen.split.set_index("perturbation")[SET].to_dict() | {"control": "control"}
    assert shown["set"].tolist() == [sets[label] for label in screen.labels[order]]
    assert np.isfinite(shown[["umap_1", "umap_2"]]).all(axis=None)
    pd.testing.assert_frame_equal(map_embedding(path, screen.split_path, seed=1, max_cells=90), shown)
