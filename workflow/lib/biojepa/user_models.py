"""Models whose predictions were made elsewhere: an object in the config's list of models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from biojepa.models import reserved_names

# What may stand in the path of their predictions.
PLACEHOLDERS = ("dataset", "split", "fold", "seed")


@dataclass(frozen=True)
class UserModel:
    """A model whose predictions were made elsewhere.

    Attributes
    ----------
    name
        Value of the wildcard ``{model}``.
    template
        Path of its predictions with any of ``PLACEHOLDERS``.
    """

    name: str
    template: str

    @property
    def placeholders(self) -> set[str]:
        """Names in braces of the path."""
        return set(re.findall(r"\{([^{}]*)\}", self.template))

    def seeds(self, seeds: Sequence[int]) -> list[int]:
        """Seeds that it has predictions of: the config's where the path names one, else 0."""
        return list(seeds) if "seed" in self.placeholders else [0]

    def path(self, dataset: str, split: str, fold: int | str, seed: int | str) -> str:
        """Path of the predictions of one fold and seed."""
        filled = self.template
        for name, value in zip(PLACEHOLDERS, (dataset, split, fold, seed), strict=True):
            filled = filled.replace(f"{{{name}}}", str(value))
        return filled


def unusable_names(names: Sequence[str], models: Mapping[str, UserModel]) -> Iterator[str]:
    """Yield what is wrong with the names of models and with the paths of those made elsewhere.

    Parameters
    ----------
    names
        Of all models of the config.
    models
        Those made elsewhere, by name.
    """
    for name in dict.fromkeys(name for place, name in enumerate(names) if name in names[:place]):
        yield f"config, models: found {name} twice; expected each name once"
    for model in models.values():
        if model.name in reserved_names():
            yield (
                f"config, models: found {model.name} as the name of predictions made elsewhere; expected a "
                "name that this workflow does not use itself"
            )
        for unknown in sorted(model.placeholders - set(PLACEHOLDERS)):
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            where = f"config, models, {model.name}"
            yield f"{where}: found the placeholder {{{unknown}}}; expected any of {known}"
