"""Claims about training: resumable, repeatable, blind to what is held out, and able to learn."""

from __future__ import annotations

import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from training_case import KnownEffects, pairs_of, tiny_settings

from biojepa.baselines import fit_baselines
from biojepa.collapse import CollapseError
from biojepa.contracts import CONTROL, TEST, TRAIN, VAL
from biojepa.errors import InputError
from biojepa.model.embedding import CellEmbedding
from biojepa.pairs import Pairs, multi_hot
from biojepa.splits import LeakageError
from biojepa.training import (
    TrainedModel,
    TrainSettings,
    encoder_stage,
    load_model,
    predictor_stage,
    run,
    train_model,
)
from biojepa.training.cells import CellStore
from biojepa.training.checkpoint import Checkpoint, discard

SETTINGS = tiny_settings()


@pytest.fixture(scope="module")
def case() -> KnownEffects:
    return KnownEffects(seed=0)


@pytest.fixture(scope="module")
def trained(case) -> tuple[TrainedModel, pd.DataFrame, dict]:
    return train_model(case.pairs, SETTINGS, seed=3)


def numbers(model: TrainedModel) -> dict[str, torch.Tensor]:
    """Every number that a model holds."""
    held = {f"embedding.{k}": v for k, v in model.embedding.state_dict().items()}
    held |= {f"predictor.{k}": v for k, v in model.predictor.state_dict().items()}
    held |= {name: getattr(model, name) for name in ("control_tokens", "control_expression")}
    for name, value in ({} if model.branch is None else model.branch.state()).items():
        parts = value if isinstance(value, dict) else {"": value}
        held |= {f"linear.{name}.{key}": torch.as_tensor(part) for key, part in parts.items()}
    return held | {
        "readout.weight": model.readout.weight,
        "readout.bias": model.readout.bias,
        "weight": torch.tensor(model.weight),
    }


