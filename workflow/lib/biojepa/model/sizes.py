"""Sizes of the models by name. Reading them imports no torch; building a model does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from biojepa.model.encoder import GeneExpressionEncoder
    from biojepa.model.predictor import ConditionalPredictor, JEPAPredictor
    from biojepa.model.vit import ViTEncoder


@dataclass(frozen=True)
class ModelSize:
    """Size of a gene-expression encoder and of its conditional predictor.

    Attributes
    ----------
    hidden
        Widths of the encoder's MLP.
    num_tokens, embed_dim
        Tokens of a cell, and their width.
    depth, heads
        Of the encoder's transformer.
    predictor_width
        Of the predictor's transformer.
    predictor_depth, predictor_heads
        Of the predictor's transformer.
    condition_dim
        Width of the condition tokens.
    """

    hidden: tuple[int, ...]
    num_tokens: int
    embed_dim: int
    depth: int
    heads: int
    predictor_width: int
    predictor_depth: int
    predictor_heads: int
    condition_dim: int


SIZES: Mapping[str, ModelSize] = MappingProxyType(
    {
        "small": ModelSize((512,), 8, 64, 1, 4, 64, 2, 4, 64),
        "reference": ModelSize((2048, 1024), 64, 256, 6, 8, 256, 4, 8, 128),
    }
)


def reference_encoder(n_genes: int, library_token: bool = False) -> GeneExpressionEncoder:
    """Build the reference :class:`GeneExpressionEncoder`: 64,615,424 parameters at 20,000 genes.

    Parameters
    ----------
    n_genes
        Genes of the input.
    library_token
        Whether the library size joins as a token, which adds 512 parameters.
    """
    from biojepa.model.encoder import GeneExpressionEncoder

    size = SIZES["reference"]
    return GeneExpressionEncoder(
        n_genes,
        size.hidden,
        size.num_tokens,
        size.embed_dim,
        size.depth,
        size.heads,
        library_token=library_token,
    )


def reference_predictor(conditioning: str = "cross_attention") -> ConditionalPredictor:
    """Build the reference :class:`ConditionalPredictor`: 6,354,176 parameters with cross-attention.

    It predicts tokens and not a change of them: it works at the width of the tokens, adds no position
    embedding, and its last layer is a LayerNorm.

    Parameters
    ----------
    conditioning
        See :class:`ConditionalPredictor`.
    """
    from biojepa.model.predictor import ConditionalPredictor

    size = SIZES["reference"]
    return ConditionalPredictor(
        size.num_tokens,
        size.embed_dim,
        condition_dim=size.condition_dim,
        depth=size.predictor_depth,
        heads=size.predictor_heads,
        conditioning=conditioning,
        residual_zero_init=False,
        positions=False,
    )


def reference_vit(channels: int = 3) -> ViTEncoder:
    """Build the reference :class:`ViTEncoder`: 224 × 224 pixels, patch 16, width 768, 12 blocks, 12 heads."""
    from biojepa.model.vit import ViTEncoder

    return ViTEncoder(224, 16, channels, embed_dim=768, depth=12, heads=12)


def reference_vit_predictor() -> JEPAPredictor:
    """Build the :class:`JEPAPredictor` of the reference ViT: width 768, 6 blocks, 12 heads."""
    from biojepa.model.predictor import JEPAPredictor

    return JEPAPredictor(196, 768, depth=6, heads=12, target_queries=True)
