"""Fixtures of all tests: where the repository and the real data are, and one finished run of the chain."""

import os
from pathlib import Path

import pytest

from biojepa.raw import ScreenSource
from workflow_case import REPO, Pipeline, missing_data

DATA_VARIABLE = "BIOJEPA_TEST_DATA"


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the published screens, which are too large for the repository."""
    named = os.environ.get(DATA_VARIABLE)
    folder = Path(named) if named else REPO.parent / "shared" / "data"
    if not folder.is_dir():
        missing_data(f"no real screens in {folder}; name their folder in {DATA_VARIABLE}")
    return folder


@pytest.fixture(scope="session")
def papalexi(real_data) -> ScreenSource:
    """Return what the table of datasets would say of a 10x folder with guide capture and a table of cells."""
    folder = real_data / "papalexi2021_10x"
    return ScreenSource(
        "papalexi",
        str(folder),
        control_label="non-targeting",
        batch_column="replicate",
        library_size_column="n_umis_all_genes",
        mito_column="p_mito",
        perturbation_type="CRISPRko",
        cell_metadata=str(folder / "cells.csv"),
        guide_table=str(folder / "guides.csv"),
    )


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """Return a copy of the workflow, so that tests may change its code."""
    return Pipeline.copy_workflow(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def finished(checkout, tmp_path_factory) -> Pipeline:
    """Run the whole chain once on a tiny simulated screen."""
    pipeline = Pipeline(checkout, tmp_path_factory.mktemp("finished"))
    answer = pipeline.run()
    assert answer.returncode == 0, answer.stdout
    return pipeline
