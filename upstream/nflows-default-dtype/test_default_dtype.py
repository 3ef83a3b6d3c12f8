import copy
from importlib import import_module

import pytest
import torch

pytest.importorskip("nflows")

MAKES = {
    "StandardNormal": lambda module: module.StandardNormal([3]),
    "ConditionalDiagonalNormal": lambda module: module.ConditionalDiagonalNormal([3]),
    "DiagonalNormal": lambda module: module.DiagonalNormal([3]),
}


@pytest.fixture(params=["nflows", "glasflow.nflows"])
def normal(request):
    pytest.importorskip(request.param.partition(".")[0])
    return import_module(f"{request.param}.distributions.normal")


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.wound("nflows", "0.14", raises=AssertionError)
def test_nothing_is_in_float64(change, normal, name):
    # On a device without float64, as Apple's, such a buffer cannot be moved at all.
    base = MAKES[name](normal)
    assert {b.dtype for b in (*base.buffers(), *base.parameters())} == {torch.float32}


@pytest.mark.wound("nflows", "0.14", raises=AssertionError)
def test_the_mean_has_the_default_dtype(change, normal):
    assert normal.StandardNormal([3]).mean().dtype == torch.float32


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_densities_are_those_of_the_released_one(name, dtype, fix, normal):
    g = torch.Generator().manual_seed(0)
    x, context = (torch.randn(50, n, generator=g, dtype=dtype) for n in (3, 6))
    before = MAKES[name](normal).to(dtype).log_prob(x, context)
    with fix.applied():
        base = MAKES[name](normal).to(dtype)  # the constant keeps its digits when it is moved
        after = base.log_prob(x, context)
        samples = base.sample(4, context) if name != "DiagonalNormal" else None
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(after, before, rtol=8 * eps, atol=8 * eps)
    assert after.dtype == dtype
    assert samples is None or samples.shape == (50, 4, 3)


def test_what_was_saved_is_loaded_and_copies_are_made(fix, normal):
    saved = normal.DiagonalNormal([3]).state_dict()
    with fix.applied():
        base = normal.DiagonalNormal([3])
        base.load_state_dict(saved)
        assert copy.deepcopy(base).log_prob(torch.zeros(2, 3)).shape == (2,)
        with pytest.raises(ValueError, match="Expected input of shape"):
            base.log_prob(torch.zeros(2, 4))
