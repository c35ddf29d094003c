"""Claims about the encoder stage: what a step computes, and that options change only what they say."""

from __future__ import annotations

import math

import pytest
import torch
from encoder_case import EncoderCase, encoder_settings
from torch import nn
from torch.nn import functional as F

from biojepa.collapse import CollapseError, DivergenceError, statistics
from biojepa.model import targets
from biojepa.model.masks import gene_mask
from biojepa.model.predictor import JEPAPredictor
from biojepa.training import encoder_stage
from biojepa.training.cells import CellStore
from biojepa.training.encoder_stage import EncoderSettings, _action_loss
from biojepa.training.gene_modules import gene_modules
from biojepa.training.optimization import Execution


@pytest.fixture(scope="module")
def case() -> EncoderCase:
    return EncoderCase()


def plain_vicreg(predicted, target, context):
    """25 · inv + 25 · var + cov per token position, written with torch.cov."""
    var = cov = 0.0
    for z in context.unbind(dim=1):
        var = var + F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() / context.shape[1]
        covariance = torch.cov(z.T)
        off = covariance.square().sum() - covariance.diagonal().square().sum()
        cov = cov + off / z.shape[1] / context.shape[1]
    return 25 * F.mse_loss(predicted, target) + 25 * var + cov


def test_the_default_is_the_written_out_loop(case):
    settings = encoder_settings(steps=6, action_weight=0.0, dropout=0.0)
    rows, kept = case.run(settings)
    embedding = case.embedding(settings)
    student, teacher = embedding.body, case.embedding(settings).body.requires_grad_(False)
    torch.manual_seed(7)
    predictor = JEPAPredictor(4, 16, 16, 1, 2)
    trained = [*student.parameters(), *predictor.parameters()]
    matrices = [p for p in trained if p.ndim == 2 and min(p.shape) > 1]
    others = [p for p in trained if not (p.ndim == 2 and min(p.shape) > 1)]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(6):
        torch.manual_seed((7 * 8 + 1) * 100_000_007 + step)
        chosen = case.cells[torch.randint(len(case.cells), (64,))]
        x, library = embedding.inputs(case.store.rows(chosen), case.store.log_library[chosen])
        hidden = gene_mask(64, x.shape[1], 0.3, 0.6)
        visible = torch.where(hidden, 0.0, x) * x.shape[1] / (~hidden).sum(dim=1, keepdim=True)
        context = student(visible, library)
        loss = plain_vicreg(predictor(context), teacher(x, library), context)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:  # a tenth of 6 steps is one of warm-up
            group["lr"] = 1e-3 * (1 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 5)))
        optimizer.step()
        momentum = min(1 - 0.004 * (math.cos(math.pi * step / 6) + 1) / 2, (1 + step) / (10 + step))
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.copy_(momentum * old + (1 - momentum) * new)
    assert rows[-1]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(kept[name], value, atol=1e-4, rtol=1e-3)


OPTIONS = {
    "default": {},
    "shared_stop_gradient": {"target": "shared_stop_gradient"},
    "separate": {"target": "separate"},
    "modules": {"masking": "modules", "modules": 5},
    "sigreg": {"regularizer": "sigreg"},
    "accumulate": {"accumulate": 2},
    "textbook": {
        "task": "control_to_perturbed",
        "target": "shared",
        "regularizer": "flat",
        "regularized": "prediction",
    },
}


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("name", OPTIONS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(case, monkeypatch, tmp_path, name):
    settings = encoder_settings(checkpoint_every=5, **OPTIONS[name])
    execution = Execution("bfloat16") if name == "accumulate" else None
    rows, weights = case.run(settings, None, execution)
    original, steps = encoder_stage.apply_gradients, []

    def failing(*arguments):
        if len(steps) == 13:
            raise StoppedError
        steps.append(1)
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoder_stage, "apply_gradients", failing)
        with pytest.raises(StoppedError):
            case.run(settings, tmp_path, execution)
        steps.clear()
        resumed_rows, resumed = case.run(settings, tmp_path, execution)
    assert len(steps) == 10  # from the checkpoint after step 10
    assert resumed_rows == rows
    assert all(torch.equal(resumed[key], weights[key]) for key in weights)
    assert rows[-1]["loss"] < 40 and rows[-1]["std_cells"] > 0


def gradients(objective, step: int = 3) -> dict[str, torch.Tensor]:
    for loss in objective.losses(step):
        loss.backward()
    return {
        f"{part}.{name}": parameter.grad
        for part, network in objective.networks.items()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("target", ["ema", "shared"])
def test_micro_batches_add_up_to_the_batch_where_the_loss_is_a_mean_over_cells(case, target):
    only_error = {"variance": 0.0, "covariance": 0.0, "action_weight": 0.0, "dropout": 0.0, "target": target}
    whole = gradients(case.objective(encoder_settings(**only_error)))
    parts = gradients(case.objective(encoder_settings(accumulate=4, **only_error)))
    assert whole.keys() == parts.keys() and len(whole) > 20
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4)
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-3


