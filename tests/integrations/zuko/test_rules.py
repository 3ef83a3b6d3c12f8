r"""Certificates and attacks of zuko's flows."""

import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn as nn

from flowguard import bounds
from flowguard.bounds import certify
from flowguard.bounds.attack import attack, sampler
from flowguard.transforms import CubicBSplineTransform, RobustSpline

zuko = pytest.importorskip("zuko")

from flowguard.integrations.zuko import (  # noqa: E402
    ConditionalMultiscaleTransform,
    GuardedFlow,
    MultiscaleFlow,
    RobustCouplingFlow,
    RobustNSF,
)
from flowguard.ood import OODConditioner  # noqa: E402

RADIUS = 4.0
T = zuko.transforms
Constant = zuko.lazy.UnconditionalTransform
Autoregressive = zuko.flows.autoregressive.MaskedAutoregressiveTransform
Coupling = zuko.flows.coupling.GeneralCouplingTransform
SPLINE = {"univariate": RobustSpline, "shapes": RobustSpline.shapes(4)}
# What differs between the versions of zuko: the name of the affine coupling flow, the least slope
# of its affine transform, the additive transform (from 1.5 on; UNAF and SOSPF end in one).
AFFINE_COUPLING = getattr(zuko.flows, "RealNVP", zuko.flows.NICE)
SLOPE = inspect.signature(T.MonotonicAffineTransform).parameters["slope"].default
HAS_ADDITIVE = hasattr(T, "AdditiveTransform")


def normal(features):
    zeros, ones = torch.zeros(features), torch.ones(features)
    return zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, zeros, ones, buffer=True
    )


def flow_of(*transforms, features=3):
    return zuko.lazy.Flow(list(transforms), normal(features))


def linears():
    r"""Layers that do not depend on the condition, between others that do."""
    shifts = [Constant(T.AdditiveTransform, torch.randn(3))] if HAS_ADDITIVE else []
    return flow_of(
        Constant(
            torch.distributions.AffineTransform, torch.randn(3), 0.5 + torch.rand(3), buffer=True
        ),
        Autoregressive(3, 2, **SPLINE),
        Constant(T.RotationTransform, torch.randn(3, 3)),
        Constant(T.PermutationTransform, torch.randperm(3), buffer=True),
        Constant(T.LULinearTransform, torch.eye(3) + 0.3 * torch.randn(3, 3)),
        Constant(T.MonotonicAffineTransform, torch.randn(3), torch.randn(3)),
        Autoregressive(3, 2, **SPLINE).inv,
        *shifts,
        Coupling(3, 2, **SPLINE),
        Constant(T.RotationTransform, torch.randn(3, 3)).inv,
    )


CERTIFIED = {
    "RobustNSF": lambda: RobustNSF(3, 2),
    "RobustNSF(passes=2)": lambda: RobustNSF(3, 2, passes=2, shift_bound=0.3),
    "RobustCouplingFlow": lambda: RobustCouplingFlow(3, 2, bound=2.0),
    "MAF of splines": lambda: zuko.flows.MAF(3, 2, **SPLINE),
    "NICE of splines": lambda: zuko.flows.NICE(3, 2, **SPLINE),
    "published splines": lambda: zuko.flows.MAF(
        3,
        2,
        univariate=partial(RobustSpline, bound=0.5, slope=None),
        shapes=RobustSpline.shapes(2),
    ),
    "B-splines": lambda: zuko.flows.MAF(
        3,
        2,
        univariate=partial(CubicBSplineTransform, shift_bound=1.0),
        shapes=CubicBSplineTransform.shapes(),
    ),
    "elementwise": lambda: flow_of(
        zuko.flows.gaussianization.ElementWiseTransform(3, 2, **SPLINE)
    ),
    "circular": lambda: flow_of(
        Constant(T.CircularShiftTransform, 3.0), RobustNSF(3, 2).transform
    ),
    "constant layers": linears,
}

