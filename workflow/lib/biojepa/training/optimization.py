"""Schedule, optimizer and random state as functions of the step, so that a run can be resumed exactly."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from biojepa.errors import InputError

M = TypeVar("M", bound=nn.Module)


def learning_rate(step: int, steps: int, peak: float, warmup_share: float = 0.1) -> float:
    """Linear warm-up over the first share of the steps, then a cosine to zero."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def ema_decay(step: int, steps: int, start: float = 0.996) -> float:
    """Momentum of the teacher, from ``start`` to 1 along a cosine (Grill et al. 2020)."""
    return 1 - (1 - start) * (math.cos(math.pi * step / max(1, steps)) + 1) / 2


@torch.no_grad()
def move_average(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move the teacher towards the student by exactly 1 - decay; buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
    for copied, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        copied.copy_(buffer)


def frozen_copy(module: M) -> M:
    """Copy a module; the copy receives no gradient and uses no dropout."""
    return copy.deepcopy(module).requires_grad_(False).eval()


def make_optimizer(modules: Iterable[nn.Module], weight_decay: float) -> torch.optim.AdamW:
    """AdamW; norms, biases and embeddings of position (all of fewer than two real axes) are not decayed."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                is_matrix = sum(size > 1 for size in parameter.shape) >= 2 and parameter.ndim == 2
                (decayed if is_matrix else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def apply_gradients(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float = 1.0) -> None:
    """Backward, clip the norm of the gradient, step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def seed_step(seed: int, stage: int, step: int) -> None:
    """Seed torch for one step.

    All randomness of a step (batch, mask, dropout) follows from seed, stage and step, so that a resumed
    run draws what an uninterrupted one would have drawn, without saving generator states.
    """
    torch.manual_seed((seed * 8 + stage) * 100_000_007 + step)


def progress_bar(stage: str, start: int, steps: int) -> tqdm:
    """Count the steps of a stage from ``start``, on standard error, at most every two seconds."""
    return tqdm(range(start, steps), stage, initial=start, total=steps, mininterval=2, file=sys.stderr)


def choose_device(wanted: str) -> torch.device:
    """Resolve ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    InputError
        When cuda is asked for and absent.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        raise InputError(
            "config key train.device",
            f"cuda, but torch {torch.__version__} ({built}) sees no GPU",
            "a visible GPU and a CUDA build of torch",
            "run on a machine with a GPU, install a CUDA build of torch, or set train.device to auto or cpu",
        )
    return torch.device(wanted)
