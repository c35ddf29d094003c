"""Claims about attention and the transformer blocks, against those of PyTorch with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biojepa.model import CrossAttentionBlock, FiLM, TransformerBlock
from biojepa.model.blocks import MAX_FEW_TOKENS, CrossAttention, SelfAttention, _attend, evaluation

D, HEADS = 16, 4
PADDED_SELF = torch.tensor([[False] * 7, [False, True, True] + [False] * 4, [True] * 6 + [False]])
PADDED_CROSS = torch.tensor([[False] * 5, [False, True, True, False, True], [True] * 4 + [False]])


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


def torch_cross_attention(ours: CrossAttention) -> nn.MultiheadAttention:
    weight = torch.cat([ours.query.weight, ours.key_value.weight])
    return torch_attention(weight, torch.cat([ours.query.bias, ours.key_value.bias]), ours.out)


@pytest.mark.parametrize("padded", [False, True])
def test_self_attention_equals_that_of_pytorch_with_and_without_padding(padded):
    ours, x = SelfAttention(D, HEADS), torch.randn(3, 7, D)
    theirs = torch_attention(ours.qkv.weight, ours.qkv.bias, ours.out)
    absent = PADDED_SELF if padded else None
    expected, _ = theirs(x, x, x, key_padding_mask=absent, need_weights=False)
    torch.testing.assert_close(ours(x, absent), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_equals_that_of_pytorch_with_and_without_padding(padded):
    ours, x, condition = CrossAttention(D, HEADS), torch.randn(3, 7, D), torch.randn(3, 5, D)
    absent = PADDED_CROSS if padded else None
    expected, _ = torch_cross_attention(ours)(
        x, condition, condition, key_padding_mask=absent, need_weights=False
    )
    torch.testing.assert_close(ours(x, condition, absent), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, MAX_FEW_TOKENS, MAX_FEW_TOKENS + 1])
def test_attention_among_few_tokens_is_the_fused_one_in_value_and_gradient(tokens, masked):
    torch.manual_seed(0)
    q = torch.randn(6, 2, 5, 4, dtype=torch.double, requires_grad=True)
    k, v = (torch.randn(6, 2, tokens, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    visible = None
    if masked:
        visible = torch.rand(6, 1, 1, tokens) < 0.6
        visible[0] = False  # nothing to attend to
        visible[1] = True
    weight = torch.randn(6, 2, 5, 4, dtype=torch.double)
    found, expected = (
        f(30 * q, k, v, visible) for f in (_attend, lambda *x: F.scaled_dot_product_attention(*x[:3], x[3]))
    )
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad((z * weight).sum(), (q, k, v)) for z in (found, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_on_a_cpu_attention_is_single_precision_under_autocast():
    q = torch.randn(2, 2, 3, 4).bfloat16()
    for tokens in (3, 40):
        k = torch.randn(2, 2, tokens, 4).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert _attend(q, k, k, None).dtype == torch.float32


def test_attention_has_the_gradient_of_pytorch():
    ours, x = SelfAttention(D, HEADS), torch.randn(3, 7, D)
    theirs = torch_attention(ours.qkv.weight, ours.qkv.bias, ours.out)
    ours(x).square().sum().backward()
    theirs(x, x, x, need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(ours.qkv.weight.grad, theirs.in_proj_weight.grad)
    torch.testing.assert_close(ours.out.weight.grad, theirs.out_proj.weight.grad)


@pytest.mark.parametrize("padded", [False, True])
def test_a_block_is_that_of_pytorch_with_norms_first(padded):
    ours, x = TransformerBlock(D, HEADS, mlp_ratio=3.0), torch.randn(3, 7, D)
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
        nn.init.normal_(mine.weight)
        yours.load_state_dict(mine.state_dict())
    absent = PADDED_SELF if padded else None
    present = slice(None) if absent is None else ~absent
    torch.testing.assert_close(ours(x, absent)[present], theirs(x, src_key_padding_mask=absent)[present])


def test_a_cross_attention_block_is_the_published_chain_of_norms_attention_and_mlp():
    block, x, condition = CrossAttentionBlock(D, HEADS), torch.randn(3, 7, D), torch.randn(3, 5, D)
    for norm in (block.norm_query, block.norm_condition, block.norm_mlp):
        nn.init.normal_(norm.weight)

    def normed(layer: nn.LayerNorm, z: torch.Tensor) -> torch.Tensor:
        centred = z - z.mean(dim=-1, keepdim=True)
        return centred / (z.var(dim=-1, correction=0, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    key = normed(block.norm_condition, condition)
    attended, _ = torch_cross_attention(block.cross)(
        normed(block.norm_query, x), key, key, key_padding_mask=PADDED_CROSS, need_weights=False
    )
    middle = x + attended
    first, last = block.mlp[0], block.mlp[2]
    hidden = F.gelu(normed(block.norm_mlp, middle) @ first.weight.T + first.bias)
    expected = middle + hidden @ last.weight.T + last.bias
    torch.testing.assert_close(block(x, condition, PADDED_CROSS), expected)
    assert first.weight.shape == (4 * D, D)


def test_attention_to_a_single_condition_adds_the_same_vector_to_every_token():
    attention, x = CrossAttention(D, HEADS), torch.randn(2, 7, D)
    added = attention(x, torch.randn(2, 1, D))
    torch.testing.assert_close(added, added[:, :1].expand_as(added))
    several = attention(x, torch.randn(2, 3, D))
    assert (several - several[:, :1]).abs().max() > 1e-3


def test_a_cell_without_any_condition_token_gets_the_same_as_from_zero_values():
    attention, absent = CrossAttention(D, HEADS), torch.ones(2, 5, dtype=torch.bool)
    added = attention(torch.randn(2, 7, D), torch.randn(2, 5, D), absent)
    torch.testing.assert_close(added, attention.out.bias.expand_as(added))


def test_blocks_do_not_know_the_order_of_tokens():
    order = torch.randperm(7)
    x, condition = torch.randn(3, 7, D), torch.randn(3, 5, D)
    block, cross = TransformerBlock(D, HEADS), CrossAttentionBlock(D, HEADS)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])
    torch.testing.assert_close(cross(x, condition[:, torch.randperm(5)]), cross(x, condition))


def test_padding_changes_nothing_whatever_it_holds():
    block, x = TransformerBlock(D, HEADS), torch.randn(3, 7, D)
    padded = torch.cat([x, 1e3 * torch.randn(3, 2, D)], dim=1)
    absent = (torch.arange(9) > 6).expand(3, 9)
    torch.testing.assert_close(block(padded, absent)[:, :7], block(x))
    assert not torch.allclose(block(padded)[:, :7], block(x), atol=1e-3)


def test_film_is_the_identity_at_the_start_and_then_scales_and_shifts_by_the_mean_of_present_tokens():
    film, x, condition = FiLM(D), torch.randn(3, 7, D), torch.randn(3, 5, D)
    assert torch.equal(film(x, condition), x)
    nn.init.normal_(film.scale_and_shift.weight)
    nn.init.normal_(film.scale_and_shift.bias)
    weight, bias = film.scale_and_shift.weight, film.scale_and_shift.bias
    expected = []
    for cell in range(3):
        pooled = condition[cell][~PADDED_CROSS[cell]].mean(dim=0)
        scale, shift = weight[:D] @ pooled + bias[:D], weight[D:] @ pooled + bias[D:]
        expected.append(x[cell] * (1 + scale) + shift)
    torch.testing.assert_close(film(x, condition, PADDED_CROSS), torch.stack(expected))
    torch.testing.assert_close(film(x, condition), film(x, condition, torch.zeros(3, 5, dtype=torch.bool)))


@pytest.mark.parametrize("attention", [SelfAttention, CrossAttention])
def test_widths_that_heads_do_not_divide_are_refused(attention):
    with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
        attention(10, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 7, 9)}, "x has shape (3, 7, 9); expected ('any', 'any', 16)"),
        ({"x": torch.zeros(7, D)}, "x has shape (7, 16); expected ('any', 'any', 16)"),
        ({"x": torch.zeros(3, 7, D).long()}, "x has dtype torch.int64; expected torch.float32"),
        ({"condition": torch.zeros(2, 5, D)}, "condition has shape (2, 5, 16); expected (3, 'any', 16)"),
        (
            {"condition": torch.zeros(3, 5, D).double()},
            "condition has dtype torch.float64; expected torch.float32",
        ),
        ({"absent": torch.zeros(3, 4).bool()}, "absent has shape (3, 4); expected (3, 5)"),
        ({"absent": torch.zeros(3, 5)}, "absent has dtype torch.float32; expected torch.bool"),
    ],
)
@pytest.mark.parametrize("block", [CrossAttentionBlock(D, HEADS), FiLM(D)], ids=["cross", "film"])
def test_another_shape_or_dtype_is_refused_with_both(block, changes, message):
    given = {"x": torch.zeros(3, 7, D), "condition": torch.zeros(3, 5, D), **changes}
    with pytest.raises(ValueError) as caught:
        block(**given)
    assert str(caught.value) == message


def test_a_transformer_block_refuses_another_shape_or_dtype():
    block = TransformerBlock(D, HEADS)
    for given, message in (
        ((torch.zeros(3, D),), "x has shape (3, 16); expected ('any', 'any', 16)"),
        ((torch.zeros(3, 7, D).half(),), "x has dtype torch.float16; expected torch.float32"),
        (
            (torch.zeros(3, 7, D), torch.zeros(3, 6).bool()),
            "absent has shape (3, 6); expected (3, 7)",
        ),
        (
            (torch.zeros(3, 7, D), torch.zeros(3, 7).long()),
            "absent has dtype torch.int64; expected torch.bool",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            block(*given)
        assert str(caught.value) == message


def test_autocast_may_bring_another_floating_dtype_but_no_integers():
    block = TransformerBlock(D, HEADS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(2, 3, D)
        torch.testing.assert_close(block(x.bfloat16()), block(x), atol=0.1, rtol=0.1, check_dtype=False)
        with pytest.raises(ValueError, match=r"x has dtype torch\.int64; expected torch\.float32"):
            block(x.long())


def test_evaluation_leaves_every_part_in_its_mode_even_after_an_error():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    module.train()
    module[1].eval()
    with evaluation(module):
        assert not any(part.training for part in module.modules())
    with pytest.raises(RuntimeError), evaluation(module):
        raise RuntimeError
    assert module.training and module[0].training and not module[1].training and not module[1][0].training