ENDS = ("shift is free", 1.0) if HAS_ADDITIVE else ("bisection", None)
REFUSED = {
    "RealNVP": (lambda: AFFINE_COUPLING(3, 2), f"slope may fall to {SLOPE:.3g}", 1 / SLOPE),
    "MAF": (lambda: zuko.flows.MAF(3, 2), f"slope may fall to {SLOPE:.3g}", 1 / SLOPE),
    "MAF of another slope": (
        lambda: zuko.flows.MAF(3, 2, univariate=partial(T.MonotonicAffineTransform, slope=0.1)),
        "slope may fall to 0.1",
        10.0,
    ),
    "NSF": (lambda: zuko.flows.NSF(3, 2), "NaN", 1.0),
    "NCSF": (lambda: zuko.flows.NCSF(3, 2), "NaN", 1.0),
    "free shifts": (lambda: RobustNSF(3, 2, shift_bound=None), "give a shift_bound", 1.0),
    "GF": (lambda: zuko.flows.GF(3, 2), "bisection", None),
    "NAF": (lambda: zuko.flows.NAF(3, 2), "bisection", None),
    "UNAF": (lambda: zuko.flows.UNAF(3, 2), *ENDS),
    "SOSPF": (lambda: zuko.flows.SOSPF(3, 2), *ENDS),
    "BPF": (lambda: zuko.flows.BPF(3, 2), "bisection", None),
    "CNF": (lambda: zuko.flows.CNF(3, 2), "no rule for zuko.flows.continuous.FFJ", None),
    "GMM": (lambda: zuko.mixtures.GMM(3, 2), "no rule for zuko.mixtures.GMM", None),
    "softclip": (lambda: flow_of(Constant(T.SoftclipTransform, 5.0)), "poles", None),
    "a univariate that flowguard cannot look into": (
        lambda: zuko.flows.MAF(
            3,
            2,
            univariate=lambda w, h, d, t: T.ComposedTransform(
                RobustSpline(w, h, d, t, bound=1.0), RobustSpline(w, h, d, t).inv
            ),
            shapes=RobustSpline.shapes(4),
        ),
        "the bound of <lambda> may depend on its parameters",
        None,
    ),
    "singular": (
        lambda: flow_of(Constant(T.LULinearTransform, torch.zeros(3, 3))),
        "singular",
        None,
    ),
    "torch's affine of parameters": (
        lambda: zuko.flows.MAF(
            3, 2, univariate=lambda a, b: torch.distributions.AffineTransform(a, b.exp())
        ),
        "no rule for torch.distributions.transforms.AffineTransform",
        None,
    ),
}
if HAS_ADDITIVE:
    REFUSED["NICE"] = (
        lambda: zuko.flows.NICE(3, 2, univariate=T.AdditiveTransform, shapes=[()]),
        "shift is free",
        1.0,
    )


def amplified(flow, factor):
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if "hyper" in name:
                p.mul_(factor)
    return flow


