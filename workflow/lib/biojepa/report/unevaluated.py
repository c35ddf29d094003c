"""The page of the scheme that holds nothing out: what was trained, and that nothing could be evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from biojepa.contracts import NO_SPLIT
from biojepa.errors import InputError
from biojepa.report.methods import duration, key_values
from biojepa.report.page import environment
from biojepa.report.tables import MISSING, format_count


@dataclass(frozen=True)
class UnevaluatedInputs:
    """What was trained on every perturbation of a dataset.

    Attributes
    ----------
    dataset
        Name of the screen.
    split
        Content of ``split.json`` of the only fold.
    trainings
        ``model``, ``seed`` and ``metrics``, the content of ``metrics.json``, of each training.
    reports
        Scheme to the address of its report, relative to the page, of the schemes that hold something out.
    predictions
        Address of the table of predictions, relative to the page; ``None`` where none are asked for.
    qc_page
        Address of the page of quality control, relative to the page; empty where there is none.
    settings, provenance
        For the record.

    Raises
    ------
    InputError
        When the split holds something out, so that there is something to evaluate.
    """

    dataset: str
    split: Mapping[str, Any]
    trainings: Sequence[Mapping[str, Any]]
    reports: Mapping[str, str] = field(default_factory=dict)
    predictions: str | None = None
    qc_page: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        held_out = {name: self.split.get(name) for name in ("n_val", "n_test") if self.split.get(name) != 0}
        if self.split.get("scheme") != NO_SPLIT or held_out:
            raise InputError(
                f"split.json of {self.dataset}, scheme {NO_SPLIT}",
                f"scheme {self.split.get('scheme')} with {held_out or 'nothing held out'}",
                f"scheme {NO_SPLIT} with n_val and n_test 0",
                "delete the folder of the fold and run again",
            )


def build_unevaluated(inputs: UnevaluatedInputs) -> str:
    """Return the page as HTML: self-contained, and equal inputs give equal bytes."""
    rows = [
        {
            "model": item["model"],
            "seed": item["seed"],
            "perturbations": format_count(item["metrics"].get("n_training_perturbations")),
            "cells": format_count(item["metrics"].get("n_training_cells")),
            "time": duration(float(item["metrics"]["seconds"])) if "seconds" in item["metrics"] else MISSING,
            "device": item["metrics"].get("device", MISSING),
        }
        for item in inputs.trainings
    ]
    settings = json.dumps(inputs.settings, indent=2, sort_keys=True, default=str, ensure_ascii=False)
    return environment().get_template("unevaluated.html.j2").render(
        inputs=inputs,
        n_train=format_count(inputs.split["n_train"]),
        models=list(dict.fromkeys(row["model"] for row in rows)),
        rows=rows,
        settings=settings,
        provenance=key_values(dict(inputs.provenance)),
    )  # fmt: skip
