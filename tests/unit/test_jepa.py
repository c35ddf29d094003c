"""Claims about the generic JEPA: it trains on images, on sequences and on masked cells, and stays awake."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biojepa.model import (
    JEPA,
    ConditionalPredictor,
    GeneExpressionEncoder,
    JEPAPredictor,
    SIGRegLoss,
    ViTEncoder,
    gene_mask,
    random_block_mask,
    temporal_mask,
)

SIZE = 16


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def fit(model: JEPA, steps: int, batch: Callable[[], dict[str, object]], rate: float = 3e-3) -> list[float]:
    """Train a JEPA; ``batch`` gives the arguments of a step. Returns the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    for step in range(steps):
        loss, _ = model(**batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update(step, steps)
        losses.append(float(loss.detach()))
    return losses


def gratings(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images (n, 1, 16, 16) of waves, and which of four directions each has.

    Phase, frequency and contrast vary, so that no pixel tells the direction.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randint(4, (n,), generator=generator)
    angle = direction * math.pi / 4 + 0.15 * torch.randn(n, generator=generator)
    frequency, phase, contrast = torch.rand(3, n, generator=generator)
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = torch.sin(angle)[:, None, None] * row + torch.cos(angle)[:, None, None] * column
    wave = torch.cos((0.9 + 0.5 * frequency)[:, None, None] * along + 2 * math.pi * phase[:, None, None])
    noise = torch.randn(n, SIZE, SIZE, generator=generator)
    return ((0.5 + contrast)[:, None, None] * wave + noise)[:, None], direction


def probe(model: JEPA, train: tuple[torch.Tensor, ...], test: tuple[torch.Tensor, ...]) -> float:
    """Accuracy on held-out images of a ridge classifier of the pooled embedding."""
    known, asked = (model.embed(x).double().numpy() for x, _ in (train, test))
    mean, scale = known.mean(axis=0), known.std(axis=0) + 1e-6
    X, Z = (np.column_stack([(z - mean) / scale, np.ones(len(z))]) for z in (known, asked))
    Y = F.one_hot(train[1]).double().numpy()
    weight = np.linalg.solve(X.T @ X + 0.1 * len(X) * np.eye(X.shape[1]), X.T @ Y)
    return float(((Z @ weight).argmax(axis=1) == test[1].numpy()).mean())


def image_jepa(target: str = "shared_stop_gradient", **changes) -> JEPA:
    encoder = ViTEncoder(SIZE, 4, 1, embed_dim=32, depth=1, heads=4)
    predictor = JEPAPredictor(16, 32, width=32, depth=1, heads=4, target_queries=True)
    return JEPA(encoder, predictor, target, **changes)


@dataclass
class Trained:
    """A JEPA trained on images, and how the untrained one did."""

    model: JEPA
    losses: list[float]
    before: float
    after: float
    held_out: torch.Tensor


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    images, directions = gratings(2048, 1)
    known, held_out = (images[:256], directions[:256]), gratings(1024, 2)
    model = image_jepa()
    before = probe(model, known, held_out)

    def batch() -> dict[str, object]:
        context, targets = random_block_mask(4, 4, blocks=1)
        rows = torch.randint(len(images), (128,))
        return {"context": images[rows], "context_mask": context, "target_mask": targets}

    losses = fit(model, 150, batch, rate=6e-3)
    return Trained(model, losses, before, probe(model, known, held_out), held_out[0])


def test_training_on_images_lowers_the_loss_and_does_not_collapse(trained):
    assert np.mean(trained.losses[-10:]) < 0.95 * np.mean(trained.losses[:5])
    spread = trained.model.encode(trained.held_out).std(dim=0).mean(dim=1)
    assert spread.shape == (16,) and float(spread.min()) > 0.1


def test_a_linear_probe_of_the_trained_encoder_beats_that_of_the_untrained_one(trained):
    assert trained.after > trained.before + 0.12, (trained.before, trained.after)


def dots(n: int, seed: int) -> torch.Tensor:
    """Sequences (n, 1, 8 frames, 12 places) of a dot that moves round a ring at a speed of its own."""
    generator = torch.Generator().manual_seed(seed)
    start, speed = 12 * torch.rand(n, 1, generator=generator), 4 * torch.rand(n, 1, generator=generator) - 2
    place = start + speed * torch.arange(8)
    angle = 2 * math.pi * (place[..., None] - torch.arange(12)) / 12
    frames = torch.exp(3 * (torch.cos(angle) - 1))
    return (frames + 0.05 * torch.randn(n, 8, 12, generator=generator))[:, None]


def test_training_on_sequences_predicts_later_frames_better_than_their_mean():
    sequences, held_out = dots(1024, 1), dots(512, 2)
    context, target = temporal_mask(8)
    encoder = ViTEncoder((8, 12), (1, 12), 1, embed_dim=24, depth=1, heads=4)
    predictor = JEPAPredictor(8, 24, width=24, depth=2, heads=4, target_queries=True)
    model = JEPA(encoder, predictor, "ema", momentum=0.9)
    untrained = held_out_error(model, sequences, held_out, context, target)

    def batch() -> dict[str, object]:
        rows = torch.randint(len(sequences), (64,))
        return {"context": sequences[rows], "context_mask": context, "target_mask": target}

    fit(model, 150, batch)
    assert untrained > 1
    assert held_out_error(model, sequences, held_out, context, target) < 0.6


@torch.no_grad()
def held_out_error(
    model: JEPA, sequences: torch.Tensor, held_out: torch.Tensor, context: torch.Tensor, target: torch.Tensor
) -> float:
    """Squared error of predicted later frames, as a share of that of the mean over training sequences."""
    model.eval()
    seen, asked = context.nonzero()[:, 0], target.nonzero()[:, 0]
    predicted = model.predictor(model.encoder(held_out, context), seen, asked)
    observed = model.encode(held_out)[:, asked]
    mean = model.encode(sequences)[:, asked].mean(dim=0)
    model.train()
    return float((predicted - observed).square().mean() / (mean - observed).square().mean())


def test_the_loss_is_that_of_the_parts_put_together_by_hand():
    model, x = image_jepa("ema").eval(), torch.randn(6, 1, SIZE, SIZE)
    for parameter in model.target.encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    context, targets = random_block_mask(4, 4)
    seen = context.nonzero()[:, 0]
    tokens = model.encoder(x, context)
    predicted, goal = [], []
    for target in targets:
        asked = target.nonzero()[:, 0]
        predicted.append(model.predictor(tokens, seen, asked))
        goal.append(model.target.encoder(x)[:, asked])
    expected, parts = model.regularizer(torch.cat(predicted, 1), torch.cat(goal, 1), tokens)
    loss, given = model(x, context_mask=context, target_mask=targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(given, parts)
    one, _ = model(x, context_mask=context, target_mask=targets[0])
    torch.testing.assert_close(one, model.regularizer(predicted[0], goal[0], tokens)[0])


@pytest.mark.parametrize("masking", ["drop", "token"])
def test_encoders_that_drop_and_those_that_replace_hidden_patches_both_work(masking):
    encoder = ViTEncoder(SIZE, 4, 1, embed_dim=32, depth=1, heads=4, masking=masking)
    model = JEPA(encoder, JEPAPredictor(16, 32, depth=1, heads=4, target_queries=True))
    x, (context, targets) = torch.randn(40, 1, SIZE, SIZE), random_block_mask(4, 4)
    other = x.clone()
    other.view(40, 4, 4, 4, 4)[:, 0, :, 0, :] += 1  # the patch in the corner
    hidden = torch.ones(16, dtype=torch.bool).index_fill(0, torch.tensor([0]), False)
    torch.testing.assert_close(model._context((x,), hidden)[0], model._context((other,), hidden)[0])
    loss, _ = model(x, context_mask=context, target_mask=targets)
    loss.backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("kind", ["ema", "shared_stop_gradient", "shared", "separate"])
def test_the_target_is_regularized_where_it_carries_gradient(kind):
    model = image_jepa(kind)
    given = {}
    model.regularizer = nn.Module()
    model.regularizer.forward = lambda p, t, *branches: (given.update(branches=branches) or p.sum(), {})
    x, (context, targets) = torch.randn(4, 1, SIZE, SIZE), random_block_mask(4, 4)
    model(x, context_mask=context, target_mask=targets)
    expected = [(4, int(context.sum()), 32), (4, 16, 32)][: 2 if kind in ("shared", "separate") else 1]
    assert [tuple(z.shape) for z in given["branches"]] == expected
    assert all(z.requires_grad for z in given["branches"])


def test_cells_with_masked_genes_and_several_inputs_are_a_context_too():
    encoder = GeneExpressionEncoder(30, (16,), 4, 16, 1, 2, dropout=0.0, library_token=True)
    model = JEPA(
        encoder, JEPAPredictor(4, 16, depth=1, heads=2), regularizer=SIGRegLoss(0.1, 64), momentum=0.9
    )
    factors, loadings, library = torch.randn(512, 4), torch.randn(4, 30), torch.randn(512)
    x = factors @ loadings / 2 + 0.3 * torch.randn(512, 30)

    def batch() -> dict[str, object]:
        rows = torch.randint(512, (96,))
        shown = x[rows].masked_fill(gene_mask(96, 30), 0)
        return {"context": (shown, library[rows]), "target": (x[rows], library[rows])}

    losses = fit(model, 60, batch)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    torch.testing.assert_close(model.embed(x, library), model.encode(x, library).mean(dim=1))


def test_a_conditional_predictor_is_told_the_condition():
    encoder = GeneExpressionEncoder(10, (8,), 3, 8, 1, 2, dropout=0.0)
    model = JEPA(encoder, ConditionalPredictor(3, 8, condition_dim=5, depth=1, heads=2), "shared")
    nn.init.normal_(model.predictor.leave.weight)
    control, perturbed, told = torch.randn(12, 10), torch.randn(12, 10), torch.randn(12, 2, 5)
    absent = torch.zeros(12, 2, dtype=torch.bool).index_fill(1, torch.tensor([1]), True)
    loss, _ = model(control, perturbed, condition=told, absent=absent)
    z, goal = encoder(control), encoder(perturbed)
    torch.testing.assert_close(loss, model.regularizer(model.predictor(z, told[:, :1]), goal, z, goal)[0])


def test_embedding_takes_the_encoder_of_the_targets_and_no_gradient_or_dropout():
    x = torch.randn(4, 30)
    for kind in ("ema", "shared_stop_gradient", "separate"):
        encoder = GeneExpressionEncoder(30, (16,), 4, 16, 1, 2, dropout=0.5)
        model = JEPA(encoder, JEPAPredictor(4, 16, depth=1, heads=2), kind).train()
        nn.init.normal_(encoder.position)
        kept = encoder if kind == "shared_stop_gradient" else model.target.encoder
        assert torch.equal(model.encode(x), kept.encode(x)) and not model.encode(x).requires_grad
        assert torch.equal(model.embed(x), kept.encode(x).mean(dim=1))
        assert model.encoder.training
    assert not torch.equal(model.target.encoder.encode(x), encoder.encode(x))


def test_the_student_is_held_once():
    for kind, copies in (("ema", 2), ("shared", 1), ("shared_stop_gradient", 1), ("separate", 2)):
        model = image_jepa(kind)
        student = sum(p.numel() for p in model.encoder.parameters())
        around = sum(p.numel() for p in model.predictor.parameters())
        assert sum(value.numel() for value in model.state_dict().values()) == copies * student + around
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == student * (2 if kind == "separate" else 1) + around


def test_the_target_of_a_copied_model_follows_the_copy():
    model = image_jepa("ema", momentum=0.0)
    other = copy.deepcopy(model)
    nn.init.normal_(other.encoder.position)
    other.update(0, 10)
    assert torch.equal(other.target.encoder.position, other.encoder.position)
    assert not torch.equal(other.encoder.position, model.encoder.position)


def test_what_cannot_be_predicted_is_refused():
    model, x = image_jepa(), torch.randn(4, 1, SIZE, SIZE)
    context, targets = random_block_mask(4, 4)
    with pytest.raises(
        ValueError, match=r"the context has \d+ tokens, the target 16; expected a target_mask"
    ):
        model(x, context_mask=context)
    with pytest.raises(ValueError, match=r"target_mask has shape \(4, 15\); expected \('any', 16\)"):
        model(x, context_mask=context, target_mask=targets[:, 1:])
    with pytest.raises(ValueError, match=r"target_mask has dtype torch\.float32; expected torch\.bool"):
        model(x, context_mask=context, target_mask=targets.float())
    with pytest.raises(ValueError, match=r"context_mask has shape \(4, 16\); expected \('any',\)"):
        model(x, context_mask=context.expand(4, 16), target_mask=targets)
    with pytest.raises(ValueError, match="a condition and a target mask were given; expected one of them"):
        model(x, context_mask=context, target_mask=targets, condition=torch.zeros(4, 1, 5))