def violations(flow, y, bound):
    r"""The number of elements above the bound and of those that are NaN."""
    z = RADIUS * (2 * torch.rand(len(y), 3, dtype=y.dtype) - 1)
    z = torch.where(torch.rand(len(y), 1) < 0.5, z, RADIUS * z.sign())
    with torch.no_grad():
        x = flow(y).transform.inv(z)
    return int((x.abs() > bound).sum()), int(x.isnan().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", CERTIFIED.values(), ids=CERTIFIED)
def test_no_sample_of_a_certified_flow_exceeds_its_bound(build, dtype):
    for factor in (1.0, 10.0):
        flow = amplified(build().to(dtype), factor)
        certificate = certify(flow)
        assert certificate.certified, certificate
        bound = certificate.bound(RADIUS)
        for far in (1.0, 1e3, 1e10, 1e30):
            y = far * torch.randn(64, 2, dtype=dtype)
            assert violations(flow, y, bound) == (0, 0), (factor, far)
        infinite = torch.randn(64, 2, dtype=dtype).sign() * math.inf
        # An infinite context is NaN after the first layer of an ordinary network (inf - inf);
        # such samples are NaN, never another number above the bound.
        assert violations(flow, infinite, bound)[0] == 0
        assert attack(flow, y, steps=5, restarts=1).value <= bound


@pytest.mark.parametrize(("build", "match", "gain"), REFUSED.values(), ids=REFUSED)
def test_what_zuko_cannot_bound_is_named(build, match, gain):
    certificate = certify(build())
    assert not certificate.certified
    assert certificate.bound(RADIUS) == math.inf
    refused = certificate.refused[0]
    assert match in refused.reason
    assert refused.gain is None if gain is None else refused.gain == pytest.approx(gain, rel=1e-3)


def test_infinite_contexts_are_bounded_where_the_network_takes_them():
    class Sign(nn.Module):
        def forward(self, x):
            return x.clamp(-1e20, 1e20)

    flow = RobustNSF(3, 2)
    for t in flow.transform.transforms:
        t.hyper.insert(0, Sign())
    y = torch.randn(64, 2).sign() * math.inf
    assert violations(flow, y, certify(flow).bound(RADIUS)) == (0, 0)


@pytest.mark.parametrize("transforms", [1, 2, 8])
def test_the_bound_of_a_coupling_flow_adds_up_its_shifts_where_they_act(transforms):
    flow = RobustCouplingFlow(2, 2, transforms=transforms, bound=5.0, shift_bound=5.0)
    certificate = certify(flow, roundoff=0.0)
    assert certificate.bound(RADIUS) == RADIUS + 5.0 * math.ceil(transforms / 2)
    assert certificate.growth == pytest.approx(1.0)
    assert certificate.event_size == 2


def test_the_bound_of_a_coupling_flow_is_reached():
    flow = RobustCouplingFlow(2, 1, transforms=4, shift_bound=2.0)
    with torch.no_grad():
        for t in flow.transform.transforms:
            t.hyper[-1].bias[-1] = -1e30  # the shift, in the transformed feature
    x = flow(torch.zeros(1, 1)).transform.inv(torch.full((1, 2), RADIUS))
    assert x.max().item() == pytest.approx(certify(flow).bound(RADIUS), rel=1e-5)


def test_constant_layers_alone_give_the_gain_of_their_product():
    a, b = torch.randn(2, 4, 4)
    flow = flow_of(
        Constant(T.RotationTransform, a), Constant(T.LULinearTransform, b + 4 * torch.eye(4)),
        Constant(T.RotationTransform, a).inv, features=4,
    )  # fmt: skip
    matrix = torch.autograd.functional.jacobian(flow().transform.inv, torch.zeros(4))
    gain = matrix.double().abs().sum(1).max().item()
    assert certify(flow).growth == pytest.approx(gain, rel=1e-3)


def test_a_layer_in_its_other_direction_is_bounded_by_what_holds_there():
    flow = flow_of(Autoregressive(3, 2, **SPLINE).inv, Constant(T.SoftclipTransform, 2.0).inv)
    # At most 2, then anywhere in the box of 5, then a shift of 5.
    assert certify(flow, roundoff=0.0).bound(100.0) == 10.0


def test_a_confidence_gives_a_radius_for_normal_noise_only():
    assert certify(RobustNSF(3, 2)).bound(confidence=0.999999) > certify(RobustNSF(3, 2)).bound(
        4.0
    )
    flow = RobustNSF(3, 2)
    flow.base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.BoxUniform, -torch.ones(3), torch.ones(3), buffer=True
    )
    with pytest.raises(ValueError, match="not standard normal"):
        certify(flow).bound(confidence=0.5)
    assert certify(flow).bound(1.0) == 1.0 + 3 * 5.0 or certify(flow).bound(1.0) > 16.0


