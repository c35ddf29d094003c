"""A frozen embedding of cells: whatever made it, it gives standardized tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biojepa.model.blocks import require_shape
from biojepa.model.encoder import GeneExpressionEncoder

MIN_SCALE = 1e-3


class PCAProjection(nn.Module):
    """Principal components as tokens, (B, genes) → (B, T, D): the embedding that a JEPA has to beat."""

    components: Tensor

    def __init__(self, n_genes: int, num_tokens: int, embed_dim: int) -> None:
        super().__init__()
        self.n_genes, self.num_tokens, self.embed_dim = n_genes, num_tokens, embed_dim
        self.register_buffer("components", torch.zeros(n_genes, num_tokens * embed_dim))

    @torch.no_grad()
    def fit(self, x: Tensor) -> PCAProjection:
        """Take the leading eigenvectors of the covariance of ``x`` (cells, genes), centred already."""
        _, vectors = torch.linalg.eigh((x.T @ x).double())
        leading = vectors.flip(1)[:, : self.components.shape[1]]
        largest = leading.abs().argmax(dim=0)
        signs = leading[largest, torch.arange(leading.shape[1], device=x.device)].sign()
        self.components[:, : leading.shape[1]] = (leading * signs).float()
        return self

    def forward(self, x: Tensor, log_library: Tensor | None = None) -> Tensor:
        """Project; ``log_library`` is accepted like an encoder's, and not used."""
        return (x @ self.components).view(len(x), self.num_tokens, self.embed_dim)


class CellEmbedding(nn.Module):
    """Standardize genes, embed, standardize tokens; all statistics are of training cells.

    Parameters
    ----------
    body
        Maps standardized expression (B, genes) and standardized log library size (B,) to (B, T, D).
    """

    gene_mean: Tensor
    gene_scale: Tensor
    library: Tensor
    token_mean: Tensor
    token_scale: Tensor

    def __init__(self, body: GeneExpressionEncoder | PCAProjection) -> None:
        super().__init__()
        self.body = body
        n_genes, tokens, dim = body.n_genes, body.num_tokens, body.embed_dim
        self.num_tokens, self.dim = tokens, dim
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("gene_scale", torch.ones(n_genes))
        self.register_buffer("library", torch.tensor([0.0, 1.0]))
        self.register_buffer("token_mean", torch.zeros(tokens, dim))
        self.register_buffer("token_scale", torch.ones(tokens, dim))

    def fit_inputs(self, mean: Tensor, scale: Tensor, log_library: Tensor) -> None:
        """Set the standardization of the input from the moments of training cells.

        Genes that hardly vary keep a scale of at least 0.1, so that noise is not blown up.
        """
        self.gene_mean.copy_(mean)
        self.gene_scale.copy_(scale.clamp(min=0.1))
        self.library.copy_(torch.stack([log_library.mean(), log_library.std().clamp(min=MIN_SCALE)]))

    def fit_tokens(self, tokens: Tensor) -> None:
        """Set the standardization of the tokens from those of training cells (cells, T, D)."""
        self.token_mean.copy_(tokens.mean(dim=0))
        self.token_scale.copy_(tokens.std(dim=0).clamp(min=MIN_SCALE))

    def inputs(self, x: Tensor, log_library: Tensor) -> tuple[Tensor, Tensor]:
        """Standardize log-expression (B, genes), clipped at 10 deviations, and log library sizes (B,)."""
        require_shape("x", x, (None, len(self.gene_mean)))
        standardized = ((x - self.gene_mean) / self.gene_scale).clamp(-10, 10)
        return standardized, (log_library - self.library[0]) / self.library[1]

    def raw_tokens(self, x: Tensor, log_library: Tensor) -> Tensor:
        """Embed without the standardization of the tokens, (B, T, D)."""
        return self.body(*self.inputs(x, log_library))

    def forward(self, x: Tensor, log_library: Tensor) -> Tensor:
        """Embed log-expression (B, genes) and log library size (B,) as standardized tokens (B, T, D)."""
        return (self.raw_tokens(x, log_library) - self.token_mean) / self.token_scale
