r"""The robust layers for nflows obey the laws that nflows' own layers obey.

The last test runs most of them once more with glasflow's fork as the only host.
"""

import copy
import importlib
import importlib.util
import io
import pathlib
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import flowguard
from flowguard.functional import FINE_SLOPE, SLOPE

try:
    from flowguard.integrations import nflows as ours
    from flowguard.integrations.nflows.host import part
except ImportError:
    pytest.skip("neither nflows nor glasflow is installed", allow_module_level=True)

T = part("transforms")
base = part("transforms.base")
nets = part("nn.nets")
Coupling = ours.RobustSplineCouplingTransform
Autoregressive = ours.MaskedRobustSplineAutoregressiveTransform

N, CONTEXT = 10, 3


def residual(context=None):
    return lambda i, o: nets.ResidualNet(i, o, 30, context_features=context, num_blocks=2)


def convolution(context=None):
    return lambda i, o: nets.ConvResidualNet(i, o, 16, context_channels=context)


def mid(features):
    return part("utils.torchutils").create_mid_split_binary_mask(features)


def vector(**options):
    return lambda context: Coupling(mid(6), residual(context), **options)


def image(**options):
    return lambda context: Coupling(mid(4), convolution(context), **options)


def masked(**options):
    return lambda context: Autoregressive(6, 30, context, **options)


#: Each layer with the shape of its inputs, and of its contexts, if any.
LAYERS = {
    "vector": (vector(), (6,), None),
    "vector, context": (vector(), (6,), (CONTEXT,)),
    "vector, two bins": (vector(num_bins=2), (6,), (CONTEXT,)),
    "vector, published": (vector(num_bins=2, slope=None), (6,), None),
    "vector, free shift": (vector(shift_bound=None), (6,), None),
    "vector, unconditional": (vector(apply_unconditional_transform=True), (6,), (CONTEXT,)),
    "image": (image(), (4, 5, 6), None),
    "image, context": (image(), (4, 5, 6), (CONTEXT, 5, 6)),
    "image, unconditional": (image(apply_unconditional_transform=True), (4, 5, 6), None),
    "image, unconditional by position": (
        image(apply_unconditional_transform=True, img_shape=[5, 6]),
        (4, 5, 6),
        None,
    ),
    "autoregressive": (masked(), (6,), None),
    "autoregressive, context": (masked(), (6,), (CONTEXT,)),
    "autoregressive, random mask": (
        masked(use_residual_blocks=False, random_mask=True),
        (6,),
        None,
    ),
    "elementwise": (lambda _: ours.RobustSplineCDF([6]), (6,), None),
    "elementwise, image": (lambda _: ours.RobustSplineCDF([4, 5, 6]), (4, 5, 6), None),
}


@pytest.fixture(params=LAYERS, ids=str)
def law(request):
    torch.manual_seed(0)
    create, shape, context = LAYERS[request.param]
    layer = create(None if context is None else context[0])
    return layer, 2 * torch.randn(N, *shape), None if context is None else torch.randn(N, *context)


