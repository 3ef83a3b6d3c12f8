r"""Training of the image models."""

__all__ = ["TrainingResult", "train"]

from flowguard.training.loop import TrainingResult, train
