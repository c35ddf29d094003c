"""The parts of a JEPA, and BioJEPA put together from them."""

from biojepa.lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "biojepa.model.biojepa": ("BioJEPA", "BioJEPAConfig"),
        "biojepa.model.blocks": ("CrossAttentionBlock", "FiLM", "TransformerBlock"),
        "biojepa.model.encoder": ("GeneExpressionEncoder",),
        "biojepa.model.jepa": ("JEPA",),
        "biojepa.model.losses": ("SIGRegLoss", "VICRegLoss"),
        "biojepa.model.masks": (
            "gene_mask",
            "module_mask",
            "perturbation_mask",
            "random_block_mask",
            "temporal_mask",
        ),
        "biojepa.model.perturbation": ("PerturbationEncoder",),
        "biojepa.model.predictor": ("ConditionalPredictor", "JEPAPredictor"),
        "biojepa.model.sizes": (
            "SIZES",
            "reference_encoder",
            "reference_predictor",
            "reference_vit",
            "reference_vit_predictor",
        ),
        "biojepa.model.targets": ("TargetEncoder",),
        "biojepa.model.vit": ("ViTEncoder",),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
