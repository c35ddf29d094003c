"""Claims about the named sizes: published numbers of parameters, counted without allocating them."""

from __future__ import annotations

import pytest
import torch

from biojepa.model.sizes import (
    SIZES,
    reference_encoder,
    reference_predictor,
    reference_vit,
    reference_vit_predictor,
)
from biojepa.training.encoder_stage import EncoderSettings
from biojepa.training.predictor_stage import PredictorSettings


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def block(dim: int) -> int:
    """Attention, an MLP of ratio 4 and two norms."""
    return 4 * (dim * dim + dim) + (8 * dim * dim + 5 * dim) + 4 * dim


def test_the_reference_model_has_its_published_number_of_parameters():
    with torch.device("meta"):
        encoder, predictor = reference_encoder(20_000), reference_predictor()
    assert count(encoder) == 64_615_424
    assert count(predictor) == 6_354_176
    assert count(encoder) + count(predictor) == 70_969_600


def test_a_library_token_adds_a_line_to_the_reference_encoder():
    with torch.device("meta"):
        assert count(reference_encoder(20_000, library_token=True)) == 64_615_424 + 2 * 256


@pytest.mark.parametrize(
    ("conditioning", "taking_up"), [("film", 256 * 512 + 512), ("none", 0), ("cross_attention", 790_272)]
)
def test_the_forms_of_the_reference_predictor_differ_in_how_they_take_up_the_condition(
    conditioning, taking_up
):
    with torch.device("meta"):
        predictor = reference_predictor(conditioning)
    condition = 0 if conditioning == "none" else 128 * 256 + 256 + 512
    assert count(predictor) == condition + 4 * (taking_up + block(256)) + 512


def test_the_reference_vit_has_the_size_of_a_base_vit_without_class_token():
    with torch.device("meta"):
        encoder, predictor = reference_vit(), reference_vit_predictor()
        spatial = reference_vit(channels=40)
        tokens = encoder(torch.zeros(2, 3, 224, 224))
    assert tokens.shape == (2, 196, 768)
    assert count(encoder) == (3 * 256 + 1) * 768 + 196 * 768 + 12 * block(768) + 2 * 768 == 85_797_120
    assert count(predictor) == 196 * 768 + 6 * block(768) + 2 * 768 + 768
    assert count(spatial) - count(encoder) == 37 * 256 * 768
    assert encoder.blocks[0].attention.heads == predictor.blocks[0].attention.heads == 12


def test_the_small_size_is_the_default_of_the_training():
    small, encoder, predictor = SIZES["small"], EncoderSettings(), PredictorSettings()
    assert (small.hidden, small.num_tokens, small.embed_dim, small.depth, small.heads) == (
        tuple(encoder.hidden),
        encoder.num_tokens,
        encoder.embed_dim,
        encoder.depth,
        encoder.heads,
    )
    assert (small.predictor_width, small.predictor_depth, small.predictor_heads, small.condition_dim) == (
        predictor.width,
        predictor.depth,
        predictor.heads,
        predictor.condition_dim,
    )
