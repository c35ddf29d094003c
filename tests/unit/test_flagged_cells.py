"""Claims about flagged cells: they train nothing, where that is fair, and are tested as before."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from test_pairs import LABELS, SINGLES, Screen, same

from biojepa.contracts import SET, TEST, TRAIN, TRAINING_CELLS_COLUMNS, VAL
from biojepa.errors import InputError
from biojepa.evaluation.splits import read_split
from biojepa.evaluation.truth import assemble_fold, collect_moments
from biojepa.flagged_cells import ALL_TRAIN, LEAVES, NOT_USED, SOME_TRAIN, drop_flagged
from biojepa.pairs import trainable_labels, validation_labels

LABELS_WITH = {gene: {label for label in LABELS if gene in label.split("+")} for gene in SINGLES}
FLAGS = ("flag_weak_perturbation", "flag_weak_guide")


def split_of(sets: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame({"perturbation": list(sets), SET: list(sets.values())})


def test_cells_and_consequences_by_hand():
    sets = {"A": TRAIN, "A+D": TRAIN, "A+B": TRAIN, "B": TRAIN, "C": TRAIN, "D": TEST, "E": VAL}
    # By label: cells, the first of which carry the first flag, and the last of which carry the second.
    cells = {"A": (20, 3, 4), "A+D": (15, 5, 0), "A+B": (12, 0, 0), "B": (14, 3, 2), "C": (8, 8, 8)}
    cells |= {"D": (20, 9, 9), "E": (20, 9, 9), "control": (30, 5, 5)}
    label, first, last = [], [], []
    for name, (n, n_first, n_last) in cells.items():
        label += [name] * n
        first += [place < n_first for place in range(n)]
        last += [place >= n - n_last for place in range(n)]
    obs = pd.DataFrame({FLAGS[0]: first, FLAGS[1]: last})
    label = np.array(label)
    dropped, table = drop_flagged(obs, label, split_of(sets), FLAGS, "cells.h5ad")
    # 7 flagged cells of A go; B would keep 9, and C none, so all of theirs go; of A+D, whose gene D is tested
    # on its own, none goes.
    expected = {"A": 7, "A+D": 0, "A+B": 0, "B": 14, "C": 8, "D": 0, "E": 0, "control": 0}
    assert {name: int(dropped[label == name].sum()) for name in cells} == expected
    of_a = dropped[label == "A"]
    assert of_a.tolist() == [True] * 3 + [False] * 13 + [True] * 4
    assert table.columns.tolist() == [*TRAINING_CELLS_COLUMNS[:2], *FLAGS, *TRAINING_CELLS_COLUMNS[2:]]
    assert table.to_numpy().tolist() == [
        ["A", 20, 3, 4, 7, 13, SOME_TRAIN],
        ["A+D", 15, 5, 0, 0, 15, NOT_USED],
        ["A+B", 12, 0, 0, 0, 12, ALL_TRAIN],
        ["B", 14, 3, 2, 14, 0, LEAVES],
        ["C", 8, 8, 8, 8, 0, LEAVES],
    ]


def test_a_perturbation_held_out_in_another_context_keeps_its_flagged_cells():
    sets = {"A": TRAIN, "A @ K562": TEST, "B": TRAIN, "A+B": TRAIN}
    label = np.repeat([*sets, "control"], 20)
    obs = pd.DataFrame({FLAGS[0]: np.tile(np.arange(20) < 5, 5)})
    dropped, table = drop_flagged(obs, label, split_of(sets), FLAGS[:1], "cells.h5ad")
    assert set(label[dropped]) == {"B"}
    assert table["consequence"].tolist() == [NOT_USED, SOME_TRAIN, NOT_USED]


def test_perturbations_with_few_cells_and_no_flag_stay():
    sets = {"A": TRAIN, "B": TRAIN}
    label = np.repeat(["A", "B", "control"], 4)
    dropped, table = drop_flagged(
        pd.DataFrame({FLAGS[0]: np.zeros(12, dtype=bool)}), label, split_of(sets), FLAGS[:1], "c"
    )
    assert not dropped.any() and table["consequence"].tolist() == [ALL_TRAIN] * 2


def test_missing_values_are_no_flag():
    obs = pd.DataFrame({FLAGS[0]: pd.array([True, None, False] * 10, dtype="boolean")})
    sets, label = {"A": TRAIN, "B": TRAIN}, np.array(["A"] * 15 + ["B"] * 15)
    dropped, _ = drop_flagged(obs, label, split_of(sets), FLAGS[:1], "c")
    assert dropped.tolist() == [True, False, False] * 10


def test_unknown_flags_are_refused_with_those_that_exist():
    sets, label = {"A": TRAIN, "B": TRAIN}, np.repeat(["A", "B"], 20)
    obs = pd.DataFrame({FLAGS[0]: False, FLAGS[1]: False, "flag_text": "no", "weak": True}, index=range(40))
    expected = r"cells\.h5ad, obs, config key pair\.drop_flags: found no flag {}; expected one of {}, {}\."
    for name in ("flag_wek_guide", "weak", "flag_text"):
        with pytest.raises(InputError, match=expected.format(name, *FLAGS)):
            drop_flagged(obs, label, split_of(sets), [name], "cells.h5ad")
    with pytest.raises(InputError, match="expected flags, of which this screen has none"):
        drop_flagged(obs[["weak"]], label, split_of(sets), FLAGS, "cells.h5ad")


def test_flags_that_leave_no_perturbation_are_refused():
    sets, label = {"A": TRAIN, "B": TRAIN}, np.repeat(["A", "B"], 20)
    obs = pd.DataFrame({FLAGS[0]: label == "A"})
    with pytest.raises(InputError, match=r"found 1 training perturbation\(s\).*Fix: name fewer flags"):
        drop_flagged(obs, label, split_of(sets), FLAGS[:1], "cells.h5ad")


# --- in pairs.h5 ----------------------------------------------------------------------------------


class FlaggedScreen(Screen):
    """A screen in which one perturbation is weak, and two cells of every label carry a weak guide."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        training = self.table.loc[self.table[SET] == TRAIN, "perturbation"]
        held_out = set(self.table["perturbation"]) - set(training)
        self.weak = next(name for name in training if "+" not in name)
        place = pd.Series(self.labels).groupby(self.labels).cumcount().to_numpy()
        self.flags = {FLAGS[0]: self.labels == self.weak, FLAGS[1]: place < 2}
        self.write(**self.flags)
        fair = {name for name in training if "+" not in name or not held_out & set(name.split("+"))}
        self.gone = np.isin(self.labels, list(fair)) & (self.flags[FLAGS[1]] | self.flags[FLAGS[0]])


