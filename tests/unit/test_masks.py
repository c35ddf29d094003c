"""Claims about the masks: shares, shapes, ranges, and what they leave to the context."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from biojepa.model import gene_mask, module_mask, perturbation_mask, random_block_mask, temporal_mask


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_each_cell_hides_its_own_share_of_genes_uniform_between_the_bounds():
    mask = gene_mask(2000, 3000, 0.3, 0.6)
    assert mask.shape == (2000, 3000) and mask.dtype == torch.bool
    share = mask.double().mean(dim=1).numpy()
    scatter = 5 * np.sqrt(0.25 / 3000)
    assert share.min() > 0.3 - scatter and share.max() < 0.6 + scatter
    assert stats.kstest(share, stats.uniform(0.3, 0.3).cdf).pvalue > 1e-3
    assert abs(mask.double().mean(dim=0).numpy() - 0.45).max() < 5 * np.sqrt(0.25 / 2000)


def test_equal_bounds_fix_the_share_and_zero_hides_nothing():
    assert not gene_mask(10, 50, 0, 0).any()
    assert float(gene_mask(500, 500, 0.25, 0.25).double().mean()) == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.5), (0.6, 0.3), (0.5, 1.0)])
def test_impossible_shares_are_refused(low, high):
    with pytest.raises(ValueError, match=f"masked shares are {low} to {high}; expected 0 <= low <= high < 1"):
        gene_mask(2, 2, low, high)
    with pytest.raises(ValueError, match=f"masked shares are {low} to {high}; expected 0 <= low <= high < 1"):
        module_mask(2, torch.zeros(2, dtype=torch.long), low, high)


def test_the_genes_of_a_module_are_hidden_together_and_others_one_by_one():
    modules = torch.tensor([7, -1, 0, 7, 0, -1, 7, -1])
    hidden = module_mask(4000, modules, 0.2, 0.7)
    assert hidden.shape == (4000, 8) and hidden.dtype == torch.bool
    for module in (0, 7):
        genes = hidden[:, modules == module]
        assert torch.equal(genes, genes[:, :1].expand_as(genes))
    # Of two different units, each pair of hidden and shown occurs.
    first, second = torch.meshgrid(torch.tensor([0, 1, 2, 5, 7]), torch.arange(8), indexing="ij")
    for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True):
        if a != b and not (modules[a] == modules[b] >= 0):
            assert len((2 * hidden[:, a].long() + hidden[:, b].long()).unique()) == 4, (a, b)
    # Each unit is hidden with probability 0.45 on average, whatever its size.
    np.testing.assert_allclose(hidden.double().mean(dim=0), 0.45, atol=5 * np.sqrt(0.25 / 4000))


def test_each_cell_hides_its_own_share_of_modules():
    modules = torch.arange(3000) // 2
    share = module_mask(2000, modules, 0.3, 0.6).double().mean(dim=1).numpy()
    assert stats.kstest(share, stats.uniform(0.3, 0.3).cdf).pvalue > 1e-3
    assert not module_mask(5, modules, 0, 0).any()


def test_genes_that_are_all_in_no_module_are_masked_like_genes():
    alone = torch.full((3000,), -1)
    hidden = module_mask(500, alone, 0.25, 0.25).double()
    assert float(hidden.mean()) == pytest.approx(0.25, abs=0.003)
    assert float((hidden[:, 0] * hidden[:, 1]).mean()) == pytest.approx(1 / 16, abs=0.05)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (torch.zeros(3, 2).long(), r"modules has shape \(3, 2\); expected \('any',\)"),
        (torch.zeros(3), r"modules has dtype torch\.float32; expected torch\.int64"),
    ],
)
def test_modules_of_another_shape_or_dtype_are_refused(modules, message):
    with pytest.raises(ValueError, match=message):
        module_mask(2, modules)


def test_controls_are_the_context_and_perturbed_cells_the_target():
    is_control = torch.tensor([True, False, False, True])
    context, target = perturbation_mask(is_control)
    assert context.tolist() == [True, False, False, True] and target.tolist() == [False, True, True, False]
    context[0] = False
    assert is_control[0]  # the answer is not the question


@pytest.mark.parametrize(("given", "controls"), [([True, True, True], 3), ([False, False, False], 0)])
def test_a_batch_of_one_kind_is_refused(given, controls):
    message = f"of 3 cells {controls} are controls; expected controls and perturbed cells both"
    with pytest.raises(ValueError, match=message):
        perturbation_mask(torch.tensor(given))


def test_a_control_mask_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"is_control has dtype torch\.float32; expected torch\.bool"):
        perturbation_mask(torch.ones(3))


def test_the_first_frames_are_the_context_and_the_next_ones_the_target():
    context, target = temporal_mask(10)
    assert context.nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert target.nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    context, target = temporal_mask(4, context=1, target=2, tokens_per_frame=3)
    assert context.tolist() == [True] * 3 + [False] * 9
    assert target.tolist() == [False] * 3 + [True] * 6 + [False] * 3
    assert context.dtype == target.dtype == torch.bool


@pytest.mark.parametrize(
    "given", [{"frames": 7}, {"frames": 8, "context": 0}, {"frames": 8, "tokens_per_frame": 0}]
)
def test_sequences_that_are_too_short_are_refused(given):
    with pytest.raises(ValueError, match=r"no more than the [78] frames of the sequence together"):
        temporal_mask(**given)


def rectangle(block: torch.Tensor) -> tuple[int, int]:
    """Height and width of a block, which must be a full rectangle."""
    rows, columns = block.any(dim=1).nonzero()[:, 0], block.any(dim=0).nonzero()[:, 0]
    size = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
    assert int(block.sum()) == size[0] * size[1]
    return size


@pytest.mark.parametrize(("height", "width"), [(60, 60), (40, 80)])
def test_target_blocks_keep_to_their_ranges_of_scale_and_aspect(height, width):
    scales, aspects = [], []
    for _ in range(150):
        _, targets = random_block_mask(height, width)
        assert targets.shape == (4, height * width) and targets.dtype == torch.bool
        sizes = {rectangle(target) for target in targets.view(4, height, width)}
        assert len(sizes) == 1  # one size for all blocks of a draw
        ((rows, columns),) = sizes
        scales.append(rows * columns / (height * width))
        aspects.append(rows / columns)
    # A side is rounded to whole patches, which moves the area by half a row or column at most.
    slack = 0.5 * 40 / (height * width)
    assert 0.15 - slack <= min(scales) < 0.16 and 0.19 < max(scales) <= 0.2 + slack
    assert 0.75 - 0.06 <= min(aspects) < 0.8 and 1.42 < max(aspects) <= 1.5 + 0.12
    assert stats.kstest(scales, stats.uniform(0.15, 0.05).cdf).pvalue > 1e-3
    assert stats.kstest(aspects, stats.uniform(0.75, 0.75).cdf).pvalue > 1e-3


def test_the_context_is_a_large_square_block_less_the_targets():
    for _ in range(100):
        context, targets = random_block_mask(14, 14)
        assert context.shape == (196,) and context.dtype == torch.bool
        hidden = targets.any(dim=0)
        assert not (context & hidden).any()
        rows, columns = (context.view(14, 14).any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
        span = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert max(span) <= 14
        # The block holds 0.85 to 1 of the grid, so at most 0.15 (and rounding) is in neither mask.
        assert int((~context & ~hidden).sum()) <= 0.15 * 196 + 14


@pytest.mark.parametrize(("scale", "patches"), [(0.5, {28 * 28, 28 * 29, 29 * 28}), (1.0, {1600})])
def test_the_context_block_has_the_scale_asked_for(scale, patches):
    for _ in range(30):
        context, targets = random_block_mask(
            40, 40, blocks=1, target_scale=(0.0007, 0.0007), context_scale=(scale, scale)
        )
        assert int(targets.sum()) == 1  # a target of one patch, inside the context block or not
        assert int(context.sum()) in patches | {n - 1 for n in patches}
        assert scale < 1 or rectangle((context | targets[0]).view(40, 40)) == (40, 40)


def test_every_place_of_the_grid_is_predicted_now_and_then_and_numbers_of_blocks_are_free():
    total = sum(random_block_mask(6, 10, blocks=2)[1].any(dim=0).long() for _ in range(200))
    assert total.shape == (60,) and int(total.min()) > 0


def test_blocks_follow_from_the_random_state():
    torch.manual_seed(4)
    first, second = random_block_mask(14, 14), random_block_mask(14, 14)
    torch.manual_seed(4)
    again = random_block_mask(14, 14)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], second[1])


def test_the_context_keeps_the_patches_asked_for_or_the_draw_is_refused():
    kept = [int(random_block_mask(5, 5, min_context=10)[0].sum()) for _ in range(100)]
    assert min(kept) >= 10
    with pytest.raises(ValueError, match=r"left the context fewer than 1 patch\(es\)"):
        random_block_mask(5, 5, target_scale=(1.0, 1.0))


@pytest.mark.parametrize(
    "given", [{"target_scale": (0.3, 0.2)}, {"context_scale": (0.5, 1.1)}, {"target_aspect": (0.0, 1.0)}]
)
def test_ranges_that_are_none_are_refused(given):
    (name, (low, high)) = next(iter(given.items()))
    with pytest.raises(ValueError, match=f"{name} is {low} to {high}; expected 0 < low <= high <= "):
        random_block_mask(8, 8, **given)