def stir(layer, std=0.1):
    r"""Takes a layer away from the identity."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(std * torch.randn_like(p))
    return layer


def good(t, shape):
    assert t.shape == torch.Size(shape)
    assert bool(t.isfinite().all())


def test_least_slopes_of_layers_as_made():
    for layer in (vector(), masked(), LAYERS["elementwise"][0]):
        assert layer(None).map.slope == SLOPE
    (of_image,) = (m for m in ours.RobustFlowStep(4).modules() if isinstance(m, Coupling))
    assert of_image.map.slope == FINE_SLOPE


def test_starts_as_the_identity(law):
    layer, x, context = law
    z, ladj = layer(x, context)
    torch.testing.assert_close(z, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(ladj, torch.zeros(N), atol=1e-3, rtol=0)


def test_forward_and_inverse_are_consistent(law):
    layer, x, context = law
    layer = stir(layer)
    identity = base.CompositeTransform([base.InverseTransform(layer), layer])
    y, ladj = identity(x, context)
    good(y, x.shape)
    good(ladj, (N,))
    torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ladj, torch.zeros(N), atol=1e-4, rtol=0)


def test_float64_is_kept(law):
    layer, x, context = (t.double() if t is not None else None for t in law)
    layer = stir(layer)
    z, ladj = layer(x, context)
    assert z.dtype == ladj.dtype == torch.float64
    y, back = layer.inverse(z, context)
    torch.testing.assert_close(y, x, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ladj, -back, atol=1e-9, rtol=1e-9)


def test_ladj_is_that_of_autograd(law):
    layer, x, context = (t.double() if t is not None else None for t in law)
    layer = stir(layer)
    c = None if context is None else context[:1]
    for direction in (layer, layer.inverse):
        jacobian = torch.autograd.functional.jacobian(lambda v, f=direction: f(v, c)[0], x[:1])
        n = x[0].numel()
        expected = torch.linalg.slogdet(jacobian.reshape(n, n)).logabsdet
        torch.testing.assert_close(direction(x[:1], c)[1][0], expected, atol=1e-7, rtol=1e-7)


def test_empty_batch(law):
    layer, x, context = law
    c = None if context is None else context[:0]
    for direction in (layer, layer.inverse):
        z, ladj = direction(x[:0], c)
        good(z, x[:0].shape)
        good(ladj, (0,))


def test_inputs_in_the_tails_alone(law):
    layer, x, context = law
    x = 100 + 0 * x
    x[1::2] *= -1
    z, _ = stir(layer)(x, context)
    y, ladj = layer.inverse(z, context)
    torch.testing.assert_close(y, x, atol=1e-4, rtol=1e-5)
    good(ladj, (N,))


def test_infinite_contexts_give_finite_samples(law):
    layer, x, context = law
    if context is None:
        pytest.skip("without context")
    for far in (1e6, 1e30, torch.inf, -torch.inf):
        y, ladj = stir(layer).inverse(x, far * context)
        good(y, x.shape)
        good(ladj, (N,))


def test_memory_layout_does_not_matter(law):
    layer, x, context = law
    stir(layer)
    apart = torch.stack([x, x], dim=-1)[..., 0]
    assert not apart.is_contiguous()
    for a, b in zip(layer(apart, context), layer(x, context), strict=True):
        torch.testing.assert_close(a, b)
    if x.dim() == 4:
        last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(last, context)[0], layer(x, context)[0])


def test_numbers_and_masks_of_numpy():
    layer = Coupling(np.array([1, 0, 1]), residual(), np.int64(4), np.float32(2.0))
    assert layer.map.bins == 4
    assert layer(torch.randn(N, 3))[0].shape == (N, 3)


def test_a_conditioner_embeds_the_context_of_a_vector_flow():
    conditioner = flowguard.OODConditioner(nn.Linear(5, CONTEXT), policy="shrink", alpha=0.05)
    flow = part("flows").Flow(
        base.CompositeTransform([stir(Coupling(mid(6), residual(CONTEXT)))]),
        part("distributions").StandardNormal([6]),
        embedding_net=conditioner,
    )
    conditioner.fit(torch.randn(256, 5), progress=False)
    conditioner.calibrate(torch.randn(256, 5), progress=False)
    y = torch.randn(4, 5)
    y[2] *= 1e4
    with pytest.warns(flowguard.ood.OODContextWarning, match="context 2"):
        x = flow.eval().sample(7, y)
    assert x.shape == (4, 7, 6)
    assert conditioner.report.flagged.tolist() == [False, False, True, False]


def test_inputs_and_outputs_of_the_network_are_not_written_to():
    raw = torch.randn(N, 3 * 22)

    class Fixed(nn.Module):
        hidden_features = 16

        def forward(self, x, context=None):
            return raw

    layer = Coupling(mid(6), lambda i, o: Fixed(), identity_init=False)
    x = torch.randn(N, 6)
    copies = raw.clone(), x.clone()
    layer.inverse(layer(x)[0])
    assert torch.equal(raw, copies[0])
    assert torch.equal(x, copies[1])


def test_logits_are_scaled_by_the_width_of_the_network():
    raw = torch.randn(N, 3 * 22)

    class Fixed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.hidden_features = width

        def forward(self, x, context=None):
            return raw

    layer = Coupling(mid(6), lambda i, o: Fixed(16), identity_init=False)
    widths, heights, derivatives, shift = raw.unflatten(1, (3, 22)).split((7, 7, 7, 1), -1)
    f = flowguard.RobustSpline(
        widths / 4, heights / 4, derivatives, shift[..., 0], bound=3.0, shift_bound=3.0
    )
    x = torch.randn(N, 6)
    torch.testing.assert_close(layer(x)[0][:, :3], f(x[:, :3]))


def test_copies_behave_alike(law):
    layer, x, context = law
    expected = stir(layer)(x, context)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = stir(copy.deepcopy(layer))
    loaded.load_state_dict(torch.load(buffer))
    for other in (copy.deepcopy(layer), loaded, pickle.loads(pickle.dumps(layer))):
        for a, b in zip(other(x, context), expected, strict=True):
            assert torch.equal(a, b)


def test_all_parameters_learn(law):
    layer, x, context = law
    layer = stir(layer)
    z, ladj = layer(x, context)
    (z.square().sum() - ladj.sum()).backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name


@pytest.mark.parametrize("context", [None, CONTEXT])
def test_the_first_step_leaves_the_identity(context):
    torch.manual_seed(0)
    for create in (residual(context), lambda i, o: Plain(create_inner(i, o, context))):
        layer = Coupling(mid(6), create)
        x, c = torch.randn(N, 6), None if context is None else torch.randn(N, context)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(2):
            z, ladj = layer(x, c)
            optimizer.zero_grad()
            (z.square().sum() - ladj.sum()).backward()
            optimizer.step()
        assert all(bool(p.grad.abs().sum() > 0) for p in layer.transform_net.parameters())
        assert bool((layer(x, c)[0] - x).abs().max() > 1e-3)


def create_inner(i, o, context):
    return nn.Sequential(nn.Linear(i + (context or 0), 16), nn.ReLU(), nn.Linear(16, o))


class Plain(nn.Module):
    r"""A network of a user's own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, context=None):
        return self.inner(x if context is None else torch.cat((x, context), dim=1))


