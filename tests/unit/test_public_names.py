"""Claims about what ``import biojepa`` offers, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import biojepa
import biojepa.model

NAMES = [
    "GeneExpressionEncoder",
    "ViTEncoder",
    "TransformerBlock",
    "CrossAttentionBlock",
    "JEPAPredictor",
    "ConditionalPredictor",
    "VICRegLoss",
    "SIGRegLoss",
    "JEPA",
    "BioJEPA",
    "PerturbationEncoder",
    "random_block_mask",
    "temporal_mask",
    "gene_mask",
    "module_mask",
    "perturbation_mask",
    "train_model",
    "load_model",
    "TrainSettings",
    "read_pairs",
    "counts_of",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_what_it_says(name):
    assert getattr(biojepa, name).__name__ == name
    assert name in dir(biojepa) and name in biojepa.__all__


@pytest.mark.parametrize("package", [biojepa, biojepa.model])
def test_all_that_is_listed_can_be_had_and_is_documented(package):
    for name in package.__all__:
        found = getattr(package, name)
        assert name == "SIZES" or found.__doc__, name
    assert {*package.__all__, "__doc__"} <= set(dir(package))


def test_importing_the_package_or_the_sizes_imports_no_torch():
    code = (
        "import sys, biojepa; from biojepa.model.sizes import SIZES; assert SIZES['reference'].depth == 6;"
        "print({'torch', 'numpy', 'pandas', 'h5py'} & set(sys.modules));"
        "biojepa.VICRegLoss; print('torch' in sys.modules)"
    )
    where = {**os.environ, "PYTHONPATH": str(Path(biojepa.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["set()", "True"]


def test_an_unknown_name_is_an_attribute_error_and_submodules_still_import():
    with pytest.raises(AttributeError, match="module 'biojepa' has no attribute 'Nothing'"):
        biojepa.Nothing  # noqa: B018
    from biojepa import contracts

    assert contracts.__name__ == "biojepa.contracts"
