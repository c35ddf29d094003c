"""Claims about which perturbations are held out, and about the seal on that decision."""

from __future__ import annotations

import hashlib
import json

import pandas as pd
import pytest

from biojepa.contracts import CATEGORY, PERTURBATION, SET, TEST, TRAIN, VAL
from biojepa.errors import InputError
from biojepa.schemes import no_split, split_perturbations
from biojepa.splits import (
    LeakageError,
    SeenGenes,
    labels_in,
    read_split,
    refuse_held_out,
    split_table,
    write_split,
)

SINGLES = [f"G{i}" for i in range(14)]
COMBINATIONS = ["G0+G1", "G2+G3", "G4+G5", "G0+Z", "Y+Z", "G12+G13"]
LABELS = [*SINGLES, *COMBINATIONS]


@pytest.mark.parametrize("n_folds", [2, 3, 5, 20])
def test_every_perturbation_is_tested_exactly_once_over_the_folds(n_folds):
    tables = split_perturbations(LABELS, n_folds)
    tested = [label for table in tables for label in labels_in(table, TEST)]
    assert len(tables) == n_folds
    assert sorted(tested) == sorted(LABELS)


@pytest.mark.parametrize("n_folds", [2, 3, 5, 20])
def test_every_fold_puts_every_perturbation_into_exactly_one_set(n_folds):
    for table in split_perturbations(LABELS, n_folds):
        assert table[PERTURBATION].tolist() == sorted(LABELS)
        sizes = [len(labels_in(table, name)) for name in (TRAIN, VAL, TEST)]
        assert sum(sizes) == len(LABELS)
        assert sizes[0] >= 2 and sizes[1] >= 1 and sizes[2] >= 1


def test_without_a_split_everything_is_training_and_nothing_has_a_category():
    table = no_split(["B", "A+B", "control", "A"])
    assert table.to_numpy().tolist() == [
        ["A", TRAIN, "", 1],
        ["A+B", TRAIN, "", 2],
        ["B", TRAIN, "", 1],
    ]
    assert list(table.columns) == [PERTURBATION, SET, CATEGORY, "n_genes_seen"]
    with pytest.raises(ValueError, match="at least one is needed"):
        no_split(["control"])


def test_every_row_of_a_split_says_what_the_other_training_perturbations_know_of_it():
    for table in split_perturbations([*LABELS, "G0+G1+G2"], n_folds=4):
        training = labels_in(table, TRAIN)
        for label, group, category, n_seen in table.itertuples(index=False):
            expected = SeenGenes.of(other for other in training if other != label).categorize(label)
            assert (category, n_seen) == ("" if group == TRAIN else expected[0], expected[1])


def test_sizes_follow_the_number_of_folds_and_the_validation_share():
    for table in split_perturbations(LABELS, n_folds=4, validation_share=0.15):
        sizes = table[SET].value_counts()
        assert sizes[TEST] == 5  # 20 / 4
        assert sizes[VAL] == 3  # round(0.15 * 20)


def test_fold_sizes_differ_by_one_at_most_and_every_fold_tests_singles_and_combinations():
    tables = split_perturbations(LABELS[:-1], n_folds=3)
    tested = [labels_in(table, TEST) for table in tables]
    assert sorted(len(labels) for labels in tested) == [6, 6, 7]
    for labels in tested:
        assert any("+" in label for label in labels) and any("+" not in label for label in labels)


def test_validation_draws_combinations_in_proportion():
    for table in split_perturbations(LABELS, n_folds=5, validation_share=0.25):
        rest = labels_in(table, TRAIN, VAL)
        combinations = sum("+" in label for label in rest)
        validated = sum("+" in label for label in labels_in(table, VAL))
        assert validated == round(5 * combinations / len(rest))


def test_control_is_never_split():
    for table in split_perturbations(["control", *LABELS], 2):
        assert "control" not in set(table[PERTURBATION])


def test_the_split_depends_on_the_set_of_labels_and_the_seed_alone():
    first = split_perturbations(LABELS, 3, seed=4)
    again = split_perturbations([*reversed(LABELS), "G0", "control"], 3, seed=4)
    for one, other in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one, other)
    other_seed = split_perturbations(LABELS, 3, seed=5)
    assert any(labels_in(a, TEST) != labels_in(b, TEST) for a, b in zip(first, other_seed, strict=True))