def assert_same(one: TrainedModel, other: TrainedModel) -> None:
    ours, theirs = numbers(one), numbers(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def test_the_same_seed_gives_the_same_model_and_curves_and_another_does_not(case, trained):
    model, history, _ = train_model(case.pairs, SETTINGS, seed=3)
    assert_same(model, trained[0])
    pd.testing.assert_frame_equal(history, trained[1], check_exact=True)
    other, _, _ = train_model(case.pairs, SETTINGS, seed=4)
    assert not torch.equal(other.control_tokens, model.control_tokens)


class StoppedError(Exception):
    pass


def interrupt(monkeypatch, stage, after: int) -> list[int]:
    """Make a stage fail before its step number ``after``; the returned list collects its steps."""
    steps: list[int] = []
    original = stage.apply_gradients

    def counted(optimizer, loss, rate, **options):
        if len(steps) == after:
            raise StoppedError
        steps.append(len(steps))
        original(optimizer, loss, rate, **options)

    monkeypatch.setattr(stage, "apply_gradients", counted)
    return steps


@pytest.mark.parametrize("stage", [encoder_stage, predictor_stage], ids=["encoder", "predictor"])
def test_a_resumed_run_equals_an_uninterrupted_one(case, trained, monkeypatch, tmp_path, stage):
    with monkeypatch.context() as patch:
        interrupt(patch, stage, after=17)
        with pytest.raises(StoppedError):
            train_model(case.pairs, SETTINGS, 3, checkpoint_folder=tmp_path)
    with monkeypatch.context() as patch:
        steps = interrupt(patch, stage, after=-1)
        model, history, _ = train_model(case.pairs, SETTINGS, 3, checkpoint_folder=tmp_path)
    assert len(steps) == 20  # from the checkpoint at step 10, not from the start
    assert_same(model, trained[0])
    pd.testing.assert_frame_equal(history, trained[1], check_exact=True)


def test_a_run_that_ended_before_it_wrote_its_model_is_not_trained_again(
    case, trained, monkeypatch, tmp_path
):
    train_model(case.pairs, SETTINGS, 3, checkpoint_folder=tmp_path)
    encoder_steps = interrupt(monkeypatch, encoder_stage, after=-1)
    predictor_steps = interrupt(monkeypatch, predictor_stage, after=-1)
    model, _, _ = train_model(case.pairs, SETTINGS, 3, checkpoint_folder=tmp_path)
    assert encoder_steps == [] and predictor_steps == []
    assert_same(model, trained[0])


QUICK = {"embedding": "untrained", "linear_branch": False}


def altered(case: KnownEffects, what: str) -> tuple:
    """Pairs, settings and seed of a run that differs from the usual one in one thing."""
    pairs, settings = case.pairs, tiny_settings(**QUICK)
    if what == "seed":
        return pairs, settings, 4
    if what == "settings":
        return pairs, tiny_settings(**QUICK, predictor={"learning_rate": 1e-3}), 3
    if what == "codes":
        return replace(pairs, codes={"network": -2 * pairs.codes["network"]}), settings, 3
    if what == "batches":
        return replace(pairs, batch=1 - pairs.batch[::-1].copy()), settings, 3
    if what == "library sizes":
        return replace(pairs, log_library_size=pairs.log_library_size[::-1].copy()), settings, 3
    return replace(pairs, data=pairs.data * np.float32(1.01)), settings, 3


@pytest.mark.parametrize("what", ["seed", "settings", "codes", "batches", "library sizes", "expression"])
def test_the_checkpoint_of_another_run_is_not_continued(case, monkeypatch, tmp_path, what):
    train_model(case.pairs, tiny_settings(**QUICK), 3, checkpoint_folder=tmp_path)
    pairs, settings, seed = altered(case, what)
    expected, _, _ = train_model(pairs, settings, seed)
    steps = interrupt(monkeypatch, predictor_stage, after=-1)
    model, _, _ = train_model(pairs, settings, seed, checkpoint_folder=tmp_path)
    assert steps[0] == 0 and len(steps) == 30
    assert_same(model, expected)


def test_a_checkpoint_belongs_to_its_fingerprint_and_can_be_discarded(tmp_path):
    folder = tmp_path / "checkpoint"
    Checkpoint(folder, "encoder", "mine").save(12, values=torch.arange(3))
    state = Checkpoint(folder, "encoder", "mine").load()
    assert state["step"] == 12 and state["values"].tolist() == [0, 1, 2]
    assert Checkpoint(folder, "encoder", "other").load() is None
    assert Checkpoint(folder, "predictor", "mine").load() is None
    assert [path.name for path in folder.iterdir()] == ["encoder.pt"]  # nothing half-written beside it
    discard(folder)
    assert not folder.exists()
    discard(folder)
    keeps_none = Checkpoint(None, "encoder", "mine")
    keeps_none.save(1)
    assert keeps_none.load() is None


@pytest.mark.parametrize(
    "changes",
    [{}, {"linear_branch": False}, {"embedding": "pca"}, {"embedding": "untrained", "priors": "none"}],
    ids=["full", "latent alone", "pca", "untrained without priors"],
)
def test_a_saved_model_embeds_and_predicts_the_same_bit_for_bit(case, tmp_path, changes):
    settings = tiny_settings(**changes, encoder={"steps": 6}, predictor={"steps": 6, "evaluate_every": 3})
    model, _, _ = train_model(case.pairs, settings, 1)
    model.save(tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert_same(loaded, model)
    pairs = case.pairs
    used = {
        name: [pairs.labels[label] for label in pairs.labels_of(part)]
        for name, part in (("trained_on", "train"), ("selected_on", "val"))
    }
    assert loaded.settings == settings and loaded.facts == {**pairs.facts, **used}
    assert (loaded.genes, loaded.labels, loaded.sets) == (
        case.pairs.genes,
        case.pairs.labels,
        case.pairs.sets,
    )
    cells = np.arange(0, 200, 7)
    x = torch.from_numpy(case.pairs.dense(cells))
    library = torch.from_numpy(case.pairs.log_library_size[cells])
    with torch.no_grad():
        assert torch.equal(loaded.embedding(x, library), model.embedding(x, library))
    for ours, theirs in zip(loaded.predict(case.test), model.predict(case.test), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_model_of_another_version_is_refused(tmp_path):
    torch.save({"format_version": 99}, tmp_path / "model.pt")
    with pytest.raises(
        InputError, match=r"model\.pt: found format version 99; expected 3.*rerun the train stage"
    ):
        load_model(tmp_path / "model.pt")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.pt").write_text("not a model")
    with pytest.raises(
        InputError, match=r"model\.pt: found a file that torch cannot read.*rerun the train stage"
    ):
        load_model(tmp_path / "model.pt")


def test_settings_survive_the_round_trip_and_unknown_choices_are_refused():
    settings = tiny_settings(priors="shuffled", encoder={"hidden": [7, 5]})
    assert settings.encoder.hidden == (7, 5)
    assert TrainSettings.from_config(asdict(settings)) == settings
    with pytest.raises(ValueError, match="embedding is 'umap'; expected one of"):
        tiny_settings(embedding="umap")
    with pytest.raises(ValueError, match="priors is 'some'; expected one of"):
        tiny_settings(priors="some")


def with_other_cells(case: KnownEffects, *sets: str):
    """The fold with other expression in the cells of some sets."""
    pairs = case.pairs
    moved = pairs.cells_of(*sets, controls=False)
    dense = pairs.dense(np.arange(len(pairs.perturbation)))
    dense[moved] = dense[moved][:, ::-1] + 1
    names = np.array([*pairs.labels, CONTROL])[pairs.perturbation]
    return pairs_of(
        dense,
        names,
        dict(zip(pairs.labels, pairs.sets, strict=True)),
        {"network": case.code},
        pairs.batch,
        library=pairs.log_library_size,
    )


def test_validation_cells_train_neither_the_encoder_nor_the_linear_branch(case, trained):
    model, _, _ = train_model(with_other_cells(case, VAL), SETTINGS, 3)
    ours, theirs = numbers(model), numbers(trained[0])
    blind = [name for name in ours if name.startswith(("embedding", "control", "linear"))]
    assert len(blind) > 20
    for name in blind:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)
    # The same change to training cells is noticed.
    other, _, _ = train_model(with_other_cells(case, TRAIN), SETTINGS, 3)
    ours, theirs = (model.linear_change(case.pairs.membership) for model in (other, trained[0]))
    assert not np.allclose(ours, theirs, atol=1e-2)


def planted(case: KnownEffects):
    """A fold in which a carried training perturbation is declared a test one."""
    sets = list(case.pairs.sets)
    sets[case.pairs.labels.index("P03")] = TEST
    return replace(case.pairs, sets=tuple(sets))


def test_a_planted_leak_stops_training_and_baselines(case):
    for fit in (lambda pairs: train_model(pairs, SETTINGS), lambda pairs: fit_baselines(pairs, ["mean"])):
        with pytest.raises(LeakageError, match=r"1 test perturbation\(s\): P03.*rerun the pair stage"):
            fit(planted(case))


def test_only_genes_of_training_perturbations_count_as_seen(case, trained):
    seen = trained[0].predictor.perturbation.seen.numpy()
    training = [label for label, s in zip(case.pairs.labels, case.pairs.sets, strict=True) if s == TRAIN]
    expected = {gene for label in training for gene in label.split("+")}
    assert {g for g, known in zip(case.pairs.perturbed_genes, seen, strict=True) if known} == expected
    assert "P20" not in expected and "P16" not in expected


def test_predictions_are_control_plus_the_linear_branch_plus_the_gated_latent_change(case, trained):
    model = trained[0]
    membership, codes = case.pairs.membership[case.test], case.pairs.codes
    readout = model.readout.weight.double().numpy()
    for weight in (0.0, 0.7):
        gated = replace(model, weight=weight, scale=0.8)
        expression, sd, tokens = gated.predict(case.test)
        z = model.control_tokens.expand(len(case.test), -1, -1)
        with torch.no_grad():
            moved = (model.predictor(z, torch.from_numpy(membership).float()) - z).numpy()
        linear = model.branch.change(membership, codes, readout)
        change = weight * moved.reshape(len(moved), -1) @ readout + linear
        expected = np.maximum(model.control_expression.numpy() + 0.8 * change, 0)
        np.testing.assert_allclose(expression, expected, atol=1e-5)
        linear_tokens = model.branch.token_change(membership, codes).reshape(moved.shape)
        np.testing.assert_allclose(tokens, z.numpy() + 0.8 * (weight * moved + linear_tokens), atol=1e-5)
        np.testing.assert_allclose(
            sd, 0.8 * model.branch.uncertainty(codes).standard_deviation(membership), rtol=1e-5
        )
        assert (expression >= 0).all()


def test_a_model_embeds_cells_block_by_block_and_refuses_other_shapes(case, trained):
    model, store = trained[0], CellStore(case.pairs, torch.device("cpu"))
    cells = torch.arange(50)
    x, library = store.rows(cells), store.log_library[cells]
    expected = model.embedding(x, library)
    tokens = model.encode(x.numpy(), library.numpy(), block=16)
    torch.testing.assert_close(torch.from_numpy(tokens), expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(model.embed(x.numpy(), library.numpy()), tokens.mean(axis=1), atol=1e-5)
    assert model.encode(x.numpy()[:0], library.numpy()[:0]).shape == (0, *tokens.shape[1:])
    with pytest.raises(ValueError, match=r"expression has shape \(50, 7\); expected \(any, 30\)"):
        model.encode(x.numpy()[:, :7], library.numpy())
    with pytest.raises(ValueError, match=r"log_library has shape \(3,\); expected \(50,\)"):
        model.encode(x.numpy(), library.numpy()[:3])


def test_validation_perturbations_scale_the_change_but_few_of_them_only_a_little(case, trained):
    model, validation = trained[0], case.pairs.labels_of(VAL)
    means, control = case.pairs.pseudobulk()
    said = replace(model, scale=1.0).change(*model.asked(validation))
    observed = means[validation] - control
    best = (said * observed).sum() / (said**2).sum()
    n = len(validation)
    assert model.scale == pytest.approx((n * best + 4) / (n + 4), rel=1e-5)
    assert model.scale != 1.0


def test_without_its_latent_view_the_linear_branch_is_the_kernel_ridge_baseline(case, trained):
    baseline = fit_baselines(case.pairs, ["kernel_ridge"])["kernel_ridge"]
    membership, codes = case.pairs.membership, case.pairs.codes
    alone = replace(trained[0].branch, share=0.0)
    readout = trained[0].readout.weight.double().numpy()
    np.testing.assert_allclose(alone.change(membership, codes, readout), baseline.delta, atol=1e-6)
    sd = alone.uncertainty(codes).standard_deviation(membership)
    np.testing.assert_allclose(sd, baseline.sd, atol=1e-6)


def test_training_from_mapped_cells_gives_the_same_model_and_copies_none_of_them(case, trained, tmp_path):
    """What is mapped is read where it lies, so that it may be larger than memory."""
    mapped = {}
    for key in ("data", "indices"):
        values = getattr(case.pairs, key)
        np.save(tmp_path / key, values)
        mapped[key] = np.load(tmp_path / f"{key}.npy", mmap_mode="c")
    again, _, _ = train_model(replace(case.pairs, **mapped), SETTINGS, seed=3)
    for ours, theirs in zip(again.predict(case.test), trained[0].predict(case.test), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    cells = sparse_pairs(2_000_000)
    tracemalloc.start()
    try:
        run._fingerprint(cells, SETTINGS, 0, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.5 * cells.data.nbytes


def sparse_pairs(entries: int) -> Pairs:
    """A fold with many entries for its few cells."""
    small = KnownEffects(seed=1, cells_per_label=8, n_controls=40).pairs
    return replace(small, data=np.ones(entries, np.float32), indices=np.zeros(entries, np.int32))


def test_any_combination_of_coded_genes_can_be_asked_for_and_control_does_not_move(case, trained):
    model, genes = trained[0], case.pairs.perturbed_genes
    asked = multi_hot(["control", "P20+P21", "P21+P20", "P00+P01"], genes)
    expression, _, tokens = model.predict_membership(asked)
    np.testing.assert_array_equal(expression[0], model.control_expression.clamp(min=0))
    np.testing.assert_array_equal(tokens[0], model.control_tokens)
    np.testing.assert_array_equal(expression[1], expression[2])
    known = case.pairs.labels.index("P00+P01")
    np.testing.assert_allclose(expression[3], model.predict(np.array([known]))[0][0], atol=1e-6)
    with pytest.raises(ValueError, match=rf"shape \(1, 3\); expected \(any, {len(genes)}\)"):
        model.predict_membership(np.zeros((1, 3)))


def without_validation(case: KnownEffects):
    """The fold with its validation labels among the training ones."""
    return replace(case.pairs, sets=tuple(TRAIN if s == VAL else s for s in case.pairs.sets))


def test_without_validation_labels_training_labels_are_left_out_in_turn_for_the_gate(case, monkeypatch):
    seen, original = [], run.gate

    def spy(addition, residual):
        seen.append((addition, residual, original(addition, residual)))
        return seen[-1][-1]

    trainings = []
    train_predictor = run.train_predictor

    def counted(*arguments):
        trainings.append((arguments[3].numpy(), arguments[4].numpy()))
        return train_predictor(*arguments)

    monkeypatch.setattr(run, "gate", spy)
    monkeypatch.setattr(run, "train_predictor", counted)
    pairs = without_validation(case)
    model, history, metrics = train_model(pairs, SETTINGS, 3)
    train = pairs.labels_of(TRAIN)
    turns = trainings[:3]
    assert all(not set(fitted) & set(out) for fitted, out in turns)
    assert all(set(fitted) | set(out) == set(train) for fitted, out in turns)
    assert sorted(np.concatenate([out for _, out in turns])) == list(train)
    addition, residual, (weight, t) = seen[0]
    assert addition.shape == residual.shape == (len(train), len(pairs.genes))
    assert metrics["latent_weight"] == model.weight == weight and metrics["latent_weight_t"] == t
    assert set(history.loc[history["stage"] == "predictor", "turn"].dropna()) == {0, 1, 2}
    means, control = pairs.pseudobulk()
    # What the gate is asked to explain is smaller than the effects, and not what the fit itself leaves.
    delta = means[train] - control
    fitted = delta - model.linear_change(pairs.membership[train])
    assert (fitted**2).sum() < (residual**2).sum() < (delta**2).sum()


def test_tokens_of_training_cells_are_standardized_and_controls_averaged(case, trained):
    model, store = trained[0], CellStore(case.pairs, torch.device("cpu"))
    cells = torch.from_numpy(case.pairs.cells_of(TRAIN))
    tokens = model.embedding(store.rows(cells), store.log_library[cells])
    torch.testing.assert_close(tokens.mean(dim=0), torch.zeros_like(tokens[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.std(dim=0), torch.ones_like(tokens[0]), atol=1e-3, rtol=0)
    controls = torch.from_numpy(np.flatnonzero(case.pairs.perturbation == -1))
    mean = model.embedding(store.rows(controls), store.log_library[controls]).mean(dim=0)
    torch.testing.assert_close(mean, model.control_tokens, atol=1e-4, rtol=0)
    np.testing.assert_allclose(model.control_expression, case.pairs.pseudobulk()[1], atol=1e-6)


def test_metrics_count_what_was_trained_on(case, trained):
    model, history, metrics = trained
    assert metrics["n_training_cells"] == 240 + 18 * 30  # controls, and 18 perturbations of 30 cells
    assert metrics["n_training_perturbations"] == 18 and metrics["n_validation_perturbations"] == 4
    held = [p for m in (model.embedding, model.predictor) for p in m.parameters()]
    assert metrics["parameters"] == sum(p.numel() for p in held)
    assert not any(p.requires_grad for p in held)
    steps = history.groupby("stage")["step"].apply(list)
    assert steps["encoder"] == [10, 20, 30] and steps["predictor"][0] == 10
    assert np.isfinite(history.loc[history["stage"] == "encoder", ["loss", "std_cells", "rankme"]]).all(
        axis=None
    )


def test_shuffled_priors_permute_the_known_codes_and_none_drops_them(case):
    settings = {"encoder": {"steps": 2}, "predictor": {"steps": 2}, "embedding": "untrained"}
    pairs = case.pairs
    codes = pairs.codes["network"].copy()
    codes[5] = 0
    pairs = replace(pairs, codes={"network": codes})
    model, _, _ = train_model(pairs, tiny_settings(priors="shuffled", **settings), 0)
    shuffled = model.codes["network"].numpy()
    assert not shuffled[5].any()
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, codes))
    assert (shuffled != codes).any(axis=1).sum() > 10
    model, _, _ = train_model(pairs, tiny_settings(priors="none", **settings), 0)
    assert model.predictor.perturbation.sources == ()


def test_a_reused_encoder_is_kept_as_it_is_and_must_be_of_the_same_split(case, trained):
    alone = tiny_settings(linear_branch=False)
    model, history, _ = train_model(case.pairs, alone, 3, encoder_from=trained[0])
    for name, values in model.embedding.state_dict().items():
        assert torch.equal(values, trained[0].embedding.state_dict()[name])
    assert torch.equal(model.control_tokens, trained[0].control_tokens)
    assert set(history["stage"]) == {"predictor"}
    assert model.embedding is not trained[0].embedding
    for other_kind in (tiny_settings(embedding="pca"), tiny_settings(encoder={"embed_dim": 32})):
        with pytest.raises(ValueError, match="the encoder to reuse is jepa of another size or kind"):
            train_model(case.pairs, other_kind, 3, encoder_from=trained[0])
    other = replace(case.pairs, facts={**case.pairs.facts, "split_sha256": "f" * 8})
    with pytest.raises(ValueError, match="trained on another split or other genes"):
        train_model(other, alone, 3, encoder_from=trained[0])


def latent_error(case: KnownEffects, **changes) -> float:
    """Squared error of Δ of unseen genes; singles alone, because partners of combinations were seen."""
    predictor = {"steps": 300, "evaluate_every": 30, "learning_rate": 3e-3, "dropout": 0.0}
    settings = tiny_settings(**changes, encoder={"steps": 60}, predictor={**predictor, "interaction": False})
    model, _, _ = train_model(case.pairs, settings, 0)
    unseen = np.array(["+" not in case.pairs.labels[row] for row in case.test])
    delta = model.predict(case.test[unseen])[0] - model.control_expression.numpy()
    return float(((delta - case.test_effect[unseen]) ** 2).mean())


def mean_error(case: KnownEffects) -> float:
    unseen = np.array(["+" not in case.pairs.labels[row] for row in case.test])
    delta = fit_baselines(case.pairs, ["mean"])["mean"].delta[case.test[unseen]]
    return float(((delta - case.test_effect[unseen]) ** 2).mean())


def test_held_out_prediction_finds_a_known_effect_and_beats_the_mean(case):
    assert latent_error(case) < 0.1 * mean_error(case)


def test_the_latent_predictor_alone_beats_the_mean_on_genes_that_no_training_cell_carries(case):
    assert latent_error(case, linear_branch=False) < 0.7 * mean_error(case)


@pytest.mark.parametrize("linear_branch", [True, False])
def test_shuffled_codes_do_not_beat_the_mean(case, linear_branch):
    assert latent_error(case, priors="shuffled", linear_branch=linear_branch) > 0.9 * mean_error(case)


def collapsed_embedding(case: KnownEffects) -> tuple[CellStore, CellEmbedding, torch.Tensor, torch.Tensor]:
    """An encoder whose tokens depend on their position alone, as a flattened regularizer likes it."""
    store = CellStore(case.pairs, torch.device("cpu"))
    cells = torch.from_numpy(case.pairs.cells_of(TRAIN))
    torch.manual_seed(0)
    embedding = CellEmbedding(
        tiny_settings(encoder={"num_tokens": 32, "embed_dim": 16}).encoder.build(store.n_genes)
    )
    mean, scale = store.moments(cells)
    embedding.fit_inputs(mean, scale, store.log_library[cells])
    with torch.no_grad():
        embedding.body.to_tokens.weight.mul_(1e-3)
        embedding.body.library.weight.mul_(1e-3)
        embedding.body.position.normal_()
    return store, embedding, cells, torch.from_numpy(case.pairs.perturbation.astype(np.int64))


@pytest.mark.parametrize("regularizer", ["flat", "per_token"])
def test_the_flat_regularizer_keeps_a_collapse_that_per_token_undoes(case, regularizer):
    store, embedding, cells, classes = collapsed_embedding(case)
    size = {"num_tokens": 32, "embed_dim": 16, "ema": 0.9, "steps": 80, "monitor_every": 80}
    rest = {"learning_rate": 3e-3, "regularizer": regularizer, "action_weight": 0.0}
    settings = tiny_settings(encoder={**size, **rest}).encoder
    run = lambda: encoder_stage.train_encoder(  # noqa: E731
        store, embedding, cells, classes, settings, 0, Checkpoint(None, "encoder", "")
    )
    if regularizer == "flat":
        with pytest.raises(
            CollapseError, match=r"collapsed by step 80.*Use train.encoder.regularizer: per_token"
        ):
            run()
    else:
        assert run()[-1]["std_cells"] > 0.3


def test_hiding_all_genes_of_a_cell_keeps_the_training_finite(case):
    settings = tiny_settings(
        encoder={"mask_low": 0.95, "mask_high": 0.99, "steps": 10}, predictor={"steps": 2}
    )
    _, history, _ = train_model(case.pairs, settings, 0)
    assert np.isfinite(history.loc[history["stage"] == "encoder", "loss"]).all()


def test_training_writes_nothing_without_a_checkpoint_folder(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_model(case.pairs, tiny_settings(encoder={"steps": 2}, predictor={"steps": 2}), 0)
    assert not list(Path(tmp_path).iterdir())


def test_types_and_doses_reach_the_predictor_in_both_kinds_of_training(case):
    n = len(case.pairs.labels)
    pairs = replace(
        case.pairs,
        types=("CRISPRa", "CRISPRi"),
        type_code=(np.arange(n) % 2).astype(np.int32),
        dose=np.where(np.arange(n) % 3, 1, 4).astype(np.float32),
    )
    for stages in ("two", "joint"):
        model, _, _ = train_model(pairs, tiny_settings(stages=stages, linear_branch=False), 0)
        model = replace(model, weight=1.0)
        codes = model.predictor.perturbation
        assert (codes.type_offset.abs().sum(dim=1) > 0).all() and codes.dose_offset.abs().sum() > 0
        asked = case.pairs.membership[:1]
        answers = [
            model.predict_membership(asked, np.array([kind]), np.array([dose], dtype=np.float32))[2]
            for kind, dose in ((0, 1), (1, 1), (0, 4))
        ]
        assert not np.array_equal(answers[0], answers[1]) and not np.array_equal(answers[0], answers[2])


def test_joint_training_trains_both_at_once_and_a_reused_encoder_is_standardized(case):
    settings = tiny_settings(stages="joint")
    model, history, metrics = train_model(case.pairs, settings, 3)
    assert set(history["stage"]) == {"joint"} and model.blended
    assert torch.equal(model.embedding.token_scale, torch.ones_like(model.embedding.token_scale))
    asked = model.asked(case.test)
    w = metrics["latent_weight"]
    change = model.scale * ((1 - w) * model.linear_change(asked[0]) + w * model.latent_change(*asked))
    expected = np.maximum(model.control_expression.numpy() + change, 0)
    np.testing.assert_allclose(model.predict(case.test)[0], expected, atol=1e-5)
    blended = replace(model, weight=0.25, scale=1.0)
    change = 0.75 * model.linear_change(asked[0]) + 0.25 * model.latent_change(*asked)
    expected = np.maximum(model.control_expression.numpy() + change, 0)
    np.testing.assert_allclose(blended.predict(case.test)[0], expected, atol=1e-5)
    # A model of the same config that is not trained jointly is standardized once, and reused as it is.
    pca, _, _ = train_model(
        case.pairs, tiny_settings(stages="joint", embedding="pca", linear_branch=False), 3
    )
    again, _, _ = train_model(case.pairs, tiny_settings(stages="joint", embedding="pca"), 3, pca)
    torch.testing.assert_close(again.embedding.token_scale, pca.embedding.token_scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.control_tokens, pca.control_tokens, rtol=1e-4, atol=1e-4)
    other, _, _ = train_model(case.pairs, tiny_settings(stages="joint", priors="shuffled"), 3, model)
    assert not torch.allclose(other.embedding.token_scale, torch.ones_like(other.embedding.token_scale))
    assert not other.blended
