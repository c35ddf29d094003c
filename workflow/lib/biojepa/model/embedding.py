"""A frozen embedding of cells: whatever made it, it gives standardized tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biojepa.model.blocks import require_shape
from biojepa.model.encoder import GeneExpressionEncoder

MIN_SCALE = 1e-3
# Cells whose tokens are summed at a time, in double precision.
SUMMED_CELLS = 1 << 16


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


class PearsonResiduals(nn.Module):
    """Log-expression to analytic Pearson residuals of its counts (Lause, Berens and Kobak 2021).

    The counts of gene g in a cell of library size n are negative binomial with mean μ = n · p of g, variance
    μ + μ² / θ, and θ = 100 for all genes. A residual is (count - μ) / √variance, clipped at ±√(training
    cells). Genes that no training cell expresses, of which nothing is known, are 0.

    Parameters
    ----------
    n_genes
        Genes of the input.
    """

    THETA = 100.0

    share: Tensor
    target_sum: Tensor
    limit: Tensor

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.zeros(n_genes))
        self.register_buffer("target_sum", torch.tensor(1.0))
        self.register_buffer("limit", torch.tensor(1.0))

    def fit(self, share: Tensor, target_sum: float, n_cells: int) -> PearsonResiduals:
        """Take over what training cells say.

        Parameters
        ----------
        share
            (genes,) p, the counts of each gene in all training cells over the sum of their library sizes.
        target_sum
            Counts per cell that expression was scaled to.
        n_cells
            Training cells.
        """
        self.share.copy_(share)
        self.target_sum.fill_(target_sum)
        self.limit.fill_(float(n_cells) ** 0.5)
        return self

    def forward(self, x: Tensor, log_library: Tensor) -> Tensor:
        """Transform log-expression (B, genes) of cells with log library sizes (B,), natural logarithm."""
        library = log_library.exp()[:, None]
        mean = library * self.share
        deviation = x.expm1() * (library / self.target_sum) - mean
        residual = deviation / (mean + mean.square() / self.THETA).sqrt().clamp(min=1e-12)
        return torch.where(self.share > 0, residual.clamp(-self.limit, self.limit), 0.0)


class CellEmbedding(nn.Module):
    """Transform and standardize genes, embed, standardize tokens; all statistics are of training cells.

    Parameters
    ----------
    body
        Maps standardized expression (B, genes) and standardized log library size (B,) to (B, T, D).
    residuals
        What log-expression is transformed by before; left as it is where ``None``.
    """

    gene_mean: Tensor
    gene_scale: Tensor
    library: Tensor
    token_mean: Tensor
    token_scale: Tensor

    def __init__(
        self, body: GeneExpressionEncoder | PCAProjection, residuals: PearsonResiduals | None = None
    ) -> None:
        super().__init__()
        self.body, self.residuals = body, residuals
        n_genes, tokens, dim = body.n_genes, body.num_tokens, body.embed_dim
        self.num_tokens, self.dim = tokens, dim
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("gene_scale", torch.ones(n_genes))
        self.register_buffer("library", torch.tensor([0.0, 1.0]))
        self.register_buffer("token_mean", torch.zeros(tokens, dim))
        self.register_buffer("token_scale", torch.ones(tokens, dim))

    def fit_inputs(self, mean: Tensor, scale: Tensor, log_library: Tensor) -> None:
        """Set the standardization of the input from the moments of training cells, as :meth:`transformed`.

        Genes that hardly vary keep a scale of at least 0.1, so that noise is not blown up. Residuals keep
        theirs: their variance is 1 where a gene varies by chance alone, and tells more of the others.
        """
        self.gene_mean.copy_(mean)
        self.gene_scale.copy_(scale.clamp(min=0.1) if self.residuals is None else torch.ones_like(scale))
        self.library.copy_(torch.stack([log_library.mean(), log_library.std().clamp(min=MIN_SCALE)]))

    def fit_tokens(self, tokens: Tensor, cells: Tensor) -> None:
        """Set the standardization of the tokens.

        Parameters
        ----------
        tokens
            (N, T, D) of all cells.
        cells
            (n,) positions of the training cells, whose mean and standard deviation are taken: in double
            precision and a part at a time, since tokens of a million cells are two gigabytes.
        """
        parts = cells.split(SUMMED_CELLS)
        mean = torch.stack([tokens[part].double().sum(dim=0) for part in parts]).sum(dim=0) / len(cells)
        squares = torch.stack([(tokens[part].double() - mean).square().sum(dim=0) for part in parts])
        self.token_mean.copy_(mean)
        self.token_scale.copy_((squares.sum(dim=0) / (len(cells) - 1)).sqrt().clamp(min=MIN_SCALE))

    def take_inputs(self, other: CellEmbedding) -> None:
        """Transform and standardize inputs as another embedding of the same genes does."""
        for name in ("gene_mean", "gene_scale", "library"):
            getattr(self, name).copy_(getattr(other, name))
        if self.residuals is not None and other.residuals is not None:
            self.residuals.load_state_dict(other.residuals.state_dict())

    def transformed(self, x: Tensor, log_library: Tensor) -> Tensor:
        """Return log-expression (B, genes) as it is, or its Pearson residuals: what is standardized."""
        require_shape("x", x, (None, len(self.gene_mean)))
        return x if self.residuals is None else self.residuals(x, log_library)

    def inputs(self, x: Tensor, log_library: Tensor) -> tuple[Tensor, Tensor]:
        """Transform and standardize log-expression (B, genes), and standardize log library sizes (B,).

        Log-expression is clipped at 10 deviations; residuals have a limit of their own.
        """
        standardized = (self.transformed(x, log_library) - self.gene_mean) / self.gene_scale
        if self.residuals is None:
            standardized = standardized.clamp(-10, 10)
        return standardized, (log_library - self.library[0]) / self.library[1]

    def raw_tokens(self, x: Tensor, log_library: Tensor) -> Tensor:
        """Embed without the standardization of the tokens, (B, T, D)."""
        return self.body(*self.inputs(x, log_library))

    def forward(self, x: Tensor, log_library: Tensor) -> Tensor:
        """Embed log-expression (B, genes) and log library size (B,) as standardized tokens (B, T, D)."""
        return (self.raw_tokens(x, log_library) - self.token_mean) / self.token_scale
