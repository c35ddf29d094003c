"""Which cells respond: the mixture, the line, and screens in which a known share escapes."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import optimize, sparse, stats

from biojepa.preprocess import PreprocessSettings, preprocess_screen
from biojepa.preprocess import describe as describe_module
from biojepa.preprocess.responding import NARROWEST, WIDEST, Controls, Mixture, draw_line, fit_mixture
from biojepa.raw import ScreenSource, read_screen
from biojepa.raw import matrix as matrix_module

SOURCE = ScreenSource("toy", "toy.h5ad", perturbation_column="gene", control_label="NT")
SETTINGS = PreprocessSettings(
    min_cells_per_perturbation=10,
    mad_threshold=None,
    permutations=199,
    effect_components=10,
    effect_cells=100,
    cell_cycle=False,
)
GENES = [f"G{i}" for i in range(60)]
# Cells, share that responds, and fold change of twenty genes in those that do.
DESIGN = {
    "NT": (400, 0.0, 1.0),
    "HALF": (300, 0.5, 2.0),
    "MOST": (90, 0.85, 2.0),
    "ALL": (200, 1.0, 2.0),
    "NO_EFFECT": (250, 0.0, 1.0),
    "SMALL": (200, 1.0, 1.15),
    "TINY": (15, 1.0, 3.0),
}
# Standard error of a share among so few cells, and the error of the fit: the bound of the tests below.
BOUND = 0.08


def toy(seed=0):
    """Return a screen and which of its cells respond."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(3.0, 1.5, len(GENES))
    labels = np.repeat(list(DESIGN), [n for n, _, _ in DESIGN.values()])
    responds = np.concatenate([np.arange(n) < round(share * n) for n, share, _ in DESIGN.values()])
    change = np.repeat([change for _, _, change in DESIGN.values()], [n for n, _, _ in DESIGN.values()])
    mean = np.tile(base, (len(labels), 1))
    mean[:, 20:30] *= np.where(responds, change, 1.0)[:, None]
    mean[:, 30:40] /= np.where(responds, change, 1.0)[:, None]
    depth = rng.lognormal(0, 0.2, len(labels))
    counts = rng.poisson(mean * depth[:, None])
    order = rng.permutation(len(labels))
    obs = pd.DataFrame({"gene": labels[order]}, index=[f"c{i}" for i in range(len(labels))])
    var = pd.DataFrame({"gene_id": GENES}, index=GENES)
    screen = ad.AnnData(X=sparse.csr_matrix(counts[order].astype(np.float32)), obs=obs, var=var)
    return screen, responds[order]


@pytest.fixture(scope="module")
def found():
    screen, responds = toy()
    result = preprocess_screen(screen, SOURCE, SETTINGS)
    assert result.cells.obs_names.equals(screen.obs_names)
    return result, responds


def shares(result):
    return result.perturbations.set_index("perturbation")["responding_share"]


def test_the_share_that_escapes_is_found(found):
    result, responds = found
    for label in ("HALF", "MOST", "ALL"):
        assert shares(result)[label] == pytest.approx(DESIGN[label][1], abs=BOUND)
        here = (result.cells.obs["perturbation"] == label).to_numpy()
        assert np.mean(result.cells.obs["flag_non_responding"].to_numpy()[here] != responds[here]) > 0.9


def test_all_cells_get_a_value_sampled_or_not(found):
    """Of HALF 100 of 300 cells are sampled; the others are placed by another pass, and as well."""
    obs = found[0].cells.obs
    half = (obs["perturbation"] == "HALF").to_numpy()
    assert obs.loc[half, "responding_posterior"].notna().all()
    everything = preprocess_screen(
        toy()[0], SOURCE, PreprocessSettings(**{**SETTINGS.__dict__, "effect_cells": 400})
    )
    other = everything.cells.obs["responding_posterior"].to_numpy()[half]
    assert np.corrcoef(other, obs["responding_posterior"].to_numpy()[half])[0, 1] > 0.95


def test_what_has_no_clear_effect_is_not_split(found):
    result, _ = found
    obs = result.cells.obs
    for label in ("NO_EFFECT", "SMALL", "TINY"):
        assert np.isnan(shares(result)[label])
        assert obs.loc[obs["perturbation"] == label, "responding_posterior"].isna().all()
    assert obs.loc[obs["is_control"], "responding_posterior"].isna().all()
    # A missing value is no flag.
    np.testing.assert_array_equal(obs["flag_non_responding"], obs["responding_posterior"] < 0.5)
    assert not obs.loc[obs["responding_posterior"].isna(), "flag_non_responding"].any()
    # SMALL is left alone for its distance and not for want of a clear effect.
    assert result.perturbations.set_index("perturbation").loc["SMALL", "effect_q"] < 0.05


