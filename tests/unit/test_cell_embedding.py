"""Claims about the frozen embedding: standardization, and principal components as tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from biojepa.model import GeneExpressionEncoder
from biojepa.model import embedding as embedding_module
from biojepa.model.embedding import CellEmbedding, PCAProjection


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_principal_components_agree_with_sklearn():
    x = normal(80, 10) @ normal(10, 10, seed=1)
    x = x - x.mean(dim=0)
    tokens = PCAProjection(10, 2, 3).fit(x)(x)
    assert tokens.shape == (80, 2, 3)
    scores = PCA(6, svd_solver="full").fit_transform(x.double().numpy())
    ours = tokens.flatten(1).numpy()
    signs = np.sign((ours * scores).sum(axis=0))
    np.testing.assert_allclose(ours * signs, scores, atol=1e-3)


def test_the_sign_of_a_component_is_fixed_by_its_largest_weight():
    x = normal(80, 10) @ normal(10, 10, seed=1)
    body = PCAProjection(10, 2, 3).fit(x - x.mean(dim=0))
    largest = body.components.abs().argmax(dim=0)
    assert (body.components[largest, torch.arange(6)] > 0).all()
    torch.testing.assert_close(PCAProjection(10, 2, 3).fit(-(x - x.mean(dim=0))).components, body.components)


def test_with_fewer_genes_than_components_the_rest_is_zero():
    x = normal(50, 4) - normal(50, 4).mean(dim=0)
    tokens = PCAProjection(4, 2, 3).fit(x)(x).flatten(1)
    assert not tokens[:, 4:].any()
    torch.testing.assert_close(tokens.square().sum(dim=1), x.square().sum(dim=1), atol=1e-4, rtol=1e-4)


def embedding(n_genes: int = 10) -> CellEmbedding:
    torch.manual_seed(0)
    return CellEmbedding(GeneExpressionEncoder(n_genes, (8,), 3, 4, 1, 2, library_token=True)).eval()


def test_inputs_are_standardized_by_value_and_clipped():
    cells = embedding()
    mean, scale = normal(10).abs(), torch.linspace(0.01, 1, 10)  # the first genes hardly vary
    library = 8 + normal(60)
    cells.fit_inputs(mean, scale, library)
    x = 3 * normal(5, 10, seed=2).abs()
    x[0, 0] = 1e4
    standardized, sizes = cells.inputs(x, library[:5])
    expected = np.clip((x.numpy() - mean.numpy()) / np.maximum(scale.numpy(), 0.1), -10, 10)
    np.testing.assert_allclose(standardized, expected, atol=1e-5)
    assert standardized[0, 0] == 10
    z = library.double().numpy()
    np.testing.assert_allclose(sizes, (z[:5] - z.mean()) / z.std(ddof=1), atol=1e-4)


def test_library_sizes_that_do_not_vary_do_not_divide_by_zero():
    cells = embedding()
    cells.fit_inputs(torch.zeros(10), torch.ones(10), torch.full((6,), 8.0))
    _, sizes = cells.inputs(torch.zeros(2, 10), torch.tensor([8.0, 8.0]))
    assert not sizes.any()


def test_tokens_of_the_cells_they_were_fitted_on_are_standard():
    cells = embedding()
    x, library = normal(300, 10, seed=3), normal(300, seed=4)
    with torch.no_grad():
        cells.fit_tokens(cells.raw_tokens(x, library), torch.arange(300))
        tokens = cells(x, library)
    torch.testing.assert_close(tokens.mean(dim=0), torch.zeros(3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.std(dim=0), torch.ones(3, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("at_a_time", [1, 7, 1000])
def test_tokens_are_standardized_by_the_cells_that_are_named_a_part_at_a_time(monkeypatch, at_a_time):
    cells, tokens, named = (
        embedding(),
        3 + 2 * normal(50, 3, 4, seed=1),
        torch.tensor([4, 40, 4, 11, 0, 49, 30, 31]),
    )
    monkeypatch.setattr(embedding_module, "SUMMED_CELLS", at_a_time)
    cells.fit_tokens(tokens, named)
    chosen = tokens[named].double().numpy()
    np.testing.assert_allclose(cells.token_mean, chosen.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(cells.token_scale, chosen.std(axis=0, ddof=1), rtol=1e-6)


def test_a_token_that_does_not_vary_stays_finite():
    cells = embedding()
    cells.fit_tokens(torch.ones(20, 3, 4), torch.arange(20))
    assert float(cells.token_scale.min()) == pytest.approx(1e-3)


def test_another_number_of_genes_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"x has shape \(2, 9\); expected \('any', 10\)"):
        embedding()(torch.zeros(2, 9), torch.zeros(2))
