"""Predictors: context tokens, and a condition, to the tokens of the target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biojepa.model.blocks import (
    CrossAttentionBlock,
    FiLM,
    TransformerBlock,
    position_embedding,
    require_dtype,
    require_shape,
)

CONDITIONINGS = ("cross_attention", "film", "none")


class JEPAPredictor(nn.Module):
    """Predict target tokens from context tokens (I-JEPA; Assran et al., CVPR 2023).

    Without positions it maps (B, T, D) to (B, T, D). With them, context tokens carry the embedding of
    their positions, one mask token per asked position joins, and only those are returned.

    Parameters
    ----------
    num_tokens, dim
        T and D of the whole grid of tokens.
    width
        Width of the transformer; linear layers lead in and out. Without one the tokens enter and leave
        as they are, at width D.
    depth, heads, dropout
        Of the transformer.
    target_queries
        Whether there is a mask token, so that positions can be asked for.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        width: int | None = None,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        target_queries: bool = False,
    ) -> None:
        super().__init__()
        inner = dim if width is None else width
        self.num_tokens, self.dim = num_tokens, dim
        self.enter = nn.Identity() if width is None else nn.Linear(dim, width)
        self.position = position_embedding(num_tokens, inner)
        self.blocks = nn.ModuleList(TransformerBlock(inner, heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(inner)
        self.leave = nn.Identity() if width is None else nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(inner)) if target_queries else None

    def forward(
        self,
        context: Tensor,
        context_positions: Tensor | None = None,
        target_positions: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Parameters
        ----------
        context
            (B, V, D); V is T unless positions are given.
        context_positions
            (V,) or (B, V) integers: where on the grid the context tokens stand; 0 … T-1 when not given.
        target_positions
            (Q,) or (B, Q) integers: the positions to predict.

        Returns
        -------
        (B, Q, D) when target positions are given, otherwise (B, V, D).

        Raises
        ------
        ValueError
            When a shape or dtype is another one, or the predictor has no mask token to ask with.
        """
        seen = self.num_tokens if context_positions is None else context_positions.shape[-1]
        require_shape("context", context, (None, seen, self.dim))
        require_dtype("context", context, self.position.dtype)
        x = self.enter(context) + self._at("context_positions", context_positions, len(context))
        if target_positions is not None:
            if self.mask_token is None:
                raise ValueError("this predictor has no mask token; build it with target_queries=True")
            queries = self.mask_token + self._at("target_positions", target_positions, len(context))
            x = torch.cat([x, queries.expand(len(x), -1, -1).to(x.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.leave(self.norm(x if target_positions is None else x[:, context.shape[1] :]))

    def _at(self, name: str, positions: Tensor | None, batch: int) -> Tensor:
        """Position embedding of some positions, (1 or B, V, W)."""
        if positions is None:
            return self.position
        require_shape(name, positions, (*((batch,) if positions.ndim > 1 else ()), positions.shape[-1]))
        require_dtype(name, positions, torch.int64)
        return self.position[0][positions if positions.ndim > 1 else positions[None]]


class ConditionalPredictor(nn.Module):
    """Predict tokens under a condition; (B, T, D), (B, S, C) → (B, T, D).

    The condition tokens pass Linear → LayerNorm → GELU. Then ``depth`` times the tokens take up the
    condition and a :class:`TransformerBlock` follows; a LayerNorm ends it.

    Parameters
    ----------
    num_tokens, dim
        T and D.
    width
        Width of the transformer; linear layers lead in and out. Without one the tokens enter as they
        are, at width D, and leave as they are unless ``residual_zero_init``.
    condition_dim
        C.
    depth, heads, dropout
        Of the transformer.
    conditioning
        How tokens take up the condition: ``cross_attention`` to all condition tokens, ``film`` (scale and
        shift by their mean, identity at the start; Perez et al. 2018), or ``none``. Cross-attention to a
        single condition token adds the same vector to every token, since a softmax over one is constant.
    residual_zero_init
        Let the output layer start at zero, so that an untrained predictor, used as a change, says
        "no change".
    positions
        Whether a learned position embedding is added to the tokens.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        width: int | None = None,
        condition_dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        conditioning: str = "cross_attention",
        residual_zero_init: bool = True,
        positions: bool = True,
    ) -> None:
        super().__init__()
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning is {conditioning!r}; expected one of {', '.join(CONDITIONINGS)}")
        inner = dim if width is None else width
        self.num_tokens, self.dim, self.condition_dim = num_tokens, dim, condition_dim
        self.enter = nn.Identity() if width is None else nn.Linear(dim, width)
        self.condition = (
            None
            if conditioning == "none"
            else nn.Sequential(nn.Linear(condition_dim, inner), nn.LayerNorm(inner), nn.GELU())
        )
        self.position = position_embedding(num_tokens, inner) if positions else None
        takes_up: list[nn.Module] = []
        if conditioning == "cross_attention":
            takes_up = [CrossAttentionBlock(inner, heads, dropout=dropout) for _ in range(depth)]
        elif conditioning == "film":
            takes_up = [FiLM(inner) for _ in range(depth)]
        self.conditioned = nn.ModuleList(takes_up)
        self.blocks = nn.ModuleList(TransformerBlock(inner, heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(inner)
        self.leave = nn.Identity() if width is None and not residual_zero_init else nn.Linear(inner, dim)
        if residual_zero_init and isinstance(self.leave, nn.Linear):
            nn.init.zeros_(self.leave.weight)
            nn.init.zeros_(self.leave.bias)

    def forward(
        self, context: Tensor, condition: Tensor | None = None, absent: Tensor | None = None
    ) -> Tensor:
        """Predict.

        Parameters
        ----------
        context
            (B, T, D).
        condition
            (B, S, C); not looked at without conditioning.
        absent
            (B, S) bool, condition tokens that are not there; what they hold changes nothing.

        Returns
        -------
        (B, T, D)

        Raises
        ------
        ValueError
            When a shape or dtype is another one, or the condition is missing.
        """
        weight = self.norm.weight
        require_shape("context", context, (None, self.num_tokens, self.dim))
        require_dtype("context", context, weight.dtype)
        x = self.enter(context)
        if self.position is not None:
            x = x + self.position
        if self.condition is None:
            for block in self.blocks:
                x = block(x)
            return self.leave(self.norm(x))
        if condition is None:
            raise ValueError(
                f"this predictor needs a condition; give one of shape (cells, tokens, {self.condition_dim})"
            )
        require_shape("condition", condition, (len(context), None, self.condition_dim))
        require_dtype("condition", condition, weight.dtype)
        if absent is not None:
            require_shape("absent", absent, tuple(condition.shape[:2]))
            require_dtype("absent", absent, torch.bool)
            # Attention gives them weight 0, but 0 times a number that is not finite is not 0.
            condition = condition.masked_fill(absent[..., None], 0)
        c = self.condition(condition)
        for take_up, block in zip(self.conditioned, self.blocks, strict=True):
            x = block(take_up(x, c, absent))
        return self.leave(self.norm(x))
