"""Where the targets of a joint embedding come from, and whether gradient flows into them."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

TARGETS = ("ema", "shared_stop_gradient", "shared", "separate")


def ema_decay(step: int, steps: int, start: float = 0.996) -> float:
    """Momentum of the teacher, from ``start`` to 1 along a cosine (Grill et al. 2020)."""
    return 1 - (1 - start) * (math.cos(math.pi * step / max(1, steps)) + 1) / 2


def while_young(step: int, decay: float) -> float:
    """Cap the decay of an average at (1 + step) / (10 + step), as TensorFlow's moving averages do."""
    return min(decay, (1 + step) / (10 + step))


def ema_momentum(step: int, steps: int, start: float = 0.996) -> float:
    """Momentum of a teacher that does not keep its random start: :func:`ema_decay`, less while young.

    At 0.996 the average looks back 250 steps, so after a few hundred steps a good part of the teacher
    would still be the initial weights.
    """
    return while_young(step, ema_decay(step, steps, start))


@torch.no_grad()
def move_average(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move the teacher towards the student by exactly 1 - decay; buffers are copied."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
    for copied, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        copied.copy_(buffer)


def frozen_copy(module: M) -> M:
    """Copy a module; the copy receives no gradient and uses no dropout."""
    return copy.deepcopy(module).requires_grad_(False).eval()


class TargetEncoder(nn.Module):
    """Encode the target of a prediction.

    ========================  ====================================  ==================
    kind                      encoder                               gradient
    ========================  ====================================  ==================
    ``ema``                   running average of the student,       no
                              without dropout
    ``shared_stop_gradient``  the student                           no
    ``shared``                the student                           yes
    ``separate``              a second one, trained by its own      yes
                              gradient; starts as a copy
    ========================  ====================================  ==================

    EMA follows BYOL (Grill et al. 2020) and I-JEPA (Assran et al. 2023), the shared encoder with a
    stop-gradient SimSiam (Chen & He 2021), and the shared and separate ones VICReg (Bardes et al. 2022).
    Only a branch with gradient can be regularized: see :attr:`with_gradient`.

    Parameters
    ----------
    student
        Encoder of the context. It is referred to, not registered: its parameters and state stay its
        owner's.
    kind
        Of the table.
    momentum
        Initial momentum of ``ema``, see :func:`ema_momentum`.
    """

    def __init__(self, student: nn.Module, kind: str = "ema", momentum: float = 0.996) -> None:
        super().__init__()
        if kind not in TARGETS:
            raise ValueError(f"the target is {kind!r}; expected one of {', '.join(TARGETS)}")
        self.kind, self.momentum = kind, momentum
        self._student = (student,)  # in a tuple, so that it is not registered here as well
        self.own: nn.Module | None = None
        if kind == "ema":
            self.own = frozen_copy(student)
        elif kind == "separate":
            self.own = copy.deepcopy(student)

    @property
    def encoder(self) -> nn.Module:
        """The module that makes the targets."""
        return self._student[0] if self.own is None else self.own

    @property
    def with_gradient(self) -> bool:
        """Whether gradient flows into the targets."""
        return self.kind in ("shared", "separate")

    def forward(self, *inputs: Tensor) -> Tensor:
        """Encode what the student's ``forward`` takes, (B, T, D)."""
        if self.with_gradient:
            return self.encoder(*inputs)
        with torch.no_grad():
            return self.encoder(*inputs)

    def update(self, step: int, steps: int) -> None:
        """Follow the student after an optimizer step; does nothing but under ``ema``.

        Parameters
        ----------
        step, steps
            Steps before this one, and of the whole training.
        """
        if self.kind == "ema":
            move_average(self.encoder, self._student[0], ema_momentum(step, steps, self.momentum))

    def train(self, mode: bool = True) -> TargetEncoder:
        """Set the mode; a running average stays without dropout."""
        super().train(mode)
        if self.kind == "ema":
            self.encoder.eval()
        return self
