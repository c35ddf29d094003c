"""Transformer blocks. Shapes: B cells or populations, T tokens, S condition tokens, D width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MAX_FEW_TOKENS = 16


def require_shape(name: str, x: Tensor, expected: tuple[int | None, ...]) -> None:
    """Refuse a tensor of another shape; ``None`` stands for any size.

    Raises
    ------
    ValueError
        Giving both shapes.
    """
    if x.ndim != len(expected) or any(
        e is not None and e != s for e, s in zip(expected, x.shape, strict=True)
    ):
        wanted = tuple("any" if size is None else size for size in expected)
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {wanted}")


def require_dtype(name: str, x: Tensor, expected: torch.dtype) -> None:
    """Refuse a tensor of another dtype.

    Under autocast any floating dtype passes for any other: the layers convert it.

    Raises
    ------
    ValueError
        Giving both dtypes.
    """
    if x.dtype == expected:
        return
    floating = x.is_floating_point() and expected.is_floating_point
    if not (floating and torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"{name} has dtype {x.dtype}; expected {expected}")


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, and leave every part in the mode in which it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class SelfAttention(nn.Module):
    """Multi-head self-attention, (B, T, D) → (B, T, D) (Vaswani et al. 2017).

    Parameters
    ----------
    dim, heads
        D and the number of heads, which must divide it.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, absent: Tensor | None = None) -> Tensor:
        """Let every token attend to all tokens of its own cell that are not ``absent`` (B, T)."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        visible = None if absent is None else ~absent[:, None, None, :]
        return self.out(_attend(q, k, v, visible).transpose(1, 2).reshape(B, T, D))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (B, T, D) to condition tokens (B, S, D) (Vaswani et al. 2017).

    With a single condition token the softmax is over one number, so 1: the same vector is added to every
    token, whatever the token holds. Give several condition tokens if tokens are to respond differently.

    Parameters
    ----------
    dim, heads
        D and the number of heads, which must divide it.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, condition: Tensor, absent: Tensor | None = None) -> Tensor:
        """Attend to the condition tokens that are not ``absent`` (B, S)."""
        B, T, D = x.shape
        q = self.query(x).view(B, T, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(condition).view(B, condition.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        visible = None if absent is None else ~absent[:, None, None, :]
        return self.out(_attend(q, k, v, visible).transpose(1, 2).reshape(B, T, D))


class _FewTokenAttention(torch.autograd.Function):
    """Attention of (N, T, d) to (N, S, d) by plain matrix products; ``hidden`` broadcasts to (N, T, S)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        score = torch.bmm(q, k.transpose(1, 2)).mul_(q.shape[-1] ** -0.5)
        if hidden is not None:
            score.masked_fill_(hidden, -torch.inf)
        # Written out, because torch's softmax of a dozen numbers takes many times as long on a CPU.
        highest = score.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(score.dtype).min)
        share = score.sub_(highest).exp_()
        # At least 1 but where everything is hidden: that gives zeros, as in torch.
        share = share.div_(share.sum(dim=-1, keepdim=True).clamp_(min=0.5))
        ctx.save_for_backward(q, k, v, share)
        return torch.bmm(share, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, share = ctx.saved_tensors
        (gradient,) = gradients
        of_share = torch.bmm(gradient, v.transpose(1, 2))
        of_score = of_share.sub_((of_share * share).sum(dim=-1, keepdim=True)).mul_(share)
        of_score = of_score.mul_(q.shape[-1] ** -0.5)
        of_v = torch.bmm(share.transpose(1, 2), gradient)
        return torch.bmm(of_score, k), torch.bmm(of_score.transpose(1, 2), q), of_v, None


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attention (B, heads, T, D / heads) to the ``visible`` (B, 1, 1, S), by the kernel that is fastest.

    That is torch's fused one, but for two cases on a CPU (docs/performance.md): its backward pass takes
    three times as long in bfloat16 as in float32, and among a dozen tokens plain products are faster.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    with torch.autocast("cpu", enabled=False):
        if q.dtype == torch.bfloat16:
            q, k, v = q.float(), k.float(), v.float()
        if k.shape[2] > MAX_FEW_TOKENS:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        hidden = None
        if visible is not None:
            hidden = (~visible).expand(-1, q.shape[1], -1, -1).flatten(0, 1)
        attended = _FewTokenAttention.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), hidden)
        return attended.view(q.shape)


