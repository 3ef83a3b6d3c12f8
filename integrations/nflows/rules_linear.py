r"""How nflows' linear layers are bounded: what they do, factor by factor."""

__all__ = ["conv", "householder", "lu", "naive", "qr", "svd"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowguard.bounds import Linear, Refused, Scale, Step, constant, within
from flowguard.bounds.solution import solution

#: What a layer may compute with: products factor by factor, or with the product of all in advance.
SLACK = 3


def _product(name: str, *factors: Tensor) -> Step:
    matrix, error = factors[0], SLACK * factors[0].abs()
    for factor in factors[1:]:
        matrix, error = matrix @ factor, error @ factor.abs()
    return Linear(name=name, matrix=matrix, error=error)


def _shifted(layer: Any, sampling: bool, parts: list[Step]) -> Iterator[Step]:
    r"""The steps of the matrix, given in forward order, and of the bias that comes after it."""
    bias = constant(layer.bias)
    sign = -1 if sampling else 1
    shift = Scale(name="bias", factor=torch.ones_like(bias), offset=sign * bias)
    parts = _cached(layer, sampling) or parts
    yield from [shift, *reversed(parts)] if sampling else [*parts, shift]


def _cached(layer: Any, sampling: bool) -> list[Step]:
    r"""The step of the matrix that a layer has stored, and uses whatever its weights are by now;
    or will store, as it computes that; none if it does not use any."""
    if not layer.using_cache or layer.training:
        return []
    name, cache = "cache", layer.cache
    stored = cache.inverse if sampling else cache.weight
    if stored is None:
        with torch.no_grad():
            try:
                stored = layer.weight_inverse() if sampling else layer.weight()
            except (RuntimeError, AttributeError):
                return [Refused(name=name, reason="its cache cannot be computed: switch it off")]
    return [_product(name, constant(stored))]


def naive(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``NaiveLinear``."""
    matrix, name = constant(layer._weight), "_weight"
    step = solution(matrix, name=name) if sampling else _product(name, matrix)
    yield from _shifted(layer, sampling, [step])


def lu(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``LULinear``."""
    with torch.no_grad():
        lower, upper = map(constant, layer._create_lower_upper())
    form = _solved if sampling else _product
    yield from _shifted(layer, sampling, [form("lower, upper", lower, upper)])


def _solved(name: str, *factors: Tensor) -> Step:
    return solution(*factors, name=name)


def conv(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``OneByOneConvolution``, a permutation before a linear map."""
    permutation = within("permutation", layer.permutation, sampling)
    linear = list(lu(layer, sampling))
    yield from [*linear, *permutation] if sampling else [*permutation, *linear]


def householder(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``HouseholderSequence``."""
    name = "q_vectors"
    squares = layer.q_vectors.detach().square().sum(-1)
    info = torch.finfo(squares.dtype)
    # So short that its products with far numbers, up to 1e33 in float32, do not overflow either.
    if not bool(((squares >= info.tiny**0.5) & (squares <= info.max**0.25)).all()):
        reason = (
            "the products of one of its normal vectors may overflow or vanish: scale that vector"
        )
        yield Refused(name=name, reason=reason, depends="not at all")
        return
    vectors = constant(layer.q_vectors)
    matrix = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    for v in vectors:
        matrix = matrix - torch.outer(v, v @ matrix) * (2 / v.square().sum())
    # Each reflection errs by at most three times the norm of x, and the others keep that.
    error = torch.full_like(matrix, SLACK * 4.0 * len(vectors))
    yield Linear(name=name, matrix=matrix.T if sampling else matrix, error=error)


def qr(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``QRLinear``."""
    with torch.no_grad():
        upper = constant(layer._create_upper())
    form = _solved if sampling else _product
    rotation = within("orthogonal", layer.orthogonal, sampling)
    yield from _shifted(layer, sampling, [form("upper", upper), *rotation])


def svd(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``SVDLinear``."""
    with torch.no_grad():
        diagonal = constant(layer.diagonal)
    factor = 1 / diagonal if sampling else diagonal
    parts = [
        *within("orthogonal_2", layer.orthogonal_2, sampling),
        Scale(name="diagonal", factor=factor, offset=torch.zeros_like(factor)),
        *within("orthogonal_1", layer.orthogonal_1, sampling),
    ]
    yield from _shifted(layer, sampling, parts)
