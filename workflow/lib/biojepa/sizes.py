"""Sizes of the networks by name, as keys of the config; read before any job, so without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from biojepa.model.sizes import SIZES as MODEL_SIZES

# Blocks of the predictor that stage 1 discards.
STAGE_1_DEPTH = {"small": 1, "reference": 4}

# Keys of the sections `train.encoder` and `train.predictor`. `small` repeats the defaults, so that a dataset
# may go back to it from a `reference` that the config names for all.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    name: {
        "encoder": {
            "hidden": list(size.hidden),
            "num_tokens": size.num_tokens,
            "embed_dim": size.embed_dim,
            "depth": size.depth,
            "heads": size.heads,
            "predictor_width": size.embed_dim,
            "predictor_depth": STAGE_1_DEPTH[name],
        },
        "predictor": {
            "width": size.predictor_width,
            "depth": size.predictor_depth,
            "heads": size.predictor_heads,
            "condition_dim": size.condition_dim,
        },
    }
    for name, size in MODEL_SIZES.items()
}


def with_named_sizes(train: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sizes that ``train["model"]`` names, ``small`` when absent; keys already there win.

    Parameters
    ----------
    train
        The section ``train`` of a config, as written.

    Raises
    ------
    ValueError
        When no size has that name.
    """
    name = train.get("model", "small")
    if name not in SIZES:
        raise ValueError(f"model is {name!r}; expected one of {', '.join(SIZES)}")
    return {**train, **{part: {**sizes, **train.get(part, {})} for part, sizes in SIZES[name].items()}}
