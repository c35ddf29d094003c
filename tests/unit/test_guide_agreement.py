"""Guides against their siblings: distances, test, flags."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from biojepa.contracts import GUIDE_TABLE_COLUMNS
from biojepa.files import read_tsv
from biojepa.preprocess import PreprocessSettings, preprocess_screen, write_preprocessed
from biojepa.preprocess.batch_effects import CENTRE_CELLS, BatchCentred, permute_within
from biojepa.preprocess.effects import energy_distance
from biojepa.preprocess.guide_agreement import Moments, compare_siblings
from biojepa.raw import ScreenSource
from biojepa.raw import matrix as matrix_module

SOURCE = ScreenSource(
    "toy",
    "toy.h5ad",
    perturbation_column="gene",
    control_label="NT",
    guide_column="guide",
    perturbation_type="CRISPRi",
)
SETTINGS = PreprocessSettings(
    min_cells_per_perturbation=10,
    mad_threshold=None,
    permutations=199,
    effect_components=8,
    cell_cycle=False,
    responding_cells=False,
)
GENES = [f"G{i}" for i in range(40)]
# Cells and fold change of each guide, of ten genes, or of ten others where it is negative.
DESIGN = {
    "NT": {"nt1": (80, 1.0), "nt2": (80, 1.0)},
    "ONE_FAILS": {"f1": (40, 2.5), "f2": (40, 2.5), "f3": (40, 1.0)},
    "TWO": {"t1": (40, 1.0), "t2": (40, 2.5)},
    "ONE_WORKS": {"w1": (40, 1.15), "w2": (40, 1.15), "w3": (40, 3.0)},
    "ELSEWHERE": {"e1": (40, 2.0), "e2": (40, 2.0), "e3": (40, -2.0)},
    "AGREE": {"a1": (40, 2.0), "a2": (40, 2.0), "a3": (9, 2.0)},
    "NOTHING": {"n1": (40, 1.0), "n2": (40, 1.0)},
    "G0+G1": {"p1;p2": (30, 2.0), "p1;p3": (30, 1.0)},
}


def toy(seed=0):
    rng = np.random.default_rng(seed)
    base = rng.gamma(4.0, 2.0, len(GENES))
    counts, labels, guides = [], [], []
    for label, of_label in DESIGN.items():
        for guide, (n, change) in of_label.items():
            mean = np.tile(base, (n, 1))
            mean[:, 10:20] *= change if change > 0 else 1
            mean[:, 20:30] *= -change if change < 0 else 1
            counts.append(rng.poisson(mean))
            labels += [label] * n
            guides += [guide] * n
    obs = pd.DataFrame({"gene": labels, "guide": guides}, index=[f"c{i}" for i in range(len(labels))])
    obs["umis"] = 300.0  # of a transcriptome of which this is a panel
    order = rng.permutation(len(obs))
    counts = sparse.csr_matrix(np.concatenate(counts)[order].astype(np.float32))
    var = pd.DataFrame({"gene_id": GENES}, index=GENES)
    return ad.AnnData(X=counts, obs=obs.iloc[order], var=var)


@pytest.fixture(scope="module")
def result():
    return preprocess_screen(toy(), SOURCE, SETTINGS)


def test_energy_from_moments_is_that_from_all_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 1, (13, 4)), rng.normal(0.5, 2, (29, 4))
    assert Moments.of(x).energy(Moments.of(y)) == pytest.approx(energy_distance(x, y), rel=1e-12)


@pytest.mark.parametrize("angle", [0.0, 60.0, 90.0, 180.0])
@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_agreement_is_the_concordance_of_the_mean_responses(angle, ratio):
    """The estimate is unbiased in each term, so that many noisy cells give that of the true means."""
    rng = np.random.default_rng(2)
    a = np.array([3.0, 0.0, 0.0])
    b = 3 * ratio * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle)), 0.0])
    points = {"a": rng.normal(a, 1, (3000, 3)), "b": rng.normal(b, 1, (3000, 3))}
    control = Moments.of(rng.normal(0, 1, (3000, 3)))
    found = compare_siblings(points, control, 9, rng)
    expected = 2 * a @ b / (a @ a + b @ b)
    assert found["a"]["agreement"] == pytest.approx(expected, abs=0.03)
    assert found["b"]["agreement"] == pytest.approx(expected, abs=0.03)
    assert found["a"]["effect_size"] == pytest.approx(2 * a @ a, rel=0.05)


def test_the_test_is_calibrated_and_finds_a_difference():
    rng = np.random.default_rng(3)
    control = Moments.of(rng.normal(size=(50, 3)))
    p = []
    for _ in range(600):
        points = {guide: rng.normal(size=(12, 3)) for guide in "abc"}
        p.append(compare_siblings(points, control, 199, rng)["b"]["p"])
    for level in (0.05, 0.15):
        assert abs(np.mean(np.array(p) <= level) - level) < 3 * np.sqrt(level * (1 - level) / 600)
    shifted = {"a": rng.normal(2, 1, (12, 3)), "b": rng.normal(size=(12, 3)), "c": rng.normal(size=(12, 3))}
    assert compare_siblings(shifted, control, 199, rng)["a"]["p"] == 1 / 200


class KnownScores:
    """Scores of all cells of a made-up screen."""

    def __init__(self, points):
        self.rows, self._points = np.arange(len(points)), points

    def of(self, rows):
        return self._points[rows]


def test_scores_are_centred_by_controls_of_the_batch_or_else_by_all_its_cells():
    """Batch a has controls, b too few of them, c too few cells of any kind."""
    rng = np.random.default_rng(4)
    batch = pd.Series(["a"] * 60 + ["b"] * 50 + ["c"] * (CENTRE_CELLS - 1))
    points = rng.normal(size=(len(batch), 3)) + np.where(batch == "a", 5, -7)[:, None]
    control = np.array([*range(30), *range(60, 60 + CENTRE_CELLS - 1)])
    centred = BatchCentred(KnownScores(points), batch, control)
    shift = points - centred.of(np.arange(len(batch)))
    everywhere = points[control].mean(axis=0)
    np.testing.assert_allclose(shift[:60], np.tile(points[:30].mean(axis=0) - everywhere, (60, 1)))
    np.testing.assert_allclose(shift[60:110], np.tile(points[60:110].mean(axis=0) - everywhere, (50, 1)))
    assert not shift[110:].any()
    one = BatchCentred(KnownScores(points), pd.Series(["all"] * len(batch)), control)
    np.testing.assert_array_equal(one.of(np.arange(len(batch))), points)
    # Nine cells of b are too few to be permuted by themselves.
    strata = centred.strata(np.r_[0:12, 60:69, 110:113])
    assert strata.tolist() == [0] * 12 + [-1] * 12


def test_permutations_keep_the_guides_of_each_stratum():
    rng = np.random.default_rng(5)
    code, strata = rng.integers(3, size=40), rng.integers(4, size=40)
    permuted = permute_within(code, strata, 50, rng)
    assert len(np.unique(permuted, axis=0)) > 45
    for stratum in range(4):
        here = np.sort(permuted[:, strata == stratum], axis=1)
        assert (here == np.sort(code[strata == stratum])).all()
    # One stratum: the very permutations that are made without any.
    without, one = (permute_within(code, s, 9, np.random.default_rng(6)) for s in (None, np.zeros(40)))
    np.testing.assert_array_equal(without, one)


def in_batches(share_of_guide, shift=4.0):
    """Return the toy screen in two batches; ten genes of y are ``shift`` times as high, also in controls.

    ``share_of_guide`` says which share of the cells of a guide is of y; half of those not named are.
    """
    screen = toy(seed=1)
    rng = np.random.default_rng(7)
    guide = screen.obs["guide"].astype(str).to_numpy()
    share = np.array([share_of_guide.get(name, 0.5) for name in guide])
    screen.obs["lane"] = np.where(rng.random(len(guide)) < share, "y", "x")
    counts = screen.X.toarray()
    in_y = (screen.obs["lane"] == "y").to_numpy()
    counts[np.ix_(in_y, range(30, 40))] = rng.poisson(shift * counts[np.ix_(in_y, range(30, 40))])
    screen.X = sparse.csr_matrix(counts)
    return screen


def test_guides_uneven_over_batches_are_not_flagged_for_it_and_discordant_ones_are():
    uneven = {"a1": 0.9, "a2": 0.1, "f1": 0.8, "f3": 0.2}
    screen = in_batches(uneven)
    known = preprocess_screen(screen, replace(SOURCE, batch_column="lane"), SETTINGS).guides
    known = known.set_index("guide_id")
    unknown = preprocess_screen(screen, SOURCE, SETTINGS).guides.set_index("guide_id")
    # Without batches, guides that do the same differ by what the batches do.
    assert unknown.loc["a1", "p"] == 1 / (1 + SETTINGS.permutations)
    assert unknown.loc["a1", "agreement"] < 0.5
    assert unknown.loc[["a1", "a2"], "flag"].str.contains("discordant").any()
    assert known.loc["a1", "p"] > 0.05
    assert known.loc[["a1", "a2"], "agreement"].min() > 0.8
    assert not known.loc[["a1", "a2", "n1", "n2"], "flag"].str.contains("discordant").any()
    flagged = set(known.index[known["flag"].str.contains("discordant")])
    assert flagged - {"w1", "w2"} == {"f3", "t1", "e3"}


def test_one_batch_by_name_is_as_none(result):
    screen = toy()
    screen.obs["lane"] = "one"
    named = preprocess_screen(screen, replace(SOURCE, batch_column="lane"), SETTINGS)
    pd.testing.assert_frame_equal(named.guides, result.guides, check_exact=True)
    pd.testing.assert_frame_equal(named.perturbations, result.perturbations, check_exact=True)
    posterior = [made.cells.obs.get("responding_posterior") for made in (named, result)]
    np.testing.assert_array_equal(*posterior)


def test_the_table_has_every_guide_and_what_it_did_to_its_target(result):
    table = result.guides
    assert tuple(table.columns) == GUIDE_TABLE_COLUMNS
    singles = [of_label for label, of_label in DESIGN.items() if label not in ("NT", "G0+G1")]
    sizes = {guide: n for of_label in singles for guide, (n, _) in of_label.items()}
    assert table.set_index("guide_id")["n_cells"].to_dict() == sizes
    assert table[["perturbation", "guide_id"]].equals(
        table[["perturbation", "guide_id"]].sort_values(["perturbation", "guide_id"])
    )
    # a3 has too few cells to be compared.
    assert table.set_index("guide_id")["p"].isna().pipe(lambda x: x[x]).index.tolist() == ["a3"]
    compared = table["p"].notna()
    np.testing.assert_allclose(
        table.loc[compared, "q"], stats.false_discovery_control(table.loc[compared, "p"])
    )


def test_on_target_change_of_a_guide_agrees_with_the_formula():
    screen = toy()
    screen.obs["gene"] = screen.obs["gene"].replace({"TWO": "G12"})
    result = preprocess_screen(screen, SOURCE, SETTINGS)
    row = result.guides.set_index("guide_id").loc["t2"]
    cp10k = result.cells.layers["counts"][:, 12].toarray().ravel() / result.cells.obs["library_size"] * 1e4
    treated, control = cp10k[result.cells.obs["guide_id"] == "t2"], cp10k[result.cells.obs["is_control"]]
    expected = np.log2((treated.mean() + 0.01) / (control.mean() + 0.01))
    assert float(row["on_target_log2fc"]) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.8
    assert row["flag"] == "weak"  # an inhibited target that goes up


def test_guides_that_fail_or_do_something_else_are_flagged_and_those_that_work_are_not(result):
    table = result.guides.set_index("guide_id")
    flagged = set(table.index[table["flag"].str.contains("discordant")])
    # Of three guides two of which do next to nothing, these may be flagged.
    assert flagged - {"w1", "w2"} == {"f3", "t1", "e3"}
    assert table.loc["f3", "agreement"] < 0.2
    assert table.loc["e3", "agreement"] < 0.2
    # The one guide that works differs from the others, but goes their way.
    assert table.loc["w3", "q"] < 0.05
    assert table.loc["w3", "agreement"] < 0.5
    assert table.loc[["a1", "a2"], "agreement"].min() > 0.9
    # Nothing is said to agree or not where there is nothing.
    assert table.loc[["n1", "n2"], "agreement"].isna().all()


def test_cells_of_flagged_guides_and_their_perturbations_carry_it(result):
    obs = result.cells.obs
    table = result.guides.set_index("guide_id")
    flagged = table.index[table["flag"].str.contains("discordant")]
    assert set(obs.loc[obs["flag_discordant_guide"], "guide_id"]) == set(flagged)
    assert obs["flag_discordant_guide"].sum() == 40 * len(flagged)
    flags = result.perturbations.set_index("perturbation")["flag"].str.split(";")
    disagree = {label for label, of_label in flags.items() if "guides_disagree" in of_label}
    assert disagree == {"ONE_FAILS", "TWO", "ELSEWHERE", "ONE_WORKS"}
    assert "weak" in flags["NOTHING"]


def test_nothing_depends_on_the_size_of_the_blocks_or_on_the_order_of_other_labels(result, monkeypatch):
    monkeypatch.setattr(matrix_module, "BLOCK_ENTRIES", 900)
    cut = preprocess_screen(toy(), SOURCE, SETTINGS)
    pd.testing.assert_frame_equal(cut.guides, result.guides, check_exact=True)
    assert cut.cells.obs["flag_discordant_guide"].equals(result.cells.obs["flag_discordant_guide"])


def test_without_guides_the_table_is_a_header(tmp_path):
    result = preprocess_screen(toy(), replace(SOURCE, guide_column=""), SETTINGS)
    files = [tmp_path / name for name in ("cells.h5ad", "qc.tsv", "perturbations.tsv", "guides.tsv")]
    write_preprocessed(result, *files)
    table = read_tsv(files[3])
    assert tuple(table.columns) == GUIDE_TABLE_COLUMNS
    assert table.empty
    assert not result.cells.obs["flag_discordant_guide"].any()
    assert not result.perturbations["flag"].str.contains("guides_disagree").any()
