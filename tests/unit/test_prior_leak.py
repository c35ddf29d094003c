"""Codes that were made from the responses look like them; knowledge from elsewhere does not."""

import numpy as np
import pandas as pd
import pytest

from biojepa.contracts import CONTEXT, STATISTICAL
from biojepa.evaluation.prior_leak import (
    SUSPICIOUS,
    FoldEvidence,
    _choose,
    check_priors,
    compare_halves,
    likeness,
)
from biojepa.evaluation.splits import FoldSplit
from biojepa.evaluation.verdict import SUSPECTED, doubt
from biojepa.prior_names import GENE_TABLE, NETWORK, OTHER_SCREEN_RESPONSES

N_LABELS, N_GENES, N_TESTED = 60, 200, 20


def cosines(values):
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    return unit @ unit.T


class Responses:
    """True responses of few programmes, and two halves of cells that measure them with noise."""

    def __init__(self, noise=1.0, seed=0):
        self.rng = np.random.default_rng(seed)
        self.truth = self.rng.normal(size=(N_LABELS, 6)) @ self.rng.normal(size=(6, N_GENES))
        size = noise * self.truth.std()
        self.halves = [self.truth + size * self.rng.normal(size=self.truth.shape) for _ in "ab"]

    def elsewhere(self, share):
        """Features of which a share is the truth, and the rest has nothing to do with it."""
        own = self.rng.normal(size=(N_LABELS, 6)) @ self.rng.normal(size=(6, N_GENES))
        return share * self.truth / self.truth.std() + (1 - share) * own / own.std()

    def evidence(self, features, kind=GENE_TABLE, covered=N_LABELS):
        tested = np.arange(N_LABELS) < N_TESTED
        known = np.arange(N_LABELS) < covered
        return FoldEvidence(
            labels=[f"P{i}" for i in range(N_LABELS)],
            codes={"mine": cosines(features - features.mean(axis=0)) * np.outer(known, known)},
            covered={"mine": known},
            changes=compare_halves(*self.halves),
            counted=np.triu(tested[:, None] | tested[None], 1),
            kinds={"mine": kind},
        )


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_likeness_is_the_correlation_with_responses_without_noise(share):
    case = Responses()
    evidence = case.evidence(case.elsewhere(share))
    truth = cosines(case.truth - case.truth.mean(axis=0))
    used = evidence.counted
    expected = np.corrcoef(evidence.codes["mine"][used], truth[used])[0, 1]
    raw = FoldEvidence(**{**vars(evidence), "changes": {"as they are": evidence.changes["as they are"]}})
    assert likeness([raw])[0].value == pytest.approx(expected, abs=0.03)
    with_noise = np.corrcoef(evidence.codes["mine"][used], evidence.changes["as they are"][1][used])[0, 1]
    assert share < 1 or with_noise < expected - 0.01  # what the correction is for


def test_the_correction_is_by_the_root_of_the_reliability():
    codes, half_a, half_b = np.random.default_rng(0).normal(size=(3, 1, 400)) + np.linspace(0, 3, 400)
    square = np.zeros((30, 30))
    place = np.triu_indices(30, 1)
    place = tuple(axis[:400] for axis in place)
    counted = np.zeros((30, 30), dtype=bool)
    counted[place] = True

    def laid_out(values):
        filled = square.copy()
        filled[place] = values[0]
        return filled

    evidence = FoldEvidence(
        [f"P{i}" for i in range(30)],
        {"s": laid_out(codes)},
        {"s": np.ones(30, dtype=bool)},
        {"only": np.stack([laid_out(half_a), laid_out(half_b)])},
        counted,
        {"s": NETWORK},
    )
    rho = lambda one, other: np.corrcoef(one[0], other[0])[0, 1]  # noqa: E731
    found = likeness([evidence])[0]
    assert found.value == pytest.approx(rho(codes, half_b) / np.sqrt(rho(half_a, half_b)))
    assert found.n_pairs == 400


@pytest.mark.parametrize("form", ["responses", "components", "standardized", "noisy"])
def test_a_copy_of_the_responses_of_all_cells_is_suspicious(form):
    case = Responses()
    copy = sum(case.halves) / 2
    if form == "components":
        copy = np.linalg.svd(copy - copy.mean(axis=0), full_matrices=False)[0][:, :3]
    elif form == "standardized":
        copy = (copy - copy.mean(axis=0)) / copy.std(axis=0)
    elif form == "noisy":
        copy = copy + 0.5 * copy.std() * case.rng.normal(size=copy.shape)
    found = likeness([case.evidence(copy)])[0]
    assert found.suspicious
    assert SUSPICIOUS <= found.low < found.value < 1.2


