"""Claims about the predictors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biojepa.model import ConditionalPredictor, JEPAPredictor

T, D, C = 5, 8, 6
CONDITIONED = ("cross_attention", "film")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_stage_one_predictor_keeps_the_shape_and_knows_positions():
    predictor, z = JEPAPredictor(3, 8, width=12, depth=2, heads=2).eval(), torch.randn(5, 3, 8)
    assert predictor(z).shape == (5, 3, 8)
    torch.testing.assert_close(predictor(z)[2:3], predictor(z[2:3]), atol=1e-5, rtol=1e-5)
    same = z[:, :1].expand(-1, 3, -1)
    assert not torch.allclose(predictor(same)[:, 0], predictor(same)[:, 1], atol=1e-4)


@pytest.mark.parametrize("width", [None, 12])
def test_asked_positions_are_mask_tokens_beside_the_context_in_its_positions(width):
    predictor = JEPAPredictor(T, D, width, depth=2, heads=2, target_queries=True)
    nn.init.normal_(predictor.mask_token)
    z, seen, asked = torch.randn(4, 3, D), torch.tensor([0, 2, 3]), torch.tensor([4, 1])
    inside = z if width is None else z @ predictor.enter.weight.T + predictor.enter.bias
    position = predictor.position[0]
    queries = (predictor.mask_token + position[asked]).expand(4, -1, -1)
    x = torch.cat([inside + position[seen], queries], dim=1)
    for block in predictor.blocks:
        x = block(x)
    x = F.layer_norm(x[:, 3:], x.shape[-1:])
    expected = x if width is None else x @ predictor.leave.weight.T + predictor.leave.bias
    torch.testing.assert_close(predictor(z, seen, asked), expected)
    rows = [t.expand(4, -1) for t in (seen, asked)]
    torch.testing.assert_close(predictor(z, *rows), expected)


def test_queries_come_in_the_order_asked_and_context_in_any():
    predictor = JEPAPredictor(T, D, depth=2, heads=2, target_queries=True)
    z, seen, asked = torch.randn(4, 3, D), torch.tensor([0, 2, 3]), torch.tensor([4, 1])
    expected = predictor(z, seen, asked)
    torch.testing.assert_close(predictor(z, seen, asked.flip(0)), expected.flip(1))
    torch.testing.assert_close(predictor(z.flip(1), seen.flip(0), asked), expected)
    assert not torch.allclose(predictor(z, seen.flip(0), asked), expected, atol=1e-4)


def test_positions_may_differ_from_row_to_row():
    predictor = JEPAPredictor(T, D, depth=1, heads=2, target_queries=True)
    z, seen, asked = torch.randn(2, 2, D), torch.tensor([[0, 2], [4, 1]]), torch.tensor([[1], [3]])
    apart = torch.cat([predictor(z[i : i + 1], seen[i], asked[i]) for i in range(2)])
    torch.testing.assert_close(predictor(z, seen, asked), apart, atol=1e-5, rtol=1e-5)


def test_asking_for_no_position_gives_none():
    predictor = JEPAPredictor(T, D, depth=1, heads=2, target_queries=True)
    assert predictor(torch.randn(2, T, D), None, torch.zeros(0, dtype=torch.long)).shape == (2, 0, D)


def test_without_a_width_of_its_own_a_predictor_has_no_way_in_or_out():
    names = {name.split(".")[0] for name, _ in JEPAPredictor(T, D, heads=2).named_parameters()}
    assert names == {"position", "blocks", "norm"}
    names = {name.split(".")[0] for name, _ in JEPAPredictor(T, D, D, heads=2).named_parameters()}
    assert names == {"enter", "position", "blocks", "norm", "leave"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(2, 4, D),), "context has shape (2, 4, 8); expected ('any', 5, 8)"),
        ((torch.zeros(2, T, D).long(),), "context has dtype torch.int64; expected torch.float32"),
        (
            (torch.zeros(2, 4, D), torch.arange(3)),
            "context has shape (2, 4, 8); expected ('any', 3, 8)",
        ),
        (
            (torch.zeros(2, 3, D), torch.ones(3)),
            "context_positions has dtype torch.float32; expected torch.int64",
        ),
        (
            (torch.zeros(2, T, D), None, torch.zeros(3, 1).long()),
            "target_positions has shape (3, 1); expected (2, 1)",
        ),
    ],
)
def test_a_predictor_refuses_another_shape_or_dtype_with_both(given, message):
    with pytest.raises(ValueError) as caught:
        JEPAPredictor(T, D, heads=2, target_queries=True)(*given)
    assert str(caught.value) == message


def test_a_predictor_without_a_mask_token_cannot_be_asked():
    with pytest.raises(ValueError, match="no mask token; build it with target_queries=True"):
        JEPAPredictor(T, D, heads=2)(torch.zeros(2, T, D), None, torch.arange(2))


def conditional(opened: bool = True, **changes) -> ConditionalPredictor:
    """A small conditional predictor; ``opened`` gives the layers that start at zero weights."""
    size = {"width": 12, "condition_dim": C, "depth": 2, "heads": 2}
    predictor = ConditionalPredictor(T, D, **{**size, **changes}).eval()
    if opened:
        for name, parameter in predictor.named_parameters():
            if "leave" in name or "scale_and_shift" in name:
                nn.init.normal_(parameter, std=0.3)
    return predictor


@pytest.mark.parametrize("width", [None, 12])
@pytest.mark.parametrize("conditioning", [*CONDITIONED, "none"])
def test_an_untrained_residual_predictor_says_no_change(conditioning, width):
    predictor = conditional(opened=False, conditioning=conditioning, width=width)
    change = predictor(torch.randn(4, T, D), torch.randn(4, 3, C))
    assert change.shape == (4, T, D) and not change.any()
    assert conditional(opened=False, residual_zero_init=False)(
        torch.randn(4, T, D), torch.randn(4, 3, C)
    ).any()


def test_the_default_conditioning_is_the_residual_form_with_positions():
    given, chosen = ConditionalPredictor(T, D, 12, C), conditional(opened=False, heads=4)
    chosen.load_state_dict(given.state_dict())
    assert not given(torch.randn(4, T, D), torch.randn(4, 3, C)).any()
    assert given.position is not None


def test_the_reference_form_is_its_published_chain_of_layers():
    predictor = conditional(width=None, residual_zero_init=False, positions=False)
    z, condition = torch.randn(4, T, D), torch.randn(4, 3, C)
    linear = predictor.condition[0]
    c = F.gelu(F.layer_norm(condition @ linear.weight.T + linear.bias, (D,)))
    x = z
    for cross, block in zip(predictor.conditioned, predictor.blocks, strict=True):
        x = block(cross(x, c))
    torch.testing.assert_close(predictor(z, condition), F.layer_norm(x, (D,)))


@pytest.mark.parametrize("conditioning", CONDITIONED)
@pytest.mark.parametrize("garbage", [1e3, float("nan")])
def test_absent_condition_tokens_change_nothing_whatever_they_hold(conditioning, garbage):
    predictor = conditional(conditioning=conditioning)
    z, condition = torch.randn(4, T, D), torch.randn(4, 2, C)
    expected = predictor(z, condition)
    padded = torch.cat([condition, garbage * torch.randn(4, 3, C)], dim=1)
    absent = torch.tensor([False, False, True, True, True]).expand(4, 5)
    torch.testing.assert_close(predictor(z, padded, absent), expected)
    assert not torch.allclose(predictor(z, padded), expected, atol=1e-3)


@pytest.mark.parametrize("conditioning", CONDITIONED)
def test_the_condition_matters_and_the_order_of_its_tokens_does_not(conditioning):
    predictor = conditional(conditioning=conditioning)
    z, condition = torch.randn(4, T, D), torch.randn(4, 3, C)
    assert not torch.allclose(predictor(z, condition), predictor(z, torch.randn(4, 3, C)), atol=1e-3)
    torch.testing.assert_close(predictor(z, condition[:, [2, 0, 1]]), predictor(z, condition))


def test_an_unconditional_predictor_does_not_look_at_the_condition():
    predictor, z = conditional(conditioning="none"), torch.randn(4, T, D)
    assert torch.equal(predictor(z), predictor(z, torch.randn(4, 3, C)))
    assert predictor(z).any()


def test_an_untrained_film_predictor_is_the_unconditional_one():
    film, plain = conditional(opened=False, conditioning="film"), conditional(conditioning="none")
    plain.load_state_dict(film.state_dict(), strict=False)
    nn.init.normal_(film.leave.weight)
    plain.leave.load_state_dict(film.leave.state_dict())
    z = torch.randn(4, T, D)
    assert film(z, torch.randn(4, 3, C)).any()
    torch.testing.assert_close(film(z, torch.randn(4, 3, C)), plain(z))


def test_one_condition_token_moves_every_token_alike_and_several_do_not():
    # One layer without what follows it, so that only the cross-attention speaks.
    predictor = conditional(width=None, depth=1, residual_zero_init=False, positions=False)
    take_up, z = predictor.conditioned[0], torch.randn(4, T, D)
    nn.init.zeros_(take_up.mlp[2].weight)
    nn.init.zeros_(take_up.mlp[2].bias)
    moved = take_up(z, predictor.condition(torch.randn(4, 1, C))) - z
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), atol=1e-5, rtol=1e-5)
    moved = take_up(z, predictor.condition(torch.randn(4, 3, C))) - z
    assert (moved - moved[:, :1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": torch.zeros(4, T, 9)}, "context has shape (4, 5, 9); expected ('any', 5, 8)"),
        ({"context": torch.zeros(4, T, D).int()}, "context has dtype torch.int32; expected torch.float32"),
        ({"condition": torch.zeros(4, C)}, "condition has shape (4, 6); expected (4, 'any', 6)"),
        (
            {"condition": torch.zeros(4, 3, C).double()},
            "condition has dtype torch.float64; expected torch.float32",
        ),
        (
            {"condition": None},
            "this predictor needs a condition; give one of shape (cells, tokens, 6)",
        ),
        ({"absent": torch.zeros(4, 2).bool()}, "absent has shape (4, 2); expected (4, 3)"),
        ({"absent": torch.zeros(4, 3)}, "absent has dtype torch.float32; expected torch.bool"),
    ],
)
@pytest.mark.parametrize("conditioning", CONDITIONED)
def test_a_conditional_predictor_refuses_another_shape_or_dtype_with_both(conditioning, changes, message):
    given = {"context": torch.zeros(4, T, D), "condition": torch.zeros(4, 3, C), **changes}
    with pytest.raises(ValueError) as caught:
        conditional(conditioning=conditioning)(**given)
    assert str(caught.value) == message


def test_another_conditioning_is_refused():
    with pytest.raises(
        ValueError, match="conditioning is 'sum'; expected one of cross_attention, film, none"
    ):
        conditional(conditioning="sum")
