"""Fixtures of all tests: where the repository and the real data are, and one finished run of the chain."""

import os
import re
from functools import cache
from pathlib import Path

import pytest

from biojepa.raw import ScreenSource
from workflow_case import REPO, Pipeline, missing_data

DATA_VARIABLE = "BIOJEPA_TEST_DATA"


@pytest.hookimpl(optionalhook=True)  # There is none where the tests run in one process.
def pytest_xdist_make_scheduler(config, log):
    """Deal out files as ``--dist loadfile`` does, but those that need the finished run as one.

    A fixture of the session is made in each process that asks for it, and this one takes a minute.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "finished" if needs_finished_run(config.rootpath / file) else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@cache
def needs_finished_run(file: Path) -> bool:
    """Say whether a test of a file takes the fixture ``finished`` below."""
    return re.search(r"def \w+\([^)]*\bfinished\b", file.read_text(encoding="utf-8")) is not None


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
