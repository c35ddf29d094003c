"""Optimizers that do not import torch's compiler.

The first optimizer of ``torch.optim`` that a process makes imports ``torch._dynamo``, two seconds that
neither a ridge regression nor a small training has to spare: nine jobs of the demo did.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LBFGS(torch.optim.LBFGS):
    """L-BFGS (Liu & Nocedal, Math. Program. 1989): ``torch.optim.LBFGS`` for one list of tensors."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take over the parameters; torch's own method is what imports the compiler."""
        self.param_groups.append({**self.defaults, **param_group, "params": list(param_group["params"])})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


class FusedAdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019) by torch's fused kernel: the steps of ``torch.optim.AdamW``.

    The kernel is the same, so are the numbers; each step saves hooks that nobody set.

    Parameters
    ----------
    groups
        Dictionaries with ``params`` and ``weight_decay``.
    betas, eps
        Of the moments.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self.param_groups = [{"lr": 0.0, **group, "params": list(group["params"])} for group in groups]
        self.betas, self.eps = betas, eps
        self._state: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters, group by group."""
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move all parameters that have a gradient."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            for p in moved:
                if p not in self._state:
                    self._state[p] = _fresh_state(p)
            averages, squares, steps = map(list, zip(*(self._state[p] for p in moved), strict=True))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                moved,
                [p.grad for p in moved],
                averages,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """Moments and steps by position of the parameter."""
        return {"state": {i: list(self._state[p]) for i, p in self._numbered() if p in self._state}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state_dict`, on the devices of the parameters."""
        found = state["state"]
        self._state = {
            p: tuple(part.to(p.device, copy=True) for part in found[i])  # type: ignore[misc]
            for i, p in self._numbered()
            if i in found
        }

    def _numbered(self) -> list[tuple[int, Tensor]]:
        return list(enumerate(self.parameters))


def _fresh_state(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First moment, second moment, steps."""
    return torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device)
