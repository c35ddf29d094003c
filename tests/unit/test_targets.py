"""Claims about the target encoder: where gradient flows, and how the average moves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from biojepa.model import TargetEncoder
from biojepa.model.targets import TARGETS, ema_decay, ema_momentum

KINDS = {"ema": False, "shared_stop_gradient": False, "shared": True, "separate": True}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def student() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_all_kinds_are_tested():
    assert set(KINDS) == set(TARGETS)


@pytest.mark.parametrize(("kind", "with_gradient"), KINDS.items())
def test_gradient_reaches_the_target_under_shared_and_separate_alone(kind, with_gradient):
    encoder = student()
    target = TargetEncoder(encoder, kind)
    tokens = target(torch.randn(6, 3))
    assert target.with_gradient is with_gradient and tokens.requires_grad is with_gradient
    if with_gradient:
        tokens.square().sum().backward()
    reached = {
        name: any(p.grad is not None for p in m.parameters())
        for name, m in (("student", encoder), ("target", target.encoder))
    }
    assert reached == {"student": kind == "shared", "target": with_gradient}
    assert not any(p.requires_grad for p in target.parameters()) or kind == "separate"


@pytest.mark.parametrize("kind", KINDS)
def test_targets_start_as_the_student_gives_them(kind):
    encoder = student().eval()
    target = TargetEncoder(encoder, kind)
    x = torch.randn(6, 3)
    assert torch.equal(target(x), encoder(x))


@pytest.mark.parametrize(
    ("kind", "follows"),
    [("shared", True), ("shared_stop_gradient", True), ("separate", False), ("ema", False)],
)
def test_shared_targets_follow_the_student_at_once_and_hold_nothing_of_their_own(kind, follows):
    encoder, x = student().eval(), torch.randn(6, 3)
    target = TargetEncoder(encoder, kind)
    nn.init.normal_(encoder[0].weight)
    assert torch.equal(target(x), encoder(x)) is follows
    assert (target.encoder is encoder) is follows
    assert (not target.state_dict()) is follows


def test_the_average_moves_by_exactly_one_minus_the_momentum_along_a_cosine():
    encoder = student()
    target = TargetEncoder(encoder, "ema", momentum=0.9)
    for step, steps in ((0, 40), (10, 40), (20, 40), (40, 40)):
        for parameter in encoder.parameters():
            nn.init.normal_(parameter)
        encoder[1].running_mean.normal_()
        before = copy.deepcopy(target.encoder)
        target.update(step, steps)
        share = 0.1 * (1 + math.cos(math.pi * step / steps)) / 2  # 1 - m
        share = max(share, 9 / (10 + step))  # while it is young
        for old, new, followed in zip(
            before.parameters(), target.encoder.parameters(), encoder.parameters(), strict=True
        ):
            torch.testing.assert_close(new, old + share * (followed - old))
        assert torch.equal(target.encoder[1].running_mean, encoder[1].running_mean)


@pytest.mark.parametrize("steps", [100, 500, 2000])
def test_a_teacher_does_not_keep_its_random_start(steps):
    kept = math.prod(ema_momentum(step, steps) for step in range(steps))
    assert kept < 1e-6
    # The plain schedule would keep a third of it over 500 steps.
    assert steps != 500 or math.prod(ema_decay(step, steps) for step in range(steps)) > 0.3
    late = range(3_000, 12_000)
    assert [ema_momentum(step, 20_000) for step in late] == [ema_decay(step, 20_000) for step in late]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ema"])
def test_the_others_do_not_move_by_themselves(kind):
    encoder = student()
    target = TargetEncoder(encoder, kind)
    nn.init.normal_(encoder[0].weight)
    before = {name: value.clone() for name, value in target.encoder.state_dict().items()}
    target.update(0, 10)
    for name, value in target.encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_average_never_drops_out_and_a_separate_encoder_follows_the_mode():
    encoder = student()
    average, separate = TargetEncoder(encoder, "ema"), TargetEncoder(encoder, "separate")
    for target in (average, separate):
        target.train()
    assert not any(part.training for part in average.encoder.modules())
    assert all(part.training for part in separate.encoder.modules())
    assert not separate.eval().encoder.training


def test_the_state_of_an_average_can_be_restored():
    encoder = student()
    target = TargetEncoder(encoder, "ema")
    nn.init.normal_(encoder[0].weight)
    target.update(0, 10)
    other = TargetEncoder(student(), "ema")
    other.load_state_dict(target.state_dict())
    x = torch.randn(6, 3)
    assert torch.equal(other(x), target(x))


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="the target is 'momentum'; expected one of ema, shared_stop"):
        TargetEncoder(student(), "momentum")
