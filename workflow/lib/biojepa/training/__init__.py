"""Train BioJEPA: the encoder on masked cells, then the predictor on populations with it frozen."""

from biojepa.training.run import TrainedModel, TrainSettings, load_model, train_model

__all__ = ["TrainSettings", "TrainedModel", "load_model", "train_model"]
