"""The simulator: like a real screen, and its truth is what its counts show."""

import gzip
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from biojepa.errors import InputError
from biojepa.files import sha256_of
from biojepa.simulate import ScreenFiles, ScreenParameters, SimulatorSettings, simulate_screen
from biojepa.simulate.cells import DYING, SINGLET, STATUSES
from biojepa.simulate.design import draw_screen
from biojepa.simulate.network import GeneNetwork, draw_network, observe_edges, smooth_over_network
from biojepa.simulate.responses import Responses

ROOT = Path(__file__).resolve().parents[2]
SMALL = SimulatorSettings(n_cells=2_300, n_genes=200, n_singles=12, n_combinations=6, n_modules=4)
# No fates, no weak guides, no batches: what is left are the effects.
CLEAN = {
    "n_batches": 1,
    "share_no_guide": 0,
    "share_two_guides": 0,
    "share_doublets": 0,
    "share_dying": 0,
    "share_weak_guides": 0,
}
# No cycle, all perturbations clear.
PLAIN = SimulatorSettings(
    n_cells=12_000, n_genes=150, n_singles=4, n_combinations=2, n_modules=4, share_control=0.25,
    share_clear=1, share_weak=0, cycle_strength=0, **CLEAN,
)  # fmt: skip


def load_script(relative):
    spec = importlib.util.spec_from_file_location(Path(relative).stem + "_script", ROOT / relative)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digests(folder):
    return {path.name: sha256_of(path) for path in sorted(Path(folder).iterdir())}


