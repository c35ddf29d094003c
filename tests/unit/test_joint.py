"""Claims about joint training: one optimizer, gradients where they belong, resumable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from encoder_case import EncoderCase
from joint_case import joint_parts, run_joint
from training_case import tiny_settings

from biojepa.training import joint_stage
from biojepa.training.encoder_stage import embed_with
from biojepa.training.optimization import Execution, seed_step

QUIET = {"dropout": 0.0, "source_dropout": 0.0}
ENCODER = {"steps": 12, "monitor_every": 4, "checkpoint_every": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def case() -> EncoderCase:
    return EncoderCase()


def settings_of(encoder=None, **changes):
    return tiny_settings(stages="joint", encoder=ENCODER | (encoder or {}), predictor=QUIET, **changes)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"target": "separate", "accumulate": 2, "dropout": 0.1}])
def test_an_interrupted_joint_run_ends_as_an_uninterrupted_one(case, monkeypatch, tmp_path, options):
    settings = settings_of(options)
    execution = Execution("bfloat16" if options else "float32")
    rows, weights = run_joint(case, settings, None, execution)
    original, steps = joint_stage.apply_gradients, []

    def failing(*arguments):
        if len(steps) == 10:
            raise StoppedError
        steps.append(1)
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(joint_stage, "apply_gradients", failing)
        with pytest.raises(StoppedError):
            run_joint(case, settings, tmp_path, execution)
        steps.clear()
        resumed_rows, resumed = run_joint(case, settings, tmp_path, execution)
    assert len(steps) == 4 and resumed_rows == rows
    assert all(torch.equal(resumed[key], weights[key]) for key in weights)


def losses_of_one_step(case, monkeypatch, settings, step=0):
    """The losses of a step, with the encoder and the predictor as they were before it."""
    caught = {}

    def stop(optimizer, losses, rate):
        caught["losses"] = [loss.detach().clone() for loss in losses]
        raise StoppedError

    monkeypatch.setattr(joint_stage, "apply_gradients", stop)
    with pytest.raises(StoppedError):
        run_joint(case, settings)
    return caught["losses"]


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_the_prediction_loss_is_the_error_of_mean_tokens(case, monkeypatch, weight):
    settings = settings_of(joint_weight=weight)
    masked, prediction = losses_of_one_step(case, monkeypatch, settings)
    embedding, predictor, membership = joint_parts(case, settings)
    objective = case.objective(settings.encoder)
    assert float(masked) == pytest.approx(float(next(objective.losses(0)).detach()), rel=1e-6)
    # The random state continues where the masks left it.
    seed_step(7, 1, 0)
    torch.randint(len(case.cells), (64,))
    torch.rand(64, 1), torch.rand(64, case.store.n_genes)
    labels = torch.from_numpy(case.train)[torch.randint(len(case.train), (16,))]
    perturbed, controls = case.populations.draw(labels, 16)
    # At the start the predictor says no change, and teacher and student are equal.
    z = embed_with(embedding.body, embedding, case.store, torch.arange(len(case.store)))
    expected = (z[controls].mean(dim=1) - z[perturbed].mean(dim=1)).square().mean()
    assert float(prediction) == pytest.approx(weight * float(expected), rel=1e-4)
    assert not predictor.change(z[controls].mean(dim=1), membership[labels]).any()


def test_populations_train_the_encoder_and_the_predictor_and_not_the_teacher(case):
    still = {"invariance": 0.0, "variance": 0.0, "covariance": 0.0, "action_weight": 0.0, "weight_decay": 0.0}
    settings = settings_of(still)
    embedding, predictor, _ = joint_parts(case, settings)
    before = {k: v.clone() for k, v in embedding.body.state_dict().items()}
    start = {k: v.clone() for k, v in predictor.state_dict().items()}
    rows, weights = run_joint(case, settings)
    assert any(not torch.equal(weights[f"encoder.{k}"], before[k]) for k in before)
    assert any(not torch.equal(weights[f"predictor.{k}"], start[k]) for k in start)
    assert rows[-1]["prediction"] < rows[0]["prediction"]
    # With a weight near zero, only the masked cells move the encoder: as in the encoder stage.
    alone, expected = case.run(replace(settings_of().encoder))
    joint, close = run_joint(case, settings_of(joint_weight=1e-12))
    assert joint[-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=1e-4)
    for key in expected:
        torch.testing.assert_close(close[f"encoder.{key}"], expected[key], atol=1e-4, rtol=1e-3)


def test_rows_have_the_prediction_error_and_the_networks_are_frozen(case):
    settings = settings_of()
    rows, _ = run_joint(case, settings)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert {"loss", "inv", "var", "cov", "prediction", "std_cells", "rankme", "lidar"} < set(rows[0])
    assert not any("second" in key or "time" in key for key in rows[0])