@pytest.fixture(scope="module")
def flagged(tmp_path_factory):
    screen = FlaggedScreen(tmp_path_factory.mktemp("flagged"))
    before, of_all = screen.build("all.h5"), screen.training_cells
    after = screen.build("some.h5", drop_flags=list(FLAGS))
    return screen, before, after, of_all, screen.training_cells


def test_pairs_lack_flagged_training_cells_and_no_other(flagged):
    screen, before, after, of_all, table = flagged
    assert screen.gone.sum() > 20
    assert set(before.cell_names) - set(after.cell_names) == set(screen.names[screen.gone])
    assert set(after.cell_names) < set(before.cell_names)
    weak = after.labels.index(screen.weak)
    assert after.n_cells[weak] == 0 and weak not in trainable_labels(after)
    np.testing.assert_array_equal(validation_labels(after), validation_labels(before))
    for kept in (screen.cells_in(VAL), screen.labels == "control"):
        assert set(screen.names[kept]) <= set(after.cell_names)
    assert table.set_index("perturbation")["n_training_cells"].to_dict() == {
        label: n
        for label, n, group in zip(after.labels, after.n_cells, after.sets, strict=True)
        if group == TRAIN
    }
    assert of_all.columns.tolist() == list(TRAINING_CELLS_COLUMNS) and not of_all["n_left_out"].any()


