r"""Factorisations by LU of several matrices are those of each."""

import pytest
import torch

from flowguard import numerics

CASES = {
    "inv": (numerics.inv, torch.linalg.inv, 1),
    "inv_ex": (lambda a: numerics.inv_ex(a)[0], torch.linalg.inv, 1),
    "logabsdet": (numerics.logabsdet, lambda a: torch.linalg.slogdet(a).logabsdet, 1),
    "inv of both": (lambda a: numerics.inv_and_logabsdet(a)[0], torch.linalg.inv, 1),
    "logabsdet of both": (
        lambda a: numerics.inv_and_logabsdet(a)[1],
        lambda a: torch.linalg.slogdet(a).logabsdet,
        1,
    ),
    "lower": (lambda a: numerics.lu(a)[1], lambda a: torch.linalg.lu(a)[1], 1),
    "upper": (lambda a: numerics.lu(a)[2], lambda a: torch.linalg.lu(a)[2], 1),
    "solve": (numerics.solve, torch.linalg.solve, 2),
}


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_several_matrices_are_as_each_of_them(name, batch):
    ours, whole, arguments = CASES[name]
    given = [torch.randn(*batch, 5, 5, dtype=torch.float64) for _ in range(arguments)]
    for t in given:
        t.requires_grad_()
    found, expected = ours(*given), whole(*given)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found.sum(), given)
    for a, b in zip(gradients, torch.autograd.grad(expected.sum(), given), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_of_several_matrices_it_is_told_which_are_singular():
    matrices = torch.stack([torch.eye(2), torch.zeros(2, 2), torch.eye(2)])
    assert (numerics.inv_ex(matrices)[1] != 0).tolist() == [False, True, False]
    with pytest.raises(RuntimeError, match="singular"):
        numerics.inv(matrices)
    with pytest.raises(RuntimeError, match="zero"):
        numerics.inv_and_logabsdet(matrices)


@pytest.mark.parametrize("name", CASES)
def test_transforms_of_functions_and_compiled_code_go_through(name):
    ours, _, arguments = CASES[name]
    given = [torch.randn(2, 3, 3, dtype=torch.float64) for _ in range(arguments)]
    derivative = torch.func.jacrev(ours)(*given)
    assert derivative.isfinite().all()
    assert torch.allclose(derivative, torch.func.jacfwd(ours)(*given), rtol=1e-9, atol=1e-9)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*given), ours(*given))
