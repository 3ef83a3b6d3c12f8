r"""One Gaussian per level: streamed moments, shrunk covariance, Mahalanobis distance."""

__all__ = ["Shrinkage", "StreamingGaussian", "pull"]

from collections.abc import Iterator
from typing import Literal, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flowguard.numerics import full_precision
from flowguard.ood.errors import NotFittedError
from flowguard.ood.moments import Moments, ledoit_wolf, merge, moments, oas
from flowguard.ood.state import PinnedState, gather, supports_float64

#: How a covariance is shrunk: by an estimate, or by a given share.
Shrinkage = float | Literal["oas", "ledoit_wolf"]

EPS = torch.finfo(torch.float32).eps


def saturation(dtype: torch.dtype) -> float:
    r"""Returns the score that stands for "finite, but too large to square"; its averages are finite.

    Arguments:
        dtype: The dtype of the score.
    """
    return torch.finfo(dtype).max * 1e-9


class StreamingGaussian(PinnedState):
    r"""Creates a Gaussian that is fitted batch by batch and gives Mahalanobis distances.

    .. math:: s(f) = \| L^{-1} (f - \mu) \|^2 \quad \text{with} \quad
        L L^\top = (1 - a) S + a \frac{\operatorname{tr} S}{C} I

    The moments are central and in float64 (Chan's merge), so that neither a mean far from zero
    nor the number of batches costs precision. A feature map gives one vector per position, all
    positions share one Gaussian, and the score is one number per position.

    Constant channels and rank-deficient features are allowed: the eigenvalues of the covariance
    are kept above a small floor, :math:`10^{-10} \operatorname{tr} S / C` or the rounding error
    of float32 features at the mean, whichever is larger. A constant channel that moves at test
    time therefore scores high, as it should, and its rounding errors do not.

    Features that are not finite score ``inf``, finite ones never do.

    Note:
        OAS and Ledoit-Wolf assume that vectors are independent. The pixels of an image are
        not, so that both shrink feature maps less than their true sample size asks for; a number
        (``1e-3`` to ``1e-2``) is the safer choice for maps from few images.

    References:
        | A Simple Unified Framework for Detecting Out-of-Distribution Samples (Lee et al., 2018)
        | https://arxiv.org/abs/1807.03888
        | Mahalanobis++: Improving OOD Detection via Feature Normalization (Mueller and Hein, 2025)
        | https://arxiv.org/abs/2505.18032

    Arguments:
        features: The number of features :math:`C`. If :py:`None`, the first update tells.
        normalize: Whether to scale vectors to unit length first (``"l2"``) or not (:py:`None`).

    Raises:
        ValueError: If `normalize` is anything else.

    Example:
        >>> import torch
        >>> gaussian = StreamingGaussian()
        >>> for _ in range(4):
        ...     gaussian.update(torch.randn(8, 3, 16, 16) + 20)
        >>> gaussian.finalize(shrinkage="oas")
        StreamingGaussian(features=3, count=8192, fitted=True)
        >>> gaussian.mahalanobis(torch.randn(2, 3, 64, 48)).shape
        torch.Size([2, 64, 48])
    """

    n: Tensor
    mean: Tensor
    scatter: Tensor
    third: Tensor
    fourth: Tensor
    cholesky: Tensor
    shrinkage: Tensor

    def __init__(
        self, features: int | None = None, normalize: Literal["l2"] | None = None
    ) -> None:
        super().__init__()
        if normalize not in (None, "l2"):
            raise ValueError(f"normalize must be None or 'l2'; got {normalize!r}")
        self.normalize = normalize
        self._kernels: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        for name in (*Moments._fields, "cholesky", "shrinkage"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))
        self._set(_zero(features or 0, torch.device("cpu")))

    def _set(self, m: Moments) -> None:
        for name, value in m._asdict().items():
            setattr(self, name, value)
        size = (len(m.mean), 0)  # no factor until `finalize`
        self.cholesky = m.mean.new_zeros(size)
        self.shrinkage = m.mean.new_full((), torch.nan)
        self._changed()

    def _changed(self) -> None:
        self._kernels = {}

    @property
    def features(self) -> int | None:
        r"""The number of features, or :py:`None` where no update told it yet."""
        return len(self.mean) or None

    @property
    def fitted(self) -> bool:
        r"""Whether :meth:`finalize` was called since the last update."""
        return self.cholesky.numel() > 0

    @property
    def moments(self) -> Moments:
        r"""The moments so far."""
        return Moments(self.n, self.mean, self.scatter, self.third, self.fourth)

    @property
    def covariance(self) -> Tensor:
        r"""The shrunk covariance matrix, with shape :math:`(C, C)`."""
        self._require_fit()
        return self.cholesky @ self.cholesky.T

    def extra_repr(self) -> str:
        r"""Returns features, count and whether it is fitted, for the printed module."""
        return f"features={self.features}, count={int(self.n)}, fitted={self.fitted}"

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        r"""Adds a batch of features.

        Arguments:
            features: The features, with shape :math:`(N, C)` or :math:`(N, C, H, W)`.

        Raises:
            TypeError: The features are not floating point.
            ValueError: The shape does not fit, or there are non-finite features.
        """
        self._check(features)
        exact = features.device if supports_float64(features.device) else torch.device("cpu")
        total = self.moments if self.features else _zero(features.shape[1], exact)
        for part in _parts(features.shape, features.device, elements=2**21):
            columns = features[part].movedim(1, 0).flatten(1).to(exact).double()
            if not columns.isfinite().all():
                raise ValueError(
                    "the features of the fit must be finite; got NaN or inf: find the contexts "
                    "that cause them (`torch.isfinite`) and leave them out"
                )
            with full_precision(columns):
                more = moments(_unit(columns) if self.normalize else columns)
            total = merge(total, Moments(*(value.to(total.mean) for value in more)))
        self._set(total)

    @torch.no_grad()
    def merge(self, other: "StreamingGaussian") -> Self:
        r"""Adds all that another Gaussian has seen. :meth:`finalize` is needed afterwards.

        Arguments:
            other: The other Gaussian.

        Raises:
            ValueError: If the two differ in the number of features, or in how they normalize.
        """
        if other.features is None:
            return self
        if self.features not in (None, other.features):
            raise ValueError(
                "Gaussians must have the same number of features to be merged; "
                f"got {self.features} and {other.features}"
            )
        if self.normalize != other.normalize:
            raise ValueError(
                "Gaussians must be normalized in the same way to be merged; "
                f"got {self.normalize!r} and {other.normalize!r}"
            )
        theirs = Moments(*(value.to(self.mean.device) for value in other.moments))
        self._set(merge(self.moments, theirs) if self.features else theirs)
        return self

    @torch.no_grad()
    def merge_ranks(self, group: ProcessGroup | None = None) -> Self:
        r"""Adds what all ranks of a process group have seen; every rank must call it.

        The ranks are merged in their order, so that all end with the same numbers.

        Arguments:
            group: The process group; the default one if :py:`None`.

        Raises:
            RuntimeError: If there is no process group.
            ValueError: If the ranks differ in the number of features.
        """
        device = self.mean.device
        ranks = [m for m in (Moments(*values) for values in gather(self.moments, group)) if m.n]
        if not ranks:
            return self
        total = ranks[0]
        for part in ranks[1:]:
            if len(part.mean) != len(total.mean):
                raise ValueError(
                    "all ranks must have the same number of features; "
                    f"got {len(total.mean)} and {len(part.mean)}"
                )
            total = merge(total, part)
        self._set(Moments(*(value.to(device) for value in total)))
        return self

    @torch.no_grad()
    def finalize(self, shrinkage: Shrinkage = "oas") -> Self:
        r"""Shrinks the covariance and factorises it.

        Arguments:
            shrinkage: The intensity :math:`a` in :math:`[0, 1]`, or how to estimate it:
                ``"oas"`` or ``"ledoit_wolf"``.

        Raises:
            NotFittedError: If there are fewer than two vectors.
            ValueError: If the shrinkage is out of range, or the covariance cannot be factorised.
        """
        if self.n < 2:
            raise NotFittedError(
                f"a covariance needs at least 2 vectors; got {int(self.n)}: give more contexts, one"
                " in each row of a batch (`update(features)` of more vectors)"
            )
        a = _intensity(shrinkage, self.moments)
        covariance = (1 - a) * self.scatter / self.n
        scale = self.scatter.trace() / self.n / len(self.mean)
        covariance.diagonal().add_(a * scale)
        rounding = (4 * EPS * self.mean.abs().amax()).square()
        floor = torch.maximum(1e-10 * scale, rounding).clamp_min(1e-24)
        least = torch.linalg.eigvalsh(covariance)[0]
        covariance.diagonal().add_((floor - least).clamp_min(0))
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            raise ValueError(
                "the covariance could not be factorised, as the features spread over too many "
                "orders of magnitude; give `shrinkage` as a number like 1e-3"
            )
        self.cholesky, self.shrinkage = factor, a
        self._changed()
        return self

    @torch.no_grad()
    def mahalanobis(self, features: Tensor) -> Tensor:
        r"""Returns the squared Mahalanobis distance of each vector or position.

        Arguments:
            features: The features, with shape :math:`(N, C)` or :math:`(N, C, H, W)`.

        Returns:
            The squared distances, with shape :math:`(N)` or :math:`(N, H, W)`.

        Raises:
            NotFittedError: If it is not fitted.
            TypeError: If the features are not floating point.
            ValueError: If their shape does not fit.
        """
        self._require_fit()
        self._check(features)
        dtype = torch.promote_types(features.dtype, torch.float32)
        shape = features.shape[:1] + features.shape[2:]
        out = torch.empty(shape, dtype=dtype, device=features.device)
        mean, whitening = self.kernel(features.device, dtype)
        for part in _parts(features.shape, features.device):
            columns = features[part].movedim(1, 0).flatten(1).to(mean)
            if self.normalize:
                columns = _unit(columns)
            # W (f - μ), and not W f - W μ: the difference is exact where the mean is large. Fewer
            # bits than those of float32 would drown the directions of least variance.
            with full_precision(columns):
                score = (whitening @ (columns - mean[:, None])).square().sum(dim=0)
            target = out[part[:1] + part[2:]]
            target.copy_(score.reshape(target.shape))
        overflow = not bool(out.isfinite().all())
        cap = saturation(dtype)
        out.clamp_(max=cap)
        if overflow:
            finite = features.isfinite().all(dim=1)
            out = out.nan_to_num_(nan=cap).masked_fill_(~finite, torch.inf)
        return out

    def kernel(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        r"""Returns the mean :math:`\mu`, with shape :math:`(C)`, and :math:`L^{-1}`, with shape
        :math:`(C, C)`, in the precision that they need.

        The factor :math:`L` is what is kept. Its inverse is derived in float64 and used as a
        matrix product, which on a CPU is three to seven times faster than solving for each pixel.

        Arguments:
            device: The device to have them on.
            dtype: The dtype of the features; float64 is returned where float32 is too coarse.

        Raises:
            NotFittedError: If it is not fitted.
        """
        self._require_fit()
        key = (device, dtype)
        if key in self._kernels:
            return self._kernels[key]
        # Made outside inference mode: autograd may need the constants later.
        with torch.inference_mode(False), torch.no_grad():
            eye = torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
            inverse = torch.linalg.solve_triangular(self.cholesky, eye, upper=False)
            # Rounding in float32 moves a whitened feature by about this much.
            blur = EPS * (self.mean.abs().amax() + self.cholesky.norm()) * inverse.norm()
            if blur > 1e-2 and supports_float64(device):
                dtype = torch.float64
            self._kernels[key] = (self.mean.to(device, dtype), inverse.to(device, dtype))
            return self._kernels[key]

    def _require_fit(self) -> None:
        if not self.fitted:
            raise NotFittedError(
                "the Gaussian is not fitted; call `update(features)` and then `finalize()`"
            )

    def _check(self, features: Tensor) -> None:
        if not features.is_floating_point():
            raise TypeError(f"features must be floating point; got {features.dtype}")
        if features.ndim not in (2, 4):
            raise ValueError(
                f"features must have shape (N, C) or (N, C, H, W); got {tuple(features.shape)}"
            )
        if features.shape[1] != (self.features or features.shape[1]) or not features.shape[1]:
            raise ValueError(
                f"features must have the {self.features} channels of the fit; got "
                f"{features.shape[1]}: give features of the same encoder, or fit again"
            )


def pull(
    features: Tensor,
    scores: Tensor,
    gaussian: StreamingGaussian,
    boundary: float,
    ratios: Tensor | None = None,
) -> Tensor:
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
        ratios: What the squared distances were divided by, with shape :math:`(H, W)`.
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
        limit = boundary if ratios is None else boundary * ratios[tuple(position)][:, None]
        out[index] = _onto(features[index], gaussian, limit).to(out.dtype)
    return out


def _onto(vectors: Tensor, gaussian: StreamingGaussian, boundary: float | Tensor) -> Tensor:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    mean, whitening = gaussian.kernel(vectors.device, dtype)
    vectors = vectors.to(mean.dtype)
    finite = vectors.isfinite().all(dim=1, keepdim=True)
    vectors = torch.where(finite, vectors, mean + 1)  # a safe stand-in, for the gradient too
    # The direction alone matters: in units of the largest entry nothing overflows.
    unit = torch.maximum(vectors.detach().abs().amax(dim=1, keepdim=True), mean.abs().amax())
    unit = unit.clamp_min(torch.finfo(mean.dtype).tiny)
    delta = vectors / unit - mean / unit
    with full_precision(delta):
        radius = (delta @ whitening.T).norm(dim=1, keepdim=True)
    moved = mean + delta * (boundary**0.5 / radius)
    return torch.where(finite, moved, mean)


def _zero(features: int, device: torch.device) -> Moments:
    zeros = torch.zeros(features, features + 1, dtype=torch.float64, device=device)
    zero = zeros.new_zeros(())
    return Moments(
        zero, zeros[:, 0].clone(), zeros[:, 1:].clone(), zeros[:, 0].clone(), zero.clone()
    )


def _intensity(shrinkage: Shrinkage, m: Moments) -> Tensor:
    if shrinkage == "oas":
        return oas(m)
    if shrinkage == "ledoit_wolf":
        return ledoit_wolf(m)
    if isinstance(shrinkage, str) or not 0 <= shrinkage <= 1:
        raise ValueError(
            f"shrinkage must be 'oas', 'ledoit_wolf' or a number in [0, 1]; got {shrinkage!r}"
        )
    return m.mean.new_full((), shrinkage)


def _parts(
    shape: torch.Size, device: torch.device, elements: int = 2**19
) -> Iterator[tuple[slice, ...]]:
    r"""Indices of parts of about ``elements`` numbers: whole images where they fit, rows if not.

    Memory stays flat on a large map, and on a CPU parts that fit the cache are also two to three
    times faster than whole maps.
    """
    if device.type != "cpu":
        elements *= 32
    per_image = max(1, shape[1:].numel())
    if len(shape) == 2 or per_image <= elements:
        step = max(1, elements // per_image)
        for i in range(0, shape[0], step):
            yield (slice(i, i + step), slice(None), slice(None))[: len(shape) - 1]
        return
    rows = max(1, elements // (shape[1] * shape[3]))
    for i in range(shape[0]):
        for j in range(0, shape[2], rows):
            yield slice(i, i + 1), slice(None), slice(j, j + rows)


def _unit(columns: Tensor) -> Tensor:
    r"""Unit vectors; scaled by their largest entry first, so that the norm cannot overflow."""
    tiny = torch.finfo(columns.dtype).tiny
    columns = columns / columns.abs().amax(dim=0, keepdim=True).clamp_min(tiny)
    return columns / columns.norm(dim=0, keepdim=True).clamp_min(tiny)
