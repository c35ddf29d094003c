"""Train BioJEPA: the encoder on masked cells, then the predictor on populations with it frozen."""

from biojepa.training.run import train_model
from biojepa.training.settings import TrainSettings
from biojepa.training.trained import TrainedModel, load_model

__all__ = ["TrainSettings", "TrainedModel", "load_model", "train_model"]
