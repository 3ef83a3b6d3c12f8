r"""Compiled kernels in eager mode: the same numbers, one compilation for all sizes, and what
happens where nothing can be compiled.

Most tests let the compiler trace and run what it finds as it is: what is made of it is PyTorch's.
"""

import copy
import itertools
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from flowguard.functional import (
    kernels,
    prepare,
    prepared_spline,
    shifted_spline,
    softmax_spline,
)
from flowguard.spline import compiled

BINS = pytest.mark.parametrize("bins", [2, 4])
INVERSE = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


@pytest.fixture
def graphs(monkeypatch):
    r"""What the compiler was asked for, one graph after the other."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    monkeypatch.setattr(compiled, "SIZE", 257)
    monkeypatch.setattr(compiled, "_cache", compiled._Cache())
    return made


@pytest.fixture(autouse=True)
def nothing_else_is_said():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compiled kernels")
        yield


def draw(shape, bins, dtype=torch.float64, seed=0):
    r"""Input, parameters as a network returns them, and the shift."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    phi = randn(*shape, 3 * (bins - 1) + 1)
    return 3 * randn(*shape), *phi.split([bins - 1] * 3 + [1], -1)


def run(x, w, h, d, shift, inverse=False, **options):
    options = {"bound": 3.0, "slope": 1e-2, "shift_bound": 1.0} | options
    return shifted_spline(x, w, h, d, shift[..., 0], inverse=inverse, **options)


def with_gradients(tensors, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outs = run(*leaves, **options)
    cotangents = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, cotangents)]


def both(function):
    r"""What a function returns with compiled kernels, and with those in place."""
    with kernels("compiled"):
        fast = function()
    with kernels("eager"):
        return fast, function()


def assert_same(function, **tolerances):
    for one, other in zip(*both(function), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerances)


@BINS
@INVERSE
def test_another_size_or_shape_compiles_nothing(graphs, inverse, bins):
    shapes = (2,), (1000,), (257,), (3, 5), (2, 3, 4, 5), (1, 7), (7, 1)
    for shape in shapes:
        tensors = draw(shape, bins)
        assert_same(lambda tensors=tensors: with_gradients(tensors, inverse=inverse))
        assert len(graphs) == 2  # forward and backward


@BINS
def test_what_is_one_number_or_none_is_computed_in_place(graphs, bins):
    for shape in ((), (1,), (1, 1), (0,), (3, 0)):
        tensors = draw(shape, bins)
        assert_same(lambda tensors=tensors: with_gradients(tensors))
    assert not graphs


@BINS
def test_all_layouts_in_memory(graphs, bins):
    x, *params = draw((6, 10), bins)
    first = [p.movedim(-1, 0).contiguous().movedim(0, -1) for p in params]  # bins first
    turned = [p.transpose(0, 1).contiguous().transpose(0, 1) for p in params]
    wide = [torch.cat((p, p), -1)[..., : p.shape[-1]] for p in params]
    for some in (first, turned, wide, [p.contiguous() for p in params]):
        assert_same(lambda some=some: run(x, *some))
    assert_same(lambda: run(x.t().contiguous().t(), *params))
    assert_same(lambda: run(x[:, ::2], *(p[:, ::2] for p in params)))
    assert_same(lambda: run(x[:, :1], *(p[:, :1] for p in params)))
    # One for all elements, or for all of a row: nothing is read from beyond.
    assert_same(lambda: run(x, *(p[0, 0] for p in params)))
    assert_same(lambda: run(x, *(p[:1] for p in params)))
    assert_same(lambda: run(x, *(p[:, :1] for p in params)))
    # As images have it: parameters of all channels one after the other.
    x, *params = draw((2, 3, 4, 5), bins)
    phi = torch.cat(params, -1).permute(0, 1, 4, 2, 3).contiguous()
    of_image = [p.movedim(2, -1) for p in phi.split([bins - 1] * 3 + [1], 2)]
    assert_same(lambda: with_gradients((x, *of_image)))


