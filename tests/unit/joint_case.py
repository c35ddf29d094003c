"""A small joint training, for the tests of the joint stage and of several processes."""

from __future__ import annotations

import torch
from encoder_case import EncoderCase

from biojepa.model.biojepa import BioJEPA
from biojepa.training.checkpoint import Checkpoint
from biojepa.training.joint_stage import train_joint
from biojepa.training.optimization import Execution
from biojepa.training.settings import TrainSettings
from biojepa.training.trained import make_predictor


def joint_parts(case: EncoderCase, settings: TrainSettings) -> tuple:
    """Return the embedding, the predictor and the codes of all labels."""
    embedding = case.embedding(settings.encoder)
    membership = torch.from_numpy(case.pairs.membership).float()
    codes = {name: torch.from_numpy(values) for name, values in case.pairs.codes.items()}
    torch.manual_seed(11)
    predictor: BioJEPA = make_predictor(settings, embedding, codes, membership[case.train].any(dim=0))
    return embedding, predictor, membership


def run_joint(
    case: EncoderCase, settings: TrainSettings, folder=None, execution: Execution | None = None
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train; return the history and the weights of encoder and predictor."""
    embedding, predictor, membership = joint_parts(case, settings)
    rows = train_joint(
        case.store,
        embedding,
        predictor,
        case.populations,
        case.cells,
        case.classes,
        membership,
        torch.from_numpy(case.pairs.type_code.astype("int64")),
        torch.from_numpy(case.pairs.dose),
        torch.from_numpy(case.train),
        settings,
        7,
        Checkpoint(folder, "joint", "this case"),
        execution,
    )
    parts = {"encoder": embedding.body, "predictor": predictor}
    weights = {
        f"{part}.{name}": value.clone()
        for part, network in parts.items()
        for name, value in network.state_dict().items()
    }
    return rows, weights