@pytest.mark.parametrize("seed", range(5))
def test_partial_knowledge_from_elsewhere_and_chance_are_not(seed):
    case = Responses(seed=seed)
    for share in (0.0, 0.3):
        found = likeness([case.evidence(case.elsewhere(share))])[0]
        assert not found.suspicious
        assert found.value < SUSPICIOUS


def test_where_the_halves_disagree_nothing_is_told():
    case = Responses(noise=30.0)
    rows = check_priors([case.evidence(case.truth)])
    assert [row["passed"] for row in rows] == [None]
    assert "the halves of the cells disagree" in rows[0]["detail"]


def test_from_few_pairs_nothing_is_told():
    case = Responses()
    rows = check_priors([case.evidence(case.truth, covered=10)])
    assert [row["passed"] for row in rows] == [None]
    assert "too few pairs (45)" in rows[0]["detail"]
    # Folds are pooled: the same pairs three times are enough.
    assert likeness([case.evidence(case.truth, covered=10)] * 3)[0].n_pairs == 135


def test_the_lower_end_is_that_of_a_jackknife_over_perturbations():
    case = Responses()
    evidence = case.evidence(case.truth)
    one_form = {"as they are": evidence.changes["as they are"]}

    def without(*labels):
        counted = evidence.counted.copy()
        counted[list(labels)] = False
        counted[:, list(labels)] = False
        return likeness([FoldEvidence(**{**vars(evidence), "changes": one_form, "counted": counted})])[0]

    values = np.array([without(label).value for label in range(N_LABELS)])
    error = np.sqrt((N_LABELS - 1) / N_LABELS * ((values - values.mean()) ** 2).sum())
    assert without().low == pytest.approx(without().value - 1.645 * error)


def test_few_perturbations_are_not_accused_by_luck():
    case = Responses()
    few = likeness([case.evidence(case.elsewhere(0.5), covered=18)])[0]
    assert few.value > SUSPICIOUS > few.low
    assert not few.suspicious


def test_the_outcome_names_the_source_and_overrules_the_verdict():
    case = Responses()
    rows = check_priors([case.evidence(sum(case.halves))])
    assert [(row["passed"], row["kind"]) for row in rows] == [(False, STATISTICAL)]
    assert rows[0]["check"].startswith("prior source mine looks like the responses")
    verdict = doubt({"outcome": "better than", "sentence": "It is better."}, rows)
    assert verdict["outcome"] == SUSPECTED
    assert "prior source mine" in verdict["sentence"]
    assert verdict["unless_leaked"] == {"outcome": "better than", "sentence": "It is better."}
    honest = check_priors([case.evidence(case.elsewhere(0.0))])
    assert [row["passed"] for row in honest] == [True]
    assert doubt({"outcome": "better than", "sentence": ""}, honest)["outcome"] == "better than"


def test_responses_of_another_screen_are_stated_and_not_accused():
    case = Responses()
    rows = check_priors([case.evidence(case.truth, kind=OTHER_SCREEN_RESPONSES)])
    assert [row["passed"] for row in rows] == [None]
    assert "measured in other cells, not judged" in rows[0]["detail"]


def test_screens_without_prior_sources_have_no_line():
    assert check_priors([]) == []


def test_labels_are_drawn_alike_every_time_and_a_context_is_compared_within_itself():
    names = [f"P{i:03d}" for i in range(300)]
    table = pd.DataFrame({"set": ["test"] * 100 + ["train"] * 200}, index=names)
    labels, tested = _choose(FoldSplit(0, table, "split.tsv", {}))
    assert (len(labels), tested.sum()) == (160, 80)
    assert set(labels[:80]) <= set(names[:100])
    assert set(labels[80:]) <= set(names[100:])
    assert _choose(FoldSplit(0, table, "split.tsv", {}))[0] == labels
    within, all_tested = _choose(FoldSplit(0, table, "split.tsv", {CONTEXT: "K562"}))
    assert all_tested.all()
    assert len(within) == 80
