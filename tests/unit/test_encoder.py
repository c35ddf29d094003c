"""Claims about the encoder of gene expression."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from biojepa.model import GeneExpressionEncoder, TransformerBlock


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_encoder(**changes) -> GeneExpressionEncoder:
    size = {"n_genes": 20, "hidden": (12, 10), "num_tokens": 3, "embed_dim": 8, "depth": 2, "heads": 2}
    return GeneExpressionEncoder(**{**size, **changes})


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_depth_is_a_real_parameter():
    parameters = [count(small_encoder(depth=depth)) for depth in (1, 2, 3)]
    block = count(TransformerBlock(8, 2))
    assert np.diff(parameters).tolist() == [block, block]


@pytest.mark.parametrize("hidden", [(), (6,), (12, 10), (12, 10, 8)])
@pytest.mark.parametrize(("num_tokens", "embed_dim"), [(1, 8), (3, 8), (3, 16)])
def test_hidden_layers_tokens_and_width_are_real_parameters(hidden, num_tokens, embed_dim):
    encoder = small_encoder(hidden=hidden, num_tokens=num_tokens, embed_dim=embed_dim, depth=1).eval()
    widths = (20, *hidden)
    mlp = sum(a * b + b + 2 * b for a, b in itertools.pairwise(widths))  # Linear and LayerNorm
    to_tokens = (widths[-1] + 1) * num_tokens * embed_dim
    around = num_tokens * embed_dim + 2 * embed_dim  # position embedding and final LayerNorm
    assert count(encoder) == mlp + to_tokens + around + count(TransformerBlock(embed_dim, 2))
    assert encoder(torch.randn(5, 20)).shape == (5, num_tokens, embed_dim)


def test_heads_are_a_real_parameter():
    one, two = small_encoder(heads=1).eval(), small_encoder(heads=2).eval()
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 20)
    assert not torch.allclose(one(x), two(x), atol=1e-4)


def test_the_encoder_is_its_published_chain_of_layers():
    encoder, x = small_encoder().eval(), torch.randn(5, 20)
    hidden = x
    for linear, norm in ((encoder.mlp[0], encoder.mlp[1]), (encoder.mlp[4], encoder.mlp[5])):
        hidden = F.gelu(F.layer_norm(hidden @ linear.weight.T + linear.bias, norm.normalized_shape))
    tokens = (hidden @ encoder.to_tokens.weight.T + encoder.to_tokens.bias).reshape(
        5, 3, 8
    ) + encoder.position
    for block in encoder.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(encoder(x), F.layer_norm(tokens, (8,)))


def test_the_batch_a_cell_is_in_changes_nothing():
    for encoder in (small_encoder().eval(), small_encoder(library_token=True).eval()):
        x, library = torch.randn(9, 20), torch.randn(9)
        together = encoder(x, library)
        apart = torch.cat([encoder(x[i : i + 1], library[i : i + 1]) for i in range(9)])
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_the_order_of_genes_is_a_matter_of_the_first_layer_alone():
    encoder, x, order = small_encoder().eval(), torch.randn(4, 20), torch.randperm(20)
    expected = encoder(x)
    encoder.mlp[0].weight.data = encoder.mlp[0].weight.data[:, order]
    torch.testing.assert_close(encoder(x[:, order]), expected)


def test_the_library_token_informs_the_others_and_is_not_returned():
    encoder, x = small_encoder(library_token=True).eval(), torch.randn(4, 20)
    shallow, deep = encoder(x, torch.full((4,), -1.0)), encoder(x, torch.full((4,), 1.0))
    assert shallow.shape == (4, 3, 8)
    assert (shallow - deep).abs().amax(dim=(1, 2)).min() > 1e-3
    with pytest.raises(ValueError, match=r"library token; give log_library of shape \(cells,\)"):
        encoder(x)


def test_encoding_uses_no_dropout_and_no_gradient_and_leaves_the_mode_alone():
    encoder, x = small_encoder(dropout=0.5), torch.randn(4, 20)
    encoder.train()
    assert not torch.equal(encoder(x), encoder(x))
    encoded = encoder.encode(x)
    assert torch.equal(encoded, encoder.encode(x)) and not encoded.requires_grad and encoder.training
    torch.testing.assert_close(encoded, encoder.eval()(x))
    assert not encoder.training


@pytest.mark.parametrize("shape", [(4, 19), (20,), (2, 4, 20)])
def test_input_of_another_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError) as caught:
        small_encoder()(torch.zeros(shape))
    assert str(caught.value) == f"x has shape {shape}; expected ('any', 20)"


@pytest.mark.parametrize(
    ("x", "library", "message"),
    [
        (torch.zeros(4, 20).long(), torch.zeros(4), "x has dtype torch.int64; expected torch.float32"),
        (torch.zeros(4, 20).double(), torch.zeros(4), "x has dtype torch.float64; expected torch.float32"),
        (torch.zeros(4, 20), torch.zeros(4, 1), "log_library has shape (4, 1); expected (4,)"),
        (torch.zeros(4, 20), torch.zeros(5), "log_library has shape (5,); expected (4,)"),
        (
            torch.zeros(4, 20),
            torch.zeros(4).int(),
            "log_library has dtype torch.int32; expected torch.float32",
        ),
    ],
)
def test_input_of_another_dtype_or_library_is_refused_with_both(x, library, message):
    with pytest.raises(ValueError) as caught:
        small_encoder(library_token=True)(x, library)
    assert str(caught.value) == message