def test_variance_and_covariance_are_those_of_a_micro_batch(case):
    settings = {"action_weight": 0.0, "dropout": 0.0, "invariance": 0.0, "variance": 0.0}
    whole, halves = (case.objective(encoder_settings(accumulate=k, **settings)) for k in (1, 2))
    losses = [sum(float(loss.detach()) for loss in objective.losses(0)) for objective in (whole, halves)]
    assert losses[1] > 1.1 * losses[0]  # covariances of fewer cells scatter more


def test_too_many_micro_batches_are_refused(case):
    with pytest.raises(ValueError, match="64 cells in 40 micro-batches leaves 1 cells"):
        case.objective(encoder_settings(accumulate=40))


@pytest.mark.parametrize("target", ["ema", "shared_stop_gradient", "shared", "separate"])
def test_the_target_is_moved_as_its_name_says_and_is_what_is_kept(case, target):
    settings = encoder_settings(target=target, action_weight=0.0, dropout=0.0)
    objective = case.objective(settings)
    got = gradients(objective)
    assert any(name.startswith("target") for name in got) == (target == "separate")
    # The student's gradient through the target is there with `shared` alone.
    through_context = gradients(
        case.objective(encoder_settings(target="shared_stop_gradient", action_weight=0.0, dropout=0.0))
    )
    same = all(torch.allclose(got[k], through_context[k], atol=1e-6) for k in got if k.startswith("student"))
    # At the first step teacher, copy and student are equal, and so are their gradients.
    assert same == (target != "shared")
    with torch.no_grad():
        for parameter in objective.target.encoder.parameters():
            parameter.add_(0.5)
    wanted = {k: v.clone() for k, v in objective.target.encoder.state_dict().items()}
    objective.keep()
    kept = objective.student.state_dict()
    assert all(torch.equal(kept[k], wanted[k]) for k in wanted)
    assert not any(p.requires_grad for p in objective.student.parameters())


def test_modules_are_hidden_together_and_genes_are_not(case):
    objective = case.objective(encoder_settings(masking="modules", modules=4))
    modules = objective.modules
    torch.manual_seed(0)
    hidden = objective._mask(200)
    for module in modules.unique():
        members = hidden[:, modules == module]
        assert (members.all(dim=1) | ~members.any(dim=1)).all()
    assert 0.3 < float(hidden.float().mean()) < 0.6
    torch.manual_seed(0)
    alone = case.objective(encoder_settings())._mask(200)
    assert not (alone.all(dim=1) | ~alone.any(dim=1)).any()


def test_modules_are_the_planted_groups_of_genes_whatever_their_scale():
    torch.manual_seed(3)
    group = torch.arange(40) % 4
    factors = torch.randn(300, 4)
    x = (factors[:, group] + 0.3 * torch.randn(300, 40)) * torch.linspace(0.1, 9, 40) + 5
    x[:, 11] = 2.0  # does not vary
    modules = gene_modules(x, 4, seed=1)
    assert modules[11] == -1
    varying = modules >= 0
    together = modules[varying][:, None] == modules[varying]
    assert torch.equal(together, group[varying][:, None] == group[varying])
    assert torch.equal(modules, gene_modules(x, 4, seed=1))
    assert int(gene_modules(x[:, :3], 50, seed=0).max()) == 2
    with pytest.raises(ValueError, match=r"shape \(40,\); expected \(cells, genes\)"):
        gene_modules(x[0], 4, 0)


def test_the_textbook_task_pairs_controls_with_cells_of_a_told_perturbation(case):
    objective = case.objective(encoder_settings(**OPTIONS["textbook"]))
    assert (case.classes[objective.controls] < 0).all() and (case.classes[objective.cells] >= 0).all()
    assert len(objective.controls) + len(objective.cells) == len(case.cells)
    got = gradients(objective)
    told = got["told.weight"].abs().sum(dim=1)
    torch.manual_seed((7 * 8 + 1) * 100_000_007 + 3)
    asked = case.classes[objective.cells[torch.randint(len(objective.cells), (64,))]].unique()
    assert torch.equal(told.nonzero(as_tuple=True)[0], asked)
    assert "action.weight" not in got  # a control cell says nothing of a perturbation


def test_bfloat16_follows_float32_and_keeps_weights_and_losses_in_float32(case):
    settings = encoder_settings(steps=10, dropout=0.0)
    exact, weights = case.run(settings)
    coarse, rounded = case.run(settings, None, Execution("bfloat16"))
    assert exact != coarse
    # bfloat16 has 8 bits: about 0.4 % of a product, and ten steps of AdamW at 1e-3.
    for name in ("loss", "std_cells", "rankme"):
        assert coarse[-1][name] == pytest.approx(exact[-1][name], rel=0.02)
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    for name in weights:
        torch.testing.assert_close(rounded[name], weights[name], atol=0.02, rtol=0.05)
    objective = case.objective(settings, Execution("bfloat16"))
    assert next(objective.losses(0)).dtype == torch.float32


