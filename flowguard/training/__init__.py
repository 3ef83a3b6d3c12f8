r"""Training of the image models."""

from flowguard.training.loop import TrainingResult, train

__all__ = ["TrainingResult", "train"]