def test_image_flows_are_bounded_alone_and_composed():
    flow = MultiscaleFlow((3, 8, 8), 2, levels=2, steps=1, hidden=8)
    certificate = certify(flow)
    assert certificate.certified
    assert certificate.event_size == 192
    assert certificate.bound(1.0) == certify(flow.transform.flow).bound(1.0)
    composed = flow_of(
        Constant(torch.distributions.AffineTransform, 0.0, 10.0),
        ConditionalMultiscaleTransform((3, 8, 8), levels=2, steps=1, hidden=8),
        Constant(torch.distributions.AffineTransform, 0.0, 0.5),
        Constant(T.PermutationTransform, torch.randperm(192), buffer=True),
        features=192,
    )
    inner = certify(composed.transform.transforms[1])
    # Noise times two goes in, a tenth of the image comes out.
    assert certify(composed).bound(1.0) == pytest.approx(inner.bound(2.0) / 10, rel=1e-4)
    x = composed().transform.inv(2 * torch.rand(16, 192) - 1)
    assert x.abs().max().item() <= certify(composed).bound(1.0)


def test_guarded_flows_are_their_flows():
    inner = RobustNSF(3, 4)
    flow = GuardedFlow(inner, OODConditioner(nn.Linear(2, 4), policy="report"))
    assert certify(flow).bound(1.0) == certify(inner).bound(1.0)
    assert certify(flow).table()[-1].name.startswith("flow.transform.transforms.0")
    assert attack(flow, torch.randn(4, 2), radius=1.0, steps=3).value <= certify(flow).bound(4.0)


def test_the_attack_explodes_real_nvp_and_not_robust_couplings():
    y = torch.zeros(8, 2)
    values = {}
    for name, build in (("affine", AFFINE_COUPLING), ("robust", RobustCouplingFlow)):
        torch.manual_seed(0)
        flow = amplified(build(2, 2, transforms=8), 4.0)
        values[name] = attack(flow, y, radius=10.0, norm="l2", steps=50, restarts=2).value
    assert values["affine"] > 1e5
    assert values["robust"] <= 24.001


def test_contexts_without_batch_of_samples_and_images_have_their_noise():
    draw, z = sampler(RobustNSF(3, 2), torch.zeros(5, 2))
    assert z.shape == (5, 3)
    assert draw(z, torch.zeros(5, 2)).shape == (5, 3)
    flow = MultiscaleFlow(3, 2, levels=1, steps=1, hidden=8)
    y = [torch.randn(2, 2, 4, 4)]
    assert attack(flow, y, radius=1.0, steps=2, restarts=1).sample.shape == (1, 3, 8, 8)


def test_a_subclass_of_a_flow_that_overrides_it_is_not_covered():
    class Louder(zuko.flows.MAF):
        def forward(self, c=None):
            return super().forward(c)

    assert "overrides forward of Flow" in certify(Louder(3, 2, **SPLINE)).refused[0].reason

    class Named(zuko.flows.MAF):
        pass

    assert certify(Named(3, 2, **SPLINE)).certified


