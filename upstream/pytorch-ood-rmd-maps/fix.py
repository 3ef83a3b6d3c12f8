r"""Relative Mahalanobis scores of feature maps, for pytorch-ood 0.4.0.

with applied():
    RMD(encoder=None).fit_features(z, y).predict_features(maps)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from pytorch_ood.api import RequiresFittingException
from pytorch_ood.detector import RMD
from torch import Tensor


@torch.no_grad()
def predict_features(self: RMD, z: Tensor) -> Tensor:
    r"""Scores (B,) of features (B, D), or of maps (B, D, H, W), which are averaged over space."""
    if self.mu is None:
        raise RequiresFittingException
    features = z.flatten(2).mean(2) if z.dim() > 2 else z
    relative = self._calc_gaussian_scores(features) - self._background_score(features)[:, None]
    return relative.amin(1)


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the method into pytorch-ood, and takes it out again."""
    with patch.object(RMD, "predict_features", predict_features):
        yield
