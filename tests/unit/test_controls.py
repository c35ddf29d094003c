"""Claims about the control that each cell is paired with, one strategy after the other."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from test_pairs import GENES, SETTINGS, Screen, same

from biojepa import controls as controls_module
from biojepa.balance import balance_table, pairing_balance
from biojepa.contracts import BALANCE_COLUMNS, STRATEGIES, TEST, TRAIN, VAL
from biojepa.controls import (
    ControlPools,
    batch_levels,
    draw_controls,
    match_depth,
    nearest_controls,
    principal_scores,
    transport_controls,
)
from biojepa.errors import InputError
from biojepa.pairing import freeze_split
from biojepa.pairs import CONTROL_CODE, match_controls, read_pairs
from biojepa.training.cells import Populations

RNG = np.random.default_rng


def one_pool(perturbation: np.ndarray) -> ControlPools:
    return ControlPools.of(perturbation, [])


# --- pools ----------------------------------------------------------------------------------------


def test_a_pool_holds_the_controls_that_are_alike_at_the_finest_level_with_any():
    perturbation = np.array([-1, -1, -1, -1, 0, 0, 1, 1])
    fine = np.array([5, 5, 7, 9, 5, 7, 8, 2])
    coarse = np.array([0, 0, 0, 1, 0, 0, 1, 3])
    pools = ControlPools.of(perturbation, [fine, coarse])
    of_cell = [pools.pools[place].tolist() for place in pools.pool_of_cell]
    assert of_cell == [[0, 1], [0, 1], [2], [3], [0, 1], [2], [3], [0, 1, 2, 3]]
    assert pools.level.tolist() == [0, 0, 0, 0, 0, 0, 1, 2]


def test_a_screen_without_a_control_has_no_pool():
    with pytest.raises(ValueError, match="no control cell"):
        ControlPools.of(np.array([0, 1]), [])


def test_pools_of_batches_draw_as_populations_do():
    perturbation = np.array([-1, -1, -1, 0, 0, 0] * 20)
    batch = np.array([0, 0, 1, 0, 1, 2] * 20)
    context = np.array([0, 1, 1, 0, 0, 1] * 20)
    for place in (None, context):
        pools = ControlPools.of(perturbation, batch_levels(batch, place))
        expected, orphans = match_controls(perturbation, batch, RNG(0), place)
        ours = draw_controls(pools, RNG(0))
        assert np.unique(batch[pools.level > 0]).tolist() == orphans
        for cell in range(len(batch)):
            assert expected[cell] in pools.pools[pools.pool_of_cell[cell]]
            assert ours[cell] in pools.pools[pools.pool_of_cell[cell]]


# --- matched --------------------------------------------------------------------------------------


def test_a_matched_control_is_one_of_those_nearest_in_depth_and_each_of_them_is_drawn():
    rng = RNG(1)
    depth = rng.normal(8, 1, 60).astype(np.float32)
    perturbation = np.r_[np.full(30, -1), np.zeros(30, dtype=int)]
    drawn = [set() for _ in depth]
    for seed in range(60):
        for cell, control in enumerate(match_depth(one_pool(perturbation), depth, 3, RNG(seed))):
            drawn[cell].add(int(control))
    for cell in range(60):
        others = [control for control in range(30) if control != cell]
        nearest = sorted(others, key=lambda control: abs(depth[control] - depth[cell]))[:3]
        assert drawn[cell] == set(nearest)


def test_fewer_controls_than_asked_for_are_all_drawn_and_an_only_one_is_its_own_partner():
    perturbation, depth = np.array([-1, -1, 0]), np.array([1.0, 5.0, 2.0])
    drawn = {tuple(match_depth(one_pool(perturbation), depth, 10, RNG(seed)).tolist()) for seed in range(30)}
    assert drawn == {(1, 0, 0), (1, 0, 1)}
    assert match_depth(one_pool(np.array([0, -1])), depth[:2], 10, RNG(0)).tolist() == [1, 1]


def test_depth_is_matched_the_same_in_blocks(monkeypatch):
    depth, perturbation = RNG(2).normal(8, 1, 50), np.where(np.arange(50) % 3, 0, -1)
    whole = match_depth(one_pool(perturbation), depth, 1, RNG(0))
    monkeypatch.setattr(controls_module, "BLOCK_OF_CELLS", 7)
    np.testing.assert_array_equal(match_depth(one_pool(perturbation), depth, 1, RNG(0)), whole)


# --- nearest --------------------------------------------------------------------------------------


def test_the_nearest_control_is_at_the_least_distance_and_never_the_cell_itself(monkeypatch):
    monkeypatch.setattr(controls_module, "BLOCK_OF_CELLS", 11)
    rng = RNG(3)
    scores = rng.standard_normal((80, 4)).astype(np.float32)
    perturbation = np.where(rng.random(80) < 0.5, -1, 0)
    batch = rng.integers(2, size=80)
    partner = nearest_controls(ControlPools.of(perturbation, [batch]), scores, RNG(0))
    for cell in range(80):
        pool = [c for c in range(80) if perturbation[c] == -1 and batch[c] == batch[cell] and c != cell]
        distance = np.linalg.norm(scores[pool].astype(float) - scores[cell], axis=1)
        assert partner[cell] == pool[distance.argmin()]


def test_of_a_large_pool_the_nearest_is_taken_among_so_many_that_are_drawn(monkeypatch):
    monkeypatch.setattr(controls_module, "NEAREST_CONTROLS", 12)
    scores = RNG(4).standard_normal((300, 3)).astype(np.float32)
    perturbation = np.where(np.arange(300) < 60, -1, 0)
    batch = (np.arange(300) % 6 == 0).astype(int)  # 50 controls of one batch, 10 of the other
    pools = ControlPools.of(perturbation, [batch])
    partner = nearest_controls(pools, scores, RNG(5))
    controls = np.arange(60)
    for code, size in ((0, 12), (1, 10)):
        cells = np.flatnonzero(batch == code)
        drawn = np.unique(partner[cells])
        assert set(drawn) <= set(controls[batch[:60] == code]) and len(drawn) <= size
        for cell in cells:
            others = drawn[drawn != cell]
            distance = np.linalg.norm(scores[others].astype(float) - scores[cell], axis=1)
            assert partner[cell] == others[distance.argmin()]
    whole = set(partner[batch == 0])
    assert len(whole) > 9
    assert set(nearest_controls(pools, scores, RNG(6))[batch == 0]) != whole
    np.testing.assert_array_equal(nearest_controls(pools, scores, RNG(5)), partner)


def test_the_only_control_is_nearest_to_itself():
    assert nearest_controls(one_pool(np.array([0, -1])), np.eye(2, dtype=np.float32), RNG(0)).tolist() == [
        1,
        1,
    ]


# --- optimal transport ----------------------------------------------------------------------------


def test_transport_between_as_many_cells_as_controls_is_the_optimal_assignment():
    rng = RNG(4)
    perturbation = np.r_[np.full(40, -1), np.zeros(40, dtype=int), np.ones(40, dtype=int)]
    scores = rng.standard_normal((120, 3)) + perturbation[:, None]
    partner = transport_controls(one_pool(perturbation), perturbation, scores, 512, RNG(0))
    for label in (0, 1):
        cells = np.flatnonzero(perturbation == label)
        cost = ((scores[cells][:, None] - scores[None, :40]) ** 2).sum(axis=2)
        np.testing.assert_array_equal(partner[cells], linear_sum_assignment(cost)[1])
        nearest = cost.argmin(axis=1)
        assert len(set(nearest)) < 40, "the nearest controls would be another pairing"
    assert (perturbation[partner[:40]] == CONTROL_CODE).all() and (partner[:40] != np.arange(40)).all()


def test_the_plan_is_drawn_from_by_its_weights():
    # Two cells on a line share three controls: each sends 2/3 of its mass to the control at its side.
    perturbation, scores = np.array([-1, -1, -1, 0, 0]), np.array([[0.0], [5], [10], [1], [9]])
    drawn = np.array(
        [
            transport_controls(one_pool(perturbation), perturbation, scores, 512, RNG(seed))[3:]
            for seed in range(3000)
        ]
    )
    shares = [[(drawn[:, cell] == control).mean() for control in range(3)] for cell in (0, 1)]
    np.testing.assert_allclose(shares, [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], atol=0.03)


def test_no_plan_is_larger_than_asked_for_and_every_cell_has_a_control(monkeypatch):
    import ot

    sizes, original = [], ot.emd

    def measured(a, b, cost, **options):
        sizes.append(cost.shape)
        return original(a, b, cost, **options)

    monkeypatch.setattr(ot, "emd", measured)
    rng = RNG(5)
    perturbation = rng.permutation(np.r_[np.full(30, -1), np.zeros(45, dtype=int), np.ones(7, dtype=int)])
    scores = rng.standard_normal((82, 2))
    partner = transport_controls(one_pool(perturbation), perturbation, scores, 10, RNG(0))
    assert (perturbation[partner] == CONTROL_CODE).all()
    assert sorted(sizes) == [(7, 10), *[(9, 10)] * 5]


def test_a_plan_that_did_not_converge_is_no_plan(monkeypatch):
    monkeypatch.setattr(controls_module, "MAX_ITERATIONS", 1)
    perturbation = np.r_[np.full(40, -1), np.zeros(40, dtype=int)]
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"transport of \(40, 40\) cells"):
        transport_controls(one_pool(perturbation), perturbation, RNG(0).standard_normal((80, 3)), 512, RNG(0))


# --- principal components -------------------------------------------------------------------------


def write_matrix(path, X) -> h5py.File:
    rows = sparse.csr_matrix(X.astype(np.float32))
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["shape"] = X.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(rows, name)
    return h5py.File(path)


def test_scores_are_those_of_a_singular_value_decomposition_of_the_fitted_cells(tmp_path):
    rng = RNG(6)
    X = rng.gamma(1, 1, (60, 12)) * (rng.random((60, 12)) < 0.5)
    keep, fitted, columns = np.arange(60) % 5 > 0, np.arange(60) % 5 > 1, np.array([0, 2, 3, 5, 8, 11])
    with write_matrix(tmp_path / "m.h5", X) as file:
        scores = principal_scores(file["X"], keep, fitted, columns, 3, RNG(0))
    X = X.astype(np.float32).astype(float)[:, columns]
    axes = np.linalg.svd(X[fitted] - X[fitted].mean(axis=0))[2][:3]
    expected = (X[keep] - X[fitted].mean(axis=0)) @ axes.T
    np.testing.assert_allclose(np.abs(scores), np.abs(expected), atol=1e-5)


# --- in the file ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Screen:
    screen = Screen(tmp_path_factory.mktemp("controls"))
    rng = RNG(7)
    screen.types = np.array(["T", "B"])[rng.integers(2, size=204)]
    screen.mito = np.where(rng.random(204) < 0.1, np.nan, rng.uniform(0, 20, 204))
    screen.write(cell_type=screen.types, n_genes=(screen.X > 0).sum(axis=1), pct_mito=screen.mito)
    return screen


@pytest.fixture(scope="module")
def files(screen):
    return {strategy: screen.build(f"{strategy}.h5", strategy=strategy) for strategy in STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_every_cell_a_control_and_says_its_name(files, strategy):
    pairs = files[strategy]
    assert pairs.facts["strategy"] == strategy
    assert (pairs.perturbation[pairs.partner] == CONTROL_CODE).all()
    assert (pairs.partner != np.arange(len(pairs.partner))).all()
    others = replace(files["population"], partner=pairs.partner, facts=pairs.facts)
    assert same(pairs, others), "but for the partners, the file is the same"


def test_random_pairs_across_batches_and_the_others_do_not(screen, files):
    lonely = files["random"].batches.index("b2")
    for strategy, pairs in files.items():
        with_controls = pairs.batch != lonely
        alike = (pairs.batch[pairs.partner] == pairs.batch)[with_controls]
        assert 0.3 < alike.mean() < 0.7 if strategy == "random" else alike.all()
    matched = files["matched"]
    rows = pd.Index(screen.names).get_indexer(matched.cell_names)
    assert (screen.types[rows][matched.partner] == screen.types[rows]).all()


def test_nearest_and_transport_in_the_file_follow_the_components_of_training_cells(screen, files):
    nearest = files["nearest"]
    rows = pd.Index(screen.names).get_indexer(nearest.cell_names)
    X = screen.X[:, [GENES.index(gene) for gene in nearest.genes]].astype(float)
    fitted = screen.cells_in(TRAIN) | (screen.labels == "control")
    # More components than genes were asked for: all of them but one are taken.
    axes = np.linalg.svd(X[fitted] - X[fitted].mean(axis=0))[2][: X.shape[1] - 1]
    scores = (X[rows] - X[fitted].mean(axis=0)) @ axes.T
    for cell in np.flatnonzero(nearest.batch < 2):
        pool = np.flatnonzero((nearest.perturbation == -1) & (nearest.batch == nearest.batch[cell]))
        pool = pool[pool != cell]
        best = pool[np.linalg.norm(scores[pool] - scores[cell], axis=1).argmin()]
        assert nearest.partner[cell] == best

    def cost(pairs):
        moved = pairs.perturbation >= 0
        return ((scores - scores[pairs.partner])[moved] ** 2).sum()

    assert cost(nearest) < cost(files["optimal_transport"]) < 0.9 * cost(files["population"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cells_of_test_perturbations_and_their_expression_pair_nothing(tmp_path, strategy):
    screen = Screen(tmp_path)
    before = screen.build(strategy=strategy)
    screen.X[screen.cells_in(TEST)] = 7.5
    screen.library[screen.cells_in(TEST)] = 1e6
    screen.write()
    assert same(before, screen.build("again.h5", strategy=strategy))
    assert not set(before.cell_names) & set(screen.names[screen.cells_in(TEST)])


def test_validation_cells_set_no_component_and_training_cells_do(tmp_path):
    screen = Screen(tmp_path)
    before = screen.build(strategy="nearest", n_genes=40, n_components=3)
    original = screen.X.copy()
    screen.X[screen.cells_in(VAL)] *= RNG(0).uniform(0, 30, 40).astype(np.float32)
    screen.write()
    after = screen.build("validation.h5", strategy="nearest", n_genes=40, n_components=3)
    others = np.isin(before.perturbation, before.labels_of(VAL), invert=True)
    np.testing.assert_array_equal(after.partner[others], before.partner[others])
    screen.X = original
    screen.X[np.flatnonzero(screen.cells_in(TRAIN))[::2]] *= RNG(0).uniform(0, 30, 40).astype(np.float32)
    screen.write()
    changed = screen.build("training.h5", strategy="nearest", n_genes=40, n_components=3)
    controls = before.perturbation == CONTROL_CODE
    assert (changed.partner[controls] != before.partner[controls]).mean() > 0.1


def test_components_of_one_gene_are_refused_with_what_to_change(tmp_path):
    screen = Screen(tmp_path)
    screen.labels = np.where(screen.labels == "control", "control", "OUTSIDE")
    screen.labels[screen.labels == "OUTSIDE"] = np.resize([f"OUT{number}" for number in range(1, 7)], 144)
    pd.DataFrame({"gene_a": ["OUT1", "OUT3"], "gene_b": ["OUT2", "OUT4"]}).to_csv(
        screen.network, sep="\t", index=False
    )
    screen.write()
    screen.table = freeze_split(screen.cells, screen.split, "made", "perturbation", 1, SETTINGS)
    with pytest.raises(InputError, match=r"1 gene\(s\).*pair\.strategy nearest.*set pair\.strategy"):
        screen.build(strategy="nearest", n_genes=1)


def test_a_lone_cell_is_sent_to_any_control_of_its_pool_alike():
    """Its plan is the only one, which needs no solver."""
    perturbation = np.append(np.full(5, CONTROL_CODE), np.arange(4000))
    scores = RNG(0).normal(size=(4005, 3))
    pools = ControlPools.of(perturbation, [np.zeros(4005, dtype=np.int64)])
    partner = transport_controls(pools, perturbation, scores, 512, RNG(1))
    counts = np.bincount(partner[5:], minlength=5)
    assert len(counts) == 5 and np.abs(counts - 800).max() < 5 * np.sqrt(640)


def test_an_unknown_strategy_is_refused(screen):
    with pytest.raises(ValueError, match="strategy is 'twins'; expected one of population, random"):
        screen.build("twins.h5", strategy="twins")


# --- what training uses ---------------------------------------------------------------------------


def test_training_draws_new_controls_for_populations_and_partners_otherwise(files):
    trained = torch.tensor([row for row, count in enumerate(files["random"].n_cells) if count])
    for strategy, pairs in files.items():
        torch.manual_seed(0)
        drawn, controls = (part.numpy() for part in Populations(pairs, torch.device("cpu")).draw(trained, 50))
        assert (pairs.perturbation[drawn] == trained.numpy()[:, None]).all()
        agree = (pairs.partner[drawn] == controls).mean()
        assert agree < 0.2 if strategy == "population" else agree == 1


def test_files_that_name_no_strategy_hold_populations(files):
    facts = {key: value for key, value in files["random"].facts.items() if key != "strategy"}
    assert Populations(replace(files["random"], facts=facts), torch.device("cpu")).partner is None


# --- balance --------------------------------------------------------------------------------------


def test_the_balance_of_a_small_table_by_hand():
    # Controls 0-3, cells 4-7 of two perturbations.
    perturbation = np.array([-1, -1, -1, -1, 0, 0, 1, 1])
    obs = pd.DataFrame(
        {
            "batch": ["a", "a", "a", "b", "a", "b", "b", "b"],
            "library_size": np.exp([1.0, 2, 3, 4, 5, 4, 3, 2]),
            "pct_mito": [1, 2, np.nan, 3, np.nan, 6, 4, 5],
        }
    )
    partner = np.array([1, 0, 0, 0, 3, 3, 2, 1])
    table = balance_table(obs, perturbation, partner, None, "matched").set_index(["covariate", "level"])
    assert (table["n_paired_controls"] == 3).all() and set(table["strategy"]) == {"matched"}
    scale = np.sqrt((3 / 16 + 3 / 16) / 2)  # of shares 1/4 and 3/4
    b = table.loc[("batch", "b")]
    assert b[["perturbed_mean", "control_mean", "paired_mean"]].tolist() == [0.75, 0.25, 0.5]
    measured = b[["smd_before", "smd_after", "abs_smd_before", "abs_smd_after"]].astype(float)
    # By perturbation: shares 1/2 and 1 against 1/4; against the partners, 1/2 - 1 and 1 - 0.
    np.testing.assert_allclose(measured, np.array([0.5, 0.25, 0.5, 0.75]) / scale)
    depth = table.loc[("log_library_size", "")]
    scale = np.sqrt((1.25 + 1.25) / 2)
    measured = depth[["smd_before", "smd_after", "abs_smd_before", "abs_smd_after"]].astype(float)
    np.testing.assert_allclose(measured, np.array([1.0, 3.5 - 13 / 4, 1.0, (0.5 + 0) / 2]) / scale)
    mito = table.loc[("pct_mito", "")]
    assert mito[["n_cells", "n_controls", "perturbed_mean", "control_mean"]].tolist() == [3, 3, 5, 2]
    assert mito["paired_mean"] == pytest.approx((3 + 3 + 2) / 3)
    assert table.index.tolist() == [
        ("batch", "a"),
        ("batch", "b"),
        ("log_library_size", ""),
        ("pct_mito", ""),
    ]


def test_the_balance_of_populations_is_what_training_draws_on_average(screen, files):
    pairs = files["population"]
    table = pairing_balance(screen.cells, screen.folder / "population.h5").set_index(["covariate", "level"])
    assert tuple(table.reset_index()[list(BALANCE_COLUMNS)]) == BALANCE_COLUMNS
    torch.manual_seed(1)
    perturbed = np.flatnonzero(pairs.perturbation >= 0)
    populations = Populations(pairs, torch.device("cpu"))
    group = populations.group[torch.from_numpy(np.repeat(perturbed, 2000))]
    drawn = populations.draw_controls(group).numpy()
    rows = pd.Index(screen.names).get_indexer(pairs.cell_names)
    depth = np.log(screen.library.astype(float))[rows]
    assert table.loc[("log_library_size", ""), "paired_mean"] == pytest.approx(depth[drawn].mean(), abs=1e-3)
    share = (screen.batch[rows][drawn] == "b0").mean()
    assert table.loc[("batch", "b0"), "paired_mean"] == pytest.approx(share, abs=2e-3)


def test_each_strategy_balances_what_it_is_made_to_balance(tmp_path):
    screen = Screen(tmp_path)
    # Perturbed cells are shallower, and more often of batch b0 and type B.
    control, rng = screen.labels == "control", RNG(8)
    screen.library = np.exp(rng.normal(np.where(control, 8.5, 8.1), 0.5)).astype(np.float32)
    screen.batch = np.where(rng.random(204) < np.where(control, 0.4, 0.8), "b0", "b1")
    types = np.where(rng.random(204) < np.where(control, 0.4, 0.6), "B", "T")
    screen.write(cell_type=types)
    after = {}
    for strategy in STRATEGIES:
        screen.build(f"{strategy}.h5", strategy=strategy, n_nearest=3)
        table = pairing_balance(screen.cells, screen.folder / f"{strategy}.h5")
        wanted = table[table["level"].isin(["b0", "B", ""])].set_index("covariate")
        assert wanted.loc[["batch", "cell_type"], "smd_before"].min() > 0.25
        assert wanted.loc["log_library_size", "smd_before"] < -0.5
        after[strategy] = wanted["smd_after"].abs()
    assert after["random"]["batch"] > 0.3
    for strategy in ("population", "matched", "nearest", "optimal_transport"):
        assert after[strategy]["batch"] == 0
    assert after["matched"]["cell_type"] == 0 and after["population"]["cell_type"] > 0.2
    # Few controls are as shallow as the shallowest cells, so not all of the difference goes.
    assert after["population"]["log_library_size"] > 0.5 and after["matched"]["log_library_size"] < 0.2


def test_a_table_of_other_cells_is_refused(screen, files, tmp_path):
    other = Screen(tmp_path)
    other.names = np.array([f"other{i}" for i in range(204)])
    other.write()
    with pytest.raises(InputError, match=r"random\.h5: found cell cell\d+, which .*cells\.h5ad lacks"):
        pairing_balance(other.cells, screen.folder / "random.h5")
    assert read_pairs(screen.folder / "random.h5").facts["strategy"] == "random"