def test_rules_are_loaded_when_the_first_layer_is_met():
    import subprocess
    import sys

    code = (
        "import sys, zuko, flowguard; from flowguard.bounds import certify;"
        "assert 'flowguard.integrations.zuko.rules' not in sys.modules;"
        "assert not certify(zuko.flows.MAF(2, 1)).refused[0].reason.startswith('flowguard knows');"
        "assert 'flowguard.integrations.zuko.rules' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_library_without_rules_is_named_and_not_imported():
    assert "no rule for" in bounds.envelope(torch.distributions.ExpTransform()).reason


# What a certificate must not promise


def reached_and_bound(flow, y=None, features=3, dtype=torch.float32):
    r"""The largest of some samples, and the bound: none where the flow is refused."""
    z = RADIUS * (2 * torch.rand(256, features, dtype=dtype) - 1)
    z = torch.cat((z, RADIUS * z.sign()))
    with torch.no_grad():
        x = flow(y).transform.inv(z)
    return x.abs().nan_to_num(0.0).max().item(), certify(flow).bound(RADIUS)


class Located(zuko.lazy.LazyDistribution):
    r"""Normal noise around a mean that the context tells."""

    def __init__(self, features, context):
        super().__init__()
        self.net = nn.Linear(context, 2 * features)

    def forward(self, c=None):
        loc, logs = self.net(c).chunk(2, dim=-1)
        return zuko.distributions.DiagNormal(loc, logs.exp())


@pytest.mark.parametrize("base", [Located, zuko.mixtures.GMM])
def test_a_base_that_depends_on_the_context_is_not_certified(base):
    flow = RobustNSF(3, 2)
    flow.base = base(3, 2)
    x = flow(1e3 * torch.randn(64, 2)).sample()
    certificate = certify(flow)
    assert not bool(x.abs().max() <= 1e3)
    assert [s.name for s in certificate.refused] == ["base"]
    assert "depends on the context" in certificate.refused[0].reason
    assert certificate.bound(RADIUS) == math.inf


@pytest.mark.parametrize(
    "base",
    [
        lambda: zuko.mixtures.GMM(3),
        lambda: zuko.lazy.UnconditionalDistribution(
            zuko.distributions.DiagNormal, torch.ones(3), 2 * torch.ones(3)
        ),
    ],
)
def test_the_noise_of_a_base_without_context_is_taken_as_it_is(base):
    flow = RobustNSF(3, 2)
    flow.base = base()
    certificate = certify(flow)
    assert certificate.bound(RADIUS) == certify(RobustNSF(3, 2)).bound(RADIUS)
    with pytest.raises(ValueError, match="not standard normal"):
        certificate.bound(confidence=0.5)


def test_an_image_flow_over_other_noise_has_no_confidence():
    flow = flow_of(
        ConditionalMultiscaleTransform((3, 8, 8), levels=2, steps=1, hidden=8), features=192
    )
    assert certify(flow).bound(confidence=0.5) > 0
    flow.base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(192), 100 * torch.ones(192), buffer=True
    )
    with pytest.raises(ValueError, match="not standard normal"):
        certify(flow).bound(confidence=0.5)


class Boxed(RobustSpline):
    r"""A spline whose box is one of its parameters."""

    def __init__(self, w, h, d, t):
        super().__init__(w, h, d, t, bound=5 + float(t.abs().max()))


@pytest.mark.parametrize(
    "univariate",
    [
        Boxed,
        lambda w, h, d, t: RobustSpline(w, h, d, t, bound=5 + float(t.abs().max())),
        partial(lambda k, *phi: RobustSpline(*phi, bound=k * (1 + float(phi[3].abs().max()))), 5),
    ],
    ids=["class", "function", "partial"],
)
@pytest.mark.parametrize("layer", [Autoregressive, Coupling])
def test_a_univariate_whose_box_depends_on_its_parameters_is_not_certified(univariate, layer):
    flow = flow_of(layer(3, 2, univariate=univariate, shapes=RobustSpline.shapes(4)))
    reached, bound = reached_and_bound(amplified(flow, 5.0), torch.randn(512, 2))
    assert reached <= bound
    assert certify(flow).refused


def test_numbers_of_numpy_are_plain_options():
    numpy = pytest.importorskip("numpy")
    options = partial(RobustSpline, bound=numpy.float32(3.0), shift_bound=numpy.int64(2))
    flow = flow_of(Autoregressive(3, 2, univariate=options, shapes=RobustSpline.shapes(4)))
    reached, bound = reached_and_bound(flow, torch.randn(512, 2))
    assert reached <= bound
    assert certify(flow).certified