@pytest.mark.parametrize(("fewest", "told"), [(4, True), (5, False)])
def test_a_share_that_four_genes_hold_up_is_not_told(monkeypatch, fewest, told):
    """Half of the cells of FEW have four genes raised; the minimum alone leaves them unsplit."""
    screen, _ = toy()
    labels = screen.obs["gene"].replace({"SMALL": "FEW"}).to_numpy()
    counts, few = screen.X.toarray(), np.flatnonzero(labels == "FEW")
    depth = 3 * counts.sum(axis=1)
    counts[few] = counts[labels == "NT"][: len(few)]
    depth[few] = depth[labels == "NT"][: len(few)]
    counts[np.ix_(few[::2], range(4))] += 30
    changed = ad.AnnData(sparse.csr_matrix(counts), screen.obs.assign(gene=labels, depth=depth), screen.var)
    monkeypatch.setattr(describe_module, "MIN_CHANGED_GENES", fewest)
    result = preprocess_screen(changed, replace(SOURCE, library_size_column="depth"), SETTINGS)
    line = result.perturbations.set_index("perturbation").loc["FEW"]
    assert line["effect_q"] < 0.05
    assert line["n_deg"] == 4
    obs = result.cells.obs.loc[result.cells.obs["perturbation"] == "FEW"]
    assert obs["responding_posterior"].notna().all() == told
    assert obs["responding_posterior"].isna().all() != told
    assert obs["flag_non_responding"].sum() == (len(few) // 2 if told else 0)
    assert np.isfinite(shares(result)["FEW"]) == told


@pytest.mark.parametrize("entries", [60, 5000])
def test_nothing_depends_on_the_size_of_the_blocks(found, monkeypatch, entries):
    monkeypatch.setattr(matrix_module, "BLOCK_ENTRIES", entries)
    cut = preprocess_screen(toy()[0], SOURCE, SETTINGS)
    pd.testing.assert_frame_equal(cut.cells.obs, found[0].cells.obs, check_exact=True)
    pd.testing.assert_frame_equal(cut.perturbations, found[0].perturbations, check_exact=True)


def test_nothing_is_said_where_the_config_says_no():
    settings = PreprocessSettings(**{**SETTINGS.__dict__, "responding_cells": False})
    result = preprocess_screen(toy()[0], SOURCE, settings)
    assert not {"responding_posterior", "flag_non_responding"} & set(result.cells.obs.columns)
    assert shares(result).isna().all()


def test_a_perturbation_without_effect_lies_where_the_controls_do():
    """A line that the same cells drew would place them away from the controls."""
    rng = np.random.default_rng(1)
    middles, naive = [], []
    for _ in range(40):
        control, points = rng.normal(size=(300, 20)), rng.normal(size=(40, 20))
        controls = Controls(control, rng)
        line = draw_line(points, controls, rng)
        if line is None:  # nothing differs by more than its error
            continue
        middles.append(line.sampled.mean())
        naive.append((points @ line.direction - line.start).mean())
    assert len(middles) > 30
    assert abs(np.mean(middles)) < 3 * np.std(middles) / np.sqrt(len(middles))
    assert np.mean(naive) > 0.4


def test_a_line_is_the_linear_discriminant():
    """With very many cells, shrinkage and noise vanish, and the distance is that of Mahalanobis."""
    rng = np.random.default_rng(2)
    mix = rng.normal(size=(4, 4))
    shift = np.array([1.0, -2.0, 0.5, 1.0])
    control, points = rng.normal(size=(20_000, 4)) @ mix, rng.normal(size=(20_000, 4)) @ mix + shift
    line = draw_line(points, Controls(control, rng), rng)
    covariance = mix.T @ mix
    expected = np.linalg.solve(covariance, shift)
    cosine = line.direction @ expected / np.linalg.norm(line.direction) / np.linalg.norm(expected)
    assert cosine > 0.999
    assert line.sampled.mean() == pytest.approx(np.sqrt(shift @ expected), rel=0.02)
    assert line.sampled.std() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("share", "mean", "sd"), [(0.3, 3.0, 1.0), (0.6, 2.5, 1.4), (0.8, 4.0, 0.7)])