def test_the_file_says_what_went_by_which_flag_and_nothing_where_none_was_asked_for(flagged):
    screen, before, after, _, _ = flagged
    assert "left_out_by_flag" not in before.facts
    by_guide = screen.gone & screen.flags[FLAGS[1]]
    assert json.loads(after.facts["left_out_by_flag"]) == {
        FLAGS[0]: int(screen.flags[FLAGS[0]].sum()),
        FLAGS[1]: int(by_guide.sum()),
        "n_left_out": int(screen.gone.sum()),
    }
    for facts in (before.facts, after.facts):
        assert facts["strategy"] == "population"


def test_the_expression_of_cells_left_out_changes_nothing(tmp_path):
    """Neither genes nor co-expression nor principal components."""
    screen = FlaggedScreen(tmp_path)
    asked = {"drop_flags": list(FLAGS), "coexpression": True, "strategy": "nearest"}
    before = screen.build(**asked)
    screen.X[screen.gone] = np.random.default_rng(4).gamma(1, 3, (screen.gone.sum(), 40))
    screen.write(**screen.flags)
    assert same(before, screen.build("again.h5", **asked))
    assert not same(screen.build("all.h5", coexpression=True), before)


def test_a_gene_of_a_perturbation_that_left_is_not_called_known_from_its_cells(tmp_path):
    screen = FlaggedScreen(tmp_path)
    training = screen.table.loc[screen.table[SET] == TRAIN, "perturbation"]
    lone = next(name for name in SINGLES if name in set(training) and not LABELS_WITH[name] - {name})
    known = [name for name in SINGLES if name != lone]
    network = pd.DataFrame({"gene_a": known, "gene_b": [*known[1:], known[0]]})
    network.to_csv(screen.network, sep="\t", index=False)
    screen.flags[FLAGS[0]] = screen.labels == lone
    screen.write(**screen.flags)
    consequences = []
    for flags in ((), FLAGS[:1]):
        screen.build("pairs.h5", drop_flags=flags)
        consequences.append(screen.coverage.set_index("gene").loc[lone, "consequence"])
    assert consequences[0].startswith("known from its own") and consequences[1].startswith("predicted as an")


def test_the_truth_holds_flagged_cells_on_the_genes_of_either_file(tmp_path):
    """Flags may change which genes are modelled, and never what is true of them."""
    screen = FlaggedScreen(tmp_path)
    test = sorted(screen.table.loc[screen.table[SET] == TEST, "perturbation"])
    flagged = screen.flags[FLAGS[0]] | screen.flags[FLAGS[1]]
    frozen = read_split(screen.split, screen.split.with_suffix(".json"), 1)
    truths = []
    for name, flags in (("all.h5", ()), ("some.h5", FLAGS)):
        genes = pd.Index(screen.build(name, drop_flags=flags, n_genes=25).genes)
        assert len(genes) < 40
        truth = assemble_fold(collect_moments(screen.cells, genes), frozen, genes, 0.05)
        columns = ad.read_h5ad(screen.cells).var_names.get_indexer(genes)
        assert sorted(truth.perturbations) == test
        for label, mean in zip(truth.perturbations, truth.all_cells, strict=True):
            here = screen.labels == label
            assert (here & flagged).any()
            np.testing.assert_allclose(mean, screen.X[here][:, columns].mean(axis=0), rtol=1e-5)
        truths.append(truth)
    one, other = truths
    shared = one.genes.intersection(other.genes)
    assert len(shared) > 10
    for name in ("half_a", "half_b", "all_cells", "var_a", "var_b", "control_mean", "perturbed_mean"):
        pair = [getattr(truth, name)[..., truth.genes.get_indexer(shared)] for truth in truths]
        np.testing.assert_array_equal(*pair, err_msg=name)
