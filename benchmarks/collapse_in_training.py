"""Train encoders that should and should not collapse, and print what the collapse monitor sees.

    python benchmarks/collapse_in_training.py PAIRS.h5 [steps]

For each objective: the standard deviation over cells as a share of that of the untrained encoder (the
lowest of the second half of the training, and at its end), RankMe, LiDAR, and the probe of the training
perturbation. The floor of the first column is biojepa.collapse.MIN_SHARE_OF_UNTRAINED.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow" / "lib"))

import numpy as np
import torch

from biojepa.contracts import TRAIN
from biojepa.model.embedding import CellEmbedding
from biojepa.pairs import read_pairs, trainable_labels
from biojepa.probes import linear_probes
from biojepa.training import encoder_stage
from biojepa.training.cells import CellStore
from biojepa.training.checkpoint import Checkpoint
from biojepa.training.encoder_stage import EncoderSettings

TEXTBOOK = {
    "task": "control_to_perturbed",
    "target": "shared_stop_gradient",
    "regularizer": "flat",
    "regularized": "prediction",
}
OBJECTIVES = {
    "default": {},
    "without action term": {"action_weight": 0.0},
    "flat, without action term": {"action_weight": 0.0, "regularizer": "flat"},
    "sigreg": {"regularizer": "sigreg"},
    "sigreg, without action term": {"regularizer": "sigreg", "action_weight": 0.0},
    "gene modules": {"masking": "modules"},
    "mask 0.5-0.8": {"mask_low": 0.5, "mask_high": 0.8},
    "shared, stop-gradient": {"target": "shared_stop_gradient"},
    "shared": {"target": "shared"},
    "separate": {"target": "separate"},
    "learning rate 0.005": {"learning_rate": 5e-3},
    "64 tokens": {"num_tokens": 64, "steps": 100},
    "depth 2": {"hidden": (512, 256), "depth": 2},
    "textbook": TEXTBOOK,
    "textbook, EMA": {**TEXTBOOK, "target": "ema"},
    "textbook, per token": {**TEXTBOOK, "regularizer": "per_token"},
    "textbook, per token, context": {**TEXTBOOK, "regularizer": "per_token", "regularized": "context"},
}


def main(path: str, steps: int) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    pairs = read_pairs(path)
    store, train = CellStore(pairs, torch.device("cpu")), trainable_labels(pairs)
    number = np.full(len(pairs.labels) + 1, -1)
    number[train] = np.arange(len(train))
    classes = torch.from_numpy(number[pairs.perturbation])
    cells = torch.from_numpy(pairs.cells_of(TRAIN))
    seen: list[tuple[float, float]] = []

    def look(measured: dict[str, float], untrained: dict[str, float], _: int) -> None:
        seen.append((measured["std_cells"], untrained["std_cells"]))

    encoder_stage.refuse_collapse = look  # to see where a collapse ends, instead of stopping there
    print("objective | lowest share of std over cells | last share | std | RankMe | LiDAR | probe (chance)")
    for name, changes in OBJECTIVES.items():
        settings = replace(EncoderSettings(steps=steps, monitor_every=steps // 10), **changes)
        torch.manual_seed(0)
        embedding = CellEmbedding(settings.build(store.n_genes))
        embedding.fit_inputs(*store.moments(cells), store.log_library[cells])
        seen.clear()
        rows = encoder_stage.train_encoder(
            store, embedding, cells, classes, settings, 0, Checkpoint(None, "encoder", "")
        )
        tokens = encoder_stage.embed_with(embedding.body, embedding, store, cells)
        probes = linear_probes(
            tokens, classes[cells], torch.from_numpy(pairs.batch)[cells].long(), store.log_library[cells]
        )
        shares, last = [now / before for now, before in seen], rows[-1]
        values = [f"{min(shares):.2f}", f"{shares[-1]:.2f}", f"{last['std_cells']:.2f}"]
        values += [f"{last['rankme']:.1f}", f"{last['lidar']:.1f}"]
        values += [f"{probes['perturbation']:.3f} ({probes['perturbation_chance']:.3f})"]
        print(" | ".join([name, *values]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 500)
