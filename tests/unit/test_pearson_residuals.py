"""Claims about Pearson residuals as the input of the encoder: their values, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.decomposition import PCA
from training_case import pairs_of, tiny_settings

from biojepa.errors import InputError
from biojepa.model.embedding import PearsonResiduals
from biojepa.pairs import Pairs
from biojepa.representation import ComparedCells, embeddings, untrained_embedding
from biojepa.training import TrainedModel, load_model, train_model
from biojepa.training.cells import LAYOUTS, CellStore

TARGET_SUM = 1000.0
SETS = {f"P{i}": "train" for i in range(6)} | {"P6": "val", "P7": "val", "P8": "test"}


def screen(outside: int = 0, seed: int = 0) -> tuple[Pairs, np.ndarray]:
    """A fold of counts (450 cells, 40 genes), one gene in no cell; ``outside`` UMIs are of other genes."""
    rng = np.random.default_rng(seed)
    labels = ["control"] * 130 + [
        label for label, which in SETS.items() if which != "test" for _ in range(40)
    ]
    depth = rng.uniform(0.3, 3, len(labels))[:, None]
    counts = rng.poisson(depth * rng.gamma(0.8, 3, 40) * rng.gamma(2, 0.5, (len(labels), 40)))
    for place, label in enumerate(SETS):
        counts[np.array(labels) == label, 4 * place : 4 * place + 4] *= 3
    counts[200, 38], counts[:, 39] = 900, 0
    library = counts.sum(axis=1) + outside
    expression = np.log1p(counts * TARGET_SUM / library[:, None])
    pairs = pairs_of(expression, labels, SETS, library=np.log(library), codes={"known": codes()})
    return replace(pairs, facts={**pairs.facts, "target_sum": TARGET_SUM}), counts


def codes() -> dict[str, np.ndarray]:
    return dict(zip(SETS, np.random.default_rng(1).standard_normal((len(SETS), 4)), strict=True))


def settings(**changes):
    encoder = {"input": "pearson_residuals", **changes.pop("encoder", {})}
    return tiny_settings(encoder=encoder, **changes)


@pytest.fixture(scope="module")
def trained() -> tuple[TrainedModel, Pairs, np.ndarray]:
    pairs, counts = screen(outside=40)
    return train_model(pairs, settings())[0], pairs, counts


def of_training(pairs: Pairs) -> np.ndarray:
    return pairs.cells_of("train")


def by_hand(counts: np.ndarray, library: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Residuals (cells, genes) by the formulas of the paper, gene proportions of training cells."""
    share = counts[training].sum(axis=0) / library[training].sum()
    mean = np.outer(library, share)
    with np.errstate(invalid="ignore"):
        residuals = (counts - mean) / np.sqrt(mean + mean**2 / 100)
    return np.nan_to_num(np.clip(residuals, -np.sqrt(len(training)), np.sqrt(len(training))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_residuals_are_those_of_scanpy_from_every_layout(layout):
    from scanpy.experimental.pp import normalize_pearson_residuals  # here, since it takes seconds to import

    pairs, counts = screen()
    store = CellStore(pairs, torch.device("cpu"), layout)
    cells = torch.arange(len(store))
    residuals = PearsonResiduals(40).fit(store.gene_shares(cells, TARGET_SUM), TARGET_SUM, len(cells))
    ours = residuals(store.rows(cells), store.log_library)
    expected = ad.AnnData(sparse.csr_matrix(counts[:, :39].astype(np.float64)))
    normalize_pearson_residuals(expected, theta=100, clip=None)
    assert abs(expected.X).max() == pytest.approx(np.sqrt(len(counts)))  # the limit is reached
    np.testing.assert_allclose(ours[:, :39], expected.X, rtol=2e-4, atol=2e-4)
    assert not ours[:, 39].any()  # a gene in no cell, of which scanpy makes no number


def test_proportions_are_those_of_training_cells_in_whole_libraries(trained):
    model, pairs, counts = trained
    training, library = of_training(pairs), np.exp(pairs.log_library_size.astype(float))
    assert len(training) < len(counts)
    np.testing.assert_allclose(
        model.embedding.residuals.share, counts[training].sum(axis=0) / library[training].sum(), rtol=1e-5
    )
    assert float(model.embedding.residuals.limit) == pytest.approx(np.sqrt(len(training)))
    x, log_library = (
        torch.from_numpy(pairs.dense(np.arange(len(counts)))),
        torch.from_numpy(pairs.log_library_size),
    )
    expected = by_hand(counts, library, training)
    np.testing.assert_allclose(model.embedding.transformed(x, log_library), expected, rtol=1e-3, atol=1e-3)
    shown, _ = model.embedding.inputs(x, log_library)
    # Centred on training cells, so that a hidden gene is at its mean, and not scaled.
    centred = expected - expected[training].mean(axis=0)
    np.testing.assert_allclose(shown, centred, rtol=1e-3, atol=1e-3)
    assert centred.max() > 10


def test_validation_cells_say_nothing_of_the_residuals(trained):
    model, pairs, _ = trained
    data = pairs.data.copy()
    for cell in pairs.cells_of("val", controls=False):
        data[pairs.indptr[cell] : pairs.indptr[cell + 1]] *= 2
    other = train_model(replace(pairs, data=data), settings(encoder={"steps": 1}, predictor={"steps": 1}))[0]
    for name, values in model.embedding.residuals.state_dict().items():
        assert torch.equal(values, other.embedding.residuals.state_dict()[name]), name
    assert torch.equal(model.embedding.gene_mean, other.embedding.gene_mean)


def test_what_is_predicted_stays_log_expression(trained):
    model, pairs, _ = trained
    means, control = pairs.pseudobulk()
    np.testing.assert_allclose(model.control_expression, control, atol=1e-5)
    said, _, _ = model.predict(pairs.labels_of("train"))
    observed = means[pairs.labels_of("train")]
    assert np.abs(said - observed).mean() < np.abs(control - observed).mean()


def test_a_model_of_residuals_is_read_back_and_embeds_the_same(trained, tmp_path):
    model, pairs, _ = trained
    model.save(tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    cells = np.arange(0, 450, 9)[:40]
    x, log_library = pairs.dense(cells), pairs.log_library_size[cells]
    np.testing.assert_array_equal(loaded.encode(x, log_library), model.encode(x, log_library))
    assert loaded.settings.encoder.input == "pearson_residuals"
    plain = train_model(pairs, tiny_settings(encoder={"steps": 1}, predictor={"steps": 1}))[0]
    assert not any("residuals" in name for name in plain.embedding.state_dict())


def test_principal_components_are_those_of_the_residuals():
    pairs, counts = screen(outside=40)
    model = train_model(pairs, settings(embedding="pca", predictor={"steps": 1}))[0]
    training = of_training(pairs)
    residuals = by_hand(counts, np.exp(pairs.log_library_size.astype(float)), training)
    expected = PCA(5, svd_solver="full").fit(residuals[training]).transform(residuals)
    tokens = model.encode(pairs.dense(np.arange(len(counts))), pairs.log_library_size).reshape(
        len(counts), -1
    )
    for component in range(5):
        assert abs(np.corrcoef(tokens[:, component], expected[:, component])[0, 1]) > 0.999


def test_the_references_of_the_representation_read_what_the_encoder_reads(trained):
    model, pairs, counts = trained
    training, x = of_training(pairs), pairs.dense(np.arange(len(counts)))
    untrained = untrained_embedding(model, 0)
    library = torch.from_numpy(pairs.log_library_size)
    for ours, theirs in zip(
        untrained.inputs(torch.from_numpy(x), library),
        model.embedding.inputs(torch.from_numpy(x), library),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    judged = np.arange(0, len(counts), 3)
    compared = ComparedCells(
        expression=x,
        log_library=pairs.log_library_size,
        judged=judged,
        fitted=training,
        labels=pairs.perturbation[judged],
        batch=np.zeros(len(judged)),
    )
    (found,) = [features.z for features in embeddings(model, compared, 0) if features.name == "pca50"]
    residuals = by_hand(counts, np.exp(pairs.log_library_size.astype(float)), training)
    expected = PCA(5, svd_solver="full").fit(residuals[training]).transform(residuals[judged])
    for component in range(5):
        assert abs(np.corrcoef(found[:, component], expected[:, component])[0, 1]) > 0.999


def test_joint_training_reads_residuals_too():
    pairs, _ = screen()
    model = train_model(pairs, settings(stages="joint", encoder={"steps": 4, "monitor_every": 4}))[0]
    assert torch.isfinite(model.control_tokens).all() and model.embedding.residuals.share.any()


def test_an_encoder_of_another_input_is_not_reused(trained):
    model, pairs, _ = trained
    with pytest.raises(ValueError, match="another size or kind"):
        train_model(pairs, tiny_settings(), encoder_from=model)


def test_pairs_that_do_not_say_their_target_sum_are_refused():
    pairs, _ = screen()
    known = {key: value for key, value in pairs.facts.items() if key != "target_sum"}
    with pytest.raises(InputError, match=r"no attribute target_sum.*rerun the preprocess and the pair stage"):
        train_model(replace(pairs, facts=known), settings())
