r"""nflows' splines computed by flowguard: the same numbers, no assertion, taken back again."""

import copy
import io
import math
import pickle
import threading

import mpmath
import pytest
import torch

import flowguard
from flowguard.functional import (
    straight_rational_quadratic_spline,
    unconstrained_rational_quadratic_spline,
)

try:
    from flowguard.integrations.nflows import splines
    from flowguard.integrations.nflows.host import available, part
    from flowguard.integrations.nflows.standin import HOLDERS, SPLINES
except ImportError:
    pytest.skip("neither nflows nor glasflow is installed", allow_module_level=True)

NAME = "unconstrained_rational_quadratic_spline"
HOST = pytest.mark.parametrize("host", available())
INVERSE = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


@pytest.fixture(autouse=True)
def clean():
    yield
    flowguard.unregister("nflows")


def held(host):
    return [vars(part(holder, host))[NAME] for holder in HOLDERS]


def theirs(host):
    return getattr(part("transforms.splines", host), NAME)


def draw(n, bins, features=2, dtype=torch.float64):
    x = torch.randn(n, features, dtype=torch.float64) * 2
    sizes = bins, bins, bins - 1
    return [t.to(dtype) for t in (x, *(torch.randn(n, features, s).double() for s in sizes))]


def flow(host, layers=2, **options):
    nets, T = part("nn.nets", host), part("transforms", host)

    def net(inputs, outputs):
        return nets.ResidualNet(inputs, outputs, 8, context_features=2)

    options = {"num_bins": 5, "tails": "linear", "tail_bound": 3.0, **options}
    cls = T.PiecewiseRationalQuadraticCouplingTransform
    masks = [[1, 0, 1], [0, 1, 0]]
    parts = [cls(masks[i % 2], net, **options) for i in range(layers)]
    parts.append(T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(3, 8, 2, **options))
    normal = part("distributions.normal", host).StandardNormal([3])
    return part("flows", host).Flow(T.CompositeTransform(parts), normal)


def gap(a, b):
    r"""The largest difference, of numbers above one relatively, in tensors; of gradients for the
    size of the largest one."""
    return max(
        ((p - q).abs() / q.abs().clamp(min=1)).max().item() for p, q in zip(a, b, strict=True)
    )


def with_gradients(function, tensors, inverse, cotangents):
    leaves = [t.clone().requires_grad_() for t in tensors]
    outs = function(*leaves, inverse=inverse, tails="linear", tail_bound=3.0)
    grads = torch.autograd.grad(outs, leaves, cotangents)
    return [o.detach() for o in outs], [g / g.abs().max() for g in grads]


def ordinary(n, bins):
    r"""Parameters as a network of 16 features gives them, whose logits the hosts divide by four."""
    x, w, h, d = draw(n, bins)
    return [x, w / 4, h / 4, d]


