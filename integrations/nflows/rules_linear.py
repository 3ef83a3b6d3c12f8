r"""How nflows' linear layers are bounded: what they do, factor by factor."""

__all__ = ["conv", "householder", "lu", "naive", "qr", "svd"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowguard.bounds import Linear, Permute, Refused, Scale, Step, constant

#: What a layer may compute with: products, substitutions, or the product of both in advance.
SLACK = 3


def _product(name: str, matrix: Tensor) -> Step:
    return Linear(name=name, matrix=matrix, error=SLACK * matrix.abs())


def _solution(name: str, *factors: Tensor) -> Step:
    r"""The solution of a system with the product of these factors."""
    matrix = torch.linalg.multi_dot(factors) if len(factors) > 1 else factors[0]
    inverse, info = torch.linalg.inv_ex(matrix)
    if info.item():
        return Refused(name=name, reason="its matrix is singular")
    # Substitution is not a product with the inverse (Higham, 2002, theorems 8.5 and 9.4).
    size = factors[0].abs()
    for factor in factors[1:]:
        size = size @ factor.abs()
    error = SLACK * inverse.abs() @ size @ inverse.abs()
    return Linear(name=name, matrix=inverse, error=error)


def _shifted(layer: Any, sampling: bool, parts: list[Step]) -> Iterator[Step]:
    r"""The steps of the matrix, given in forward order, and of the bias that comes after it."""
    bias = constant(layer.bias)
    sign = -1 if sampling else 1
    shift = Scale(name="bias", factor=torch.ones_like(bias), offset=sign * bias)
    yield from [shift, *reversed(parts)] if sampling else [*parts, shift]


def naive(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``NaiveLinear``."""
    matrix = constant(layer._weight)
    if not sampling:
        yield from _shifted(layer, sampling, [_product("_weight", matrix)])
        return
    p, lower, upper = torch.linalg.lu(matrix)
    yield from _shifted(layer, sampling, [_solution("_weight", p @ lower, upper)])


def lu(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``LULinear``."""
    with torch.no_grad():
        lower, upper = map(constant, layer._create_lower_upper())
    form = _solution if sampling else _product
    yield from _shifted(layer, sampling, [form("upper", upper), form("lower", lower)])


def conv(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``OneByOneConvolution``, a permutation before a linear map."""
    order = layer.permutation._permutation
    if sampling:
        yield from lu(layer, sampling)
        yield Permute(name="permutation", order=torch.argsort(order))
    else:
        yield Permute(name="permutation", order=order)
        yield from lu(layer, sampling)


def householder(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``HouseholderSequence``."""
    yield _reflections("q_vectors", layer, sampling)


def _reflections(name: str, layer: Any, sampling: bool) -> Step:
    vectors = constant(layer.q_vectors)
    matrix = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    for v in vectors:
        matrix = matrix - torch.outer(v, v @ matrix) * (2 / v.square().sum())
    if not bool(matrix.isfinite().all()):
        return Refused(name=name, reason="one of its reflections has a normal vector of zero")
    # Each reflection errs by at most three times the norm of x, and the others keep that.
    error = torch.full_like(matrix, SLACK * 4.0 * len(vectors))
    return Linear(name=name, matrix=matrix.T if sampling else matrix, error=error)


def qr(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``QRLinear``."""
    with torch.no_grad():
        upper = constant(layer._create_upper())
    form = _solution if sampling else _product
    rotation = _reflections("orthogonal", layer.orthogonal, sampling)
    yield from _shifted(layer, sampling, [form("upper", upper), rotation])


def svd(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of ``SVDLinear``."""
    with torch.no_grad():
        diagonal = constant(layer.diagonal)
    factor = 1 / diagonal if sampling else diagonal
    parts = [
        _reflections("orthogonal_2", layer.orthogonal_2, sampling),
        Scale(name="diagonal", factor=factor, offset=torch.zeros_like(factor)),
        _reflections("orthogonal_1", layer.orthogonal_1, sampling),
    ]
    yield from _shifted(layer, sampling, parts)