def test_a_network_of_a_users_own_is_left_as_it_is():
    inner = create_inner(3, 66, CONTEXT)
    before = copy.deepcopy(inner.state_dict())
    layer = Coupling(mid(6), lambda i, o: Plain(inner))
    x, c = torch.randn(N, 6), torch.randn(N, CONTEXT)
    torch.testing.assert_close(layer(x, c)[0], x, atol=1e-5, rtol=0)
    assert all(torch.equal(v, before[k]) for k, v in inner.state_dict().items())
    assert layer.head.gain is not None


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 1e30, torch.inf, -torch.inf])
def test_extreme_logits(value, gain):
    r"""The class of nflows#87: there, the discriminant is negative, and an assertion ends the
    run."""

    class Extreme(nn.Module):
        def forward(self, x, context=None):
            signs = torch.randn(x.shape[0], 22 * 3).sign()
            return signs * value if value else torch.zeros_like(signs)

    torch.manual_seed(0)
    layer = Coupling(mid(6), lambda i, o: Extreme(), identity_init=gain)
    x = 3 * torch.randn(1000, 6)
    for direction in (layer, layer.inverse):
        y, ladj = direction(x)
        good(y, x.shape)
        good(ladj, (1000,))
        assert bool((y.abs() <= x.abs().clamp(min=3.0) + 3.0 + 1e-4).all())


def test_nan_is_not_hidden():
    layer = stir(Coupling(mid(6), residual(CONTEXT)))
    context = torch.randn(N, CONTEXT)
    context[3, 1] = torch.nan
    y, _ = layer.inverse(torch.randn(N, 6), context)
    assert y[3].isnan().any()
    assert bool(y[torch.arange(N) != 3].isfinite().all())