def test_gradients_that_come_from_a_sum(graphs):
    tensors = draw((5, 8), 2)

    def function():
        leaves = [t.detach().requires_grad_() for t in tensors]
        y, ladj = run(*leaves)
        (y.square().sum() - ladj.sum()).backward()
        return [t.grad for t in leaves]

    assert_same(function)


@pytest.mark.parametrize("shape", [(40,), (5, 8)], ids=str)
def test_what_comes_out_may_be_written_over(graphs, shape):
    def function():
        leaves = [t.requires_grad_() for t in draw(shape, 2)]
        y, ladj = run(*leaves)
        y.add_(1)
        ladj.mul_(2)
        return [y, ladj, *torch.autograd.grad(y.sum() + ladj.sum(), leaves)]

    assert_same(function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@INVERSE
def test_single_and_half_precision(graphs, inverse, dtype):
    tensors = draw((200,), 2, dtype)
    wide = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    tolerances = {"rtol": 1e-4, "atol": 1e-4} | wide
    assert_same(lambda: with_gradients(tensors, inverse=inverse), **tolerances)


@pytest.mark.parametrize(
    "options",
    [{"slope": None}, {"shift_bound": None}, {"bound": 0.5, "slope": 0.1}, {"steep": False}],
    ids=str,
)
@BINS
def test_each_option_has_its_own_kernel(graphs, bins, options):
    tensors = draw((50,), bins)
    assert_same(lambda: run(*tensors))
    assert_same(lambda: run(*tensors, **options))
    assert len(graphs) == 2


def test_more_kernels_than_the_compiler_would_make_of_one_code(graphs):
    x, *params, shift = draw((30,), 2)
    for k in range(12):
        assert_same(lambda k=k: run(x, *params, shift, bound=1.0 + k))
    assert len(graphs) == 12


def test_without_a_shift(graphs):
    x, *params, _ = draw((30,), 3)
    assert_same(lambda: shifted_spline(x, *params, None, bound=2.0, slope=1e-2))


def test_what_is_prepared(graphs):
    x, *params, shift = draw((3, 40), 2)
    options = {"bound": 2.0, "slope": 1e-2, "shift_bound": 1.0}
    raw = [*(p[..., 0] for p in params), shift[..., 0]]
    known = prepare(*raw, **options, out=[torch.empty_like(p) for p in raw])
    for inverse in (False, True):
        assert_same(lambda inverse=inverse: prepared_spline(x, known, inverse=inverse))
    assert len(graphs) == 2


def test_splines_of_other_libraries_are_computed_in_place(graphs):
    x, w, h, d = draw((20,), 4)[:4]
    assert_same(lambda: softmax_spline(x, w, h, d[..., :2], bound=3.0))
    assert not graphs


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(graphs, mode):
    def function():
        with mode():
            return [t.clone() for t in run(*draw((30,), 2))]

    assert_same(function)
    assert_same(lambda: with_gradients(draw((30,), 2)))


def test_autocast_changes_neither_numbers_nor_kernels(graphs):
    tensors = draw((30,), 2, torch.float32)
    assert_same(lambda: with_gradients(tensors), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(lambda: with_gradients(tensors), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2


@BINS
@INVERSE
def test_derivatives_of_both_orders(graphs, inverse, bins):
    tensors = [t.requires_grad_() for t in draw((3,), bins)]
    with kernels("compiled"):
        assert torch.autograd.gradcheck(
            lambda *t: run(*t, inverse=inverse),
            tensors,
            check_forward_ad=True,
            check_batched_grad=True,
        )
        assert torch.autograd.gradgradcheck(lambda *t: run(*t, inverse=inverse), tensors)
    assert len(graphs) == 2


def test_transforms_of_functions_are_computed_as_before(graphs):
    tensors = draw((6,), 4)

    def total(*t):
        y, ladj = run(*t)
        return (y + ladj).sum()

    assert_same(lambda: torch.func.vmap(run)(*tensors))
    assert_same(lambda: torch.func.grad(total, argnums=(0, 1, 2, 3, 4))(*tensors))
    assert_same(lambda: [torch.func.jacrev(total)(*tensors), torch.func.jacfwd(total)(*tensors)])
    assert not graphs


def test_the_backward_is_computed_as_the_forward_was(graphs):
    def function():
        leaves = [t.requires_grad_() for t in draw((40,), 2)]
        outs = run(*leaves)
        with kernels("traced"):  # as another thread may have it
            return torch.autograd.grad(outs, leaves, outs)

    assert_same(function)
    assert len(graphs) == 2


def test_in_what_users_compile_the_choice_means_nothing(graphs):
    tensors = draw((30,), 2)
    expected = run(*tensors)
    whole = torch.compile(lambda *t: run(*t), fullgraph=True, backend="eager")
    with kernels("compiled"):
        for one, other in zip(whole(*tensors), expected, strict=True):
            torch.testing.assert_close(one, other)
        broken = torch.compile(
            lambda *t: torch._dynamo.disable(run)(*t), backend="eager", fullgraph=False
        )
        assert not graphs
        for one, other in zip(broken(*tensors), expected, strict=True):
            torch.testing.assert_close(one, other)
    assert len(graphs) == 1  # ours, in what the compiler left to Python


def test_when_the_compiler_forgets_what_it_made(graphs):
    assert_same(lambda: run(*draw((30,), 2)))
    torch._dynamo.reset()
    for n in (20, 30, 50):
        assert_same(lambda n=n: run(*draw((n,), 2)))


def test_threads_share_what_was_compiled(graphs):
    results, errors = [], []

    def work(n):
        try:
            with kernels("compiled"):
                results.append((n, with_gradients(draw((n,), 2))))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(50 + n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(graphs) == 2
    for n, made in results:
        for one, other in zip(made, with_gradients(draw((n,), 2)), strict=True):
            torch.testing.assert_close(one, other)


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi = nn.Parameter(torch.randn(20, 4))

    def forward(self, x):
        return run(x, *self.phi.split(1, -1))


def test_models_can_be_copied_and_saved(graphs):
    flow, x = Flow(), torch.randn(20)
    with kernels("compiled"):
        y, ladj = flow(x)
        (y.sum() + ladj.sum()).backward()
        for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            torch.testing.assert_close(other(x)[0], y)


class Splines(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, k):
        return torch.stack(run(*draw((40,), 2, seed=k)))


def test_workers_that_were_forked_compute_in_place(graphs):
    with kernels("compiled"):
        run(*draw((40,), 2))
        loader = DataLoader(
            Splines(), batch_size=None, num_workers=1, multiprocessing_context="fork"
        )
        for k, made in enumerate(loader):
            with kernels("eager"):
                assert torch.equal(made, Splines()[k])
    assert len(graphs) == 1


def test_a_compiler_that_fails_is_told_of_once(graphs, monkeypatch):
    def backend(graph, inputs):
        raise OSError("no g++")

    monkeypatch.setattr(compiled, "BACKEND", backend)
    tensors = draw((30,), 2)
    expected = with_gradients(tensors)
    with kernels("compiled"):
        with pytest.warns(RuntimeWarning, match=r"on this cpu; got .*OSError.* in place instead"):
            made = with_gradients(tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = with_gradients(tensors)
            run(*draw((30,), 3))
    for one, other, third in zip(made, again, expected, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_a_compiler_that_is_turned_off_is_told_of(graphs):
    tensors = draw((30,), 2)
    with (
        kernels("compiled"),
        torch.compiler.set_stance("force_eager"),
        pytest.warns(RuntimeWarning, match="the compiler of PyTorch is turned off"),
    ):
        y, _ = run(*tensors)
    assert torch.equal(y, run(*tensors)[0])


@pytest.mark.slow
@pytest.mark.parametrize("bins", [2, 8])
def test_what_the_compiler_really_makes(bins, monkeypatch):
    monkeypatch.setattr(compiled, "_cache", compiled._Cache())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for inverse, shape in itertools.product((False, True), ((2,), (1000,), (7, 13))):
        tensors = draw(shape, bins, torch.float32)
        assert_same(
            lambda tensors=tensors, inverse=inverse: with_gradients(tensors, inverse=inverse),
            rtol=1e-3,
            atol=1e-3,
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
