"""Claims about the benchmark of training: both loops compute the same, the opponents are what they say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_case import EncoderCase, encoder_settings
from joint_case import joint_parts
from scipy import stats
from training_case import pairs_of, tiny_settings

from biojepa.contracts import TRAIN
from biojepa.model.targets import frozen_copy, move_average, while_young
from biojepa.training.encoder_stage import STAGE
from biojepa.training.optimization import (
    Execution,
    apply_gradients,
    learning_rate,
    make_optimizer,
    seed_step,
)
from biojepa.training.predictor_stage import STAGE as PREDICTOR_STAGE
from biojepa.training.predictor_stage import LatentCells, predictor_loss

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def case() -> EncoderCase:
    return EncoderCase()


@pytest.fixture
def plain_loop(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import plain_loop

    return plain_loop


@pytest.fixture
def generative(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import generative

    return generative


def test_on_the_same_draws_the_encoder_stage_is_the_plain_loop(case, plain_loop):
    settings = encoder_settings(steps=8, dropout=0.0)
    history, kept = case.run(settings)
    objective = case.objective(settings)
    networks = plain_loop.EncoderNetworks(
        objective.student,
        objective.target.encoder,
        objective.predictor,
        objective.action,
        objective.criterion,
    )
    optimizer = plain_loop.adamw(networks.trained(), settings.weight_decay)
    data = plain_loop.MaskedCells(
        case.pairs, objective.embedding, np.arange(len(case.store)), case.classes.numpy(), settings
    )
    losses = []
    for step in range(8):
        seed_step(7, STAGE, step)
        chosen = case.cells[torch.randint(len(case.cells), (settings.batch_size,))]
        hidden = objective._mask(len(chosen))
        # Cell by cell, as the plain loop reads them, but with the masks of the pipeline.
        x, _, library, classes = zip(*(data[int(cell)] for cell in chosen), strict=True)
        x = torch.stack(x)
        visible = torch.where(hidden, 0.0, x) * x.shape[1] / (~hidden).sum(dim=1, keepdim=True).clamp(min=1)
        batch = (x, visible, torch.stack(library), torch.tensor(classes))
        losses.append(plain_loop.encoder_step(networks, optimizer, batch, step, settings))
    assert losses[-1] < losses[0]
    assert history[-1]["loss"] == pytest.approx(losses[-1], rel=1e-4)
    for name, value in networks.teacher.state_dict().items():
        torch.testing.assert_close(kept[name], value, atol=1e-4, rtol=1e-3)


def test_on_the_same_draws_the_predictor_stage_is_the_plain_loop(case, plain_loop):
    whole = tiny_settings(predictor={"dropout": 0.0, "source_dropout": 0.0})
    settings = whole.predictor
    _, model, membership = joint_parts(case, whole)
    plain = joint_parts(case, whole)[1]
    torch.manual_seed(0)
    tokens = torch.randn(len(case.store), model.num_tokens, model.dim)
    labels = len(case.pairs.labels)
    latent = LatentCells(
        tokens,
        membership,
        torch.zeros(labels, dtype=torch.long),
        torch.ones(labels),
        0.1 * torch.randn(labels, model.num_tokens, model.dim),
    )
    train = torch.from_numpy(case.train)
    teachers = frozen_copy(model), plain_loop.teacher_of(plain)
    optimizer = make_optimizer((model,), settings.weight_decay)
    other = plain_loop.adamw(plain.parameters(), settings.weight_decay)
    for step in range(8):
        seed_step(7, PREDICTOR_STAGE, step)
        ours = predictor_loss(model, case.populations, latent, train, settings, Execution())
        rate = learning_rate(step, settings.steps, settings.learning_rate)
        apply_gradients(optimizer, ours, rate)
        move_average(teachers[0], model, while_young(step, settings.ema))
        seed_step(7, PREDICTOR_STAGE, step)
        asked = train[torch.randint(len(train), (settings.batch_size,))]
        cells, controls = case.populations.draw(asked, settings.population)
        batch = (asked, tokens[controls].mean(dim=1), tokens[cells].mean(dim=1))
        loss = plain_loop.predictor_step(
            plain, teachers[1], other, batch, membership, latent.baseline, step, settings
        )
        assert float(ours.detach()) == pytest.approx(loss, rel=1e-4)
    for mine, theirs in zip(teachers[0].parameters(), teachers[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_the_plain_loop_reads_cells_and_populations_as_they_are(case, plain_loop):
    settings, embedding = encoder_settings(), case.embedding(encoder_settings())
    data = plain_loop.MaskedCells(
        case.pairs, embedding, case.pairs.cells_of(TRAIN), case.classes.numpy(), settings
    )
    torch.manual_seed(0)
    x, visible, library, named = data[5]
    cell = case.pairs.cells_of(TRAIN)[5]
    expected, depth = embedding.inputs(
        torch.from_numpy(case.pairs.dense(np.array([cell]))), case.store.log_library[[cell]]
    )
    torch.testing.assert_close(x, expected[0])
    torch.testing.assert_close(library, depth[0])
    assert named == int(case.classes[cell])
    shown = visible != 0
    torch.testing.assert_close(visible[shown] * shown.float().mean(), x[shown])
    assert 0.2 < shown.float().mean() < 0.9
    batch = next(plain_loop.batches(data, 16, workers=0))
    assert [tuple(part.shape) for part in batch] == [(16, 30), (16, 30), (16,), (16,)]
    tokens = torch.arange(len(case.store)).float()[:, None, None].expand(-1, 1, 1)
    populations = plain_loop.CellPopulations(case.pairs, tokens, case.train[:1], tiny_settings().predictor)
    label, control, perturbed = populations[0]
    own = np.flatnonzero(case.pairs.perturbation == label)
    assert own.min() <= float(perturbed) <= own.max()
    assert control.shape == (1, 1)


def test_the_negative_binomial_is_that_of_scipy(generative):
    counts, mean, r = torch.arange(12.0), torch.tensor(3.5), torch.tensor(1.7)
    found = generative.negative_binomial(counts, mean, r)
    expected = stats.nbinom.logpmf(counts.numpy(), 1.7, 1.7 / (1.7 + 3.5))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def counted():
    """Cells whose gene P doubles half of the genes and halves the others; counts are known."""
    rng = np.random.default_rng(0)
    base = rng.uniform(2, 8, 20)
    shift = np.where(np.arange(20) < 10, 2.0, 0.5)
    labels = ["control"] * 300 + ["P"] * 300
    counts = rng.poisson(np.where(np.array(labels)[:, None] == "P", base * shift, base))
    library = np.log(counts.sum(axis=1))
    expression = np.log1p(counts * 100.0 / np.exp(library)[:, None])
    pairs = pairs_of(expression, labels, {"P": "train"}, {"s": {"P": [1.0, 0.5]}}, library=library)
    return replace(pairs, facts={**pairs.facts, "target_sum": 100.0}), counts


def test_counts_are_got_back(generative, counted):
    pairs, counts = counted
    cells = generative.Cells.of(pairs, torch.device("cpu"))
    np.testing.assert_array_equal(cells.counts, counts)
    assert len(cells.controls) == 300
    assert not generative.Condition(cells.codes)(cells.membership[:1]).any()  # control


@pytest.mark.parametrize(("name", "steps"), [("CountVAE", 250), ("ExpressionDiffusion", 500)])
def test_an_opponent_learns_a_known_effect(generative, counted, name, steps):
    pairs, _ = counted
    cells = generative.Cells.of(pairs, torch.device("cpu"))
    torch.manual_seed(0)
    kind = getattr(generative, name)
    model = kind(tiny_settings().encoder, cells) if name == "CountVAE" else kind(cells, 64, 2)
    trainer = generative.Trainer(model, cells, kl_steps=100)
    losses = [float(trainer.step(step)) for step in range(steps)]
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    means, control = pairs.pseudobulk()
    found = trainer.change(cells.membership[1:])
    assert np.corrcoef(found[0], means[0] - control)[0, 1] > 0.9


def test_the_table_shows_every_row_and_says_how_it_was_made(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import run

    made_by = {"script": "x.py", "commit": "abc", "machine": "m", "packages": {"torch": "2"}}
    table = [{"name": "a", "ratio": 2.0}, {"name": "b", "ratio": None, "more": True}]
    (tmp_path / "x.json").write_text(json.dumps({"made_by": made_by, "device": "cpu", "table": table}))
    assert run.tables(["x"], tmp_path).splitlines() == [
        "## x",
        "",
        "`x.py` at commit abc; m, cpu; torch 2",
        "",
        "| name | ratio | more |",
        "| --- | ---: | ---: |",
        "| a | 2 |  |",
        "| b |  | yes |",
    ]
    with pytest.raises(FileNotFoundError, match=r"no result .*y\.json; there are: x"):
        run.tables(["y"], tmp_path)
    for benchmark in run.BENCHMARKS.values():
        assert (REPO / "benchmarks" / benchmark.command.split()[0]).is_file()
    assert all(name in run.listing() for name in run.BENCHMARKS)