def test_a_constructor_that_makes_another_map_each_time_is_named():
    flow = flow_of(Constant(lambda: T.MonotonicAffineTransform(*torch.randn(2, 3))))
    (refused,) = certify(flow).refused
    assert "may make another one at each call" in refused.reason


def test_plain_numbers_count_in_double_precision():
    flow = flow_of(
        Constant(torch.distributions.AffineTransform, 0.0, 0.1),
        Constant(T.RotationTransform, torch.zeros(3, 3)),
    ).double()
    reached, bound = reached_and_bound(flow, dtype=torch.float64)
    assert 40.0 == reached <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-2, 1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("forward", [False, True])
def test_nearly_singular_factors_keep_their_bound(scale, dtype, forward):
    matrix = torch.eye(5) + torch.randn(5, 5).sign() * (1 - torch.eye(5)) / scale
    layer = Constant(T.LULinearTransform, matrix)
    flow = flow_of(layer.inv if forward else layer, features=5).to(dtype)
    reached, bound = reached_and_bound(flow, features=5, dtype=dtype)
    assert reached <= bound


@pytest.mark.parametrize("cls", [T.CircularShiftTransform, T.SoftclipTransform])
def test_a_negative_bound_is_a_bound(cls):
    flow = flow_of(RobustNSF(3, 2).transform, Constant(cls, -2.0).inv)
    with torch.no_grad():
        reached = cls(-2.0)(torch.linspace(-1e3, 1e3, 1001)).abs().max().item()
    (first, *_) = certify(Constant(cls, -2.0).inv).table(1e3)
    assert 1.9 < reached <= first.bound_out < 2.01
    assert certify(flow).certified


def test_indices_that_are_no_permutation_are_named():
    order = torch.tensor([0, 0, 0])
    flow = flow_of(
        Constant(T.RotationTransform, torch.randn(3, 3)),
        Constant(T.PermutationTransform, order, buffer=True).inv,
    )
    (refused,) = certify(flow).refused
    assert "no permutation" in refused.reason


SQUASHED = {
    "torch's sigmoid": (torch.distributions.transforms.SigmoidTransform, 1.0),
    "torch's tanh": (torch.distributions.transforms.TanhTransform, 1.0),
    "cosine": (T.CosTransform, 1.0),
    "sine": (T.SinTransform, 1.0),
    "softclip": (T.SoftclipTransform, 1.0),
}


@pytest.mark.parametrize("name", SQUASHED)
def test_what_squashes_is_bounded_in_one_direction(name):
    cls, most = SQUASHED[name]
    certificate = certify(Constant(cls).inv)
    assert certificate.bound(1e6) == pytest.approx(most, rel=1e-5)
    with torch.no_grad():
        x = cls()(torch.linspace(-1e6, 1e6, 10001))
    assert 0.99 * most < x.abs().max() <= certificate.bound(1e6)
    assert not certify(Constant(cls)).certified


@pytest.mark.parametrize("build", CERTIFIED.values(), ids=CERTIFIED)
def test_a_flow_given_its_context_is_certified_as_it_is(build):
    flow = amplified(build(), 10.0)
    y = 100 * torch.randn(64, 2)
    z = RADIUS * (2 * torch.rand(64, 3) - 1)
    for given_y in (flow(y), flow(y).transform):
        certificate = certify(given_y)
        assert certificate.certified, certificate
        assert certificate.bound(RADIUS) == pytest.approx(certify(flow).bound(RADIUS))
        with torch.no_grad():
            assert flow(y).transform.inv(z).abs().max() <= certificate.bound(RADIUS)
    assert certify(flow(y)).event_size == 3
    assert certify(flow(y)).bound(confidence=0.9) > 0


