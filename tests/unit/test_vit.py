"""Claims about the vision transformer and its patch masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from biojepa.model import ViTEncoder

T = 6  # a grid of 3 × 2 patches of 4 × 5 pixels
VISIBLE = torch.tensor([True, False, True, True, False, True])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_vit(**changes) -> ViTEncoder:
    size = {"image_size": (12, 10), "patch_size": (4, 5), "channels": 7, "embed_dim": 8}
    return ViTEncoder(**{**size, "depth": 2, "heads": 2, **changes}).eval()


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 7, 12, 10)


def by_hand(encoder: ViTEncoder, x: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Cut patches out with loops, embed them by a matrix product, and encode those kept."""
    weight = encoder.patches.weight.reshape(8, -1)
    tokens = []
    for t in kept:
        row, column = 4 * (t // 2), 5 * (t % 2)
        patch = x[:, :, row : row + 4, column : column + 5].reshape(len(x), -1)
        tokens.append(patch @ weight.T + encoder.patches.bias + encoder.position[0, t])
    hidden = torch.stack(tokens, dim=1)
    for block in encoder.blocks:
        hidden = block(hidden)
    return F.layer_norm(hidden, (8,))


def test_patches_that_are_not_square_with_any_channels_are_embedded_row_by_row():
    encoder, x = small_vit(), images()
    assert encoder.grid == (3, 2) and encoder.num_tokens == T
    torch.testing.assert_close(encoder(x), by_hand(encoder, x, list(range(T))), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode(x), encoder(x))


def test_dropped_patches_are_not_encoded_and_the_others_keep_their_positions():
    encoder, x = small_vit(), images()
    expected = by_hand(encoder, x, [0, 2, 3, 5])
    torch.testing.assert_close(encoder(x, VISIBLE), expected, atol=1e-5, rtol=1e-5)
    blank = x.clone()
    blank[:, :, 0:4, 5:10] = 1e3  # patch 1
    blank[:, :, 8:12, 0:5] = float("nan")  # patch 4
    torch.testing.assert_close(encoder(blank, VISIBLE), encoder(x, VISIBLE))


@pytest.mark.parametrize("masking", ["drop", "token"])
def test_each_image_may_show_other_patches(masking):
    encoder, x = small_vit(masking=masking), images(2)
    visible = torch.stack([VISIBLE, VISIBLE.roll(1)])
    together = encoder(x, visible)
    apart = torch.cat([encoder(x[i : i + 1], visible[i]) for i in range(2)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert together.shape == (2, 4 if masking == "drop" else T, 8)


def test_mask_tokens_stand_where_patches_are_hidden_and_nothing_of_those_gets_through():
    encoder, x = small_vit(masking="token", depth=0), images()
    torch.nn.init.normal_(encoder.mask_token)
    tokens, whole = encoder(x, VISIBLE), encoder(x)
    torch.testing.assert_close(tokens[:, VISIBLE], whole[:, VISIBLE])
    hidden = F.layer_norm(encoder.mask_token + encoder.position[0, ~VISIBLE], (8,))
    torch.testing.assert_close(tokens[:, ~VISIBLE], hidden.expand(3, -1, -1))
    deep, other = small_vit(masking="token"), x.clone()
    other[:, :, 0:4, 5:10] += 5
    assert torch.equal(deep(other, VISIBLE), deep(x, VISIBLE))
    assert not torch.allclose(deep(other), deep(x), atol=1e-3)


def test_a_sequence_of_vectors_is_an_image_with_one_patch_per_frame():
    encoder = ViTEncoder((5, 3), (1, 3), 1, embed_dim=8, depth=0, heads=2)
    sequence = torch.randn(2, 5, 3)
    weight, bias = encoder.patches.weight.reshape(8, 3), encoder.patches.bias
    expected = F.layer_norm(sequence @ weight.T + bias + encoder.position, (8,))
    torch.testing.assert_close(encoder(sequence[:, None]), expected)


def test_depth_is_a_real_parameter_and_only_mask_tokens_add_one():
    count = lambda **changes: sum(p.numel() for p in small_vit(**changes).parameters())  # noqa: E731
    attention, mlp, norms = 4 * (8 * 8 + 8), 2 * 8 * 32 + 32 + 8, 4 * 8
    assert count() == (7 * 4 * 5 + 1) * 8 + T * 8 + 2 * 8 + 2 * (attention + mlp + norms)
    assert count(depth=3) - count() == attention + mlp + norms
    assert count(masking="token") == count() + 8


@pytest.mark.parametrize(
    ("x", "visible", "message"),
    [
        (torch.zeros(3, 6, 12, 10), None, "x has shape (3, 6, 12, 10); expected ('any', 7, 12, 10)"),
        (torch.zeros(7, 12, 10), None, "x has shape (7, 12, 10); expected ('any', 7, 12, 10)"),
        (torch.zeros(3, 7, 12, 10).byte(), None, "x has dtype torch.uint8; expected torch.float32"),
        (torch.zeros(3, 7, 12, 10), VISIBLE[:5], "visible has shape (5,); expected (6,)"),
        (torch.zeros(3, 7, 12, 10), VISIBLE.expand(2, 6), "visible has shape (2, 6); expected (3, 6)"),
        (torch.zeros(3, 7, 12, 10), VISIBLE.float(), "visible has dtype torch.float32; expected torch.bool"),
        (
            torch.zeros(2, 7, 12, 10),
            torch.stack([VISIBLE, ~VISIBLE]),
            "the images show 2 to 4 patches; expected as many each",
        ),
    ],
)
def test_another_shape_or_dtype_is_refused_with_both(x, visible, message):
    with pytest.raises(ValueError) as caught:
        small_vit()(x, visible)
    assert str(caught.value) == message


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"patches of \(4, 4\) pixels do not tile an image of \(12, 10\)"):
        small_vit(patch_size=4)
    with pytest.raises(ValueError, match="masking is 'blur'; expected one of drop, token"):
        small_vit(masking="blur")
