"""Encoder of gene expression: a cell to a set of latent tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from biojepa.model.blocks import (
    TransformerBlock,
    evaluation,
    position_embedding,
    require_dtype,
    require_shape,
)


class GeneExpressionEncoder(nn.Module):
    """Encode log-expression, MLP → tokens → transformer; (B, genes) → (B, T, D).

    Parameters
    ----------
    n_genes
        Genes of the input.
    hidden
        Widths of the MLP; each layer is Linear → LayerNorm → GELU → dropout.
    num_tokens, embed_dim
        T and D.
    depth, heads, mlp_ratio, dropout
        Of the transformer.
    library_token
        Whether a token made of the log library size joins the attention. It is dropped from the
        output: it gives the encoder the depth of a cell, so that the tokens need not carry it.
    """

    def __init__(
        self,
        n_genes: int,
        hidden: Sequence[int] = (2048, 1024),
        num_tokens: int = 64,
        embed_dim: int = 256,
        depth: int = 6,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        library_token: bool = False,
    ) -> None:
        super().__init__()
        self.n_genes, self.num_tokens, self.embed_dim = n_genes, num_tokens, embed_dim
        layers: list[nn.Module] = []
        width = n_genes
        for size in hidden:
            layers += [nn.Linear(width, size), nn.LayerNorm(size), nn.GELU(), nn.Dropout(dropout)]
            width = size
        self.mlp = nn.Sequential(*layers)
        self.to_tokens = nn.Linear(width, num_tokens * embed_dim)
        self.position = position_embedding(num_tokens, embed_dim)
        self.library = nn.Linear(1, embed_dim) if library_token else None
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, heads, mlp_ratio, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor, log_library: Tensor | None = None) -> Tensor:
        """Encode cells.

        Parameters
        ----------
        x
            (B, genes) standardized log-expression or residuals; a masked gene is 0, its mean.
        log_library
            (B,) standardized log library size, needed when the encoder has a library token.

        Returns
        -------
        (B, T, D)

        Raises
        ------
        ValueError
            When a shape or dtype is another one, or the library size is missing.
        """
        require_shape("x", x, (None, self.n_genes))
        require_dtype("x", x, self.position.dtype)
        tokens = self.to_tokens(self.mlp(x)).view(len(x), self.num_tokens, self.embed_dim) + self.position
        if self.library is not None:
            if log_library is None:
                raise ValueError("this encoder has a library token; give log_library of shape (cells,)")
            require_shape("log_library", log_library, (len(x),))
            require_dtype("log_library", log_library, self.position.dtype)
            tokens = torch.cat([tokens, self.library(log_library[:, None])[:, None]], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, : self.num_tokens])

    @torch.no_grad()
    def encode(self, x: Tensor, log_library: Tensor | None = None) -> Tensor:
        """Encode without gradient and without dropout, (B, T, D)."""
        with evaluation(self):
            return self(x, log_library)