@settings(max_examples=25)
@given(
    features=st.integers(1, 7),
    seed=st.integers(0, 100),
    bins=st.integers(2, 9),
    image=st.booleans(),
    free=st.booleans(),
)
def test_any_mask_and_number_of_bins(features, seed, bins, image, free):
    torch.manual_seed(seed)
    mask = torch.randint(-1, 3, (features,))
    size = (2, 3) if image else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of layers without inputs
        layer = Coupling(
            mask,
            lambda i, o: Bare(i, o, image),
            num_bins=bins,
            apply_unconditional_transform=free,
        )
    layer = stir(layer).double()
    x = 2 * torch.randn(4, features, *size, dtype=torch.float64)
    z, ladj = layer(x)
    good(z, x.shape)
    good(ladj, (4,))
    if not free:
        assert torch.equal(z[:, mask <= 0], x[:, mask <= 0])
    assert (mask > 0).sum() == len(layer.transform_features)
    y, back = layer.inverse(z)
    torch.testing.assert_close(y, x, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(ladj, -back, atol=1e-7, rtol=1e-7)


class Bare(nn.Module):
    r"""A linear network, which takes no inputs as well as many."""

    def __init__(self, inputs, outputs, image):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / 4)
        self.bias = nn.Parameter(torch.randn(outputs) / 4)

    def forward(self, x, context=None):
        y = torch.einsum("oi,ni...->no...", self.weight, x)
        return y + self.bias.reshape(-1, *(1,) * (y.dim() - 2))


def test_one_feature():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coupling = stir(Coupling([1], residual(CONTEXT)))
    x, c = torch.randn(N, 1), torch.randn(N, CONTEXT)
    for layer in (coupling, stir(Autoregressive(1, 8, CONTEXT))):
        z, ladj = layer(x, c)
        y, back = layer.inverse(z, c)
        torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ladj, -back, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("context", [None, CONTEXT])
def test_autoregressive_order(context):
    layer = stir(Autoregressive(5, 16, context))
    x = torch.randn(1, 5)
    c = None if context is None else torch.randn(1, context)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v, c)[0], x)[0, :, 0]
    assert torch.equal(jacobian, jacobian.tril())


def test_unconditional_splines_take_any_image_size_unless_they_differ_by_position():
    layer = stir(image(apply_unconditional_transform=True)(None))
    x = torch.randn(2, 4, 7, 3)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, atol=1e-5, rtol=1e-5)


def test_unconditional_splines_act_from_the_start():
    for free in (True, False):
        layer = Coupling(mid(20), residual(), apply_unconditional_transform=free)
        x = torch.rand(N, 20)
        kept = mid(20) <= 0
        assert torch.equal(layer(x)[0][:, kept], x[:, kept]) is not free


def test_it_is_a_coupling_of_the_host():
    layer = Coupling(mid(6), residual())
    assert isinstance(layer, part("transforms.coupling").CouplingTransform)
    assert isinstance(
        Autoregressive(3, 8), part("transforms.autoregressive").AutoregressiveTransform
    )
    theirs = T.PiecewiseRationalQuadraticCouplingTransform(mid(6), residual(), tails="linear")
    assert layer.state_dict().keys() == theirs.state_dict().keys()


def test_context_reaches_the_network():
    layer = stir(Coupling(mid(6), residual(CONTEXT)))
    x = torch.randn(N, 6)
    a, b = (layer(x, torch.randn(N, CONTEXT))[0] for _ in range(2))
    assert bool((a - b)[:, :3].abs().max() > 1e-4)
    assert torch.equal(a[:, 3:], b[:, 3:])