def _mlp(dim: int, ratio: float, dropout: float) -> nn.Sequential:
    hidden = int(dim * ratio)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout))


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)); (B, T, D) → (B, T, D).

    Parameters
    ----------
    dim, heads
        D and the number of heads, which must divide it.
    mlp_ratio
        Width of the MLP's hidden layer, in units of D.
    dropout
        After the MLP.
    """

    def __init__(self, dim: int, heads: int = 8, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.mlp = _mlp(dim, mlp_ratio, dropout)

    def forward(self, x: Tensor, absent: Tensor | None = None) -> Tensor:
        """Apply the block.

        Parameters
        ----------
        x
            (B, T, D).
        absent
            (B, T) bool, tokens that are padding: no other token attends to them.

        Returns
        -------
        (B, T, D); what stands at an absent token means nothing.

        Raises
        ------
        ValueError
            When a shape or dtype is another one.
        """
        require_shape("x", x, (None, None, self.dim))
        require_dtype("x", x, self.norm1.weight.dtype)
        if absent is not None:
            require_shape("absent", absent, tuple(x.shape[:2]))
            require_dtype("absent", absent, torch.bool)
        x = x + self.attention(self.norm1(x), absent)
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """Pre-norm block of tokens that look at a condition; (B, T, D), (B, S, D) → (B, T, D).

    x + cross-attention(norm(x), norm(condition)), then x + MLP(norm(x)). Tokens do not look at each other
    here: let a :class:`TransformerBlock` follow.

    Parameters
    ----------
    dim, heads, mlp_ratio, dropout
        See :class:`TransformerBlock`.
    """

    def __init__(self, dim: int, heads: int = 8, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.norm_query, self.norm_condition = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross = CrossAttention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = _mlp(dim, mlp_ratio, dropout)

    def forward(self, x: Tensor, condition: Tensor, absent: Tensor | None = None) -> Tensor:
        """Apply the block.

        Parameters
        ----------
        x
            (B, T, D).
        condition
            (B, S, D).
        absent
            (B, S) bool, condition tokens that are padding.

        Returns
        -------
        (B, T, D)

        Raises
        ------
        ValueError
            When a shape or dtype is another one.
        """
        require_shape("x", x, (None, None, self.dim))
        require_dtype("x", x, self.norm_query.weight.dtype)
        _require_condition(condition, absent, len(x), self.dim, self.norm_condition.weight.dtype)
        x = x + self.cross(self.norm_query(x), self.norm_condition(condition), absent)
        return x + self.mlp(self.norm_mlp(x))


class FiLM(nn.Module):
    """Scale and shift every token by the pooled condition (Perez et al., AAAI 2018); identity at the start.

    x · (1 + γ(c)) + β(c), with c the mean of the condition tokens that are present, and γ and β linear.

    Parameters
    ----------
    dim
        D of tokens and condition.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale_and_shift = nn.Linear(dim, 2 * dim)
        nn.init.zeros_(self.scale_and_shift.weight)
        nn.init.zeros_(self.scale_and_shift.bias)

    def forward(self, x: Tensor, condition: Tensor, absent: Tensor | None = None) -> Tensor:
        """Modulate tokens.

        Parameters
        ----------
        x, condition, absent
            As of :class:`CrossAttentionBlock`.

        Returns
        -------
        (B, T, D)

        Raises
        ------
        ValueError
            When a shape or dtype is another one.
        """
        require_shape("x", x, (None, None, self.dim))
        require_dtype("x", x, self.scale_and_shift.weight.dtype)
        _require_condition(condition, absent, len(x), self.dim, self.scale_and_shift.weight.dtype)
        if absent is None:
            pooled = condition.mean(dim=1)
        else:
            present = (~absent).sum(dim=1, keepdim=True).clamp(min=1)
            pooled = condition.masked_fill(absent[..., None], 0).sum(dim=1) / present
        scale, shift = self.scale_and_shift(pooled)[:, None].chunk(2, dim=-1)
        return x * (1 + scale) + shift


def _require_condition(
    condition: Tensor, absent: Tensor | None, batch: int, dim: int, dtype: torch.dtype
) -> None:
    require_shape("condition", condition, (batch, None, dim))
    require_dtype("condition", condition, dtype)
    if absent is not None:
        require_shape("absent", absent, tuple(condition.shape[:2]))
        require_dtype("absent", absent, torch.bool)


def position_embedding(tokens: int, dim: int) -> nn.Parameter:
    """Learned position embedding (1, T, D), σ = 0.02."""
    return nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