def read_cells(folder):
    return pd.read_csv(folder / "truth_cells.tsv.gz", sep="\t", keep_default_na=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen")
    simulate_screen(SMALL, path, seed=3)
    return path


@pytest.fixture(scope="module")
def default_screen():
    """Return the default screen with 3,000 cells, and its counts (cells, genes + guides)."""
    settings = SimulatorSettings(n_cells=3_000)
    screen = draw_screen(settings, ScreenParameters.read())
    counts = sparse.vstack(list(screen.blocks())).toarray()
    return screen, counts


# --- like a real screen ------------------------------------------------------------------------


def test_depth_zero_fraction_and_gene_means_agree_with_the_fitted_screen(default_screen):
    screen, counts = default_screen
    fitted = screen.parameters
    clean = screen.plan.status[:3_000] == SINGLET
    nuclear = counts[clean][:, : screen.genes.n_nuclear]
    assert np.mean(nuclear == 0) == pytest.approx(fitted.zero_fraction, abs=0.03)

    # Depth: a panel sees its share of the library, so only the spread of the logs is comparable.
    depth = screen.plan.depth[:3_000][clean]
    total_spread = np.hypot(fitted.library_log_sd, fitted.batch_depth_log_sd)
    assert np.log(depth).mean() == pytest.approx(fitted.library_log_mean, abs=0.25)
    assert np.log(nuclear.sum(1)).std() == pytest.approx(total_spread, abs=0.08)

    cp10k = nuclear.sum(0) / depth.sum() * 1e4
    for level in (0.2, 0.5, 0.8):
        expected = np.interp(level, fitted.quantile_levels, fitted.log_cp10k_quantiles)
        assert np.log(np.quantile(cp10k, level)) == pytest.approx(expected, abs=0.3)


def test_dispersion_of_the_counts_follows_the_fitted_trend(default_screen):
    screen, counts = default_screen
    clean = screen.plan.status[:3_000] == SINGLET
    nuclear = counts[clean][:, : screen.genes.n_nuclear].astype(float)
    size = screen.plan.depth[:3_000][clean] / screen.plan.depth[:3_000][clean].mean()
    mean, dispersion = load_script("benchmarks/fit_simulator.py").moment_dispersion(nuclear, size)
    for low, high in ((0.1, 0.3), (0.3, 1), (1, 10)):
        genes = (mean >= low) & (mean < high)
        expected = np.median(screen.parameters.dispersion(mean[genes]))
        assert np.median(dispersion[genes]) == pytest.approx(expected, rel=0.35)


def test_moment_dispersion_recovers_that_of_negative_binomial_counts():
    rng = np.random.default_rng(0)
    size = rng.uniform(0.5, 1.5, 40_000)
    size /= size.mean()
    phi, mu = np.array([0.2, 1.0]), np.array([3.0, 0.5])
    expected = size[:, None] * mu
    counts = rng.negative_binomial(1 / phi, 1 / (1 + phi * expected))
    mean, dispersion = load_script("benchmarks/fit_simulator.py").moment_dispersion(
        counts.astype(float), size
    )
    np.testing.assert_allclose(mean, mu, rtol=0.02)
    np.testing.assert_allclose(dispersion, phi, rtol=0.08)


def test_mitochondrial_share_and_guide_umis_agree_with_the_fitted_screen(default_screen):
    screen, counts = default_screen
    fitted, plan = screen.parameters, screen.plan
    n_genes = len(screen.genes.names)
    share = counts[:, n_genes - 13 : n_genes].sum(1) / counts[:, :n_genes].sum(1)
    status = plan.status[:3_000]
    assert np.median(share[status == SINGLET]) == pytest.approx(np.exp(fitted.mito_log_mean), rel=0.2)
    assert np.median(share[status == DYING]) > 4 * np.median(share[status == SINGLET])

    alone = np.flatnonzero((status == SINGLET) & (plan.guide[:3_000, 1] < 0))
    carried = counts[alone, n_genes + plan.guide[alone, 0]]
    assert np.log(np.median(carried)) == pytest.approx(fitted.guide_signal_log_mean, abs=0.15)
    ambient = counts[alone, n_genes:].sum(1) - carried
    assert ambient.mean() == pytest.approx(fitted.guide_background_mean, rel=0.15)


def test_half_of_the_perturbations_are_reproducible_and_a_third_are_hardly_there():
    settings = SimulatorSettings(n_cells=8_000, n_combinations=0, n_genes=600, **CLEAN)
    screen = draw_screen(settings, ScreenParameters.read())
    counts = sparse.vstack(list(screen.blocks()))[:, : screen.genes.n_nuclear].toarray()
    total = counts.sum(1, keepdims=True)
    expression = np.log1p(counts / total * 1e4)
    control = expression[screen.plan.condition == 0].mean(0)
    halves = []
    for condition in range(1, 61):
        change = expression[screen.plan.condition == condition] - control
        halves.append(np.corrcoef(change[::2].mean(0), change[1::2].mean(0))[0, 1])
    by_class = pd.Series(halves).groupby(screen.responses.strength_class).median()
    assert 0.6 < by_class["clear"] < 0.95
    assert by_class["weak"] < 0.35
    assert np.mean(np.array(halves) > 0.5) == pytest.approx(0.5, abs=0.15)


def test_stored_parameters_are_those_of_the_real_files(real_data):
    content = load_script("benchmarks/fit_simulator.py").fit(Path(real_data))
    stored = json.loads((ROOT / "resources" / "simulator.json").read_text())
    assert content.keys() == stored.keys()
    assert content["provenance"]["sha256"] == stored["provenance"]["sha256"]
    for name, value in content.items():
        if name != "provenance":
            np.testing.assert_allclose(value, stored[name], rtol=1e-4, err_msg=name)


# --- the truth is what the counts show ------------------------------------------------------------


def test_counts_show_the_true_log_fold_changes(tmp_path):
    # Weak guides among them: the truth of a perturbation is the mean over its guides.
    simulate_screen(replace(PLAIN, share_weak_guides=0.4), tmp_path, seed=1)
    raw, truth = ad.read_h5ad(tmp_path / "raw.h5ad"), ad.read_h5ad(tmp_path / "truth.h5ad")
    perturbation = read_cells(tmp_path)["perturbation"].to_numpy()
    counts = raw[:, truth.var_names].X
    control = np.asarray(counts[perturbation == "control"].mean(0)).ravel()
    common = (control > 0.5) & ~truth.var_names.str.startswith("MT-")
    assert common.sum() > 30
    for label in truth.obs_names:
        seen = np.asarray(counts[perturbation == label].mean(0)).ravel()
        observed = np.log(seen[common] / control[common])
        true = truth[label].X.ravel()[common]
        slope = (observed @ true) / (true @ true)
        assert np.corrcoef(observed, true)[0, 1] > 0.95, label
        assert slope == pytest.approx(1, abs=0.1), label


def test_perturbed_gene_goes_down_fourfold_and_hardly_with_a_weak_guide():
    settings = replace(PLAIN, n_combinations=0, share_weak_guides=0.5, seed=5)
    screen = draw_screen(settings, ScreenParameters.read())
    counts = sparse.vstack(list(screen.blocks())).tocsc()
    condition, weak = screen.plan.condition, screen.guides.is_weak[screen.plan.guide[:, 0]]
    falls = {True: [], False: []}
    for index, gene in enumerate(screen.responses.targets):
        column = counts[:, gene].toarray().ravel()
        for is_weak in (True, False):
            cells = (condition == index + 1) & (weak == is_weak)
            if cells.sum() > 200:
                falls[is_weak].append(np.log2(column[cells].mean() / column[condition == 0].mean()))
    # Full efficacy is log2FC -2; guides reach 85-100 % of it, weak ones 5-30 %.
    assert np.mean(falls[False]) == pytest.approx(-1.85, abs=0.25)
    assert -0.7 < np.mean(falls[True]) < 0


def test_log_fold_change_of_two_guides_by_hand():
    responses = Responses(
        targets=np.array([0, 2]), strength=np.ones(2), strength_class=np.array(["clear"] * 2),
        programme=np.zeros((2, 1)), loadings=np.zeros((1, 3)),
        change=np.array([[0.0, 1.0, 3.0], [2.0, -1.0, 0.0]], dtype=np.float32),
        pairs=np.array([[0, 1]]), interaction=np.array([0.5]), knock_down=-1.5, saturation=2.0,
    )  # fmt: skip
    result = responses.log_fold_change(
        np.array([0, 0, -1]), np.array([-1, 1, -1]),
        np.array([[1.0, 0.0], [0.5, 1.0], [0.0, 0.0]]), np.array([1.0, 0.5, 1.0]),
    )  # fmt: skip
    single = [-1.5, 2 * np.tanh(0.5), 2 * np.tanh(1.5)]
    pair = [2 * np.tanh(0.5) - 0.75, 2 * np.tanh(-0.125), 2 * np.tanh(0.375) - 1.5]
    np.testing.assert_allclose(result, [single, pair, [0, 0, 0]], rtol=1e-6)


def test_additive_combinations_add_up_and_interactions_are_those_stated(tmp_path):
    settings = SimulatorSettings(n_cells=100, n_singles=20, n_combinations=20, n_genes=300)
    simulate_screen(settings, tmp_path)
    truth = ad.read_h5ad(tmp_path / "truth.h5ad")
    full = pd.DataFrame(truth.layers["full_efficacy"], truth.obs_names, truth.var_names)
    pairs = truth.obs[truth.obs["n_perturbed_genes"] == 2]
    assert (pairs["interaction"] == "additive").sum() == 10
    for gene in truth.obs_names[truth.obs["n_perturbed_genes"] == 1]:
        assert full.loc[gene, gene] == pytest.approx(-2 * np.log(2))
    for label, row in pairs.iterrows():
        first, second = label.split("+")
        others = full.columns.difference([first, second])
        inverse = {name: np.arctanh(full.loc[name, others] / 2.5) for name in (first, second, label)}
        expected = row["interaction_factor"] * (inverse[first] + inverse[second])
        np.testing.assert_allclose(inverse[label], expected, atol=2e-4)
        same_module = truth.var.loc[first, "module"] == truth.var.loc[second, "module"]
        if row["interaction"] == "additive":
            assert row["interaction_factor"] == 1
        elif same_module:
            assert row["interaction"] == "buffering" and 0.3 <= row["interaction_factor"] <= 0.7
        else:
            assert row["interaction"] == "synergy" and 1.3 <= row["interaction_factor"] <= 1.7


# --- unseen genes follow from the network and from nothing else -----------------------------------


def leave_one_out(kernel, changes):
    """Correlate each row, less the mean of the others, with its kernel-weighted prediction."""
    scores = []
    for row in range(len(changes)):
        others = np.delete(np.arange(len(changes)), row)
        centre = changes[others].mean(0)
        weight = kernel[row, others]
        predicted = weight @ (changes[others] - centre) / max(np.abs(weight).sum(), 1e-12)
        scores.append(np.corrcoef(predicted, changes[row] - centre)[0, 1])
    return np.array(scores)


def test_unseen_responses_follow_from_the_network_file_and_not_from_a_shuffled_one(tmp_path):
    simulate_screen(SimulatorSettings(n_cells=500), tmp_path)
    truth = ad.read_h5ad(tmp_path / "truth.h5ad")
    singles = truth[truth.obs["strength_class"].isin(["clear", "between"]).to_numpy()]
    genes = [gene for gene in truth.var_names if not gene.startswith("MT-")]
    position = {gene: index for index, gene in enumerate(genes)}
    listed = pd.read_csv(tmp_path / "network.tsv.gz", sep="\t")
    edges = listed.apply(lambda column: column.map(position)).to_numpy()
    network = GeneNetwork(np.zeros(len(genes), int), np.zeros(len(genes), bool), edges)
    diffusion = smooth_over_network(network, np.eye(len(genes)), restart=0.1)
    rows = [position[gene] for gene in singles.obs_names]
    profile = diffusion[rows] - diffusion.mean(0)
    kernel = np.maximum(np.corrcoef(profile), 0) ** 2
    changes = singles.layers["full_efficacy"]
    shuffled = np.random.default_rng(0).permutation(len(rows))
    assert np.median(leave_one_out(kernel, changes)) > 0.4
    assert abs(np.median(leave_one_out(kernel[shuffled][:, shuffled], changes))) < 0.2


def test_expression_of_a_gene_does_not_betray_its_response():
    screen = draw_screen(SimulatorSettings(n_cells=10, n_singles=490), ScreenParameters.read())
    genes, targets = screen.genes, screen.responses.targets
    programme = screen.responses.programme - screen.responses.programme.mean(0)

    def explained_by(columns):
        design = np.column_stack([np.ones(len(targets)), columns])
        fitted = design @ np.linalg.lstsq(design, programme, rcond=None)[0]
        return fitted.var() / programme.var()

    share, dispersion = np.log(genes.share[targets]), np.log(genes.dispersion[targets])
    visible = [share, dispersion, *genes.cycle[:, targets], *genes.batch[:, targets]]
    # By chance 7 columns explain 7 / 490 of the variance, and 11 explain 11 / 490.
    assert explained_by(np.column_stack(visible)) < 0.035
    modules = screen.network.module[targets][:, None] == np.arange(1, 12)
    assert explained_by(modules.astype(float)) > 0.5


def test_page_rank_smoothing_solves_its_equation():
    rng = np.random.default_rng(0)
    network = draw_network(60, 3, 4, rng)
    values = rng.standard_normal((60, 2))
    adjacency = np.zeros((60, 60))
    for left, right in network.edges:
        adjacency[left, right] = adjacency[right, left] = 1
    alone = adjacency.sum(1) == 0
    adjacency[alone, alone] = 1
    step = adjacency / adjacency.sum(1, keepdims=True)
    exact = np.linalg.solve(np.eye(60) - 0.7 * step, 0.3 * values)
    np.testing.assert_allclose(smooth_over_network(network, values), exact, atol=1e-5)


def test_network_has_modules_hubs_and_the_degree_asked_for():
    rng = np.random.default_rng(0)
    network = draw_network(2_000, 10, 12, rng)
    left, right = network.edges.T
    assert (left < right).all() and len(np.unique(network.edges, axis=0)) == len(network.edges)
    degree = np.bincount(network.edges.ravel(), minlength=2_000)
    assert degree.mean() == pytest.approx(12, rel=0.1)
    # 85 % of the ends are drawn within the module, a tenth of the rest falls into it by chance.
    assert np.mean(network.module[left] == network.module[right]) == pytest.approx(0.865, abs=0.03)
    assert degree[network.is_hub].mean() > 3 * degree[~network.is_hub].mean()
    seen = observe_edges(network, 0.2, rng)
    true = set(map(tuple, network.edges.tolist()))
    listed = set(map(tuple, seen.tolist()))
    assert len(true & listed) / len(true) == pytest.approx(0.8, abs=0.03)
    assert len(listed - true) / len(true) == pytest.approx(0.2, abs=0.02)


# --- cells and files ---------------------------------------------------------------------------


def test_fates_have_the_shares_asked_for(folder):
    share = read_cells(folder)["status"].value_counts() / SMALL.n_cells
    expected = {"no_guide": 0.05, "two_guides": 0.03, "doublet": 0.04, "dying": 0.05, "singlet": 0.83}
    assert set(expected) == set(STATUSES)
    for status, value in expected.items():
        assert share[status] == pytest.approx(value, abs=0.001)


def test_truth_of_cells_matches_the_guide_counts(folder):
    raw, cells = ad.read_h5ad(folder / "raw.h5ad"), read_cells(folder)
    assert cells["barcode"].tolist() == raw.obs_names.tolist()
    guides = raw[:, raw.var["feature_types"] == "CRISPR Guide Capture"]
    target = pd.read_csv(folder / "guides.csv").set_index("guide")["target"]
    counts = pd.DataFrame(guides.X.toarray(), columns=guides.var_names)
    for status, rows in cells.groupby("status"):
        held = rows["guides"].str.split(";")
        found = np.array([counts.loc[row, names].min() for row, names in held.items()])
        rest = np.array([counts.loc[row].drop(names).max() for row, names in held.items()])
        if status == "no_guide":
            assert np.median(found) <= 2
        else:
            assert np.mean(found > rest) > 0.9
        for names, label in zip(held, rows["perturbation"], strict=True):
            genes = sorted({target[name] for name in names} - {"non-targeting"})
            assert label == ("+".join(genes) or "control")
    n_guides = cells["guides"].str.count(";") + 1
    assert (n_guides[cells["status"] == "two_guides"] == 2).all()
    assert (n_guides[cells["status"] == "doublet"] >= 2).all()


def test_doublets_have_the_umis_of_two_cells(default_screen):
    screen, counts = default_screen
    plan, n = screen.plan, 3_000
    doublet = np.flatnonzero(plan.partner[:n] >= 0)
    assert len(doublet) == 120
    assert (plan.batch[doublet] == plan.batch[plan.partner[doublet]]).all()
    total = counts[:, : len(screen.genes.names)].sum(1)
    depth = plan.depth[:n].copy()
    depth[doublet] += plan.depth[plan.partner[doublet]]
    per_umi = (total / depth)[doublet].mean() / (total / depth)[plan.status[:n] == SINGLET].mean()
    assert per_umi == pytest.approx(1, abs=0.05)


def test_raw_file_is_a_feature_barcode_matrix_without_the_truth(folder):
    raw = ad.read_h5ad(folder / "raw.h5ad")
    assert list(raw.obs.columns) == ["batch"]
    assert list(raw.var.columns) == ["gene_id", "feature_types"]
    assert not (raw.uns or raw.obsm or raw.varm or raw.layers)
    assert raw.obs_names.is_unique and raw.var_names.is_unique and raw.var["gene_id"].is_unique
    assert raw.obs_names.str.fullmatch(r"[ACGT]{16}-[123]").all()
    assert raw.var["feature_types"].value_counts().to_dict() == {
        "Gene Expression": 200,
        "CRISPR Guide Capture": 40,
    }
    assert raw.var_names.str.startswith("MT-").sum() == 13
    assert raw.X.has_canonical_format and raw.X.dtype == np.int32 and raw.X.data.min() >= 1
    assert set(raw.obs["batch"].cat.categories) == {"batch1", "batch2", "batch3"}
    guides = pd.read_csv(folder / "guides.csv")
    kind = raw.var["feature_types"] == "CRISPR Guide Capture"
    assert guides["guide"].tolist() == raw.var_names[kind].tolist()
    assert (guides["target"] == "non-targeting").sum() == 4  # 10 % of 36 targeting guides, rounded
    genes = set(raw.var_names[~kind])
    network = pd.read_csv(folder / "network.tsv.gz", sep="\t")
    assert genes.issuperset(network["gene_a"]) and genes.issuperset(network["gene_b"])
    lines = (folder / "gene_sets.gmt").read_text().splitlines()
    assert genes.issuperset(gene for line in lines for gene in line.split("\t")[2:])


def test_same_seed_gives_the_same_bytes_and_block_size_changes_no_count(folder, tmp_path):
    simulate_screen(replace(SMALL, block_size=1), tmp_path / "small_blocks", seed=3)
    simulate_screen(replace(SMALL, seed=4), tmp_path / "other_seed")
    first = digests(folder)
    small = digests(tmp_path / "small_blocks")
    tables = ("guides.csv", "network.tsv.gz", "gene_sets.gmt", "truth_cells.tsv.gz")
    assert [small[name] for name in tables] == [first[name] for name in tables]
    # HDF5 lays chunks out in the order of writing, so only what the matrix holds is the same.
    one, other = (ad.read_h5ad(path / "raw.h5ad").X for path in (folder, tmp_path / "small_blocks"))
    assert one.shape == other.shape and (one != other).nnz == 0
    assert not set(digests(tmp_path / "other_seed").values()) & set(first.values())
    simulate_screen(SMALL, tmp_path / "again", seed=3)
    assert digests(tmp_path / "again") == digests(folder)


def test_blocks_cover_every_barcode_once():
    screen = draw_screen(replace(SMALL, block_size=1_100), ScreenParameters.read())
    shapes = [block.shape for block in screen.blocks()]
    assert shapes == [(1_000, 240), (1_000, 240), (300, 240)]


def test_noise_of_one_run_of_barcodes_does_not_return_in_the_next(default_screen):
    screen, counts = default_screen
    common = np.argsort(-screen.genes.share[: screen.genes.n_nuclear])[:200]
    rate = counts[:, common] / screen.plan.depth[:3_000, None]
    noise = np.log(rate + 1e-5)
    noise = (noise - noise.mean(0)) / noise.std(0)
    noise -= noise.mean(1, keepdims=True)
    between_runs = [(noise[start : start + 500] * noise[:500]).mean() for start in (500, 1_000, 1_500)]
    np.testing.assert_allclose(between_runs, 0, atol=0.02)


def test_compressed_tables_hold_neither_time_nor_file_name(folder):
    header = (folder / "truth_cells.tsv.gz").read_bytes()[:10]
    # RFC 1952: no flags (bit 3 would be a file name), modification time zero.
    assert header[:2] == b"\x1f\x8b" and header[3] == 0 and header[4:8] == bytes(4)
    with gzip.open(folder / "network.tsv.gz", "rt") as file:
        assert file.readline() == "gene_a\tgene_b\n"


def test_an_interrupted_simulation_leaves_no_matrix(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("biojepa.simulate.design.draw_counts", fail)
    with pytest.raises(OSError, match="disk full"):
        simulate_screen(SMALL, tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if "raw" in path.name]


def test_script_writes_the_files_that_the_rule_names(tmp_path, folder):
    names = ScreenFiles.in_folder(tmp_path / "renamed")
    paths = {name: str(path.with_name("my_" + path.name)) for name, path in vars(names).items()}
    settings = {
        "n_cells": 2_300,
        "n_genes": 200,
        "n_singles": 12,
        "n_combinations": 6,
        "n_modules": 4,
        "seed": 3,
    }
    snakemake = SimpleNamespace(
        output=SimpleNamespace(**paths), params=SimpleNamespace(settings=settings), input={}
    )
    load_script("workflow/scripts/simulate.py").main(snakemake)
    for name, path in paths.items():
        assert sha256_of(path) == sha256_of(getattr(ScreenFiles.in_folder(folder), name)), name


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_cell": 10}, r"simulator\.n_cell:.*no setting.*did you mean n_cells"),
        ({"n_cells": 0}, r"simulator\.n_cells: found 0; expected 1 or more"),
        ({"n_cells": "many"}, r"simulator\.n_cells: found 'many'; expected a whole number"),
        ({"n_cells": 10.5}, r"simulator\.n_cells: found 10.5; expected a whole number"),
        ({"effect_strength": float("nan")}, "effect_strength: found nan; expected a finite number"),
        ({"share_control": 5}, "share_control: found 5; expected a share between 0 and 1.*0.05"),
        ({"share_control": True}, "share_control: found True; expected a finite number"),
        ({"n_genes": 100}, "n_singles: found 60; expected at most 43.*raise n_genes"),
        ({"n_modules": 300}, "n_modules: found 300; expected at most 246"),
        ({"n_singles": 5}, "n_combinations: found 20; expected at most 10.*lower n_combinations"),
        ({"share_doublets": 0.9, "share_dying": 0.2}, "share_doublets.*a sum of 1.18; expected at most 1"),
        ({"share_clear": 0.8}, "share_clear, share_weak: found a sum of 1.13"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(settings, message):
    with pytest.raises(InputError, match=message):
        SimulatorSettings.from_dict(settings)


def test_unusable_parameters_are_named(tmp_path):
    path = tmp_path / "simulator.json"
    with pytest.raises(InputError, match=r"simulator\.json: found no such file.*fit_simulator"):
        ScreenParameters.read(path)
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        ScreenParameters.read(path)
    path.write_text('{"library_log_mean": 9}')
    with pytest.raises(InputError, match="found no library_log_sd"):
        ScreenParameters.read(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_cells": 1, "n_genes": 40, "n_singles": 1, "n_combinations": 0, "n_modules": 1, "n_programmes": 1},
        {"n_cells": 30, "share_control": 0, "n_batches": 1},
        {"n_cells": 30, "share_control": 1},
        {"n_cells": 30, "share_weak_guides": 1, "share_interactions": 1, "network_noise": 1},
    ],
)
def test_extreme_settings_still_make_a_readable_screen(settings, tmp_path):
    simulate_screen(SimulatorSettings(**settings), tmp_path)
    raw, truth = ad.read_h5ad(tmp_path / "raw.h5ad"), ad.read_h5ad(tmp_path / "truth.h5ad")
    assert raw.n_obs == settings["n_cells"] and raw.X.sum() > 0
    assert np.isfinite(truth.X).all()
