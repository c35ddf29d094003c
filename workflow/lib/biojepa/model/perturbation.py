"""Perturbation codes: condition tokens for single, combined and unseen genes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from biojepa.model.blocks import require_shape


class PerturbationEncoder(nn.Module):
    """Turn a gene into condition tokens, one per prior source and one for what training learned of it.

    A gene's tokens come from side information, so a gene that no training cell carries still has a
    code. The learned token exists for genes that training perturbed and is absent for others, and it
    is dropped at random in training so that the predictor learns to do without it. A gene with no
    token at all keeps the ``unknown`` token, which is trained by the same dropout.

    Parameters
    ----------
    codes
        Source name to (genes, dim); an all-zero row means that the source does not cover the gene.
    seen
        (genes,) bool, genes that a training perturbation carries.
    dim
        Width of the condition tokens.
    source_dropout
        Probability to hide a present token in training.
    learned
        Whether seen genes have a learned token.
    n_types
        Types of perturbation (knock-out, CRISPRi, CRISPRa). More than one have learned offsets, zero at
        initialization.
    dosed
        Whether tokens shift with the logarithm of the dose; not at all at initialization and at dose 1.
    """

    seen: Tensor

    def __init__(
        self,
        codes: Mapping[str, Tensor],
        seen: Tensor,
        dim: int = 128,
        source_dropout: float = 0.2,
        learned: bool = True,
        n_types: int = 1,
        dosed: bool = False,
    ) -> None:
        super().__init__()
        self.sources = tuple(codes)
        self.source_dropout, self.learned = source_dropout, learned
        n_genes = len(seen)
        for name, values in codes.items():
            require_shape(f"codes[{name!r}]", values, (n_genes, None))
            self.register_buffer(_buffer(name), values.float().clone())
        self.project = nn.ModuleList(
            nn.Sequential(nn.Linear(values.shape[1], dim), nn.LayerNorm(dim), nn.GELU())
            for values in codes.values()
        )
        self.register_buffer("seen", seen.bool())
        self.gene = nn.Embedding(n_genes, dim) if learned else None
        if self.gene is not None:
            nn.init.normal_(self.gene.weight, std=0.5)
        self.kind = nn.Parameter(torch.randn(len(self.sources) + 2, dim) * 0.02)
        self.type_offset = nn.Parameter(torch.zeros(n_types, dim)) if n_types > 1 else None
        self.dose_offset = nn.Parameter(torch.zeros(dim)) if dosed else None

    def codes(self, source: str) -> Tensor:
        """Codes (genes, dim) of a source."""
        return self.get_buffer(_buffer(source))

    def forward(
        self, gene: Tensor, type_code: Tensor | None = None, dose: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Code genes.

        Parameters
        ----------
        gene
            (N,) positions of genes.
        type_code
            (N,) type of the perturbation, the first where ``None``.
        dose
            (N,) positive dose, 1 where ``None``.

        Returns
        -------
        tokens
            (N, sources + 2, dim): the sources, the learned token, the unknown token.
        absent
            (N, sources + 2) bool. The unknown token is present where no other is.
        """
        tokens, absent = [], []
        for name, project in zip(self.sources, self.project, strict=True):
            values = self.codes(name)[gene]
            tokens.append(project(values))
            absent.append(~values.any(dim=1))
        if self.gene is not None:
            tokens.append(self.gene(gene))
            absent.append(~self.seen[gene])
        else:
            tokens.append(torch.zeros(len(gene), self.kind.shape[1], device=gene.device))
            absent.append(torch.ones(len(gene), dtype=torch.bool, device=gene.device))
        missing = torch.stack(absent, dim=1)
        if self.training and self.source_dropout:
            missing = missing | (torch.rand(missing.shape, device=missing.device) < self.source_dropout)
        missing = torch.cat([missing, ~missing.all(dim=1, keepdim=True)], dim=1)
        stacked = torch.stack([*tokens, torch.zeros_like(tokens[0])], dim=1) + self.kind
        if self.type_offset is not None and type_code is not None:
            stacked = stacked + self.type_offset[type_code][:, None]
        elif self.type_offset is not None:
            stacked = stacked + self.type_offset[0]
        if self.dose_offset is not None and dose is not None:
            stacked = stacked + (dose.log()[:, None] * self.dose_offset)[:, None]
        return stacked, missing


def _buffer(source: str) -> str:
    # A file may have dots in its name, a buffer may not.
    return f"codes_{source.replace('.', '~')}"
