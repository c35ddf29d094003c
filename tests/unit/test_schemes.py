"""Claims about what each scheme holds out: genes, combinations, contexts, and what the user names."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from biojepa.contracts import CATEGORY, PERTURBATION, SET, TEST, TRAIN, VAL
from biojepa.errors import InputError
from biojepa.labels import context_of, genes_of, in_context, is_combination, normalize_label, perturbation_of
from biojepa.schemes import COMBINATION_PROTOCOLS, split_context, split_genes, split_listed
from biojepa.schemes.combinations import gears_simulation, half_of_doubles
from biojepa.schemes.fold import draw_validation
from biojepa.splits import SeenGenes, cell_labels, labels_in

SINGLES = [f"G{i}" for i in range(14)]
# G2 is a hub; Y and Z are perturbed in combinations alone.
COMBINATIONS = ["G0+G1", "G2+G3", "G2+G5", "G2+G6", "G2+G7", "G4+G5", "G0+Z", "Y+Z", "G8+G9", "G12+G13"]
LABELS = [*SINGLES, *COMBINATIONS]


def genes_in(labels):
    return {gene for label in labels for gene in genes_of(label)}


def sets_of(held_out):
    return tuple(set(labels_in(held_out.table, name)) for name in (TRAIN, VAL, TEST))


def spell(label):
    return "+".join(reversed(label.split("+")))


# --- labels with a context -----------------------------------------------------------------------


def test_a_label_in_a_context_is_the_same_perturbation_of_the_same_genes():
    label = in_context("A+B", "CD4+ T @ day 2")
    assert label == "A+B @ CD4+ T @ day 2"
    assert genes_of(label) == ["A", "B"] and perturbation_of(label) == "A+B"
    assert context_of(label) == "CD4+ T @ day 2"
    assert is_combination(label) and not is_combination(in_context("A", "CD4+ T"))
    assert context_of("A+B") == "all" and perturbation_of("A+B") == "A+B"
    assert genes_of(in_context("control", "K562")) == []


def test_a_gene_name_that_looks_like_a_context_is_refused():
    with pytest.raises(InputError, match=r"' @ ' inside the gene name 'A @ B'.*label_pattern"):
        normalize_label("A @ B+C")


# --- gene ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_folds", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 3])
def test_every_gene_is_held_out_in_exactly_one_fold_with_all_that_carries_it(n_folds, seed):
    held = []
    for fold in range(n_folds):
        held_out = split_genes(LABELS, fold, n_folds, 0.15, seed)
        train, val, test = sets_of(held_out)
        genes = set(held_out.facts["held_out_genes"])
        held += genes
        assert train | val | test == set(LABELS) and len(train) + len(val) + len(test) == len(LABELS)
        assert test == {label for label in LABELS if genes & set(genes_of(label))}
        assert not genes_in(train | val) & genes
    assert sorted(held) == sorted(genes_in(LABELS))


@pytest.mark.parametrize("seed", range(6))
def test_validation_is_composed_of_genes_that_training_never_perturbs(seed):
    for fold in range(4):
        held_out = split_genes(LABELS, fold, 4, 0.1, seed)
        train, val, _ = sets_of(held_out)
        chosen = set(held_out.facts["validation_genes"])
        assert chosen and not genes_in(train) & chosen
        assert all(chosen & set(genes_of(label)) for label in val)
        assert 1 <= len(val) <= 2 * round(0.1 * len(LABELS)), "the hub, with five labels, is too much"
        # Nothing held out is composed of what training perturbs alone.
        rows = held_out.table[held_out.table[SET] != TRAIN]
        assert set(rows[CATEGORY]) <= {"single", "combo_seen1", "combo_seen0"}


def test_folds_of_genes_depend_on_the_seed_and_not_on_the_order_of_labels():
    facts = [split_genes(labels, 0, 3, seed=seed).facts for labels, seed in
             ((LABELS, 1), ([*reversed(LABELS), "control", "G1"], 1), (LABELS, 2))]  # fmt: skip
    assert facts[0] == facts[1]
    assert facts[0]["held_out_genes"] != facts[2]["held_out_genes"]


def test_every_fold_of_genes_tests_genes_that_are_perturbed_alone():
    labels = [*SINGLES[:4], *[f"{a}+{b}" for a in "PQRS" for b in "TUVW"]]
    for fold in range(4):
        test = labels_in(split_genes(labels, fold, 4).table, TEST)
        assert sum(not is_combination(label) for label in test) == 1


def test_too_few_genes_are_refused_with_their_number():
    with pytest.raises(InputError, match=r"x\.h5ad, scheme gene.*3 perturbed gene\(s\) in 6 .*at least 5"):
        split_genes(["A", "B", "C", "A+B", "A+C", "B+C"], 0, 5, where="x.h5ad")
    # All carry A, so that the fold that holds it out has nothing left.
    messages = []
    for fold in range(2):
        with pytest.raises(InputError) as caught:
            split_genes([f"A+{x}" for x in "BCDEFG"], fold, 2)
        messages.append(str(caught.value))
    assert any("found 0 training, 0 validation and 6 test" in message for message in messages)


# --- combination ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", range(4))
def test_half_of_the_combinations_and_all_singles_are_trained(fold):
    train, val, test = sets_of(half_of_doubles(LABELS, fold, 0.1, seed=1))
    assert set(SINGLES) <= train
    assert len(train & set(COMBINATIONS)) == len(COMBINATIONS) // 2
    assert val | test == set(COMBINATIONS) - train and val and test and not val & test
    assert len(val) <= len(val | test) / 3


def test_draws_of_doubles_differ_between_folds_and_seeds_and_repeat_with_them():
    tested = [tuple(sorted(sets_of(half_of_doubles(LABELS, fold, seed=seed))[2]))
              for seed in (0, 1) for fold in range(3)]  # fmt: skip
    assert len(set(tested)) == 6
    again = half_of_doubles([*reversed(LABELS), "control"], 2, seed=1).table
    assert again.equals(half_of_doubles(LABELS, 2, seed=1).table)


@pytest.mark.parametrize("seed", range(5))
def test_gears_simulation_holds_out_a_quarter_of_the_genes_and_of_the_combinations_of_the_others(seed):
    held_out = gears_simulation(LABELS, 0, seed=seed)
    train, val, test = sets_of(held_out)
    genes, out = genes_in(LABELS), set(held_out.facts["held_out_genes"])
    assert len(out) == len(genes) - int(0.75 * len(genes))
    carried = {label for label in LABELS if out & set(genes_of(label))}
    assert carried <= test
    composed = {label for label in COMBINATIONS if not out & set(genes_of(label))}
    assert len(test - carried) == len(composed) - int(0.75 * len(composed)) and test - carried <= composed
    of_validation = set(held_out.facts["validation_genes"])
    rest = genes_in(set(LABELS) - test)
    assert len(of_validation) == len(rest) - int(0.9 * len(rest))
    assert not genes_in(train) & (out | of_validation)
    assert train | val | test == set(LABELS)


def test_categories_of_held_out_combinations_are_those_of_trained_singles():
    """A partner counts as seen where it is trained as a single, in whatever combination it is trained."""
    found = set()
    for seed in range(40):
        held_out = gears_simulation(LABELS, 0, seed=seed)
        train, _, test = sets_of(held_out)
        category = held_out.table.set_index(PERTURBATION)[CATEGORY]
        for label in test:
            known = [gene in train for gene in genes_of(label)]
            trained_at_all = any(gene in genes_in(train) for gene in genes_of(label))
            if is_combination(label):
                assert category[label] == f"combo_seen{2 if all(known) else 1 if any(known) else 0}"
            else:
                assert category[label] == ("single_in_combo" if trained_at_all else "single")
            found.add(category[label])
    assert found == {"single", "combo_seen0", "combo_seen1", "combo_seen2"}


@pytest.mark.parametrize("protocol", COMBINATION_PROTOCOLS)
def test_a_screen_without_combinations_is_refused_with_their_number(protocol):
    split = COMBINATION_PROTOCOLS[protocol]
    with pytest.raises(InputError, match=r"x\.h5ad, scheme combination.*found 3 combination\(s\) among 17"):
        split([*SINGLES, *COMBINATIONS[:3]], 0, where="x.h5ad")


# --- context -------------------------------------------------------------------------------------


def cells_of(counts):
    """Label and context of cells, from {(label, context): cells}."""
    pairs = [(label, place) for (label, place), n in counts.items() for _ in range(n)]
    label, context = (np.array(part, dtype=object) for part in zip(*pairs, strict=True))
    order = np.random.default_rng(0).permutation(len(label))
    return label[order], context[order]


COUNTS = {
    **{(label, place): 20 for label in ["control", *SINGLES, "G0+G1"] for place in ("K562", "RPE1")},
    ("G13", "K562"): 3,
    ("G12", "RPE1"): 4,
    ("control", "HEK"): 5,
    ("NEW", "RPE1"): 15,
    ("G0+NEW", "RPE1"): 15,
}


def test_a_held_out_context_is_tested_and_its_perturbations_may_be_trained_elsewhere():
    label, context = cells_of(COUNTS)
    held_out = split_context(label, context, ["K562", "RPE1"], 1, "cell_type", 10, 0.15)
    train, val, test = sets_of(held_out)
    tested = [name for name in [*SINGLES, "G0+G1", "NEW", "G0+NEW"] if name != "G12"]
    # What stops a training elsewhere is not unseen here.
    assert test == {f"{name} @ RPE1" for name in tested if name not in val}
    stopped_by = {f"{name} @ RPE1": 20 for name in val}
    # G13 has 3 cells outside the held-out context, too few to train; G12 has 4 in it, too few to test.
    assert train | val == {*SINGLES, "G0+G1"} - {"G13"}
    assert len(val) == round(0.15 * 14)
    assert held_out.facts == {
        "context_column": "cell_type",
        "context": "RPE1",
        "min_cells_in_context": 10,
        "validation_elsewhere": sorted(stopped_by),
        "left_out": {"G12 @ RPE1": 4, "G13": 3, **stopped_by},
    }
    assert "G12" not in val
    category = held_out.table.set_index(PERTURBATION)[CATEGORY]
    for name in tested:
        if name in train:
            assert category[f"{name} @ RPE1"] == "other_context"
    assert category["NEW @ RPE1"] == category["G13 @ RPE1"] == "single"
    assert category["G0+NEW @ RPE1"] == ("combo_seen1" if "G0" in train else "combo_seen0")


def test_a_perturbation_that_validation_holds_is_not_known_from_another_context():
    seen = SeenGenes.of(["A", "B"])
    assert seen.categorize("A @ K562") == ("other_context", 1)
    assert seen.categorize("A+B @ K562") == ("combo_seen2", 2)
    assert seen.categorize("C @ K562") == ("single", 0)
    assert seen.categorize("A") == ("single_in_combo", 1), "without a context nothing changes"


def test_cells_are_labelled_by_the_held_out_context_and_controls_are_not():
    obs = pd.DataFrame({"perturbation": ["A", "control", "A", "A+B"], "batch": ["x", "x", "y", "x"]})
    assert cell_labels(obs, {}).tolist() == ["A", "control", "A", "A+B"]
    facts = {"context": "x", "context_column": "batch"}
    assert cell_labels(obs, facts).tolist() == ["A @ x", "control", "A", "A+B @ x"]


@pytest.mark.parametrize(
    ("contexts", "min_cells", "message"),
    [
        (
            ["K563"],
            10,
            r"no cell whose cell_type is 'K563'; cells of each: HEK \(5\), K562 \(303\), RPE1 \(334\)",
        ),
        (["HEK"], 10, r"held-out context 'HEK'.*found 5 control cell\(s\) in it.*at least 10"),
        (["HEK"], 2, r"held-out context 'HEK'.*15 training, 2 validation and 0 test"),
        (["K562"], 19, None),
    ],
)
def test_contexts_that_cannot_be_held_out_are_refused_with_what_was_found(contexts, min_cells, message):
    label, context = cells_of(COUNTS)
    if message is None:
        split_context(label, context, contexts, 0, "cell_type", min_cells)
        return
    with pytest.raises(InputError, match=message):
        split_context(label, context, contexts, 0, "cell_type", min_cells)


def test_a_fold_whose_test_perturbations_all_serve_for_validation_elsewhere_is_refused():
    """The sizes are those of the fold, not those of before its validation was drawn."""
    counts = {(label, "K562"): 12 for label in ["control", "A", "B", "C"]}
    counts |= {("control", "RPE1"): 12, ("A", "RPE1"): 12}
    refused = 0
    for seed in range(12):
        # D, which the other context lacks, is tested whatever validation is, and changes no draw.
        with_more = split_context(*cells_of({**counts, ("D", "RPE1"): 12}), ["RPE1"], 0, "batch", seed=seed)
        _, validation, test = sets_of(with_more)
        assert test == {"A @ RPE1", "D @ RPE1"} - {f"{name} @ RPE1" for name in validation}
        if "A" not in validation:
            assert sets_of(split_context(*cells_of(counts), ["RPE1"], 0, "batch", seed=seed))[2] == {
                "A @ RPE1"
            }
            continue
        refused += 1
        with pytest.raises(InputError, match=r"2 training, 1 validation and 0 test.*1 more are validation"):
            split_context(*cells_of(counts), ["RPE1"], 0, "batch", seed=seed)
    assert 0 < refused < 12


# --- validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "wanted", "left", "drawn"),
    [(10, 3, 2, 3), (10, 0, 2, 1), (10, 50, 2, 8), (10, 50, 0, 10), (3, 1, 2, 1), (2, 1, 2, 0), (1, 1, 2, 0),
     (0, 4, 2, 0), (5, 2, 8, 0)],
)  # fmt: skip
def test_validation_is_as_many_as_training_can_spare(n, wanted, left, drawn):
    for free in (SINGLES[:n], COMBINATIONS[:n], LABELS[9 : 9 + n]):
        found = draw_validation(free, wanted, np.random.default_rng(n), left)
        assert len(found) == drawn and found <= set(free)


def test_validation_holds_singles_and_combinations_in_proportion():
    for seed in range(5):
        found = draw_validation([*SINGLES[:12], *COMBINATIONS[:6]], 6, np.random.default_rng(seed))
        assert sum(is_combination(label) for label in found) == 2 and len(found) == 6


# --- list ----------------------------------------------------------------------------------------


def test_what_is_listed_is_held_out_in_any_order_of_genes(tmp_path):
    wanted = {"test": ["G3", spell("G2+G5")], "validation": ["G4", spell("Y+Z")]}
    held_out = split_listed(LABELS, wanted)
    assert sets_of(held_out)[1:] == ({"G4", "Y+Z"}, {"G3", "G2+G5"})
    assert held_out.facts == {"listed_in": "config, pair.list", "validation_drawn": False}
    path = tmp_path / "mine.tsv"
    path.write_text("set\tperturbation\ntest\tG3\ntest\tG5+G2\nval\tG4\nvalidation\tY+Z\ntrain\tG0\n")
    from_file = split_listed(LABELS, str(path))
    assert from_file.table.equals(held_out.table)
    assert from_file.facts["listed_in"] == str(path)


def test_validation_is_drawn_where_none_is_listed_but_not_from_what_is_listed_as_trained(tmp_path):
    held_out = split_listed(LABELS, {"test": ["G3"]}, validation_share=0.2, seed=4)
    assert held_out.facts["validation_drawn"] is True
    assert len(sets_of(held_out)[1]) == round(0.2 * len(LABELS))
    # Of 13 singles and 10 combinations: 5 · 10 / 23 = 2.2 of these.
    assert sum(is_combination(label) for label in sets_of(held_out)[1]) == 2
    other = split_listed(LABELS, {"test": ["G3"]}, validation_share=0.2, seed=5)
    assert sets_of(other)[1] != sets_of(held_out)[1] and sets_of(other)[2] == {"G3"}
    path = tmp_path / "mine.tsv"
    fixed = [label for label in LABELS if label not in ("G3", "G4")]
    path.write_text("perturbation\tset\nG3\ttest\n" + "".join(f"{label}\ttrain\n" for label in fixed))
    assert sets_of(split_listed(LABELS, str(path)))[1] == {"G4"}


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"test": ["G33", "G2+G9"]}, r"2 that x\.h5ad lacks .*'G33' \(similar: .*G3.*'G2\+G9' \(similar: "),
        ({"test": ["control"]}, r"1 that x\.h5ad lacks .*'control'"),
        ({"test": ["G3"], "validation": ["G3", "G4"]}, "config, pair.list: found G3 in two sets"),
        ({"test": []}, r"0 test perturbation\(s\)"),
        ({"test": LABELS[:-1]}, "1 training, 0 validation and 23 test"),
        ("lost.tsv", "no file lost.tsv"),
    ],
)
def test_lists_that_do_not_fit_the_screen_are_refused(listed, message):
    with pytest.raises(InputError, match=message):
        split_listed(LABELS, listed, where="x.h5ad")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene\tset\nG1\ttest\n", r"columns \['gene', 'set'\]"),
        ("perturbation\tset\nG1\ttset\n", r"line 2.*perturbation 'G1' in set 'tset'.*test, val, validation"),
        ("perturbation\tset\nG1\ttest\n\ttest\n", r"line 3"),
    ],
)
def test_tables_that_are_no_list_are_refused_by_line(tmp_path, text, message):
    (tmp_path / "mine.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        split_listed(LABELS, str(tmp_path / "mine.tsv"))
