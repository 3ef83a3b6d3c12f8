r"""The certificate: its bounds hold, are tight where they can be, and nothing is guessed."""

import math
import pickle
import re
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import AffineTransform as Constant

from flowguard import bounds, migrate
from flowguard.bounds import Limit, Linear, Scale, certify
from flowguard.bounds.regions import Envelope, Region
from flowguard.bounds.solution import solution
from flowguard.image import (
    ActNorm,
    Affine,
    ConditionalCoupling,
    ConditionalMultiscaleFlow,
    CubicBSpline,
    FlowStep,
    InvertibleConv1x1,
    OrthogonalConv1x1,
    ReparametrizedAffine,
    Robust,
    Split,
    Squeeze,
)
from flowguard.models import SuperResolutionFlow
from flowguard.transforms import (
    AdditiveTransform,
    AffineTransform,
    ReparametrizedAffineTransform,
    RobustSpline,
    Univariate,
)

RADIUS = 4.0
DTYPES = (torch.float32, torch.float64)


def disturb(module, scale=1.0):
    r"""Weights unlike those at the start, where couplings are the identity."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            conditional = any(s in name for s in ("injector", "first", "rest", "net"))
            p.add_((scale if conditional else 0.1) * torch.randn_like(p))
    return module.eval()


def image_flow(levels, steps, dtype=torch.float32, scale=0.1, **options):
    flow = ConditionalMultiscaleFlow(3, 4, levels=levels, steps=steps, hidden=8, **options)
    return disturb(flow, scale).to(dtype)


def maps(levels, size, dtype=torch.float32):
    return [torch.randn(2, 4, size >> i, size >> i, dtype=dtype) for i in range(1, levels + 1)]


def noise(flow, size, rows=2, dtype=torch.float32, corners=False):
    z = [2 * torch.rand(rows, *s, dtype=dtype) - 1 for s in flow.latent_shapes(size, size)]
    return [RADIUS * (t.sign() if corners else t) for t in z]


def spline(shift=None, **options):
    return RobustSpline(*torch.zeros(3, 1), shift, **options)


# What is certified, and what is not


def test_a_spline_is_bounded_by_its_box_and_its_shift():
    certificate = certify(spline(torch.tensor(1.0), bound=3.0, shift_bound=2.0), roundoff=0.0)
    assert certificate.certified
    assert certificate.bound(0.0) == 3.0
    assert certificate.bound(4.0) == 6.0
    assert certificate.growth == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("layer", "match", "gain"),
    [
        (spline(torch.tensor(1.0), shift_bound=None), "shift is free", 1.0),
        (AdditiveTransform(torch.zeros(2)), "shift is free", 1.0),
        (AffineTransform(torch.zeros(2), torch.zeros(2)), "slope may fall to 0.0001", 1e4),
        (ReparametrizedAffineTransform(torch.zeros(2), torch.zeros(2)), "shift is free", 1.0001),
        (ConditionalCoupling(4, 2, coupling=Affine()), "slope may fall", 1e4),
        (ConditionalCoupling(4, 2, coupling=ReparametrizedAffine()), "shift is free", 1.0001),
        (ConditionalCoupling(4, 2, coupling=Robust(shift_bound=None)), "shift is free", 1.0),
        (nn.Linear(2, 2), "no rule for torch.nn.modules.linear.Linear", None),
        (Split(4, 2, scale_bound=None), "prior is free", None),  # type: ignore[arg-type]
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_what_depends_on_the_condition_without_bound_is_named(layer, match, gain):
    certificate = certify(layer)
    assert not certificate.certified
    assert certificate.bound(1.0) == math.inf
    assert certificate.growth == math.inf
    row = next(row for row in certificate.table() if row.reason)
    assert match in row.reason
    assert row.bound_out == math.inf
    assert row.gain is None if gain is None else row.gain == pytest.approx(gain)


@pytest.mark.parametrize("mix", ["free", "orthogonal"])
@pytest.mark.parametrize("coupling", [Robust(), Robust(bins=8, slope=None), CubicBSpline()])
def test_robust_image_flows_are_certified(mix, coupling):
    certificate = certify(image_flow(2, 2, mix=mix, coupling=coupling))
    assert certificate.certified
    assert RADIUS < certificate.bound(RADIUS) < 1e4


def test_one_affine_step_is_found_among_robust_ones():
    flow = image_flow(2, 2)
    step = FlowStep(12, 4, hidden=8, coupling="affine")
    flow.steps[0][1] = step
    certificate = certify(flow)
    assert [s.name for s in certificate.refused] == [
        "steps.0.1.coupling.rest",
        "steps.0.1.coupling.injector",
    ]
    assert "steps.0.1.coupling.rest" in str(certificate)


def test_the_residual_of_super_resolution_is_certified_and_the_table_says_so():
    model = SuperResolutionFlow(levels=2, steps=1, hidden=8, features=8, margin=None)
    certificate = certify(model)
    assert certificate.bound(RADIUS) == certify(model.flow).bound(RADIUS)
    assert "left out" in certificate.table()[-1].depends


def test_weights_that_are_not_finite_are_named():
    flow = image_flow(1, 1)
    with torch.no_grad():
        flow.get_parameter("steps.0.0.coupling.first_kept.weight")[0, 0] = math.nan
    certificate = certify(flow)
    assert [s.name for s in certificate.refused] == ["steps.0.0.coupling.first_kept.weight"]
    assert certificate.bound(1.0) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mix", ["fixed", "free", "orthogonal"])
def test_no_layer_with_numbers_that_are_not_finite_is_certified(mix, value):
    flow = ConditionalMultiscaleFlow(3, 4, levels=1, steps=1, hidden=4, mix=mix)
    tensors = {**dict(flow.named_parameters()), **dict(flow.named_buffers())}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or name.endswith("mix.weight"):
            continue  # sampling by fixed rotations takes the transposes
        first, old = tensor.detach().flatten()[:1], tensor.flatten()[0].item()
        first.fill_(value)
        certificate = certify(flow)
        assert not certificate.certified, name
        layer = name.rpartition(".")[0]
        assert certificate.refused[0].name.startswith(layer)
        assert "not finite" in str(certificate)
        assert certificate.bound(1.0) == math.inf
        first.fill_(old)
    assert certify(flow).certified


def test_a_broken_unit_of_a_migrated_coupling_is_named():
    flow = ConditionalMultiscaleFlow(3, 4, levels=1, steps=1, hidden=4, coupling="affine")
    new, _ = migrate(flow.eval(), torch.randn(8, 3, 4, 4), [torch.randn(8, 4, 2, 2)])
    name = "steps.0.0.coupling.units.rest.scale_in"
    new.get_buffer(name)[0] = math.nan
    assert [s.name for s in certify(new).refused] == [name]


def test_what_is_told_of_strange_conditions_is_no_obstacle():
    model = SuperResolutionFlow(levels=2, steps=1, hidden=8, features=8).eval()
    lr = torch.rand(8, 3, 8, 8)
    model.conditioner.fit(lr, progress=False)
    told = [b for b in model.conditioner.guard.buffers() if b.is_floating_point()]
    assert told
    for buffer in told:
        buffer.fill_(math.nan)
    assert certify(model).certified


@pytest.mark.parametrize(
    "transform",
    [Constant(0.0, 0.0), Constant(torch.tensor([0.0, math.nan]), torch.ones(2))],
    ids=["a slope of zero", "NaN"],
)
def test_constants_that_are_not_finite_give_no_certificate(transform):
    certificate = certify(torch.distributions.ComposeTransform([transform]))
    assert [s.name for s in certificate.refused] == ["parts.0"]


def test_a_normalisation_without_a_finite_inverse_is_named():
    layer = ActNorm(2)
    with torch.no_grad():
        layer.logs.fill_(-1000.0)  # e^1000 is infinite in float64
    assert not certify(layer).certified


def test_a_singular_matrix_is_named():
    layer = InvertibleConv1x1(3)
    with torch.no_grad():
        layer.weight.zero_()
    assert "singular" in certify(layer).refused[0].reason


def test_a_scale_beyond_the_dtype_gives_no_bound():
    layer = ActNorm(2)
    with torch.no_grad():
        layer.logs.fill_(-100.0)  # e^100 is infinite in float32, and finite in float64
    assert certify(layer).bound(1.0) == math.inf
    assert layer.inverse(torch.zeros(1, 2, 1, 1))[0].isnan().all()
    assert certify(layer).bound(0.0) == math.inf
    assert certify(layer.double()).bound(1.0) == pytest.approx(math.exp(100))


# Nothing is guessed


class Wider(RobustSpline):
    def _backward(self, y):
        x, ladj = super()._backward(y)
        return 2 * x, ladj


class Renamed(RobustSpline):
    r"""A subclass that changes nothing."""


class Stated(Univariate):
    def _forward(self, x):
        return x / 3, torch.full_like(x, -math.log(3))

    def _backward(self, y):
        return 3 * y, torch.full_like(y, math.log(3))

    def inverse_bound(self, radius):
        return 3 * radius


def test_a_subclass_that_overrides_something_is_not_covered_by_the_rule_of_its_base():
    layer = Wider(*torch.zeros(3, 1), torch.zeros(()))
    assert "overrides _backward of RobustSpline" in certify(layer).refused[0].reason
    assert certify(Renamed(*torch.zeros(3, 1), torch.zeros(()))).certified


def test_a_transform_is_taken_at_the_word_of_its_own_inverse_bound():
    @bounds.rule(Stated)
    def stated(f, sampling):
        yield bounds.Pointwise(envelope=bounds.envelope(f, sampling))

    assert certify(Stated(), roundoff=0.0).bound(2.0) == 6.0
    both = torch.distributions.ComposeTransform([Stated(), spline(torch.tensor(1.0))])
    g = bounds.envelope(both)
    assert [g.reach(r) for r in (0.0, 2.0)] == [15.0, 21.0]
    assert not certify(Univariate()).certified


def test_a_map_of_the_user_needs_an_envelope_of_the_user():
    class Mine:
        parameters = 1

        def transform(self, phi):
            return AdditiveTransform(phi.squeeze(2), shift_bound=0.5)

    layer = ConditionalCoupling(4, 2, coupling=Mine())
    assert not certify(layer).certified  # zeros alone do not tell what it does

    @bounds.envelope_rule(Mine)
    def mine(family, sampling):
        return Envelope(1.0, 0.5, displacement=0.5)

    assert certify(layer, roundoff=0.0).bound(1.0) == pytest.approx(2.0)  # the second half, twice


# The bounds hold


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", ["free", "orthogonal"])
@pytest.mark.parametrize(("levels", "steps", "size"), [(1, 3, 8), (2, 2, 16), (3, 1, 16)])
def test_no_sample_of_an_image_flow_exceeds_its_bound(levels, steps, size, mix, dtype):
    for scale in (0.05, 1.0):
        flow = image_flow(levels, steps, dtype, scale, mix=mix)
        bound = certify(flow).bound(RADIUS)
        for far in (1.0, 1e5, 1e30, math.inf):
            y = maps(levels, size, dtype)
            y = [far * t for t in y] if math.isfinite(far) else [t.sign() * math.inf for t in y]
            for corners in (False, True):
                x, _ = flow.inverse(noise(flow, size, dtype=dtype, corners=corners), y)
                assert bool((x.abs() <= bound).all()), (scale, far)


def test_infinite_contexts_give_finite_images_and_nan_stays_nan():
    flow = image_flow(2, 1)
    y = maps(2, 8)
    y[0][0], y[1][0] = math.inf, -math.inf
    y[1][1, 0, 0, 0] = math.nan
    x, _ = flow.inverse(noise(flow, 8), y)
    assert bool(x[0].isfinite().all())
    assert bool(x[1].isnan().any())


@given(
    shift=st.floats(-math.inf, math.inf),
    knots=st.lists(st.floats(-math.inf, math.inf), min_size=3, max_size=3),
    z=st.floats(-50, 50),
    bound=st.floats(0.1, 10),
    shift_bound=st.floats(0.1, 10),
)
def test_a_spline_keeps_its_bound_for_all_parameters(shift, knots, z, bound, shift_bound):
    params = torch.tensor(knots).unsqueeze(1)
    f = RobustSpline(*params, torch.tensor(shift), bound=bound, shift_bound=shift_bound)
    x = f.inv(torch.tensor(z)).abs().item()
    assert x <= certify(f).bound(abs(torch.tensor(z).item()))


@pytest.mark.parametrize("radius", [0.01, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("seed", range(15))
def test_a_region_holds_all_that_its_steps_make_of_its_points(seed, radius):
    torch.manual_seed(seed)
    c, n = 4, 200
    region = Region.cube(torch.full((1, c), radius, dtype=torch.float64))
    x = radius * (2 * torch.rand(n, 1, c, dtype=torch.float64) - 1)
    x = torch.where(torch.rand(n, 1, 1) < 0.5, x, radius * x.sign())
    g = Envelope(gain=1.0, offset=1.0, floor=2.0, displacement=7.0)  # box 3, shift 1
    for _ in range(6):
        kind = int(torch.randint(5, ()))
        p = region.box.shape[0]
        if kind == 0:
            w = torch.randn(c, c, dtype=torch.float64)
            region, x = region.linear(w, w.abs(), 1e-15), x @ w.T
        elif kind == 1:
            s, b = torch.randn(2, c, dtype=torch.float64)
            region, x = region.scale(s, b, 1e-15), x * s + b
        elif kind == 2:
            order = torch.randperm(c)
            region, x = region.permute(order), x[..., order]
        elif kind == 3:
            mask = torch.rand(c) < 0.7
            phi = 20 * torch.randn(3, n, p, c, 1, dtype=torch.float64)
            f = RobustSpline(*phi, 20 * torch.randn_like(x), bound=3.0, shift_bound=1.0)
            region, x = region.elementwise(g, mask, 1e-15), torch.where(mask, f.inv(x), x)
        elif region.box.shape[1] == c:
            more = radius * (2 * torch.rand(n, p, 3 * c, dtype=torch.float64) - 1)
            region = region.join(3 * c, radius).unsqueeze(2)
            x = torch.cat((x, more), -1).unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(1, 2)
            assert x.shape[1:] == region.box.shape
        if region.box.shape[0] > 16:
            break
        if region.box.shape[1] != c:
            c = region.box.shape[1]
        hull = region.center.abs() + region.spread.abs().sum(-1) + region.own
        tolerance = 1e-12 * (1 + region.largest)
        assert bool((x.abs() <= region.box + tolerance).all())
        assert bool((x.norm(dim=-1) <= region.ball + tolerance).all())
        assert bool(((x - region.center).abs() <= hull + tolerance).all())


def test_the_bound_of_a_shift_is_computed_in_double_precision():
    f = AdditiveTransform(torch.full((1,), -1e30, dtype=torch.float64), shift_bound=1e-5)
    z = torch.full((1,), 0.01, dtype=torch.float64)
    assert f.inv(z).item() <= certify(f).bound(0.01) <= 0.01001 * (1 + 1e-12)


def test_the_margin_for_rounding_is_needed_and_enough_where_every_shift_is_at_its_bound():
    # A tenth is no float: sums of it round, some upwards.
    z, layers = RADIUS * torch.rand(1000), 50
    none = torch.zeros(1)
    f = RobustSpline(none, none, none, torch.tensor(-1e30), bound=0.1, shift_bound=0.1)
    x = z
    for _ in range(layers):
        x = f.inv(x)
    x = x.double()

    def limit(roundoff):
        (step,) = certify(f).steps
        region = Region.cube(z.double().unsqueeze(1))
        for _ in range(layers):
            region = step.through(region, RADIUS, roundoff)
        return region.box.squeeze(1)

    assert bool((x > limit(0.0)).any())
    assert bool((x <= limit(certify(f).roundoff)).all())
    assert torch.allclose(x, limit(0.0), rtol=1e-4)


# The bounds are tight


def test_the_bound_of_a_coupling_is_reached():
    layer = ConditionalCoupling(2, 1, hidden=4, coupling=Robust(bound=1.0, shift_bound=0.5))
    with torch.no_grad():
        for net in (layer.injector, layer.rest):
            net[-1].bias.view(-1, 4)[:, 3] = -1e30
    x, _ = layer.inverse(torch.full((1, 2, 2, 2), RADIUS), torch.zeros(1, 1, 2, 2))
    region = Region.cube(torch.full((1, 2), RADIUS, dtype=torch.float64))
    for step in certify(layer).steps:
        region = step.through(region, RADIUS, 0.0)
    assert x.amax((0, 2, 3)).tolist() == region.box[0].tolist() == [RADIUS + 0.5, RADIUS + 1.0]


def test_the_bound_of_a_split_is_reached():
    layer = Split(2, 1, mean_bound=3.0, scale_bound=0.5)
    with torch.no_grad():
        layer.net.bias.fill_(1e30)
    x, _ = layer.inverse(*torch.full((2, 1, 1, 2, 2), RADIUS), torch.zeros(1, 1, 2, 2))
    assert x[:, 1].max().item() == pytest.approx(certify(layer, roundoff=0.0).bound(RADIUS))
    assert certify(layer).bound(0.0) == pytest.approx(3.0)


def test_a_rotation_and_its_inverse_do_not_add_up():
    region = Region.cube(torch.ones(1, 8, dtype=torch.float64))
    w = OrthogonalConv1x1(8).weight.detach().double()
    g = Envelope(gain=1.0, offset=0.1, floor=0.0, displacement=0.1)
    turned = region.linear(w, w.abs(), 0.0)
    assert turned.largest > 2
    assert turned.linear(w.T, w.abs(), 0.0).largest == pytest.approx(1.0, rel=1e-6)
    # Nor with a spline in between, which moves by a tenth at most.
    there = turned.elementwise(g, torch.ones(8, dtype=torch.bool), 0.0)
    assert there.linear(w.T, w.abs(), 0.0).largest < 1.0 + 0.1 * 8**0.5 + 1e-6


def test_rotations_keep_the_growth_of_deep_flows_small():
    growths = []
    for steps in (1, 8):
        flow = ConditionalMultiscaleFlow(3, 4, levels=1, steps=steps, hidden=8, mix="orthogonal")
        growths.append(certify(flow).growth)
    assert max(growths) < 12**0.5 + 1e-3


@pytest.mark.parametrize("layer", [InvertibleConv1x1(6), OrthogonalConv1x1(6)])
def test_growth_is_the_gain_of_the_linear_layers(layer):
    layer = disturb(layer, 1.0).double()
    columns, _ = layer.inverse(torch.eye(6, dtype=torch.float64)[:, :, None, None])
    gain = columns.flatten(1).abs().sum(0).max().item()
    assert certify(layer).growth == pytest.approx(gain)
    assert certify(layer).bound(1e6) == pytest.approx(1e6 * gain)


# The certificate as an object


def test_a_radius_is_found_for_a_confidence():
    # Beyond the box, where the bound grows with the radius.
    certificate = certify(image_flow(1, 1, coupling=Robust(bound=1.0)))
    z = 0.8 * torch.randn(200, 3 * 8 * 8).abs().amax(1)
    with pytest.raises(ValueError, match="event_size"):
        certificate.bound(confidence=0.5)
    for confidence in (0.1, 0.5, 0.9):
        bound = certificate.bound(confidence=confidence, temperature=0.8, event_size=192)
        share = sum(certificate.bound(r.item()) <= bound for r in z) / len(z)
        assert share == pytest.approx(confidence, abs=0.12)
    assert certificate.bound(confidence=1 - 1e-12, event_size=192) > certificate.bound(6.0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda c: c.bound(), "either radius or confidence"),
        (lambda c: c.bound(1.0, confidence=0.5), "either radius or confidence"),
        (lambda c: c.bound(-1.0), "radius must be finite and not negative"),
        (lambda c: c.bound(math.nan), "radius must be finite and not negative"),
        (lambda c: c.bound(confidence=1.0, event_size=2), "between 0 and 1"),
        (lambda c: c.bound(confidence=0.5, temperature=-1, event_size=2), "temperature"),
        (lambda c: c.bound(confidence=0.5, event_size=0), "event_size"),
    ],
)
def test_wrong_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(certify(image_flow(1, 1)))


def test_the_roundoff_must_be_small():
    with pytest.raises(ValueError, match="roundoff"):
        certify(image_flow(1, 1), roundoff=1.0)


def test_a_coarser_dtype_widens_the_bound_and_the_bound_grows_with_the_radius():
    flow = image_flow(2, 2)
    single, exact = certify(flow), certify(flow, roundoff=0.0)
    assert certify(flow.double()).bound(RADIUS) == pytest.approx(exact.bound(RADIUS), rel=1e-9)
    assert exact.bound(RADIUS) < single.bound(RADIUS) < 1.01 * exact.bound(RADIUS)
    radii = [0.0, 1.0, 4.0, 100.0, 1e6]
    values = [single.bound(r) for r in radii]
    assert values == sorted(values)


def test_the_table_has_a_row_for_each_layer_and_prints():
    certificate = certify(image_flow(2, 1))
    table = certificate.table(RADIUS)
    names = [row.name for row in table]
    assert names[:5] == [
        "noise",
        "steps.1.0.coupling.rest",
        "steps.1.0.coupling.injector",
        "steps.1.0.mix",
        "steps.1.0.actnorm",
    ]
    assert [row.bound_in for row in table[1:]] == [row.bound_out for row in table[:-1]]
    assert table[-1].bound_out == certificate.bound(RADIUS)
    assert len(str(table).splitlines()) == len(table) + 1


def test_the_certificate_becomes_plain_data_and_survives_pickling():
    import json

    certificate = certify(image_flow(1, 1))
    plain = json.loads(json.dumps(certificate.to_dict(2.0)))
    assert plain["certified"] is True
    assert plain["bound"] == certificate.bound(2.0)
    assert plain["layers"][0]["name"] == "noise"
    again = pickle.loads(pickle.dumps(certificate))
    assert again.bound(2.0) == certificate.bound(2.0)


def test_the_certificate_belongs_to_the_weights_it_was_made_of():
    layer = InvertibleConv1x1(4)
    certificate = certify(layer)
    before = certificate.bound(1.0)
    with torch.no_grad():
        layer.weight.mul_(1e-3)
    assert certificate.bound(1.0) == before
    assert certify(layer).bound(1.0) == pytest.approx(1e3 * before, rel=1e-3)


def test_a_compiled_model_is_its_original():
    layer = ActNorm(3)
    assert certify(torch.compile(layer)).bound(2.0) == certify(layer).bound(2.0)


def test_steps_compose_in_sampling_order():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = ActNorm(2), ActNorm(2)

    @bounds.rule(Pair)
    def pair(layer, sampling):
        yield from bounds.within("second", layer.second, sampling)
        yield from bounds.within("first", layer.first, sampling)

    model = Pair()
    with torch.no_grad():
        model.first.logs.fill_(-math.log(2.0))  # the inverse doubles
        model.second.bias.fill_(1.0)  # the inverse subtracts one
    assert certify(model, roundoff=0.0).bound(3.0) == pytest.approx(8.0)
    assert [row.name for row in certify(model).table()] == ["second", "first"]


def test_steps_keep_their_numbers_of_features():
    assert Linear(matrix=torch.eye(3)).features == 3
    assert Scale(factor=torch.tensor(2.0), offset=torch.zeros(())).features is None


# What a rule is for: exactly its class


def small_flow(**options):
    torch.manual_seed(0)
    return image_flow(2, 1, **options)


def with_hook(flow):
    flow.steps[0][0].actnorm.register_forward_hook(lambda m, i, o: (100 * o[0], o[1]))


def with_hook_before(flow):
    flow.steps[0][0].register_forward_pre_hook(lambda m, i: (100 * i[0], *i[1:]))


def with_own_method(flow):
    inverse = flow.steps[0][0].actnorm.inverse
    flow.steps[0][0].actnorm.inverse = lambda z, context=None: inverse(1e9 * z)


def with_weight_norm(flow):
    nn.utils.parametrizations.weight_norm(flow.steps[0][0].mix, "weight")


def with_spectral_norm(flow):
    nn.utils.parametrizations.spectral_norm(flow.steps[0][0].mix, "weight")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_hook, "actnorm.*forward hooks"),
        (with_hook_before, "steps.0.0.*forward hooks"),
        (with_own_method, "actnorm.*an? inverse of its own"),
        (with_weight_norm, "mix.*parametrization"),
        (with_spectral_norm, "mix.*parametrization"),
    ],
)
def test_an_instance_that_departs_from_its_class_is_refused_and_named(change, match):
    flow = small_flow()
    assert certify(flow).certified
    change(flow)
    certificate = certify(flow)
    assert not certificate.certified
    (refused,) = certificate.refused
    assert re.search(match, f"{refused.name}: {refused.reason}"), refused


def test_hooks_on_networks_and_hooks_that_record_scores_are_no_obstacle():
    flow = small_flow()
    flow.steps[0][0].coupling.injector.register_forward_hook(lambda m, i, o: 100 * o)
    assert certify(flow).certified


def test_hooks_of_all_modules_are_refused():
    flow = small_flow()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
    try:
        assert "hooks of all modules" in certify(flow).refused[0].reason
    finally:
        handle.remove()
    assert certify(flow).certified


class Sized(ConditionalMultiscaleFlow):
    r"""A class of the user that only makes a flow of its own size."""

    def __init__(self):
        super().__init__(3, 4, levels=1, steps=1, hidden=8)

    def helper_of_the_user(self):
        return self.levels


class Called(ConditionalMultiscaleFlow):
    def __call__(self, x, context):
        return super().__call__(100 * x, context)


def test_a_subclass_may_choose_arguments_and_add_methods_but_override_nothing():
    assert certify(Sized().eval()).certified
    called = Called(3, 4, levels=1, steps=1, hidden=8).eval()
    assert "overrides __call__" in certify(called).refused[0].reason


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, nn.Sequential]
)
def test_what_only_holds_a_flow_has_its_bound(wrap):
    flow = small_flow()
    assert certify(wrap(flow)).bound(RADIUS) == certify(flow).bound(RADIUS)


def test_a_module_that_holds_a_flow_says_which_part_to_certify():
    holder = nn.Module()
    holder.net = small_flow()
    assert "certify(model.net)" in certify(holder).refused[0].reason
    two = nn.Sequential(nn.Linear(2, 2), small_flow())
    assert "certify the flow in it" in certify(two).refused[0].reason


class Growing:
    r"""A map whose box depends on its parameters: zeros do not tell how large it is."""

    parameters = 4

    def transform(self, phi):
        *knots, shift = phi.split(1, dim=2)
        widths, heights, derivatives = (p.movedim(2, -1) for p in knots)
        bound = 1 + phi.abs().max().item()
        return RobustSpline(widths, heights, derivatives, shift.squeeze(2), bound=bound)


def test_a_map_whose_box_may_depend_on_its_parameters_is_refused():
    flow = ConditionalMultiscaleFlow(3, 4, levels=1, steps=1, hidden=8, coupling=Growing())
    assert "Growing" in certify(flow).refused[0].reason


# Precision


def test_products_that_may_lose_all_digits_are_refused():
    wide = certify(InvertibleConv1x1(253).bfloat16())
    assert "may lose all digits" in wide.refused[0].reason
    assert math.isinf(wide.bound(RADIUS))
    assert (
        "may lose all digits" in certify(OrthogonalConv1x1(300), roundoff=2**-8).refused[0].reason
    )
    assert RADIUS / 4 < certify(OrthogonalConv1x1(16), roundoff=2**-8).bound(RADIUS) < math.inf


def test_a_bound_is_never_negative_however_coarse_the_arithmetic_is():
    for channels in (2, 90, 100, 104, 300):
        certificate = certify(OrthogonalConv1x1(channels), roundoff=0.0099)
        value = certificate.bound(RADIUS)
        assert value >= RADIUS / math.sqrt(channels)
        assert certificate.certified == math.isfinite(value)


def test_dtypes_without_digits_are_refused():
    flow = small_flow()
    flow.register_buffer("scale", torch.ones(1).to(torch.float8_e5m2))
    assert "float8" in certify(flow).refused[0].reason


def test_the_rounding_is_that_of_the_numbers_a_transform_holds():
    half = torch.zeros(3, 1, dtype=torch.bfloat16)
    assert certify(RobustSpline(*half, torch.zeros(()))).roundoff == 2.0**-8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert certify(small_flow()).roundoff == 2.0**-8


def test_reduced_precision_of_the_matrix_units_widens_the_bound():
    flow = small_flow()
    exact = certify(flow).bound(RADIUS)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        medium = certify(flow)
        double = certify(small_flow(dtype=torch.float64))
    finally:
        torch.set_float32_matmul_precision(before)
    assert {s.factors for s in medium.steps if isinstance(s, Linear)} == {2.0**-8}
    assert exact * 1.001 < medium.bound(RADIUS) < exact * 1.5
    assert {s.factors for s in double.steps if isinstance(s, Linear)} == {0.0}


def test_the_margin_of_reduced_precision_holds_for_factors_that_are_rounded():
    torch.manual_seed(0)
    matrix, x = torch.randn(8, 8), torch.randn(8, 1000).clamp(-1, 1)
    step = replace(Linear(matrix=matrix), factors=2.0**-8)
    region = step.through(Region.cube(torch.ones(1, 8, dtype=torch.float64)), 1.0, 0.0)
    rounded = matrix.bfloat16().double() @ x.bfloat16().double()
    exact = Region.cube(torch.ones(1, 8, dtype=torch.float64)).linear(
        matrix.double(), matrix.double().abs(), 0.0
    )
    away = (rounded - matrix.double() @ x.double()).abs().amax(1)
    assert (away <= (region.box - exact.box)[0]).all()


def test_a_matrix_without_digits_in_its_inverse_counts_as_singular():
    mix = InvertibleConv1x1(3).double()
    with torch.no_grad():
        mix.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]))
        mix.weight[2, 2] += 1e-14
    certificate = certify(mix)
    assert not certificate.certified or math.isinf(certificate.bound(RADIUS))


def test_a_normalisation_that_its_next_batch_initialises_is_refused():
    layer = ActNorm(3)
    assert certify(layer).certified  # sampling runs its inverse, which initialises nothing
    inverted = list(bounds.steps(layer, False))
    assert "its next batch initialises it" in inverted[0].reason
    layer(torch.randn(2, 3, 4, 4))
    assert isinstance(bounds.steps(layer, False)[0], Scale)


def test_a_layer_that_is_there_twice_counts_twice():
    flow = ConditionalMultiscaleFlow(1, 1, levels=1, steps=2, hidden=2).eval()
    with torch.no_grad():
        flow.steps[0][0].actnorm.logs.fill_(-1.0)
    flow.steps[0][1] = flow.steps[0][0]
    z = [torch.full((1, 4, 1, 1), 4.0)]
    x, _ = flow.inverse(z, [torch.zeros(1, 1, 1, 1)])
    assert x.abs().max() <= certify(flow).bound(4.0)


def test_the_ball_of_a_map_is_computed_in_float64():
    shift = torch.full((1,), -1e30, dtype=torch.float64)
    f = RobustSpline(*torch.zeros(3, 1, 1), shift, bound=0.1, shift_bound=1.8461046527421945)
    x = f.inv(torch.zeros(1, 1, dtype=torch.float64))
    assert x.abs().max() <= certify(f, roundoff=2.0**-53).bound(0.0)


def test_a_squeeze_alone_keeps_the_bound():
    assert certify(Squeeze(), roundoff=0.0).bound(3.0) == 3.0


def test_numbers_without_dimensions_do_not_tell_the_dtype_of_the_noise():
    loc, scale = (torch.tensor(v, dtype=torch.float64) for v in (-1.2017, -0.5988))
    f = Constant(loc, scale)
    assert certify(f).roundoff == 2.0**-24
    x = f.inv(torch.full((1,), 1e-30))
    assert x.dtype == torch.float32
    assert x.double().abs().item() <= certify(f).bound(1e-30)


def test_a_spline_of_a_box_beyond_its_dtype_has_a_bound():
    half = torch.zeros(3, 1, dtype=torch.float16)
    f = RobustSpline(*half, torch.ones((), dtype=torch.float16), bound=1.0, shift_bound=1e6)
    assert f.shift.isfinite()
    assert certify(f).bound(1.0) >= 1.0


def test_a_certificate_equals_itself_alone():
    flow = ConditionalMultiscaleFlow(3, 8, levels=1, steps=1, hidden=8)
    certificate = certify(flow)
    assert certificate == certificate
    assert certificate != certify(flow)
    assert len({certificate, certificate, certificate.tighten(0)}) == 2
    step = certificate.steps[1]
    assert step == step
    assert step in certificate.steps
    assert solution(2 * torch.eye(2)) != solution(2 * torch.eye(2))


def test_a_limit_lets_nothing_grow_and_nothing_beyond_its_bound():
    region = Region.cube(torch.tensor([[0.1, 1.0, 30.0]], dtype=torch.float64))
    step = Limit(bound=1.25, beside=1.0)
    assert step.through(region, 4.0, 0.0).box.tolist() == [[0.1, 1.0, 1.25]]
    rounded = step.through(region, 4.0, 1e-3).box[0]
    assert rounded[0] > 0.1 + 1e-3  # of what is added before and taken away again
    assert 1.25 < rounded[2] < 1.28
    assert not replace(step, bound=math.inf).finite


def test_what_has_a_limit_has_no_growth():
    torch.manual_seed(0)
    model = SuperResolutionFlow(levels=1, steps=1, hidden=4, features=4)
    assert certify(model).growth == 0
    assert certify(model.limit(None)).growth > 0.1
