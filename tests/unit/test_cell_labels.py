"""Labels of cells that cannot be read are listed with their numbers, and none is lost in silence."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from biojepa.errors import InputError
from biojepa.guides import GuideAssignment
from biojepa.preprocess.annotate import annotate_cells
from biojepa.preprocess.cell_labels import listed, normalize_labels, unread_labels, unsplit_labels
from biojepa.raw import RawScreen, ScreenSource


def annotated(labels, **row):
    counts = np.ones((len(labels), 2), dtype=np.float32)
    obs = pd.DataFrame({"label": labels}, index=[f"c{i}" for i in range(len(labels))])
    screen = ad.AnnData(counts, obs=obs, var=pd.DataFrame({"gene_id": ["A", "B"]}, index=["A", "B"]))
    source = ScreenSource("toy", "toy.h5ad", perturbation_column="label", **row)
    return annotate_cells(RawScreen.of(screen), source, GuideAssignment())


def test_all_labels_that_cannot_be_read_are_in_one_message():
    labels = ["A+B"] * 3 + ["A_B"] * 2 + ["C+D"] * 7 + ["ctrl"]
    with pytest.raises(InputError) as caught:
        normalize_labels(labels, "_")
    message = str(caught.value)
    assert "2 that cannot be read: C+D (7 cells), A+B (3 cells)" in message
    assert "set `separator` to '+'" in message
    assert normalize_labels(["A_B", "ctrl", None], "_").tolist() == ["A+B", "control", None]


def test_labels_without_a_perturbation_are_counted_in_the_note():
    raw = ["A"] * 3 + ["ctrl"] * 2 + ["nan"] * 4 + [None] * 5 + ["Unassigned", "NTC", "NTC"]
    table = annotated(raw, control_label="ctrl")
    assert table.notes["unlabelled"] == (
        "left out, add to `control_label` (joined by ;) to use: NTC (2 cells); "
        "no perturbation in: no label (5 cells), 'nan' (4 cells), 'Unassigned' (1 cells)"
    )
    labels = table.obs["perturbation"].to_numpy()
    assert pd.isna(labels).sum() == 4 + 5 + 1 + 2
    counted = unread_labels(raw, labels)
    assert counted == {"no label": 5, "'nan'": 4, "'NTC'": 2, "'Unassigned'": 1}
    assert "unlabelled" not in annotated(["A", "ctrl"]).notes


@pytest.mark.parametrize("join", ["_", ",", "|", ";"])
def test_combinations_under_another_separator_are_pointed_out(join, caplog):
    labels = ["A"] * 2 + ["B"] * 2 + [f"A{join}B"] * 3 + [f"B{join}ctrl"] + ["ctrl"] * 2
    table = annotated(labels)
    note = (
        f"taken as single genes, set `separator` to {join} if they are combinations: "
        f"A{join}B (3 cells), B{join}ctrl (1 cells)"
    )
    assert table.notes["unlabelled"] == note
    assert f"toy.h5ad, column 'label': {note}" in caplog.text
    right = annotated(labels, separator=join)
    assert set(right.obs["perturbation"]) == {"A", "B", "A+B", "control"}
    assert "unlabelled" not in right.notes


def test_gene_names_with_a_separator_are_no_combinations():
    labels = np.array(["HLA-A", "RP11_34", "A", "control", "A+B", None], dtype=object)
    assert unsplit_labels(labels) == ("", {})


def test_only_the_most_frequent_are_shown():
    shown = listed({f"g{i:02d}": 100 - i for i in range(30)})
    assert shown.startswith("g00 (100 cells), g01 (99 cells)")
    assert shown.endswith("g19 (81 cells), … (30 in all)")
