"""Claims about the halves of a perturbation's cells."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from biojepa.halves import half_b

NAMES = np.array([f"AAACCTG{i:05d}-1" for i in range(301)], dtype=object)
LABELS = np.array([f"P{i % 7}" for i in range(301)], dtype=object)


def test_halves_are_balanced_within_every_label_and_odd_cells_fall_to_b():
    in_b = half_b(NAMES, 0, LABELS)
    for label in np.unique(LABELS):
        n, b = (label == LABELS).sum(), in_b[label == LABELS].sum()
        assert b == n - n // 2


def test_halves_follow_the_order_of_blake2b_hashes():
    salt = (3).to_bytes(8, "little")
    hashes = [
        int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8, salt=salt).digest(), "little")
        for n in NAMES
    ]
    expected = np.zeros(len(NAMES), dtype=bool)
    expected[np.argsort(hashes)[len(NAMES) // 2 :]] = True
    assert (half_b(NAMES, 3) == expected).all()


def test_halves_do_not_depend_on_the_order_of_cells():
    order = np.random.default_rng(0).permutation(len(NAMES))
    assert (half_b(NAMES[order], 0, LABELS[order]) == half_b(NAMES, 0, LABELS)[order]).all()


def test_halves_of_one_label_do_not_depend_on_other_labels():
    chosen = LABELS == "P3"
    assert (half_b(NAMES[chosen], 0) == half_b(NAMES, 0, LABELS)[chosen]).all()


def test_another_seed_gives_other_halves():
    agreement = (half_b(NAMES, 0, LABELS) == half_b(NAMES, 1, LABELS)).mean()
    assert 0.35 < agreement < 0.65


def test_a_single_cell_is_truth_and_no_cell_gives_no_half():
    assert half_b(["only"], 0).tolist() == [True]
    assert half_b([], 0).tolist() == []


def test_repeated_names_are_refused():
    with pytest.raises(ValueError, match="'a' and 'a' are not distinct"):
        half_b(["a", "b", "a"], 0)
    with pytest.raises(ValueError, match="2 cell names but 1 labels"):
        half_b(["a", "b"], 0, ["P"])
