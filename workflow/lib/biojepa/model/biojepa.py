"""BioJEPA: predict the embedding of perturbed cells from that of control cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from biojepa.model.blocks import evaluation, require_shape
from biojepa.model.perturbation import PerturbationEncoder
from biojepa.model.predictor import ConditionalPredictor


@dataclass(frozen=True)
class BioJEPAConfig:
    """Size of the conditional predictor.

    Attributes
    ----------
    width, depth, heads, dropout
        Of the predictor's transformer.
    condition_dim
        Width of the condition tokens.
    source_dropout
        Probability to hide a source of prior knowledge in training.
    learned_genes
        Whether genes seen in training have a learned token.
    interaction
        Whether combinations have a term beyond the sum of their genes.
    """

    width: int = 64
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1
    condition_dim: int = 64
    source_dropout: float = 0.2
    learned_genes: bool = True
    interaction: bool = True


class BioJEPA(nn.Module):
    """Predict how a population's tokens move under a perturbation.

    ẑ(z, p) = z + Σ_{g in p} Δ_g(z) + I_p(z) with

    - Δ_g(z) = f(z, tokens of g): zero at initialization, zero for control because control has no gene;
    - I_p(z), for two genes or more, from the sum and the product of their pooled codes, so symmetric
      in the genes, and zero at initialization: combinations start additive.

    Parameters
    ----------
    num_tokens, dim
        T and D of the frozen, standardized embedding.
    codes, seen
        See :class:`PerturbationEncoder`.
    config
        Sizes.
    n_types, dosed
        See :class:`PerturbationEncoder`.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        codes: Mapping[str, Tensor],
        seen: Tensor,
        config: BioJEPAConfig,
        n_types: int = 1,
        dosed: bool = False,
    ) -> None:
        super().__init__()
        self.num_tokens, self.dim, self.n_genes, self.config = num_tokens, dim, len(seen), config
        self.perturbation = PerturbationEncoder(
            codes, seen, config.condition_dim, config.source_dropout, config.learned_genes, n_types, dosed
        )
        self.single = self._predictor()
        self.pair = self._predictor() if config.interaction else None

    def _predictor(self) -> ConditionalPredictor:
        config = self.config
        return ConditionalPredictor(
            self.num_tokens,
            self.dim,
            config.width,
            config.condition_dim,
            config.depth,
            config.heads,
            config.dropout,
        )

    def change(
        self,
        context: Tensor,
        membership: Tensor,
        type_code: Tensor | None = None,
        dose: Tensor | None = None,
    ) -> Tensor:
        """Predict the change of the tokens.

        Parameters
        ----------
        context
            (B, T, D) standardized tokens of control populations.
        membership
            (B, genes) multi-hot code of the perturbed genes; all zero for control.
        type_code, dose
            (B,) type and positive dose of the perturbation; the first type and dose 1 where ``None``.
            These three may stay in the memory of a CPU while the context is on a GPU: which genes are
            perturbed decides on shapes, and to ask a GPU for them is to wait for it.

        Returns
        -------
        (B, T, D), exactly zero for control.
        """
        require_shape("context", context, (None, self.num_tokens, self.dim))
        require_shape("membership", membership, (len(context), self.n_genes))
        for name, values in (("type_code", type_code), ("dose", dose)):
            if values is not None:
                require_shape(name, values, (len(context),))
        if dose is not None and not bool((dose > 0).all()):
            raise ValueError(f"dose has values down to {float(dose.min())}; expected positive ones")
        device = context.device
        asked, gene = membership.nonzero(as_tuple=True)
        change = torch.zeros_like(context)
        if not len(gene):
            return change
        tokens, absent = self.perturbation(
            gene.to(device, non_blocking=True),
            None if type_code is None else type_code[asked].to(device, non_blocking=True),
            None if dose is None else dose[asked].to(device, non_blocking=True),
        )
        population = asked.to(device, non_blocking=True)
        singles = self.single(context[population], tokens, absent)
        change = change.index_add(0, population, singles.to(change.dtype))
        if self.pair is None:
            return change
        several = (membership.sum(dim=1) > 1).nonzero(as_tuple=True)[0].to(device, non_blocking=True)
        if not len(several):
            return change
        present = (~absent).unsqueeze(-1).to(tokens.dtype)
        pooled = (tokens * present).sum(dim=1) / present.sum(dim=1)
        zeros = pooled.new_zeros(len(context), pooled.shape[1])
        total = zeros.index_add(0, population, pooled)
        squares = zeros.index_add(0, population, pooled.square())
        # The sum of products over pairs of genes, (total² - Σ squares) / 2, whatever their order.
        condition = torch.stack([total, (total.square() - squares) / 2], dim=1)[several]
        return change.index_add(0, several, self.pair(context[several], condition).to(change.dtype))

    def forward(
        self,
        context: Tensor,
        membership: Tensor,
        type_code: Tensor | None = None,
        dose: Tensor | None = None,
    ) -> Tensor:
        """Predict the tokens of perturbed populations, (B, T, D); parameters as of :meth:`change`."""
        return context + self.change(context, membership, type_code, dose)

    @torch.no_grad()
    def predict_perturbation(
        self,
        context: Tensor,
        membership: Tensor,
        type_code: Tensor | None = None,
        dose: Tensor | None = None,
    ) -> Tensor:
        """Predict without gradient and without dropout, (B, T, D)."""
        with evaluation(self):
            return self(context, membership, type_code, dose)
