"""Claims about attention, the encoder and the predictors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biojepa.model import (
    ConditionalPredictor,
    CrossAttentionBlock,
    GeneExpressionEncoder,
    JEPAPredictor,
    TransformerBlock,
)
from biojepa.model.blocks import CrossAttention, SelfAttention

D, HEADS = 16, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def torch_attention(weight: torch.Tensor, bias: torch.Tensor, out: nn.Linear) -> nn.MultiheadAttention:
    """Build the attention of PyTorch from stacked query, key and value weights."""
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
    state = {
        "in_proj_weight": weight,
        "in_proj_bias": bias,
        "out_proj.weight": out.weight,
        "out_proj.bias": out.bias,
    }
    attention.load_state_dict(state)
    return attention


def test_self_attention_equals_that_of_pytorch():
    ours, x = SelfAttention(D, HEADS), torch.randn(3, 7, D)
    theirs = torch_attention(ours.qkv.weight, ours.qkv.bias, ours.out)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_equals_that_of_pytorch_with_and_without_padding(padded):
    ours, x, condition = CrossAttention(D, HEADS), torch.randn(3, 7, D), torch.randn(3, 5, D)
    weight = torch.cat([ours.query.weight, ours.key_value.weight])
    theirs = torch_attention(weight, torch.cat([ours.query.bias, ours.key_value.bias]), ours.out)
    absent = torch.tensor([[False] * 5, [False, True, True, False, True], [True] * 4 + [False]])
    absent = absent if padded else None
    expected, _ = theirs(x, condition, condition, key_padding_mask=absent, need_weights=False)
    torch.testing.assert_close(ours(x, condition, absent), expected)


def test_a_block_is_that_of_pytorch_with_norms_first():
    ours, x = TransformerBlock(D, HEADS, mlp_ratio=3.0), torch.randn(2, 6, D)
    theirs = nn.TransformerEncoderLayer(
        D, HEADS, 3 * D, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    )
    attention = torch_attention(ours.attention.qkv.weight, ours.attention.qkv.bias, ours.attention.out)
    theirs.self_attn.load_state_dict(attention.state_dict())
    for mine, yours in (
        (ours.norm1, theirs.norm1),
        (ours.norm2, theirs.norm2),
        (ours.mlp[0], theirs.linear1),
        (ours.mlp[2], theirs.linear2),
    ):
        yours.load_state_dict(mine.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_attention_to_a_single_condition_adds_the_same_vector_to_every_token():
    attention = CrossAttention(D, HEADS)
    added = attention(torch.randn(2, 7, D), torch.randn(2, 1, D))
    torch.testing.assert_close(added, added[:, :1].expand_as(added))


def test_blocks_do_not_know_the_order_of_tokens():
    order = torch.randperm(7)
    x, condition = torch.randn(3, 7, D), torch.randn(3, 5, D)
    block, cross = TransformerBlock(D, HEADS), CrossAttentionBlock(D, HEADS)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])
    torch.testing.assert_close(cross(x, condition[:, torch.randperm(5)]), cross(x, condition))


@pytest.mark.parametrize("attention", [SelfAttention, CrossAttention])
def test_widths_that_heads_do_not_divide_are_refused(attention):
    with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
        attention(10, 4)


def small_encoder(**changes) -> GeneExpressionEncoder:
    size = {"n_genes": 20, "hidden": (12, 10), "num_tokens": 3, "embed_dim": 8, "depth": 2, "heads": 2}
    return GeneExpressionEncoder(**{**size, **changes})


def test_the_reference_encoder_has_its_published_number_of_parameters():
    with torch.device("meta"):
        encoder = GeneExpressionEncoder(20_000, library_token=False)
    assert sum(p.numel() for p in encoder.parameters()) == 64_615_424


def test_depth_is_a_real_parameter():
    parameters = [sum(p.numel() for p in small_encoder(depth=depth).parameters()) for depth in (1, 2, 3)]
    block = sum(p.numel() for p in TransformerBlock(8, 2).parameters())
    assert np.diff(parameters).tolist() == [block, block]


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
    assert f"x has shape {shape}; expected ('any', 20)" in str(caught.value)


def test_the_stage_one_predictor_keeps_the_shape_and_knows_positions():
    predictor, z = JEPAPredictor(3, 8, width=12, depth=2, heads=2).eval(), torch.randn(5, 3, 8)
    assert predictor(z).shape == (5, 3, 8)
    torch.testing.assert_close(predictor(z)[2:3], predictor(z[2:3]), atol=1e-5, rtol=1e-5)
    same = z[:, :1].expand(-1, 3, -1)
    assert not torch.allclose(predictor(same)[:, 0], predictor(same)[:, 1], atol=1e-4)
    with pytest.raises(ValueError, match=r"context has shape \(5, 2, 8\); expected \('any', 3, 8\)"):
        predictor(z[:, :2])


def opened(**changes) -> ConditionalPredictor:
    """A conditional predictor whose last layer is not zero."""
    predictor = ConditionalPredictor(3, 8, width=12, condition_dim=6, depth=2, heads=2, **changes).eval()
    nn.init.normal_(predictor.leave.weight, std=0.3)
    return predictor


def test_an_untrained_conditional_predictor_says_no_change():
    predictor = ConditionalPredictor(3, 8, width=12, condition_dim=6)
    assert not predictor(torch.randn(5, 3, 8), torch.randn(5, 4, 6)).any()


def test_absent_condition_tokens_change_nothing_whatever_they_hold():
    predictor, z, condition = opened(), torch.randn(5, 3, 8), torch.randn(5, 2, 6)
    expected = predictor(z, condition)
    padded = torch.cat([condition, 1e3 * torch.randn(5, 3, 6)], dim=1)
    absent = torch.tensor([False, False, True, True, True]).expand(5, 5)
    torch.testing.assert_close(predictor(z, padded, absent), expected)
    assert not torch.allclose(predictor(z, padded), expected, atol=1e-3)


def test_the_condition_matters():
    predictor, z = opened(), torch.randn(5, 3, 8)
    assert not torch.allclose(
        predictor(z, torch.randn(5, 2, 6)), predictor(z, torch.randn(5, 2, 6)), atol=1e-3
    )
