"""Two processes train what one does; torchrun starts them, and a failure is one message."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from distributed_run import train_all
from encoder_case import EncoderCase, encoder_settings
from training_case import KnownEffects, tiny_settings

from biojepa.errors import InputError, StoppedRun
from biojepa.pairs import write_pairs
from biojepa.training import distributed, encoder_stage, load_model, train_model
from biojepa.training.__main__ import main, train_in_processes, train_to_folder

SCRIPT = Path(__file__).with_name("distributed_run.py")


def start(number: int, port: int, path: Path) -> subprocess.Popen:
    group = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(path)],
        env={**os.environ, **group, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process and two processes make of the same steps."""
    path = tmp_path_factory.mktemp("processes") / "two.pt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = [start(number, port, path) for number in range(2)]
    one = train_all()
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    # Nothing but the main process draws a progress bar.
    assert "encoder" in said[0] and "encoder" not in said[1]
    return one, torch.load(path, weights_only=True), torch.load(f"{path}.other", weights_only=True)


@pytest.mark.parametrize("name", ["default", "sigreg", "shared", "joint"])
def test_two_processes_give_the_weights_of_one(both, name):
    one, two, other = both
    ours, theirs = one[name]["weights"], two[name]["weights"]
    assert ours.keys() == theirs.keys()
    for key in ours:
        # Sums in another order. Ten steps of AdamW at 1e-3 move a weight by up to 0.005.
        torch.testing.assert_close(theirs[key], ours[key], atol=2e-4, rtol=1e-3)
        assert torch.equal(theirs[key], other[name][key])  # the processes agree exactly
    if name == "shared":  # without a running average, so that the movement is that of the steps
        start = EncoderCase().embedding(encoder_settings(dropout=0.0)).body.state_dict()
        assert max(float((ours[key] - start[key]).abs().max()) for key in start) > 0.004
    for row, wanted in zip(two[name]["rows"], one[name]["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["default", "sigreg", "shared"])
def test_two_processes_give_the_gradients_of_one(both, name):
    ours, theirs = both[0][name]["gradients"], both[1][name]["gradients"]
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], atol=1e-5, rtol=1e-3)
    assert max(float(value.abs().max()) for value in ours.values()) > 0.05


def test_without_torchrun_there_is_one_process_and_nothing_is_shared():
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    x = torch.randn(4, 3, requires_grad=True)
    assert distributed.gather_rows(x) is x
    assert distributed.share_of(7, "key") == slice(0, 7)
    torch.manual_seed(5)
    with distributed.own_randomness(3):
        drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.share_of(9, "key") == slice(3, 6)
    with pytest.raises(InputError, match=r"train\.encoder\.batch_size: found a batch of 64 cells for 3"):
        distributed.share_of(64, "train.encoder.batch_size")


@pytest.fixture(scope="module")
def fold(tmp_path_factory):
    """A fold in memory and as a file."""
    case = KnownEffects(seed=1)
    pairs, folder = case.pairs, tmp_path_factory.mktemp("fold")
    with h5py.File(folder / "cells.h5", "w") as file:
        matrix = file.create_group("X")
        matrix.attrs["shape"] = (len(pairs.perturbation), len(pairs.genes))
        for key in ("data", "indices", "indptr"):
            matrix[key] = getattr(pairs, key)
        tables = ("perturbation", "batch", "log_library_size", "partner")
        names = ("genes", "cell_names", "batches", "labels", "sets", "categories", "types", "perturbed_genes")
        write_pairs(
            folder / "pairs.h5",
            matrix,
            np.ones(len(pairs.perturbation), dtype=bool),
            np.arange(len(pairs.genes)),
            {key: getattr(pairs, key) for key in tables},
            {key: getattr(pairs, key) for key in ("type_code", "dose")},
            {key: getattr(pairs, key) for key in names},
            pairs.codes,
            dict(pairs.facts),
        )
    return case, folder / "pairs.h5"


SMALL = {"encoder": {"steps": 6}, "predictor": {"steps": 6, "evaluate_every": 3}}


