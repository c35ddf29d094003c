"""The parts of a JEPA, and BioJEPA put together from them."""

from biojepa.model.biojepa import BioJEPA, BioJEPAConfig
from biojepa.model.blocks import CrossAttentionBlock, TransformerBlock
from biojepa.model.encoder import GeneExpressionEncoder
from biojepa.model.losses import VICRegLoss
from biojepa.model.masks import gene_mask
from biojepa.model.perturbation import PerturbationEncoder
from biojepa.model.predictor import ConditionalPredictor, JEPAPredictor

__all__ = [
    "BioJEPA",
    "BioJEPAConfig",
    "ConditionalPredictor",
    "CrossAttentionBlock",
    "GeneExpressionEncoder",
    "JEPAPredictor",
    "PerturbationEncoder",
    "TransformerBlock",
    "VICRegLoss",
    "gene_mask",
]
