"""Transformer blocks. Shapes: B cells or populations, T tokens, S condition tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class SelfAttention(nn.Module):
    """Multi-head self-attention, (B, T, D) → (B, T, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Let every token attend to all tokens of its own cell."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (B, T, D) to condition tokens (B, S, D)."""

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
        return self.out(
            F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).reshape(B, T, D)
        )


def _mlp(dim: int, ratio: float, dropout: float) -> nn.Sequential:
    hidden = int(dim * ratio)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout))


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)); (B, T, D) → (B, T, D)."""

    def __init__(self, dim: int, heads: int = 8, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.mlp = _mlp(dim, mlp_ratio, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """Cross-attention to the condition, then a self-attention block; (B, T, D), (B, S, D) → (B, T, D)."""

    def __init__(self, dim: int, heads: int = 8, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.cross = CrossAttention(dim, heads)
        self.block = TransformerBlock(dim, heads, mlp_ratio, dropout)

    def forward(self, x: Tensor, condition: Tensor, absent: Tensor | None = None) -> Tensor:
        """Apply the block; ``absent`` (B, S) marks condition tokens that are padding."""
        return self.block(x + self.cross(self.norm(x), condition, absent))


def position_embedding(tokens: int, dim: int) -> nn.Parameter:
    """Learned position embedding (1, T, D), σ = 0.02."""
    return nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
