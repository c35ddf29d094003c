"""BioJEPA: predict what an unseen perturbation does to a cell, in embedding space."""

from biojepa.lazy import lazy_names

__version__ = "0.1.0"

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "biojepa.model": (
            "BioJEPA",
            "BioJEPAConfig",
            "ConditionalPredictor",
            "CrossAttentionBlock",
            "GeneExpressionEncoder",
            "JEPA",
            "JEPAPredictor",
            "PerturbationEncoder",
            "SIGRegLoss",
            "TransformerBlock",
            "VICRegLoss",
            "ViTEncoder",
            "gene_mask",
            "module_mask",
            "perturbation_mask",
            "random_block_mask",
            "temporal_mask",
        ),
        "biojepa.pairs": ("counts_of", "read_pairs"),
        "biojepa.training.run": ("train_model",),
        "biojepa.training.settings": ("TrainSettings",),
        "biojepa.training.trained": ("load_model",),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
