"""A small encoder stage on cells with known effects, for the tests of its options."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from training_case import KnownEffects, tiny_settings

from biojepa.model.embedding import CellEmbedding
from biojepa.pairs import trainable_labels
from biojepa.training.cells import CellStore, Populations
from biojepa.training.checkpoint import Checkpoint
from biojepa.training.encoder_stage import EncoderObjective, EncoderSettings, train_encoder
from biojepa.training.optimization import Execution


class EncoderCase:
    """Cells, classes and a fitted, untrained embedding."""

    def __init__(self, seed: int = 0) -> None:
        self.pairs = KnownEffects(seed).pairs
        self.store = CellStore(self.pairs, torch.device("cpu"))
        self.train = trainable_labels(self.pairs)
        number = np.full(len(self.pairs.labels) + 1, -1)
        number[self.train] = np.arange(len(self.train))
        self.classes = torch.from_numpy(number[self.pairs.perturbation])
        self.cells = torch.from_numpy(self.pairs.cells_of("train"))
        self.populations = Populations(self.pairs, torch.device("cpu"))

    def embedding(self, settings: EncoderSettings) -> CellEmbedding:
        torch.manual_seed(7)
        embedding = CellEmbedding(settings.build(self.store.n_genes))
        embedding.fit_inputs(*self.store.moments(self.cells), self.store.log_library[self.cells])
        return embedding

    def objective(self, settings: EncoderSettings, execution: Execution | None = None) -> EncoderObjective:
        return EncoderObjective(
            self.store,
            self.embedding(settings),
            self.cells,
            self.classes,
            settings,
            7,
            execution or Execution(),
        )

    def run(
        self, settings: EncoderSettings, folder=None, execution: Execution | None = None
    ) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        """Train; return the history and the weights that are kept."""
        embedding = self.embedding(settings)
        checkpoint = Checkpoint(folder, "encoder", "this case")
        rows = train_encoder(
            self.store, embedding, self.cells, self.classes, settings, 7, checkpoint, execution
        )
        return rows, {name: value.clone() for name, value in embedding.body.state_dict().items()}


def encoder_settings(**changes) -> EncoderSettings:
    """Settings of the tiny encoder, 20 steps."""
    return replace(tiny_settings().encoder, **{"steps": 20, "action_weight": 1.0, **changes})
