"""Predictors: context tokens, and a condition, to the tokens of the target."""

from __future__ import annotations

from torch import Tensor, nn

from biojepa.model.blocks import CrossAttentionBlock, TransformerBlock, position_embedding, require_shape


class JEPAPredictor(nn.Module):
    """Predict target tokens from context tokens, (B, T, D) → (B, T, D), through a width of its own."""

    def __init__(
        self, num_tokens: int, dim: int, width: int, depth: int = 2, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_tokens, self.dim = num_tokens, dim
        self.enter = nn.Linear(dim, width)
        self.position = position_embedding(num_tokens, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, dim)

    def forward(self, context: Tensor) -> Tensor:
        """Predict the tokens of the unmasked cell."""
        require_shape("context", context, (None, self.num_tokens, self.dim))
        x = self.enter(context) + self.position
        for block in self.blocks:
            x = block(x)
        return self.leave(self.norm(x))


class ConditionalPredictor(nn.Module):
    """Predict a change of tokens under a condition; (B, T, D), (B, S, C) → (B, T, D).

    The output layer starts at zero, so that an untrained predictor says "no change".
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        width: int,
        condition_dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_tokens, self.dim = num_tokens, dim
        self.enter = nn.Linear(dim, width)
        self.condition = nn.Sequential(nn.Linear(condition_dim, width), nn.LayerNorm(width), nn.GELU())
        self.position = position_embedding(num_tokens, width)
        self.blocks = nn.ModuleList(CrossAttentionBlock(width, heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, context: Tensor, condition: Tensor, absent: Tensor | None = None) -> Tensor:
        """Predict; ``absent`` (B, S) marks condition tokens that are not there."""
        require_shape("context", context, (None, self.num_tokens, self.dim))
        x = self.enter(context) + self.position
        c = self.condition(condition)
        for block in self.blocks:
            x = block(x, c, absent)
        return self.leave(self.norm(x))
