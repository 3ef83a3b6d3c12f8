r"""Memory that outlives a call must never show in what a call returns."""

import threading
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from flowguard import kernels
from flowguard.functional import rational_quadratic_spline
from flowguard.spline.inplace import memory

BINS = pytest.mark.parametrize("bins", [2, 5])
spline = partial(rational_quadratic_spline, bound=3.0)


def draw(n, bins, dtype=torch.float64):
    x = 2 * torch.randn(n, dtype=dtype)
    return [x, *(torch.randn(n, bins - 1, dtype=dtype) for _ in range(3))]


def both(args):
    args = [a.detach().requires_grad_() for a in args]
    out = spline(*args)
    return [*out, *torch.autograd.grad(out, args, (args[0].cos(), args[0].sin()))]


@BINS
def test_results_are_not_overwritten_by_later_calls(bins):
    inputs = [draw(n, bins) for n in (100, 7, 100, 3000, 1)]
    results = [both(args) for args in inputs]
    copies = [[t.clone() for t in result] for result in results]
    for args in inputs:
        both(args)
        spline(*args, inverse=True)
    for result, copy in zip(results, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, copy, strict=True))


@BINS
def test_fresh_memory_gives_the_same(bins):
    args = draw(500, bins)
    warm = both(args)
    memory.release()
    assert all(torch.equal(a, b) for a, b in zip(both(args), warm, strict=True))


@BINS
def test_threads_do_not_share_it(bins):
    inputs = [draw(20_000, bins) for _ in range(4)]
    expected = [both(args) for args in inputs]
    wrong = []

    def work(k):
        for _ in range(10):
            result = both(inputs[k])
            if not all(torch.equal(a, b) for a, b in zip(result, expected[k], strict=True)):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_within_a_call_has_its_own():
    outer = memory.scratch(torch.empty(1), torch.float32)
    inner = memory.scratch(torch.empty(1), torch.float32)
    assert outer is not inner
    memory.keep(inner)
    memory.keep(outer)
    assert memory.scratch(torch.empty(1), torch.float32) is outer


def test_inference_mode_leaves_nothing_that_others_cannot_use():
    args = draw(50, 2, torch.float32)
    expected = spline(*args)[0]
    memory.release()
    with torch.inference_mode():
        assert torch.equal(spline(*args)[0], expected)
    assert torch.equal(both(args)[0], expected)


def test_another_default_device():
    args = draw(20, 2)
    expected = spline(*args)[0]
    memory.release()
    torch.set_default_device("meta")
    try:
        y = spline(*args)[0]
    finally:
        torch.set_default_device(None)
    assert torch.equal(y, expected)


def test_little_is_kept():
    spline(*draw(2**20, 5, torch.float32))
    block = memory.scratch(torch.empty(1), torch.float32)
    assert block._memory.nbytes <= 2 * memory.LIMIT
    for n in range(1, 3 * memory.MOST):
        block.rows(memory.Layout(1, 1), torch.Size([n]))
    assert len(block._rows) <= memory.MOST


@BINS
def test_what_is_recorded_gets_its_own(bins):
    x, *params = draw(20, bins)
    recorded = make_fx(lambda x, *p: spline(x, *p)[0])(x, *params)
    later = draw(20, bins)
    kept = recorded(*later)
    with kernels("traced"):  # as it is recorded
        expected = spline(*later)[0]
    recorded(x, *params)
    spline(x, *params)
    assert torch.equal(kept, expected)


@BINS
def test_views_of_it_are_made_once_for_each_shape(bins):
    x, *params = draw(40, bins)
    views = []

    class Views(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in ("unbind", "split", "unflatten", "arange"):
                views.append(function)
            return function(*args, **(kwargs or {}))

    def count(x, *params):
        views.clear()
        with Views():
            spline(x, *params)
        return len(views)

    memory.release()
    first = count(x, *params)
    assert first > 0
    assert count(x, *params) == 0
    assert count(x[:20], *(p[:20] for p in params)) == first


def test_no_number_of_python_is_handed_to_another_device():
    # Each would wait for all that the device has still to do.
    args = [t.to("meta").requires_grad_() for t in draw(300, 5)]
    made = []

    class Numbers(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in ("new_tensor", "tensor", "as_tensor"):
                made.append(args)
            return function(*args, **(kwargs or {}))

    with Numbers():
        sum(out.sum() for out in spline(*args)).backward()
    assert made == []
    assert args[1].grad.is_meta
