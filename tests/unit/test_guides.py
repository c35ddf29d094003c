"""Which guides a cell carries."""

import numpy as np
import pytest
from scipy import sparse

from biojepa.errors import InputError
from biojepa.guides import GuideAssignment, assign_guides, call_guides

NAMES = ["Ag1", "Ag2", "Bg1", "NTg1", "NTg2"]
TARGETS = {"Ag1": "A", "Ag2": "A", "Bg1": "B", "NTg1": "control", "NTg2": "control"}


def call(rows, **settings):
    return assign_guides(
        sparse.csr_matrix(np.array(rows, dtype=float)), NAMES, TARGETS, GuideAssignment(**settings)
    )


def test_dominance_calls_one_guide_by_its_share():
    calls = call(
        [
            [6, 0, 4, 0, 0],  # exactly 0.6: called
            [59, 0, 41, 0, 0],  # 0.59: two guides
            [0, 0, 0, 30, 1],  # control
            [4, 0, 0, 0, 0],  # too few UMIs
            [0, 0, 0, 0, 0],  # nothing
        ]
    )
    assert calls["status"].tolist() == ["assigned", "too_many_guides", "assigned", "no_guide", "no_guide"]
    assert calls["label"].tolist() == ["A", None, "control", None, None]
    assert calls["guide_id"].tolist() == ["Ag1", None, "NTg1", None, None]
    assert calls["guide_umis"].tolist() == [10, 100, 31, 4, 0]
    assert calls["guide_share"].round(4).tolist() == [0.6, 0.59, 0.9677, 1.0, 0.0]


def test_dominance_does_not_choose_between_equal_guides():
    calls = call([[10, 0, 10, 0, 0]], min_share=0.5)
    assert calls["status"].tolist() == ["too_many_guides"]


def test_threshold_joins_the_targets_of_all_guides():
    calls = call(
        [
            [20, 0, 30, 0, 0],  # A and B
            [20, 30, 0, 0, 0],  # two guides of A
            [20, 0, 0, 30, 0],  # A and a control guide
            [0, 0, 0, 30, 20],  # two control guides
            [20, 0, 100, 0, 0],  # exactly a fifth of the top guide: called
            [19, 0, 100, 0, 0],  # below it
            [4, 0, 15, 0, 0],  # above the share, below the UMIs
            [20, 20, 20, 0, 0],  # three guides
        ],
        method="threshold",
    )
    assert calls["label"].tolist() == ["A+B", "A", "A", "control", "A+B", "B", "B", None]
    assert calls["guide_id"].tolist()[:4] == ["Ag1;Bg1", "Ag1;Ag2", "Ag1;NTg1", "NTg1;NTg2"]
    assert calls["status"].tolist() == ["assigned"] * 7 + ["too_many_guides"]


def test_threshold_allows_as_many_guides_as_asked():
    assert call([[20, 20, 20, 0, 0]], method="threshold", max_guides=3)["label"].tolist() == ["A+B"]


ROWS = [
    [20, 0, 30, 0, 0],  # two guides
    [20, 0, 1, 0, 0],
    [0, 0, 0, 30, 0],
    [9, 9, 9, 0, 0],  # three guides
    [2, 0, 0, 0, 0],
    [0, 0, 0, 0, 0],
]


@pytest.mark.parametrize(
    ("method", "called", "assigned", "alone", "classes"),
    [
        (
            "dominance",
            [2, 1, 2, 1, 0],
            [1, 0, 1, 1, 0],
            [1, 0, 1, 1, 0],
            [("no_guide", 0, 2), ("assigned", 1, 3), ("too_many_guides", None, 1)],
        ),
        (
            "threshold",
            [3, 1, 2, 1, 0],
            [2, 0, 1, 1, 0],
            [1, 0, 0, 1, 0],
            [("no_guide", 0, 2), ("assigned", 1, 2), ("assigned", 2, 1), ("too_many_guides", 3, 1)],
        ),
    ],
)
def test_tables_of_guides_and_of_cells_say_what_became_of_them(method, called, assigned, alone, classes):
    counts = sparse.csr_matrix(np.array(ROWS))
    made = call_guides(counts, NAMES, TARGETS, GuideAssignment(method=method, min_umis=3))
    guides = made.guides
    assert guides["guide"].tolist() == NAMES
    assert guides["target"].tolist() == ["A", "A", "B", "control", "control"]
    assert guides["cells_counted"].tolist() == [4, 1, 3, 1, 0]
    assert guides["umis"].tolist() == [51, 9, 40, 30, 0]
    assert guides["threshold"].tolist() == [3] * 5
    assert guides["cells_called"].tolist() == called
    assert guides["cells_assigned"].tolist() == assigned
    assert guides["cells_alone"].tolist() == alone
    # Only the mixture fits anything.
    assert guides["signal_log2_mean"].isna().all()
    assert guides["converged"].isna().all()
    assert (guides["fallback"] == "").all()
    rows = made.classes[["status", "n_guides", "cells"]].astype(object)
    assert [tuple(row) for row in rows.where(rows.notna(), None).to_numpy()] == classes
    assert made.classes["share"].tolist() == pytest.approx([cells / 6 for *_, cells in classes])


def test_dominance_agrees_with_a_dense_computation():
    rng = np.random.default_rng(1)
    counts = rng.negative_binomial(0.3, 0.02, (400, 5))
    calls = call(counts, min_umis=3)
    total, top = counts.sum(1), counts.max(1)
    with np.errstate(invalid="ignore"):
        called = (top >= 3) & (top / total >= 0.6)
    assert 50 < called.sum() < 350
    expected = [
        TARGETS[NAMES[best]] if ok else None for best, ok in zip(counts.argmax(1), called, strict=True)
    ]
    assert calls["label"].tolist() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "top"}, r"guide_assignment\.method.*'top'.*dominance, threshold or mixture"),
        ({"min_share": 0.0}, "0 < min_share"),
        ({"min_share": 1.5}, "0 < min_share"),
        ({"min_umis": 0}, "min_umis ≥ 1"),
        ({"min_share": float("nan")}, "0 < min_share"),
        ({"method": "mixture", "min_share": -0.1}, "0 ≤ min_share"),
        ({"max_guides": 0}, "max_guides ≥ 1"),
        ({"min_posterior": 1.0}, r"guide_assignment\.min_posterior: found 1\.0.*0 < min_posterior < 1"),
        ({"min_posterior": float("nan")}, "0 < min_posterior < 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        GuideAssignment(**settings)