def test_a_compiled_encoder_is_used_and_gives_the_same_weights(case, monkeypatch):
    asked = []
    compiler = torch.compile

    def traced(module):
        asked.append(module)
        return compiler(module, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    settings = encoder_settings(steps=4)
    _, expected = case.run(settings)
    assert asked == []
    _, weights = case.run(settings, None, Execution(compile=True))
    assert len(asked) == 2  # what encodes the context, and what encodes the target
    assert weights.keys() == expected.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-6, rtol=1e-5)


def test_where_compiling_fails_training_goes_on_uncompiled_and_says_so(case, monkeypatch, caplog):
    def failing(module):
        raise RuntimeError("no C++ compiler\nand a long story")

    settings, execution = encoder_settings(steps=4), Execution(compile=True)
    _, expected = case.run(settings)
    monkeypatch.setattr(torch, "compile", failing)
    _, weights = case.run(settings, None, execution)
    assert "torch.compile failed (RuntimeError: no C++ compiler)" in caplog.text
    assert execution.compile_seconds == []
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["sparse", "host"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_where_cells_are_kept_changes_nothing(case, monkeypatch, layout, accumulate):
    settings = encoder_settings(steps=5, accumulate=accumulate)
    assert case.store.layout == "dense"
    rows, expected = case.run(settings)
    asked = []
    store = CellStore(case.pairs, torch.device("cpu"), layout)
    prefetch = store.prefetch
    monkeypatch.setattr(store, "prefetch", lambda cells, key: (asked.append(key), prefetch(cells, key)))
    monkeypatch.setattr(case, "store", store)
    found, weights = case.run(settings)
    assert found == rows
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    named = [(step, part) for step in range(1, 5) for part in range(accumulate)]
    assert asked == (named if layout == "host" else [])
    assert not store._coming  # every batch that was fetched ahead was used


def test_what_is_measured_is_the_target_encoder_without_dropout(case):
    objective = case.objective(encoder_settings(target="shared_stop_gradient", dropout=0.5))
    objective.student.train()
    measured = objective.measure()
    assert objective.student.training
    x = case.store.rows(objective.monitored)
    tokens = objective.student.eval()(
        *objective.embedding.inputs(x, case.store.log_library[objective.monitored])
    )
    assert measured == pytest.approx(statistics(tokens.detach(), case.classes[objective.monitored]), rel=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [("target", "teacher"), ("task", "x"), ("masking", "x"), ("regularizer", "x"), ("regularized", "x")],
)
def test_an_unknown_choice_is_refused(key, value):
    with pytest.raises(ValueError, match=f"encoder.{key} is '{value}'; expected one of "):
        EncoderSettings(**{key: value})


def test_a_training_that_diverges_is_stopped_with_a_message(case):
    with pytest.raises(DivergenceError, match=r"encoder diverged by step \d+: the loss is .*learning_rate"):
        case.run(encoder_settings(learning_rate=1e18, monitor_every=5))


def test_the_action_term_names_the_perturbation_relative_to_the_controls_of_the_batch():
    context = torch.tensor([[1.0, 0.0], [3.0, 0.0], [4.0, 1.0], [2.0, -3.0]])[:, None]
    classes = torch.tensor([-1, -1, 0, 1])
    action = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        action.weight.copy_(torch.eye(2))
    # Controls average to (2, 0): the two perturbed cells are moved by (2, 1) and (0, -3).
    expected = (math.log1p(math.exp(1 - 2)) + math.log1p(math.exp(0 + 3))) / 2
    assert float(_action_loss(context, classes, action)) == pytest.approx(expected, rel=1e-5)
    assert float(_action_loss(context[:2], classes[:2], action)) == 0.0


def test_the_flattened_textbook_objective_collapses_and_is_stopped(case, monkeypatch):
    textbook = OPTIONS["textbook"] | {"target": "shared_stop_gradient", "learning_rate": 5e-3, "steps": 100}
    with pytest.raises(CollapseError, match=r"by step \d+: .*per_token"):
        case.run(encoder_settings(monitor_every=50, **textbook))
    # A teacher whose average looks back further than the training hides the collapse of its student.
    late = textbook | {"target": "ema"}
    monkeypatch.setattr(targets, "ema_momentum", targets.ema_decay)
    with pytest.raises(CollapseError, match=r"by step \d+: .*per_token"):
        case.run(encoder_settings(monitor_every=50, **late))
    monkeypatch.undo()
    # The same cells, steps and rate with the default objective are healthy.
    rows, _ = case.run(encoder_settings(monitor_every=50, learning_rate=5e-3, steps=100))
    assert rows[-1]["std_cells"] > 0.5
