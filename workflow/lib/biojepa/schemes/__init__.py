"""The ways to hold out perturbations, each of which asks another question of a model.

A scheme deals the perturbations of a screen into training, validation and test, one fold at a time, from
labels and contexts alone: no expression is looked at. The result is frozen by :mod:`biojepa.splits`.
"""

from biojepa.schemes.combinations import COMBINATION_PROTOCOLS, HALF_OF_DOUBLES
from biojepa.schemes.contexts import split_context
from biojepa.schemes.fold import MIN_PERTURBATIONS, HeldOut
from biojepa.schemes.listed import split_listed
from biojepa.schemes.perturbations import no_split, split_genes, split_perturbations

__all__ = [
    "COMBINATION_PROTOCOLS",
    "HALF_OF_DOUBLES",
    "MIN_PERTURBATIONS",
    "HeldOut",
    "no_split",
    "split_context",
    "split_genes",
    "split_listed",
    "split_perturbations",
]
