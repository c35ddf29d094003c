"""Simple heads on a frozen embedding: what the embedding is worth without a latent predictor.

Ridge and nearest neighbours predict how the mean tokens of a label differ from those of control, and the
readout of the trained model turns that into expression. Embedding and readout are those of a trained
model, so that heads on different embeddings differ in the embedding alone. Nothing here sees a cell of a
test perturbation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from biojepa.baselines import PENALTIES
from biojepa.linear import ridge
from biojepa.models import HEAD_MODELS
from biojepa.pairs import Pairs, refuse_leaked_pairs, trainable_labels
from biojepa.training.cells import CellStore
from biojepa.training.run import embed, label_means, prior_codes
from biojepa.training.trained import TrainedModel

log = logging.getLogger(__name__)

# Cosines up to this are rounding: the codes have nothing in common.
NO_SIMILARITY = 1e-9


@dataclass(frozen=True)
class HeadPrediction:
    """What a head says of every label of a fold, test labels included.

    Attributes
    ----------
    expression
        ``(labels, genes)`` mean log-expression, never below 0.
    tokens
        ``(labels, T, D)`` standardized tokens.
    """

    expression: np.ndarray
    tokens: np.ndarray


def head_features(membership: np.ndarray, codes: Mapping[str, np.ndarray], train: np.ndarray) -> np.ndarray:
    """Describe labels by the genes that training perturbed and by their prior codes.

    Two blocks, the multi-hot code and all prior codes together, each of mean squared norm 1 over the
    training labels; within the second block every source has the same share. A gene that no training
    label perturbs has no column of its own, so a label of such genes alone is all zero without priors.

    Parameters
    ----------
    membership
        ``(labels, genes)`` multi-hot code.
    codes
        Source to ``(genes, dim)``; empty for no priors.
    train
        ``(n,)`` positions of the training labels.

    Returns
    -------
    ``(labels, features)``
    """

    def scaled(block: np.ndarray) -> np.ndarray:
        norm = np.sqrt((block[train] ** 2).sum(axis=1).mean())
        # Where training knows nothing of a block, nothing can be learned from it.
        return block / norm if norm > 0 else np.zeros_like(block)

    seen = membership[train].any(axis=0)
    blocks = [scaled(membership[:, seen])]
    if codes:
        blocks.append(scaled(np.hstack([scaled(membership @ values) for values in codes.values()])))
    return np.hstack(blocks)


def predict_change(
    head: str,
    features: np.ndarray,
    train: np.ndarray,
    change: np.ndarray,
    neighbours: int = 5,
    penalties: Sequence[float] = PENALTIES,
) -> np.ndarray:
    """Predict the change of every label from those of the training labels.

    A label without any feature, such as one of unseen genes without priors, gets the mean training change.

    Parameters
    ----------
    head
        ``ridge``: penalty by exact leave-one-out over the training labels. ``knn``: unweighted mean over
        the most similar training labels by cosine; labels that have nothing in common with a label, at a
        cosine of 0 or below, are not its neighbours, however few remain.
    features
        ``(labels, features)`` of all labels.
    train, change
        ``(n,)`` positions of the training labels, ``(n, outputs)`` their change.
    neighbours
        Most neighbours of ``knn``.
    penalties
        Candidates of ``ridge``, as in :func:`biojepa.linear.ridge`.

    Returns
    -------
    ``(labels, outputs)``

    Raises
    ------
    ValueError
        For another head, or when labels and changes differ in number.
    """
    if len(train) != len(change):
        raise ValueError(f"{len(train)} training labels and changes of shape {change.shape}")
    mean = change.mean(axis=0)
    if head == "ridge":
        prediction = ridge(features[train], change, features, penalties)
    elif head == "knn":
        prediction = np.stack([_neighbour_mean(row, change, neighbours) for row in _cosine(features, train)])
    else:
        raise ValueError(f"head is {head!r}; expected ridge or knn")
    prediction[~features.any(axis=1)] = mean
    return prediction


def _cosine(features: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Cosine of every label with every training label, (labels, n); 0 for a label without features."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit @ unit[train].T


def _neighbour_mean(similarity: np.ndarray, change: np.ndarray, neighbours: int) -> np.ndarray:
    """Average the change of the most similar training labels, (outputs,); of all where none is similar."""
    nearest = np.argsort(-similarity, kind="stable")[:neighbours]
    nearest = nearest[similarity[nearest] > NO_SIMILARITY]
    return change[nearest if len(nearest) else slice(None)].mean(axis=0)


def fit_heads(
    sources: Mapping[str, TrainedModel],
    pairs: Pairs,
    names: Sequence[str],
    neighbours: int = 5,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
) -> dict[str, HeadPrediction]:
    """Fit heads on the embeddings of trained models, and predict every label of the fold.

    Parameters
    ----------
    sources
        Trained models of the same fold, by name; at least those whose embedding a head uses.
    pairs
        The fold that they were trained on.
    names
        Keys of :data:`biojepa.models.HEAD_MODELS`.
    neighbours, penalties
        As in :func:`predict_change`.
    seed
        Of the shuffled priors: the permutation is that of a training with this seed.

    Returns
    -------
    One prediction for each name.

    Raises
    ------
    ValueError
        For an unknown name, a missing source, or a source of another split or other genes.
    LeakageError
        When ``pairs`` carries cells of a test perturbation.
    """
    refuse_leaked_pairs(pairs)
    unknown = sorted(set(names) - set(HEAD_MODELS))
    if unknown:
        raise ValueError(f"unknown heads {unknown}; there are {sorted(HEAD_MODELS)}")
    heads = {name: HEAD_MODELS[name] for name in names}
    missing = sorted({head.source for head in heads.values()} - set(sources))
    if missing:
        raise ValueError(f"heads {sorted(heads)} need the trained models {missing}; got {sorted(sources)}")
    train = trainable_labels(pairs)
    membership = pairs.membership
    features = {
        priors: head_features(membership, prior_codes(pairs, priors, seed), train)
        for priors in {head.priors for head in heads.values()}
    }
    fitted: dict[str, HeadPrediction] = {}
    for source in dict.fromkeys(head.source for head in heads.values()):
        model = sources[source]
        change = token_change(model, pairs, train)
        for name, head in heads.items():
            if head.source == source:
                predicted = predict_change(
                    head.head, features[head.priors], train, change, neighbours, penalties
                )
                fitted[name] = _read_out(model, predicted)
        log.info("%s: heads on %d training perturbations", source, len(train))
    return {name: fitted[name] for name in names}


@torch.no_grad()
def token_change(model: TrainedModel, pairs: Pairs, labels: np.ndarray) -> np.ndarray:
    """Mean change of the flattened tokens of ``labels`` against control, ``(len(labels), T·D)`` float64.

    Raises
    ------
    ValueError
        When the model was trained on another split or other genes.
    """
    if model.facts["split_sha256"] != pairs.facts["split_sha256"] or model.genes != pairs.genes:
        raise ValueError("the model whose embedding is used was trained on another split or other genes")
    store = CellStore(pairs, model.control_tokens.device)
    tokens = embed(model.embedding, store, torch.arange(len(store), device=store.device))
    means, control = label_means(pairs, tokens)
    return (means - control)[torch.as_tensor(labels)].flatten(1).double().cpu().numpy()


@torch.no_grad()
def _read_out(model: TrainedModel, change: np.ndarray) -> HeadPrediction:
    """Turn a change of the flattened tokens ``(labels, T·D)`` into expression and tokens."""
    control = model.control_tokens
    tokens = torch.from_numpy(change).to(control).view(-1, *control.shape)
    expression = model.control_expression + model.readout.change(tokens)
    # A mean of log1p values cannot be negative.
    return HeadPrediction(expression.clamp(min=0).cpu().numpy(), (control + tokens).cpu().numpy())