@pytest.mark.parametrize("bins", [2, 8])
def test_compiles_into_one_graph(bins):
    layer = stir(Coupling(torch.arange(24) % 2, convolution(CONTEXT), num_bins=bins))
    x, c = torch.randn(4, 24, 40, 40), torch.randn(4, CONTEXT, 40, 40)
    with torch.no_grad():
        for direction in (layer.forward, layer.inverse):
            compiled = torch.compile(direction, fullgraph=True, backend="eager")
            for a, b in zip(compiled(x, c), direction(x, c), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_autocast_keeps_the_dtype_of_the_inputs():
    layer = stir(Coupling(mid(6), residual()))
    with torch.autocast("cpu", torch.bfloat16):
        z, ladj = layer(torch.randn(N, 6))
    assert z.dtype == torch.float32
    assert bool(z.isfinite().all() and ladj.isfinite().all())


def test_bfloat16():
    layer = stir(Coupling(mid(6), residual())).bfloat16()
    z, ladj = layer.inverse(torch.randn(N, 6, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16
    assert bool(z.isfinite().all() and ladj.isfinite().all())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Coupling(mid(6), residual())(torch.randn(3, 5)), "6 features; got inputs of 5"),
        (lambda: Coupling(mid(6), residual()).inverse(torch.randn(6)), r"\(N, D\) or"),
        (lambda: Coupling(mid(6), residual(), num_bins=1), "num_bins.*got 1"),
        (lambda: Coupling(mid(6), residual(), 8, "linear"), "tail_bound.*got 'linear'"),
        (lambda: Coupling(mid(6), residual(), tail_bound=-1.0), "tail_bound.*got -1.0"),
        (lambda: Coupling(mid(6), residual(), shift_bound=0.0), "shift_bound.*got 0.0"),
        (lambda: Coupling(mid(6), residual(), slope=0.7), "slope.*got 0.7"),
        (lambda: Coupling(mid(6), residual(), tails=None), "its tails are linear.*tails=None"),
        (lambda: Autoregressive(6, 8, tails=None), "its tails are linear.*tails=None"),
        (lambda: Coupling(mid(6), residual(), img_shape=4), "img_shape must be the height and"),
        (lambda: Coupling(mid(6), residual(), img_shape=(4,)), "img_shape must be the height and"),
        (lambda: Autoregressive(0, 8), "features must be a positive integer; got 0"),
        (lambda: Autoregressive(6, "8"), "hidden_features must be a positive integer; got '8'"),
        (lambda: Autoregressive(6, 8)(torch.randn(3, 5)), r"\(N, 6\); got \(3, 5\)"),
        (
            lambda: Coupling(mid(6), lambda i, o: nets.ResidualNet(i, o + 1, 8))(
                torch.randn(3, 6)
            ),
            "22 numbers for each of 3 features, 66 in all; got 67",
        ),
    ],
)
def test_mistakes(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("layer", [Coupling(mid(4), residual()), Autoregressive(4, 8)])
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_whole_numbers_are_refused_rather_than_rounded_to(layer, way):
    with pytest.raises(TypeError, match=r"floating point tensor; got torch\.int64"):
        getattr(layer, way)(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating point tensor; got list"):
        getattr(layer, way)([1.0, 2.0])


def test_registered_names_are_in_the_host():
    namespace = importlib.import_module(f"{ours.HOST}.transforms")
    flowguard.register("nflows")
    try:
        assert namespace.RobustSplineCouplingTransform is Coupling
        assert namespace.ConditionalMultiscaleTransform is ours.ConditionalMultiscaleTransform
    finally:
        flowguard.unregister("nflows")
    assert not hasattr(namespace, "RobustSplineCouplingTransform")


@pytest.mark.slow
def test_ten_million_points_with_far_contexts():
    r"""nflows: about one failed assertion in a million elements at extreme logits."""
    torch.manual_seed(0)
    failures, largest, points = 0, 0.0, 0
    couplings = [
        stir(Coupling([1, 0], residual(2)), 0.3),
        stir(Coupling([0, 1], residual(2)), 0.3),
    ]
    flow = base.CompositeTransform(couplings)
    with torch.no_grad():
        for far in (1.0, 10.0, 100.0, 1e3, 1e4, 1e6, 1e10, 1e20, 1e30, torch.inf):
            for _ in range(10):
                z = torch.randn(100_000, 2)
                x, ladj = flow.inverse(z, far * torch.randn(100_000, 2))
                bound = z.abs().amax().clamp(min=3.0) + 6.0
                failures += int((~x.isfinite().all(1) | ~ladj.isfinite()).sum())
                failures += int((x.abs().amax(1) > bound + 1e-3).sum())
                largest = max(largest, x.abs().max().item())
                points += len(z)
    print(f"{points} points, {failures} failures, largest {largest:.2f}")
    assert points == 10**7
    assert failures == 0


@pytest.mark.skipif(ours.HOST != "nflows", reason="runs with nflows as host")
@pytest.mark.skipif(importlib.util.find_spec("glasflow") is None, reason="glasflow is missing")
@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("test_layers.py", "identity or consistent or copies or host or one_feature or mistakes"),
        ("test_image.py", "flat_latents or host or copies or flow or step or size"),
    ],
)
def test_the_same_with_glasflow_as_the_only_host(file, tests):
    code = f"""
import sys
sys.modules["nflows"] = None  # what the import system sees of a package that is not there
import pytest
import flowguard.integrations.nflows as ours
assert ours.HOST == "glasflow.nflows"
file = {str(pathlib.Path(__file__).with_name(file))!r}
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "-x", "-k", {tests!r}, file]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def slowly(layer, net, run):
    r"""What a layer returns if each pass works out all features, as where a hook listens."""
    hook = net.register_forward_hook(lambda *_: None)
    try:
        return run()
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 1, "use_residual_blocks": False},
        {"use_residual_blocks": False, "random_mask": True},
        {"use_batch_norm": True},
        {"identity_init": False, "num_bins": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("gain", [False, True])
def test_features_are_worked_out_once_with_the_same_result(options, gain, monkeypatch):
    torch.manual_seed(0)
    counted, spline = [], flowguard.RobustSpline._spline

    def counting(self, x, inverse, steep):
        counted.append(x.numel())
        return spline(self, x, inverse, steep)

    context = torch.randn(9, 2).double() if options.get("use_residual_blocks", True) else None
    layer = Autoregressive(5, 16, None if context is None else 2, **options).double().eval()
    if gain:
        layer.head.gain = nn.Parameter(0.1 * torch.rand(5, layer.map.parameters).double())
    with torch.no_grad():
        for p in layer.autoregressive_net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    z = torch.randn(9, 5).double()
    monkeypatch.setattr(flowguard.RobustSpline, "_spline", counting)
    new = layer.inverse(z, context)
    assert sum(counted) == 9 * 5
    old = slowly(layer, layer.autoregressive_net, lambda: layer.inverse(z, context))
    assert sum(counted) == 9 * 5 * (1 + 5)
    for a, b in zip(new, old, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    grads = [
        torch.autograd.grad(x.square().sum() + ladj.sum(), layer.autoregressive_net.parameters())
        for x, ladj in (new, old)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def units_once(monkeypatch):
    r"""How many units each product works out."""
    seen, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda b, w, h: seen.append(len(w)) or addmm(b, w, h))
    return seen


def another(x):
    return x.relu()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", [nn.functional.relu, nn.Tanh(), another])
def test_each_unit_is_worked_out_once(residual, activation, monkeypatch):
    layer = Autoregressive(
        5, 16, 2 if residual else None, use_residual_blocks=residual, activation=activation
    ).eval()
    z, context = torch.randn(9, 5), torch.randn(9, 2) if residual else None
    seen = units_once(monkeypatch)
    with torch.no_grad():
        layer.inverse(z, context)
    # of nothing that is not known to work on each unit by itself
    hidden = 1 + 2 * (2 if residual else 1)
    assert sum(seen) == (0 if activation is another else 16 * hidden + 5 * layer.map.parameters)


def test_hidden_layers_with_hooks_run_as_they_are(monkeypatch):
    layer, rows = Autoregressive(3, 8, 2), []
    hidden = layer.autoregressive_net.blocks[0].linear_layers[1]
    hidden.register_forward_hook(lambda module, inputs, output: rows.append(output.shape))
    layer.inverse(torch.randn(9, 3), torch.randn(9, 2))
    assert rows == 3 * [(9, 8)]


def test_a_trained_batch_norm_sees_what_it_saw_before(monkeypatch):
    torch.manual_seed(0)
    layer = Autoregressive(3, 8, use_batch_norm=True).train()
    rows = []
    final = layer.autoregressive_net.final_layer
    run = type(final).forward
    monkeypatch.setattr(type(final), "forward", lambda m, h: rows.append(m) or run(m, h))
    layer.inverse(torch.randn(9, 3))
    assert sum(m is final for m in rows) == 3


def test_a_head_of_users_that_knows_of_no_features_works_out_all():
    class Tempered(type(Autoregressive(3, 8).head)):
        def phi(self, raw):
            return 0.5 * super().phi(raw)

        def spline(self, raw):
            return self.map.transform(self.phi(raw))

        def forward(self, x, raw, inverse=False):
            f = self.spline(raw)
            y, ladj = f.inverse_and_ladj(x) if inverse else f.call_and_ladj(x)
            return y, ladj.sum(-1)

    torch.manual_seed(0)
    layer = Autoregressive(3, 8).double().eval()
    layer.head.__class__ = Tempered
    with torch.no_grad():
        for p in layer.autoregressive_net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(5, 3).double()
    z, ladj = layer(x)
    back, back_ladj = layer.inverse(z)
    assert torch.allclose(back, x, atol=1e-6)
    assert torch.allclose(back_ladj, -ladj, atol=1e-6)