def check(bins, inverse, host, elements):
    torch.manual_seed(0)
    tensors = ordinary(elements // 2, bins)
    cotangents = tuple(torch.randn(2, elements // 2, 2, dtype=torch.float64))
    function = unconstrained_rational_quadratic_spline
    ours, to_ours = with_gradients(function, tensors, inverse, cotangents)
    other, to_other = with_gradients(theirs(host), tensors, inverse, cotangents)
    assert gap(ours, other) <= (1e-10 if inverse else 1e-12)
    assert gap(to_ours, to_other) <= (1e-10 if inverse else 1e-12)


@HOST
@INVERSE
@pytest.mark.parametrize("bins", [2, 8, 32])
def test_the_numbers_are_the_hosts(bins, inverse, host):
    check(bins, inverse, host, elements=20_000)


@pytest.mark.slow
@HOST
@INVERSE
@pytest.mark.parametrize("bins", [2, 3, 8, 16, 32])
def test_the_numbers_of_a_million_elements_are_the_hosts(bins, inverse, host):
    check(bins, inverse, host, elements=1_000_000)


def exact(x, w, h, d, bound=3, least=1e-3):
    r"""The logarithm of the slope in forty digits, by the formulas of the paper."""
    with mpmath.workdps(40):
        x, least = mpmath.mpf(x), mpmath.mpf(least)
        logits = [[mpmath.exp(v) for v in p] for p in (w, h)]
        w, h = (
            [2 * bound * (least + (1 - len(p) * least) * v / sum(p)) for v in p] for p in logits
        )
        d = [mpmath.mpf(1), *(least + mpmath.log(1 + mpmath.exp(v)) for v in d), mpmath.mpf(1)]
        k, start = 0, mpmath.mpf(-bound)
        while x >= start + w[k]:
            start, k = start + w[k], k + 1
        t, s = (x - start) / w[k], h[k] / w[k]
        top = d[k + 1] * t**2 + 2 * s * t * (1 - t) + d[k] * (1 - t) ** 2
        return mpmath.log(s**2 * top / (s + (d[k] + d[k + 1] - 2 * s) * t * (1 - t)) ** 2)


@HOST
def test_where_both_differ_most_the_hosts_digits_are_the_wrong_ones(host):
    torch.manual_seed(0)
    tensors = [t.flatten(0, 1) for t in draw(10_000, 32)]
    ours = unconstrained_rational_quadratic_spline(*tensors, tail_bound=3.0)[1]
    other = theirs(host)(*tensors, tail_bound=3.0)[1]
    worst = (ours - other).abs().topk(3).indices.tolist()
    assert (ours - other)[worst[0]].abs() > 1e-12
    for i in worst:
        truth = exact(*(t[i].tolist() for t in tensors))
        assert abs(truth - ours[i].item()) < 1e-12
    truth = exact(*(t[worst[0]].tolist() for t in tensors))
    assert abs(truth - other[worst[0]].item()) > 1e-12


@HOST
@INVERSE
def test_the_numbers_on_a_box_are_the_hosts(inverse, host):
    torch.manual_seed(0)
    x, w, h, _ = draw(500, 6)
    d = torch.randn(500, 2, 7, dtype=x.dtype)
    box = {"left": -1.0, "right": 2.0, "bottom": -2.0, "top": 5.0}
    x = x.clamp(-1, 2)
    other = part("transforms.splines", host).rational_quadratic_spline(
        x, w, h, d, inverse=inverse, **box
    )
    ours = straight_rational_quadratic_spline(x, w, h, d, inverse=inverse, **box)
    assert gap(ours, other) <= 1e-11


# Steep at one end of a bin and flat at the other: in single precision the discriminant at its upper
# end is a difference of two numbers that differ by less than their rounding.
CANCELLED = {
    "inputs": torch.tensor([2.954228639602661, 0.5]),
    "unnormalized_widths": torch.tensor([0.0, -5.0, 0.0]).repeat(2, 1),
    "unnormalized_heights": torch.tensor([0.0, 5.0, 0.0]).repeat(2, 1),
    "unnormalized_derivatives": torch.tensor([1000.0, -20.0]).repeat(2, 1),
}


@HOST
def test_a_negative_discriminant_ends_the_host_and_not_ours(host):
    options = {**CANCELLED, "inverse": True, "tail_bound": 3.0}
    with pytest.raises(AssertionError):
        theirs(host)(**options)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = theirs(host)(**double)[0]
    with splines():
        x, ladj = theirs(host)(**options)
    assert torch.allclose(x.double(), expected, atol=1e-4)
    assert ladj.isfinite().all()


@HOST
@INVERSE
@pytest.mark.parametrize("value", [1e4, -1e4, math.inf, -math.inf])
@pytest.mark.parametrize("which", [1, 2, 3])
def test_extreme_parameters_give_finite_numbers(which, value, inverse, host):
    torch.manual_seed(0)
    tensors = draw(50, 8, dtype=torch.float32)
    tensors[which][:, :, ::3] = value
    leaves = [t.requires_grad_() for t in tensors]
    with splines():
        outs = theirs(host)(*leaves, inverse=inverse, tail_bound=3.0)
    assert all(o.isfinite().all() for o in outs)
    grads = torch.autograd.grad(sum(o.sum() for o in outs), leaves)
    assert all(g.isfinite().all() for g in grads)


@HOST
@INVERSE
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_nan_ends_the_host_and_stays_in_its_element_in_ours(which, inverse, host):
    torch.manual_seed(0)
    tensors = draw(50, 8, dtype=torch.float32)
    tensors[0].clamp_(-2.9, 2.9)
    options = {"inverse": inverse, "tail_bound": 3.0}
    with splines():
        before = theirs(host)(*tensors, **options)
    tensors[which].view(100, -1)[7] = math.nan
    if which and inverse:
        with pytest.raises(AssertionError):
            theirs(host)(*tensors, **options)
    with splines():
        after = theirs(host)(*tensors, **options)
    for a, b in zip(after, before, strict=True):
        a, b = a.flatten(), b.flatten()
        assert a[7].isnan()
        assert torch.equal(a[:7], b[:7])
        assert torch.equal(a[8:], b[8:])


@HOST
def test_a_model_runs_on_it_unchanged(host):
    torch.manual_seed(0)
    model = flow(host)
    x, context = torch.randn(30, 3), torch.randn(30, 2)
    noise = torch.randn(30, 3)
    before = model.log_prob(x, context), *model._transform.inverse(noise, context)
    with splines():
        after = model.log_prob(x, context), *model._transform.inverse(noise, context)
    for a, b in zip(after, before, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@HOST
def test_a_spline_without_tails_keeps_its_domain(host):
    T = part("transforms", host)
    layer = T.PiecewiseRationalQuadraticCDF([3], num_bins=4, tails=None)
    x = torch.rand(20, 3)
    before = layer(x)[0]
    with splines():
        assert torch.allclose(layer(x)[0], before, atol=1e-6)
        with pytest.raises(part("transforms.base", host).InputOutsideDomain):
            layer(x + 1)


def test_it_is_nested_and_taken_back():
    before = [held(host) for host in available()]
    with splines():
        inside = [held(host) for host in available()]
        with splines():
            assert [held(host) for host in available()] == inside
        assert [held(host) for host in available()] == inside
        assert SPLINES.active
    assert [held(host) for host in available()] == before
    assert not any(
        a is b
        for one, two in zip(inside, before, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    with pytest.raises(KeyError), splines():
        raise KeyError
    assert [held(host) for host in available()] == before
    flowguard.register("nflows", splines=True)
    with splines():
        pass
    assert SPLINES.active
    flowguard.unregister("nflows")
    assert [held(host) for host in available()] == before


def test_to_register_without_it_leaves_the_splines_alone():
    before = held(available()[0])
    flowguard.register("nflows")
    assert held(available()[0]) == before


@HOST
def test_other_threads_keep_the_hosts(host):
    options = {**CANCELLED, "inverse": True, "tail_bound": 3.0}
    found = []

    def call():
        try:
            theirs(host)(**options)
            found.append("ours")
        except AssertionError:
            found.append("theirs")

    def in_a_thread():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with splines():
        call()
        in_a_thread()
    flowguard.register("nflows", splines=True)
    in_a_thread()
    flowguard.unregister("nflows")
    in_a_thread()
    assert found == ["ours", "theirs", "ours", "theirs"]


@HOST
def test_what_was_kept_from_inside_is_the_hosts_outside(host):
    with splines():
        kept = theirs(host)
    options = {**CANCELLED, "inverse": True, "tail_bound": 3.0}
    with pytest.raises(AssertionError):
        kept(**options)


@HOST
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("numbers", "other numbers"),
        ("signature", "other parameters"),
        ("failure", "raises ZeroDivisionError"),
    ],
)
def test_a_function_that_is_another_is_refused(change, reason, host, monkeypatch):
    original, module = theirs(host), part(HOLDERS[-1], host)

    def numbers(
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        inverse=False,
        tails="linear",
        tail_bound=1.0,
        min_bin_width=1e-3,
        min_bin_height=1e-3,
        min_derivative=1e-3,
    ):
        if change == "failure":
            raise ZeroDivisionError("no")
        y, ladj = original(
            inputs,
            unnormalized_widths,
            unnormalized_heights,
            unnormalized_derivatives,
            inverse,
            tails,
            tail_bound,
            min_bin_width,
            min_bin_height,
            min_derivative,
        )
        return y, ladj + 1e-6 * (min_derivative > 0.05)

    other = (
        (lambda *args, **options: original(*args, **options)) if change == "signature" else numbers
    )
    monkeypatch.setattr(module, NAME, other)
    before = [held(name) for name in available()]
    with pytest.raises(RuntimeError, match=reason), splines():
        raise NotImplementedError
    with pytest.raises(RuntimeError, match=f"{module.__name__}.{NAME} is not the function"):
        flowguard.register("nflows", splines=True)
    assert [held(name) for name in available()] == before
    assert not hasattr(part("transforms", available()[0]), "RobustSplineCDF")


@HOST
def test_a_function_that_is_written_otherwise_is_known(host, monkeypatch):
    original = theirs(host)
    copy_of_it = type(original)(
        original.__code__.replace(co_name="another"),
        original.__globals__,
        argdefs=original.__defaults__,
    )
    monkeypatch.setattr(part(HOLDERS[-1], host), NAME, copy_of_it)
    with splines():
        assert held(host)[-1] is not copy_of_it
    assert held(host)[-1] is copy_of_it


@HOST
def test_what_others_put_there_meanwhile_stays(host):
    module = part(HOLDERS[-1], host)
    original = vars(module)[NAME]
    with splines():
        module.unconstrained_rational_quadratic_spline = mine = lambda *args: None
    assert vars(module)[NAME] is mine
    module.unconstrained_rational_quadratic_spline = original


@HOST
def test_models_that_were_saved_and_copied_inside_work_outside(host):
    torch.manual_seed(0)
    x, context = torch.randn(10, 3), torch.randn(10, 2)
    with splines():
        model = flow(host)
        model.log_prob(x, context)
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        layers = pickle.dumps(model._transform._transforms[0])
    expected = model.log_prob(x, context)
    assert torch.equal(copied.log_prob(x, context), expected)
    another = flow(host)
    file.seek(0)
    another.load_state_dict(torch.load(file))
    assert torch.equal(another.log_prob(x, context), expected)
    layer = model._transform._transforms[0]
    assert torch.equal(pickle.loads(layers)(x, context)[0], layer(x, context)[0])


@HOST
def test_certificates_and_migrations_are_what_they_were(host):
    torch.manual_seed(0)
    model = flow(host)
    x, context = torch.randn(200, 3), torch.randn(200, 2)
    outside = flowguard.certify(model), flowguard.migrate(copy.deepcopy(model), x, context)[0]
    with splines():
        inside = flowguard.certify(model), flowguard.migrate(copy.deepcopy(model), x, context)[0]
    assert str(inside[0]) == str(outside[0])
    assert not inside[0].certified
    bounds = [flowguard.certify(robust).bound(3.0) for robust in (inside[1], outside[1])]
    assert math.isclose(*bounds, rel_tol=1e-4)
    layer = part("transforms", host).PiecewiseRationalQuadraticCDF([3], tails="linear")
    with splines():
        bound = flowguard.certify(layer).bound(5.0)
        z = torch.linspace(-5, 5, 999).unsqueeze(1).repeat(1, 3)
        assert layer.inverse(z)[0].abs().max() <= bound


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_layer_is_one_graph(everywhere):
    torch.manual_seed(0)
    host = available()[0]
    layer = flow(host, layers=1)._transform._transforms[0]
    x, params = torch.randn(10, 2), torch.randn(10, 2 * 14)
    before = layer._coupling_transform_forward(x, params.clone())  # which divides them in place

    def compiled():
        function = torch.compile(
            layer._coupling_transform_forward, fullgraph=True, backend="eager"
        )
        return function(x, params.clone())

    torch._dynamo.reset()
    if everywhere:
        flowguard.register("nflows", splines=True)
        after = compiled()
    else:
        with splines():
            after = compiled()
    for a, b in zip(after, before, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