def test_a_flow_given_its_context_is_refused_where_its_maps_differ_from_row_to_row():
    flow = zuko.flows.MAF(3, 2)
    certificate = certify(flow(torch.randn(4, 2)))
    assert "slope may fall" in certificate.refused[0].reason
    flow = MultiscaleFlow(3, 2, levels=1, steps=1, hidden=8)
    y = [torch.randn(2, 2, 4, 4)]
    assert certify(flow(y)).bound(1.0) == certify(flow).bound(1.0)
    other = zuko.distributions.NormalizingFlow(
        T.AutoregressiveTransform(lambda x: T.IdentityTransform(), 3), flow(y).base
    )
    assert "flowguard does not know" in certify(other).refused[0].reason
    coarse = RobustNSF(3, 2).bfloat16()
    given_y = coarse(torch.randn(4, 2).bfloat16()).transform
    assert "certify the flow that made it" in certify(given_y).refused[0].reason


@pytest.mark.parametrize("slope", [0.1, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("forward", [False, True])
def test_a_spline_with_constant_knots_is_bounded_by_them_or_named(slope, forward):
    phi = (slope * torch.randn(3, n) for n in (8, 8, 7))
    layer = Constant(T.MonotonicRQSTransform, *phi)
    certificate = certify(layer.inv if forward else layer)
    z = 5 * (1 - 10 ** (-7 * torch.rand(20_000, 3)))
    with torch.no_grad():
        x = layer()(z) if forward else layer().inv(z)
    assert x.nan_to_num(0.0).abs().max().item() <= certificate.bound(5.0)
    assert not certificate.certified or x.isfinite().all()
    # Before 1.5, zuko's steepest knots lose more digits.
    assert certificate.certified == (slope < 2 or (forward and (slope < 100 or HAS_ADDITIVE)))


def test_conditional_splines_of_the_host_leave_their_box():
    # Why they are not certified: finite samples may exceed what exact arithmetic would have.
    f = T.MonotonicRQSTransform(*(1e4 * torch.randn(200_000, n) for n in (2, 2, 1)))
    y = 5 * (1 - 1e-6 * torch.rand(200_000))
    assert f.inv(y).nan_to_num(0.0).abs().max() > 5.001  # a thousand times the rounding


def test_layers_that_are_there_twice_count_twice():
    layer = Constant(torch.distributions.AffineTransform, 0.0, 0.1)
    flow = flow_of(layer, layer, Constant(T.RotationTransform, torch.zeros(3, 3)))
    reached, bound = reached_and_bound(flow)
    assert 399 < reached <= bound < 401


def test_parts_that_depart_from_their_class_are_named():
    for spoil in (
        lambda flow: setattr(flow.base, "forward", lambda c=None: None),
        lambda flow: flow.base.register_forward_hook(lambda m, args, out: out),
        lambda flow: setattr(flow.transform.transforms[0], "meta", lambda c, x: None),
        lambda flow: setattr(flow.transform, "forward", lambda c=None: None),
    ):
        flow = RobustNSF(3, 2)
        spoil(flow)
        assert certify(flow).refused


def test_a_circular_shift_whose_numbers_overflow_is_refused():
    f = zuko.transforms.CircularShiftTransform(1e-9)
    assert f.inv(torch.full((64,), 1e30)).isnan().any()
    assert "overflow" in certify(f).refused[0].reason
    wide = certify(zuko.transforms.CircularShiftTransform(1e-3), roundoff=0.0)
    assert wide.bound(1e30) == 1e-3


class Renamed(RobustSpline):
    r"""A class of the user that changes nothing."""


class Wider(RobustSpline):
    def __init__(self, *phi):
        super().__init__(*phi, bound=5.0 + phi[-1].abs().max().item())


@pytest.mark.parametrize(("univariate", "certified"), [(Renamed, True), (Wider, False)])
def test_a_derived_map_is_certified_if_it_is_made_as_its_base_is(univariate, certified):
    flow = zuko.flows.MAF(2, 1, univariate=univariate, shapes=RobustSpline.shapes(4))
    assert certify(flow).certified == certified
