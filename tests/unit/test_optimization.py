"""Claims about schedules, the teacher, the optimizer and the device."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training_case import tiny_settings

from biojepa.errors import InputError
from biojepa.model import BioJEPA, BioJEPAConfig, GeneExpressionEncoder, VICRegLoss
from biojepa.model.targets import ema_decay, frozen_copy, move_average
from biojepa.training import optimization
from biojepa.training.optimization import (
    Execution,
    apply_gradients,
    choose_device,
    choose_precision,
    deterministic_algorithms,
    learning_rate,
    make_optimizer,
    seed_step,
)
from biojepa.training.tracking import Tracker


def test_the_learning_rate_warms_up_over_a_tenth_and_falls_along_a_cosine():
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert learning_rate(100, 100, 2.0) == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_the_optimizer_is_adamw_and_continues_from_its_state():
    torch.manual_seed(0)
    ours, reference, resumed = (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)) for _ in range(3))
    reference.load_state_dict(ours.state_dict())
    unused = nn.Linear(2, 2)
    optimizer = make_optimizer((ours, unused), 0.05)
    matrices = [p for p in reference.parameters() if p.ndim == 2]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    expected = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False, foreach=False)
    before = [p.clone() for p in unused.parameters()]
    for step in range(7):
        if step == 4:
            resumed.load_state_dict(ours.state_dict())
            state = optimizer.state_dict()
            optimizer = make_optimizer((resumed, unused), 0.05)
            optimizer.load_state_dict(state)
            ours = resumed
        x = torch.randn(8, 6)
        for group in expected.param_groups:
            group["lr"] = 0.01 * (step + 1)
        expected.zero_grad()
        reference(x).square().mean().backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        expected.step()
        apply_gradients(optimizer, ours(x).square().mean(), 0.01 * (step + 1))
    for p, wanted in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, wanted, rtol=1e-5, atol=1e-6)
    # Without a gradient nothing moves, not even by decay.
    assert all(torch.equal(p, old) for p, old in zip(unused.parameters(), before, strict=True))


def test_a_run_of_one_step_has_a_learning_rate():
    assert learning_rate(0, 1, 0.5) == 0.5


def test_the_momentum_of_the_teacher_goes_from_its_start_to_one():
    assert ema_decay(0, 50, 0.99) == pytest.approx(0.99)
    assert ema_decay(25, 50, 0.99) == pytest.approx(0.995)
    assert ema_decay(50, 50, 0.99) == pytest.approx(1.0)


def test_the_teacher_moves_by_exactly_one_minus_the_momentum():
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double() for _ in range(2))
    with torch.no_grad():
        student[1].running_mean.fill_(3.0)
    before = [p.clone() for p in teacher.parameters()]
    move_average(teacher, student, 0.9)
    for old, new, target in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new - old, 0.1 * (target - old), rtol=1e-12, atol=1e-15)
    assert (teacher[1].running_mean == 3.0).all()
    frozen = [p.clone() for p in teacher.parameters()]
    move_average(teacher, student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(frozen, teacher.parameters(), strict=True))
    move_average(teacher, student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_no_gradient_reaches_the_teacher():
    torch.manual_seed(0)
    student = GeneExpressionEncoder(10, (8,), 2, 4, 1, 2)
    teacher = frozen_copy(student)
    assert not teacher.training and student.training
    x = torch.randn(6, 10)
    target, context = teacher(x), student(x)
    assert not target.requires_grad
    VICRegLoss()(context, target, context)[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    with torch.no_grad():
        next(student.parameters()).add_(1)
    assert not torch.equal(next(student.parameters()), next(teacher.parameters()))  # a copy, not a view


def test_norms_biases_and_positions_are_not_decayed_and_matrices_are():
    model = nn.ModuleList(
        [
            GeneExpressionEncoder(10, (8,), 2, 4, 1, 2, library_token=True),
            BioJEPA(
                2, 4, {"net": torch.ones(3, 5)}, torch.ones(3).bool(), BioJEPAConfig(8, 1, 2, condition_dim=8)
            ),
        ]
    )
    groups = make_optimizer((model,), 0.05).param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed = {id(p) for p in groups[0]["params"]}
    spared = {id(p) for p in groups[1]["params"]}
    assert not decayed & spared and len(decayed | spared) == len(list(model.parameters()))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert {id(module.weight), id(module.bias)} <= spared
        if isinstance(module, nn.Linear):
            assert id(module.bias) in spared
            assert (id(module.weight) in decayed) == (min(module.weight.shape) > 1)
    for name, parameter in model.named_parameters():
        if name.endswith("position"):
            assert id(parameter) in spared


def test_frozen_parameters_are_not_optimized():
    frozen = nn.Linear(3, 3).requires_grad_(False)
    groups = make_optimizer((frozen, nn.Linear(3, 3)), 0.1).param_groups
    assert [len(group["params"]) for group in groups] == [1, 1]


def test_gradients_are_clipped_to_norm_one_and_the_rate_of_the_step_is_used():
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([parameter], lr=99.0)
    apply_gradients(optimizer, (parameter * torch.tensor([30.0, 40.0])).sum(), rate=0.5)
    torch.testing.assert_close(parameter.data, torch.tensor([3 - 0.5 * 0.6, 4 - 0.5 * 0.8]))
    apply_gradients(optimizer, (parameter * torch.tensor([0.3, 0.4])).sum(), rate=1.0)  # short: not clipped
    torch.testing.assert_close(parameter.data, torch.tensor([3 - 0.3 - 0.3, 4 - 0.4 - 0.4]))


def test_randomness_of_a_step_follows_from_seed_stage_and_step():
    def draw(*key: int) -> float:
        seed_step(*key)
        return float(torch.rand(1))

    keys = [(seed, stage, step) for seed in range(3) for stage in (1, 2) for step in range(20)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, 2, 5) == draw(1, 2, 5)


def test_the_device_that_was_asked_for_is_taken_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu") == choose_device("auto") == torch.device("cpu")
    with pytest.raises(InputError) as caught:
        choose_device("cuda")
    for part in ("train.device", "cuda", "sees no GPU", "set train.device to auto or cpu"):
        assert part in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")


def test_a_gpu_that_torch_cannot_use_is_reported_and_no_gpu_is_not(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    for present in (False, True):
        monkeypatch.setattr(optimization, "machine_has_gpu", lambda present=present: present)
        caplog.clear()
        assert choose_device("auto") == torch.device("cpu")
        found = "\n".join(caplog.messages)
        assert (found != "") == present
    for part in ("a build without CUDA", "training on the CPU", "CONDA_OVERRIDE_CUDA"):
        assert part in found


def test_losses_of_micro_batches_add_up_before_one_step():
    whole, parts = (nn.Parameter(torch.tensor([0.3, 0.2])) for _ in range(2))
    x = torch.tensor([[0.1, 0.4], [0.3, -0.2], [0.2, 0.1]])
    for parameter, split in ((whole, False), (parts, True)):
        optimizer = torch.optim.SGD([parameter], lr=9.0)
        errors = (row @ parameter for row in x)
        losses = (e.square() / 3 for e in errors) if split else (x @ parameter).square().mean()
        apply_gradients(optimizer, losses, rate=0.5)
    start = torch.tensor([0.3, 0.2])
    torch.testing.assert_close(whole.data, start - 0.5 * 2 / 3 * x.T @ (x @ start))
    torch.testing.assert_close(parts.data, whole.data)


def test_precision_follows_the_device_and_unknown_names_are_refused(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_precision("auto", d) for d in (cpu, gpu)] == ["float32", "bfloat16"]
    assert [choose_precision(p, gpu) for p in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    monkeypatch.setattr(optimization, "_has_amx", lambda: True)
    assert [choose_precision("auto", cpu, width) for width in (64, 128)] == ["float32", "bfloat16"]
    monkeypatch.setattr(optimization, "_has_amx", lambda: False)
    assert choose_precision("auto", cpu, 128) == "float32"
    with pytest.raises(ValueError, match="precision is 'half'; expected one of"):
        choose_precision("half", cpu)
    a = torch.ones(2, 2)
    with Execution("bfloat16").autocast(cpu):
        assert (a @ a).dtype == torch.bfloat16
    with Execution().autocast(cpu):
        assert (a @ a).dtype == torch.float32


def test_deterministic_algorithms_are_on_inside_and_as_before_outside():
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_of_several_processes_each_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(optimization, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == torch.device("cuda", 3)
    assert chosen == [torch.device("cuda", 3)]


def test_curves_are_written_where_tensorboard_is_and_its_absence_is_said(monkeypatch, tmp_path, caplog):
    rows = [{"step": 5, "loss": 2.0, "rankme": 3.0}]
    written, flushed = [], []
    fake = SimpleNamespace(
        SummaryWriter=lambda folder: SimpleNamespace(
            add_scalar=lambda *values: written.append((folder, *values)), flush=lambda: flushed.append(1)
        )
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    settings = tiny_settings(tensorboard=True)
    tracker = Execution.of(settings, torch.device("cpu"), tmp_path / "checkpoint").tracker
    for row in rows:
        tracker.add("encoder", row)
    folder = str(tmp_path / "tensorboard")
    assert written == [(folder, "encoder/loss", 2.0, 5), (folder, "encoder/rankme", 3.0, 5)] and flushed == [
        1
    ]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    silent = Tracker(tmp_path / "tensorboard")
    silent.add("encoder", rows[0])
    assert len(written) == 2
    assert "tensorboard is not installed" in caplog.text and "pip install tensorboard" in caplog.text
    caplog.clear()
    Tracker(None).add("encoder", rows[0])
    assert Execution.of(tiny_settings(), torch.device("cpu"), tmp_path).tracker._writer is None
    assert caplog.text == ""
