"""Sizes of the networks by name, in the config and in plain Python."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from biojepa.config import ConfigError, load_config
from biojepa.sizes import SIZES, with_named_sizes
from biojepa.training import TrainSettings
from biojepa.training.encoder_stage import EncoderSettings
from biojepa.training.predictor_stage import PredictorSettings
from workflow_case import REPO

SCHEMAS = REPO / "workflow" / "schemas"
REFERENCE = {
    "encoder": {"hidden": [2048, 1024], "num_tokens": 64, "embed_dim": 256, "depth": 6, "heads": 8},
    "predictor": {"depth": 4, "heads": 8, "condition_dim": 128},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    table = "dataset\tsource\nsmall_one\tsimulator\nlarge_one\tsimulator\n"
    (tmp_path / "config" / "datasets.tsv").write_text(table, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def sizes_of(train, part):
    return {key: train[part][key] for key in REFERENCE[part]}


def load(**config):
    return load_config({"run": ["small_one", "large_one"], **config}, SCHEMAS)


def test_small_is_what_the_settings_have_by_default():
    defaults = TrainSettings()
    assert TrainSettings.from_config({}) == defaults == TrainSettings.from_config({"model": "small"})
    for part, values in SIZES["small"].items():
        for key, value in values.items():
            default = getattr(getattr(defaults, part), key)
            assert (list(default) if isinstance(default, tuple) else default) == value


def test_reference_fills_in_what_is_not_written_in_plain_python():
    settings = TrainSettings.from_config({"model": "reference", "encoder": {"depth": 2, "steps": 7}})
    assert settings.encoder.hidden == (2048, 1024) and settings.encoder.embed_dim == 256
    assert (settings.encoder.depth, settings.encoder.steps) == (2, 7)
    assert (settings.predictor.depth, settings.predictor.heads, settings.predictor.condition_dim) == (
        4,
        8,
        128,
    )
    assert settings.encoder.batch_size == EncoderSettings().batch_size
    assert settings.predictor.steps == PredictorSettings().steps
    with pytest.raises(ValueError, match="model is 'huge'; expected one of small, reference"):
        with_named_sizes({"model": "huge"})


@pytest.mark.parametrize("part", REFERENCE)
def test_the_config_names_a_size_and_a_dataset_another(folder, part):
    config = load(
        train={"model": "reference"}, overrides={"small_one": {"train": {"model": "small", "processes": 2}}}
    )
    assert sizes_of(config.settings("large_one", "train"), part) == REFERENCE[part]
    small = config.settings("small_one", "train")
    assert sizes_of(small, part) == {key: SIZES["small"][part][key] for key in REFERENCE[part]}
    assert small["processes"] == 2
    turned = load(overrides={"large_one": {"train": {"model": "reference"}}})
    assert sizes_of(turned.settings("large_one", "train"), part) == REFERENCE[part]
    assert sizes_of(turned.settings("small_one", "train"), part) == {
        key: SIZES["small"][part][key] for key in REFERENCE[part]
    }


def test_written_keys_win_over_the_name_wherever_they_stand(folder):
    config = load(
        train={"encoder": {"depth": 3}},
        overrides={"large_one": {"train": {"model": "reference", "predictor": {"heads": 4}}}},
    )
    large = config.settings("large_one", "train")
    assert (large["encoder"]["depth"], large["encoder"]["num_tokens"]) == (3, 64)
    assert (large["predictor"]["heads"], large["predictor"]["condition_dim"]) == (4, 128)
    assert config.settings("small_one", "train")["encoder"]["depth"] == 3


def test_impossible_sizes_are_seen_after_the_name_is_resolved(folder):
    with pytest.raises(
        ConfigError, match=r"train\.encoder\.embed_dim: found 256; .* multiple of the 6 heads"
    ):
        load(train={"model": "reference", "encoder": {"heads": 6}})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"processes": 3}, r"encoder\.batch_size: found 128; expected a multiple of 3"),
        ({"processes": 2, "encoder": {"accumulate": 5}}, "multiple of 10, accumulate times processes"),
        ({"encoder": {"accumulate": 128}}, "at least 2 cells in a micro-batch"),
        (
            {"stages": "joint", "processes": 4, "predictor": {"batch_size": 6}},
            r"predictor\.batch_size: found 6; expected a multiple of the 4 processes",
        ),
        ({"encoder": {"target": "teacher"}}, r"train\.encoder\.target: 'teacher' is not one of"),
        ({"precision": "half"}, r"train\.precision: 'half' is not one of"),
    ],
)
def test_settings_that_would_fail_in_training_are_refused_before_the_first_job(folder, train, message):
    with pytest.raises(ConfigError, match=message):
        load(train=train)
    load(train={"processes": 4, "encoder": {"accumulate": 8}})


def test_the_workflow_reads_the_sizes_without_importing_torch():
    code = "import sys; import biojepa.config; sys.exit('torch' in sys.modules)"
    library = str(REPO / "workflow" / "lib")
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": library}).returncode == 0


def test_settings_of_the_config_make_the_settings_of_the_library(folder):
    train = dict(load(train={"model": "reference"}).settings("large_one", "train"))
    train.pop("baselines")
    assert TrainSettings.from_config(yaml.safe_load(yaml.safe_dump(train))) == TrainSettings.from_config(
        {"model": "reference"}
    )
