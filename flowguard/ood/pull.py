r"""Moves embeddings back to ground that the flow knows."""

from __future__ import annotations

import torch
from torch import Tensor

from flowguard.ood.gaussian import StreamingGaussian
from flowguard.ood.state import without_autocast

__all__ = ["pull"]


def pull(features: Tensor, scores: Tensor, gaussian: StreamingGaussian, boundary: float) -> Tensor:
    r"""Moves what lies beyond a boundary along its Mahalanobis radius onto it.

    .. math:: f \mapsto \mu + \frac{\sqrt{b}}{\| L^{-1} (f - \mu) \|} (f - \mu)
        \quad \text{where} \quad \| L^{-1} (f - \mu) \|^2 > b

    Vectors within are returned bit for bit. Vectors with NaN or inf become :math:`\mu`. The
    gradient is that of the formula; it vanishes along the radius, and for vectors that are not
    finite.

    Arguments:
        features: The embedding, with shape :math:`(N, C)` or :math:`(N, C, H, W)`.
        scores: Its squared distances, with shape :math:`(N)` or :math:`(N, H, W)`.
        gaussian: The Gaussian that gave them.
        boundary: The squared radius :math:`b`.
    """
    outside = scores > boundary
    where = outside.nonzero()
    if not len(where):
        return features
    out = features.clone()
    # A backward pass through many small writes would copy the gradient once for each of them.
    step = len(where) if torch.is_grad_enabled() and features.requires_grad else 2**16
    for part in where.split(step):
        place, *position = part.unbind(dim=1)
        index = (place, slice(None), *position)
        out[index] = _onto(features[index], gaussian, boundary).to(out.dtype)
    return out


def _onto(vectors: Tensor, gaussian: StreamingGaussian, boundary: float) -> Tensor:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    mean, whitening = gaussian.kernel(vectors.device, dtype)
    vectors = vectors.to(mean.dtype)
    finite = vectors.isfinite().all(dim=1, keepdim=True)
    vectors = torch.where(finite, vectors, mean + 1)  # a safe stand-in, for the gradient too
    # The direction alone matters: in units of the largest entry nothing overflows.
    unit = torch.maximum(vectors.detach().abs().amax(dim=1, keepdim=True), mean.abs().amax())
    unit = unit.clamp_min(torch.finfo(mean.dtype).tiny)
    delta = vectors / unit - mean / unit
    with without_autocast(delta):
        radius = (delta @ whitening.T).norm(dim=1, keepdim=True)
    moved = mean + delta * (boundary**0.5 / radius)
    return torch.where(finite, moved, mean)