def test_the_mixture_is_the_most_likely_one(share, mean, sd):
    rng = np.random.default_rng(3)
    n = 500
    responds = rng.random(n) < share
    place = np.where(responds, rng.normal(mean, sd, n), rng.normal(size=n))

    def loss(x):
        density = x[0] * stats.norm.pdf(place, x[1], x[2]) + (1 - x[0]) * stats.norm.pdf(place)
        return -np.log(density).sum()

    bounds = [(1e-6, 1 - 1e-6), (0, None), (NARROWEST, WIDEST)]
    best = optimize.minimize(loss, [share, mean, sd], bounds=bounds)
    found = fit_mixture(place)
    assert found.gain == pytest.approx(stats.norm.logpdf(place).sum() * -1 - best.fun, abs=0.05)
    np.testing.assert_allclose([found.share, found.mean, found.sd], best.x, atol=0.03)
    density = found.share * stats.norm.pdf(place, found.mean, found.sd)
    expected = density / (density + (1 - found.share) * stats.norm.pdf(place))
    middle = (place > 0) & (place < mean)  # outwards of there, it is kept from falling
    np.testing.assert_allclose(found.posterior(place)[middle], expected[middle], rtol=1e-9)
    assert np.mean((found.posterior(place) >= 0.5) == responds) > 0.85


@pytest.mark.parametrize("sd", [0.5, 1.0, 3.0])
def test_a_cell_farther_out_responds_no_less(sd):
    place = np.linspace(-30, 30, 601)
    posterior = Mixture(0.5, 3.0, sd, 0.0).posterior(place)
    assert (np.diff(posterior) >= 0).all()
    # Of a wide component, the tail below the controls gives the lowest that it can be.
    assert posterior[0] < 0.2
    assert posterior[-1] > 0.99


def test_in_papalexi_most_knock_outs_of_the_interferon_pathway_respond(papalexi):
    """Cells called non-responding still have the transcript that responding ones have lost."""
    result = preprocess_screen(read_screen(papalexi), papalexi, PreprocessSettings())
    pathway = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]
    assert shares(result)[pathway].between(0.7, 0.95).all()
    # Targets without any effect in these cells.
    assert shares(result)[["ATF2", "CAV1", "CD86", "PDCD1LG2", "STAT3", "TNFRSF14"]].isna().all()
    cells, posterior = result.cells, result.cells.obs["responding_posterior"].to_numpy()
    for gene in ("JAK2", "STAT1", "IFNGR2"):
        here = (cells.obs["perturbation"] == gene).to_numpy()
        cp10k = np.expm1(cells[:, gene].X.toarray().ravel())
        control = cp10k[cells.obs["is_control"].to_numpy()].mean()
        assert cp10k[here & (posterior >= 0.5)].mean() < 0.65 * control
        assert cp10k[here & (posterior < 0.5)].mean() > 0.65 * control
    # The guides of the four do the same; two of IRF1 do little, which their siblings show.
    guides = result.guides.set_index("guide_id")
    assert guides.loc[guides["perturbation"].isin(pathway), "agreement"].min() > 0.8
    assert guides.loc["IRF1g1", "q"] < 0.05
    assert guides.loc["IRF1g1", "agreement"] < 0.7
    assert guides.loc[["IRF1g1", "IRF1g2"], "effect_size"].max() < 0.7
    assert guides.loc[["IRF1g3", "IRF1g4"], "effect_size"].min() > 2


def test_cells_placed_later_lie_as_the_sampled_ones_do_in_every_batch():
    """Half of the cells are of a lane in which the genes that tell who responds are changed, too."""
    screen, responds = toy()
    in_y = np.random.default_rng(8).random(len(responds)) < 0.5
    counts = screen.X.toarray()
    counts[np.ix_(in_y, range(20, 30))] *= 4
    screen.X = sparse.csr_matrix(counts)
    screen.obs["lane"] = np.where(in_y, "y", "x")
    settings = replace(SETTINGS, effect_cells=60)
    result = preprocess_screen(screen, replace(SOURCE, batch_column="lane"), settings)
    posterior = result.cells.obs["responding_posterior"].to_numpy()
    half = (screen.obs["gene"] == "HALF").to_numpy()
    for lane in (in_y, ~in_y):
        here = half & lane
        assert np.mean((posterior[here] > 0.5) == responds[here]) > 0.9