def test_the_command_line_writes_what_the_call_returns(fold, tmp_path, capsys):
    case, path = fold
    settings = tiny_settings(**SMALL)
    written = tmp_path / "settings.json"
    written.write_text(json.dumps(asdict(settings)), encoding="utf-8")
    folder = tmp_path / "out"
    assert main([str(path), str(folder), "--settings", str(written), "--seed", "4"]) == 0
    model, history, _ = train_model(case.pairs, settings, 4)
    loaded = load_model(folder / "model.pt")
    assert torch.equal(loaded.control_tokens, model.control_tokens)
    table = pd.read_csv(folder / "history.tsv", sep="\t")
    pd.testing.assert_frame_equal(table, history, check_dtype=False)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["n_training_perturbations"] == 18
    assert not (folder / "checkpoint").exists()
    # The encoder of the first run is reused by a second.
    again = ["--settings", str(written), "--seed", "4", "--encoder-from", str(folder / "model.pt")]
    assert main([str(path), str(tmp_path / "reused"), *again]) == 0
    assert set(pd.read_csv(tmp_path / "reused" / "history.tsv", sep="\t")["stage"]) == {"predictor"}


def test_the_command_line_continues_an_interrupted_run(fold, tmp_path, monkeypatch):
    case, path = fold
    settings = tiny_settings(encoder={"steps": 12, "checkpoint_every": 4}, predictor={"steps": 3})
    original, steps = encoder_stage.apply_gradients, []

    def failing(*arguments):
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(1)
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoder_stage, "apply_gradients", failing)
        with pytest.raises(KeyboardInterrupt):
            train_to_folder(path, tmp_path, settings, 2)
        assert (tmp_path / "checkpoint").exists() and not (tmp_path / "model.pt").exists()
        steps[:] = [1] * 100
        train_to_folder(path, tmp_path, settings, 2)
        assert len(steps) == 100 + 8  # steps 5 to 12
    model, _, _ = train_model(case.pairs, settings, 2)
    assert torch.equal(load_model(tmp_path / "model.pt").control_tokens, model.control_tokens)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"encoder": {"stepz": 3}}', r"found .*'stepz'.*; expected keys of the section train"),
        ("[1]", "found list; expected a JSON object"),
        ("{", "expected a JSON object"),
        ('{"precision": "half"}', "precision is 'half'"),
    ],
)
def test_settings_that_cannot_be_used_are_one_message(fold, tmp_path, capsys, content, message):
    (tmp_path / "settings.json").write_text(content, encoding="utf-8")
    assert main([str(fold[1]), str(tmp_path), "--settings", str(tmp_path / "settings.json")]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("biojepa: ") and "\n" not in said
    assert re.search(message, said)


@pytest.mark.slow
def test_torchrun_trains_in_two_processes_and_writes_one_model(fold, tmp_path):
    case, path = fold
    settings = tiny_settings(
        encoder={"steps": 10, "dropout": 0.0}, predictor={"steps": 6, "evaluate_every": 3}, processes=2
    )
    train_in_processes(path, tmp_path, settings, 4)
    two = load_model(tmp_path / "model.pt")
    assert two.settings.processes == 2
    one, history, _ = train_model(case.pairs, settings, 4)
    torch.testing.assert_close(two.control_tokens, one.control_tokens, atol=5e-3, rtol=1e-2)
    table = pd.read_csv(tmp_path / "history.tsv", sep="\t")
    assert table["step"].tolist() == history["step"].tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.tsv", "metrics.json", "model.pt"]


@pytest.mark.slow
def test_a_collapse_in_two_processes_is_one_message(fold, tmp_path):
    settings = tiny_settings(
        encoder={"task": "control_to_perturbed", "target": "shared_stop_gradient", "regularizer": "flat"}
        | {"regularized": "prediction", "steps": 100, "learning_rate": 5e-3, "monitor_every": 50},
        processes=2,
    )
    with pytest.raises(StoppedRun, match=r"^The embedding collapsed by step"):
        train_in_processes(fold[1], tmp_path, settings, 0)
    assert not (tmp_path / "model.pt").exists()