@pytest.mark.parametrize(
    ("label", "category", "n_seen"),
    [
        ("A+B", "combo_seen2", 2),
        ("A+D", "combo_seen1", 2),  # D was perturbed in training, but never alone
        ("A+Z", "combo_seen1", 1),
        ("C+D", "combo_seen0", 2),
        ("Y+Z", "combo_seen0", 0),
        ("C", "single_in_combo", 1),
        ("Z", "single", 0),
        ("A+B+Z", "combo_seen1", 2),
    ],
)
def test_categories_of_hand_made_cases(label, category, n_seen):
    assert SeenGenes.of(["A", "B", "A+C", "D+E"]).categorize(label) == (category, n_seen)


def test_a_gene_seen_in_validation_alone_counts_as_unseen():
    table = split_table(["A", "A+B", "B", "C"], validation={"B"}, test={"A+B"}, training=["A", "C"])
    row = table.set_index(PERTURBATION).loc["A+B"]
    assert (row[CATEGORY], row["n_genes_seen"]) == ("combo_seen1", 1)


def test_a_training_perturbation_has_no_category_and_does_not_count_itself():
    names = ["A", "A+B", "C"]
    table = split_table(names, set(), set(), names).set_index(PERTURBATION)
    assert table[CATEGORY].tolist() == ["", "", ""]
    assert table["n_genes_seen"].to_dict() == {"A": 1, "A+B": 1, "C": 0}


@pytest.mark.parametrize(
    ("labels", "n_folds", "message"),
    [
        (LABELS[:5], 2, "5 perturbations cannot be split .* at least 6"),
        (LABELS, 1, "n_folds is 1; expected 2 to 20"),
        (LABELS, 21, "n_folds is 21; expected 2 to 20"),
    ],
)
def test_too_few_perturbations_and_impossible_folds_are_refused(labels, n_folds, message):
    with pytest.raises(ValueError, match=message):
        split_perturbations(labels, n_folds)


def test_a_written_split_reads_back_the_same_even_with_a_gene_called_na(tmp_path):
    table = split_perturbations([*LABELS, "NA", "nan", "None"], 2)[1]
    write_split(table, tmp_path / "split.tsv", dataset="made", fold=1)
    pd.testing.assert_frame_equal(read_split(tmp_path / "split.tsv"), table)
    info = json.loads((tmp_path / "split.json").read_text())
    assert info["sha256"] == hashlib.sha256((tmp_path / "split.tsv").read_bytes()).hexdigest()
    assert info["dataset"] == "made" and info["fold"] == 1
    for name in (TRAIN, VAL, TEST):
        assert info[f"n_{name}"] == (table[SET] == name).sum()


def test_a_split_edited_after_it_was_frozen_is_refused(tmp_path):
    path = tmp_path / "split.tsv"
    write_split(split_perturbations(LABELS, 2)[0], path)
    path.write_text(path.read_text().replace("\ttest\t", "\ttrain\t", 1))
    with pytest.raises(InputError) as caught:
        read_split(path)
    frozen = json.loads((tmp_path / "split.json").read_text())["sha256"]
    message = str(caught.value)
    assert str(path) in message and frozen in message and "split.json" in message
    assert "must not be edited" in message and "rerun the pair stage" in message


def test_a_table_that_is_no_split_is_refused_though_its_digest_fits(tmp_path):
    path = tmp_path / "split.tsv"
    path.write_text("perturbation\tset\nA\ttest\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "split.json").write_text(json.dumps({"sha256": digest}))
    with pytest.raises(InputError, match=r"columns \['perturbation', 'set'\].*n_genes_seen"):
        read_split(path)


def test_a_planted_leak_is_caught_and_named():
    table = split_perturbations(LABELS, 2)[0]
    train, val, test = (labels_in(table, name) for name in (TRAIN, VAL, TEST))
    refuse_held_out([*train, "control"], table, (TRAIN,), "training")
    refuse_held_out([*train, *val], table, (TRAIN, VAL), "pairs.h5")
    with pytest.raises(LeakageError) as caught:
        refuse_held_out([*train, test[0]], table, (TRAIN, VAL), "pairs.h5")
    assert "pairs.h5 would use 1 perturbation(s) outside train/val" in str(caught.value)
    assert test[0] in str(caught.value)
    with pytest.raises(LeakageError, match="outside train: " + val[0].replace("+", r"\+")):
        refuse_held_out([*train, val[0]], table, (TRAIN,), "gene selection")


def test_a_label_that_the_split_does_not_know_is_a_leak_too():
    table = split_perturbations(LABELS, 2)[0]
    with pytest.raises(LeakageError, match="UNKNOWN"):
        refuse_held_out(["UNKNOWN"], table, (TRAIN, VAL, TEST), "training")
