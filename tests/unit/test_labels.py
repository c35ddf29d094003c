"""One spelling for the same perturbation, whatever the file calls it."""

import numpy as np
import pytest

from biojepa.errors import InputError
from biojepa.labels import (
    control_names,
    genes_of,
    normalize_label,
    spell_label,
)
from biojepa.preprocess.cell_labels import normalize_labels, other_controls


@pytest.mark.parametrize(
    ("raw", "separator", "controls", "pattern", "expected"),
    [
        ("SET+KLF1", "+", ("control",), "", "KLF1+SET"),
        ("SET_KLF1", "_", ("control",), "", "KLF1+SET"),
        ("SET | KLF1", "|", ("control",), "", "KLF1+SET"),
        ("SET,KLF1,SET", ",", (), "", "KLF1+SET"),
        ("KLF1+ctrl", "+", ("ctrl",), "", "KLF1"),
        ("ctrl+KLF1", "+", ("non-targeting",), "", "KLF1"),
        ("KLF1_NegCtrl", "_", (), "", "KLF1"),
        ("ctrl+ctrl", "+", ("ctrl",), "", "control"),
        ("non-targeting", "+", ("non-targeting",), "", "control"),
        ("NT", "+", (), "", "control"),
        ("62(mod)_pBA581", "_", ("62(mod)_pBA581",), "", "control"),
        ("non_targeting", "_", (), "", "control"),
        ("STAT1g2", "+", ("NT",), r"g\d+$", "STAT1"),
        ("NTg4", "+", ("NT",), r"g\d+$", "control"),
        ("STAT2g1+IRF1g3", "+", ("NT",), r"g\d+$", "IRF1+STAT2"),
        ("SPI1_pDS255", "_", ("NT",), r"_pDS\d+$", "SPI1"),
        # R writes NA where a value is missing; as a gene, it was a perturbation of all unlabelled cells.
        ("NA", "+", ("control",), "", None),
        ("n/a", "+", (), "", None),
        ("<NA>", "+", (), "", None),
        ("#N/A", "+", (), "", None),
        ("NAA10", "+", (), "", "NAA10"),
        ("NT5E", "+", (), "", "NT5E"),
        (None, "+", (), "", None),
        (float("nan"), "+", (), "", None),
        ("  ", "+", (), "", None),
        ("nan", "+", (), "", None),
        # Another kind of control than the named one is neither a gene nor, unasked, a control.
        ("ctrl", "+", ("non-targeting",), "", None),
    ],
)
def test_label_becomes_sorted_genes_or_control(raw, separator, controls, pattern, expected):
    assert normalize_label(raw, separator, controls, pattern) == expected


def test_normal_labels_stay_as_they_are():
    for label in ("control", "KLF1", "KLF1+SET", "A+B+C"):
        assert normalize_label(normalize_label(label)) == label


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("SET+KLF1", "KLF1+SET"),
        ("KLF1+ctrl", "KLF1"),
        ("SET+KLF1 @ CD4+ T", "KLF1+SET @ CD4+ T"),
        ("ctrl+KLF1 @ RPE1", "KLF1 @ RPE1"),
        ("NT+A", "NT+A"),  # one of the known labels, which a synonym of control would change
        ("unknown", "unknown"),
        ("unknown @ K562", "unknown @ K562"),
        ("", ""),
    ],
)
def test_what_others_wrote_is_spelled_as_in_the_split(raw, expected):
    assert spell_label(raw, {"NT+A", "KLF1+SET"}) == expected


def test_gene_with_the_joining_character_is_refused():
    with pytest.raises(InputError, match=r"'A\+B_C'.*separator is '_'.*label_pattern"):
        normalize_label("A+B_C", "_")


def test_many_labels_agree_with_one_at_a_time():
    rng = np.random.default_rng(0)
    pool = np.array(["B+A", "ctrl", None, "A", float("nan"), "C+ctrl", "A+B"], dtype=object)
    raw = rng.choice(pool, 500)
    expected = [normalize_label(label) for label in raw]
    assert normalize_labels(raw).tolist() == expected
    assert set(expected) == {"A+B", "control", None, "A", "C"}


def test_unnamed_controls_are_counted_and_named_ones_are_not():
    raw = ["ctrl", "ctrl", "non-targeting", "KLF1", None]
    assert other_controls(raw, ("non-targeting",)) == {"ctrl": 2}
    assert other_controls(raw, ("non-targeting", "ctrl")) == {}
    assert control_names(" non-targeting; ctrl ;") == ("non-targeting", "ctrl")


def test_genes_of_a_label():
    assert genes_of("KLF1+SET") == ["KLF1", "SET"]
    assert genes_of("control") == []
