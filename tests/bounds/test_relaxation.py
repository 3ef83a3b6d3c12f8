r"""Bounds read backwards: they hold for any slopes, and are near to what can be reached."""

import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import ComposeTransform

from flowguard.bounds import (
    Envelope,
    Flatten,
    Join,
    Linear,
    Noise,
    Permute,
    Pointwise,
    Refused,
    Remark,
    Scale,
    Unsqueeze,
    certify,
    envelope,
)
from flowguard.bounds.certificate import Certificate
from flowguard.bounds.regions import Region
from flowguard.bounds.relaxation import Chain, Course, Forms, Joined, Node, Product
from flowguard.image import ConditionalMultiscaleFlow, OrthogonalConv1x1
from flowguard.transforms import AdditiveTransform, RobustSpline

RADIUS = 4.0
#: Of float64, in which both a bound and what is to stay below it are computed here.
ALMOST = 1 + 1e-9

MAPS = [
    RobustSpline(*torch.zeros(3, 1), torch.zeros(()), bound=2.0, shift_bound=0.5),
    RobustSpline(*torch.zeros(3, 1), torch.zeros(()), bound=0.5, shift_bound=2.0),
    RobustSpline(*torch.zeros(3, 1), bound=3.0),
    AdditiveTransform(torch.zeros(()), shift_bound=1.0),
]
ENVELOPES = [envelope(f, sampling) for f in MAPS for sampling in (True, False)]
ENVELOPES += [
    Envelope(1.0, 0.3, displacement=1.5),
    Envelope(1.2, 0.3, floor=0.5),
    Envelope(0.0, 0.0, floor=1.0),
    Envelope(limit=lambda radius: 1.0 + radius**2 / 8),
]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# What a map may do, by its envelope; and the worst that a chain of maps can do


def choices(g, z):
    r"""The least and the largest value that a map within an envelope may give, for each z."""
    if g.limit is not None:
        reach = z.new_tensor([g.limit(r) for r in z.abs().flatten().tolist()]).view_as(z)
        return -reach, reach
    reach = g.offset + (g.gain * z.abs()).clamp(min=g.floor)
    low, high = torch.maximum(-reach, z - g.displacement), torch.minimum(reach, z + g.displacement)
    if not math.isfinite(g.inside):
        return low, high
    near = z.abs() <= g.edge
    low = torch.where(near, torch.minimum(z - g.offset, -z.new_tensor(g.inside)), z - g.offset)
    high = torch.where(near, torch.maximum(z + g.offset, z.new_tensor(g.inside)), z + g.offset)
    return low, high


def walk(steps, choose):
    r"""Samples, with shape (N, P, C), for noise and maps that are chosen: `choose` gives numbers
    between -1 and 1, of a shape."""
    radius = RADIUS
    x = choose(1, next(s.features for s in steps if s.features is not None)) * radius
    for step in steps:
        if isinstance(step, Linear):
            x = x @ step.matrix.T
        elif isinstance(step, Scale):
            x = x * step.factor + step.offset
        elif isinstance(step, Permute):
            x = x[..., step.order]
        elif isinstance(step, Pointwise):
            low, high = choices(step.envelope, x)
            moved = low + (high - low) * (1 + choose(*x.shape[1:])) / 2
            x = moved if step.mask is None else torch.where(step.mask, moved, x)
        elif isinstance(step, Join):
            reach = step.mean_bound + math.exp(step.scale_bound) * radius
            x = torch.cat((x, reach * choose(x.shape[1], step.joined)), -1)
        elif isinstance(step, Unsqueeze):
            x = x.unflatten(-1, (-1, step.factor**2)).transpose(-1, -2).flatten(1, 2)
        elif isinstance(step, Flatten):
            x = x.flatten(1).unsqueeze(1)
        else:
            assert isinstance(step, Noise | Remark)
    return x


def worst(steps, tries=4, climbs=40):
    r"""The largest values that an adversary finds who chooses noise and all maps freely, with
    shape (P, C)."""
    angles, rows = [], 1

    def run(rows):
        left = iter(angles)

        def choose(*shape):
            angle = next(left, None)
            if angle is None:
                angle = (2 * double(rows, *shape)).requires_grad_()
                angles.append(angle)
            return angle.sin()

        return walk(steps, choose)

    with torch.no_grad():
        shape = run(1).shape[1:]
    angles.clear()
    rows = tries * shape.numel()
    x = run(rows)
    optimizer = torch.optim.Adam(angles, 0.3)
    best = torch.zeros(shape, dtype=torch.float64)
    for _ in range(climbs):
        x = run(rows)
        best = torch.maximum(best, x.detach().abs().amax(0))
        optimizer.zero_grad()
        own = x.flatten(1).unflatten(0, (tries, -1)).diagonal(dim1=1, dim2=2)
        (-own.sum()).backward()
        optimizer.step()
    return best


def random_steps(length):
    c = int(torch.randint(1, 5, ()))
    steps = [Noise(size=c)]
    for _ in range(length):
        kind = int(torch.randint(8, ()))
        if kind == 0:
            steps.append(Linear(matrix=double(c, c) / c**0.5))
        elif kind == 1:
            steps.append(Scale(factor=double(c), offset=double(c)))
        elif kind == 2:
            steps.append(Permute(order=torch.randperm(c)))
        elif kind == 3 and c <= 4:
            joined = 4 - c if c < 4 else 4
            steps.append(Join(joined=joined, mean_bound=0.5, scale_bound=0.1))
            steps.append(Unsqueeze(factor=2))
            c = (c + joined) // 4
        elif kind == 4:
            steps.append(Remark())
        else:
            mask = None if torch.rand(()) < 0.3 else torch.rand(c) < 0.7
            g = ENVELOPES[int(torch.randint(len(ENVELOPES), ()))]
            steps.append(Pointwise(envelope=g, mask=mask))
    return steps


def certificate(steps, roundoff=0.0):
    return Certificate("", tuple(steps), roundoff)


# One map


def beside(g, radius, share):
    r"""How far a map can be from a line of that slope, as the relaxation has it."""
    box = torch.full((1, 1), radius, dtype=torch.float64)
    region = Region.cube(box)
    mask = torch.ones(1, dtype=torch.bool)
    grown, slack = region.growth(g, mask, 0.0)
    course = Course.map(g, mask, box, grown, slack)
    after = Node.of(region.elementwise(g, mask, 0.0))
    share = torch.full((1, 1), share, dtype=torch.float64)
    low, high = course.beside(Forms.of(region), share, Node.of(region), after)
    assert torch.equal(low, -high)
    return high.item()


def exact(f, radius, share, sampling):
    r"""The same from the definition of a robust map: a shift, and a box of any monotone map."""
    box, shift = f.bound, 0.0 if f.shift is None else f.shift_bound
    out, into = (box, box + shift) if sampling else (box + shift, box)
    within = out + share * min(radius, into)
    beyond = (1 - share) * radius + shift
    return max(within, beyond) if radius + (shift if sampling else 0.0) >= box else within


GRID = [0.0, 0.3, 0.5, 1.0, 2.0, 2.4, 2.5, 3.7, 10.0]


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize("f", MAPS[:3])
def test_a_robust_map_is_as_far_from_a_line_as_its_definition_says(f, sampling):
    for radius in GRID:
        for share in (0.0, 0.2, 0.5, 0.9, 1.0):
            found = beside(envelope(f, sampling), radius, share)
            assert found == pytest.approx(exact(f, radius, share, sampling), abs=1e-12)


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize(("bound", "shift_bound"), [(2.0, 0.5), (0.5, 2.0), (3.0, 1e-3)])
def test_no_robust_map_is_farther_from_a_line_and_extreme_ones_are_as_far(
    bound, shift_bound, sampling
):
    # Parameters of any size, and in particular those of a step up or down at either end.
    logits = torch.cat((60 * double(4000, 3, 1), 60 * double(4000, 3, 1).sign()))
    shift = torch.cat((double(4000), 1e30 * double(4000).sign()))
    f = RobustSpline(*logits.unbind(1), shift, bound=bound, shift_bound=shift_bound, slope=None)
    g = envelope(f, sampling)
    for radius in GRID:
        z = radius * torch.linspace(-1, 1, 81, dtype=torch.float64)
        edge = min(0.99 * g.edge, radius)  # beside the narrowest bin
        z = torch.cat((z, z.new_tensor([-edge, edge])))[:, None]
        x = f.inv(z) if sampling else f(z)
        for share in (0.0, 0.3, 0.7, 1.0):
            reached = (x - share * z).abs().max().item()
            limit = beside(g, radius, share)
            assert reached <= limit * ALMOST
            assert reached >= 0.95 * limit - 0.05 * bound


def test_two_maps_move_a_feature_by_less_than_twice_what_one_does():
    f = RobustSpline(*torch.zeros(3, 1), torch.zeros(()), bound=5.0, shift_bound=1.0)
    step = Pointwise(envelope=envelope(f))
    far = Noise(size=1), step, step, Scale(factor=torch.ones(1), offset=torch.zeros(1))
    chain = Chain(region := Region.cube(torch.full((1, 1), 1e3, dtype=torch.float64)), 0)
    for s in far:
        after = s.through(region, 1e3, 0.0)
        chain.add(s.link(region, 1e3, 0.0), after)
        region = after
    assert len(chain.links) == 2  # the noise, and all that is elementwise
    one = torch.ones(1, 1, dtype=torch.float64)
    rows = Forms.of(region)
    low, high = chain.links[-1].beside(rows, one, chain.nodes[1], chain.nodes[2])
    assert high.item() == -low.item() == 12.0  # 2 B + 2 β, not 4 B + 2 β


@pytest.mark.parametrize("factor", [1.0, -0.5, 2.0, 0.0])
@pytest.mark.parametrize("first", ENVELOPES)
def test_no_two_maps_are_farther_from_a_line_than_their_course(first, factor):
    radius, grid = 3.0, torch.linspace(-1, 1, 41, dtype=torch.float64)
    z = torch.cat((radius * grid, torch.tensor([-2.5, 2.5]).double().clamp(-radius, radius)))
    scale = Scale(factor=torch.tensor([factor]), offset=torch.tensor([0.25]))
    for second in ENVELOPES:
        steps = [Noise(size=1), Pointwise(envelope=first), scale, Pointwise(envelope=second)]
        chain, region = chained(steps, radius=radius)
        low, high = choices(first, z)
        middle = torch.lerp(low[:, None], high[:, None], (1 + grid) / 2)
        down, up = choices(second, factor * middle + 0.25)
        tightest = math.inf
        for share in (0.0, 0.3, 0.7, 1.0):
            shares = torch.full((1, 1), share, dtype=torch.float64)
            limits = chain.links[-1].beside(Forms.of(region), shares, *chain.nodes[1:])
            line = share * factor * z[:, None]
            reached = torch.maximum(-(down - line).amin(), (up - line).amax())
            limit = max(-limits[0].item(), limits[1].item())
            assert reached <= limit * ALMOST
            tightest = min(tightest, limit - reached.item())
        if math.isfinite(first.edge) and math.isfinite(second.edge):
            assert tightest < 0.1  # of the grid


# Chains of layers


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 9), effort=st.sampled_from([0, 5]))
def test_no_choice_of_maps_exceeds_the_tightened_bound(seed, length, effort):
    torch.manual_seed(seed)
    steps = random_steps(length)
    plain = certificate(steps)
    tight = plain.tighten(effort)
    bound = tight.bound(RADIUS)
    assert worst(steps).max().item() <= bound * ALMOST
    assert bound <= plain.bound(RADIUS)
    for ours, theirs in zip(tight.table(RADIUS), plain.table(RADIUS), strict=True):
        assert ours.bound_out <= theirs.bound_out * ALMOST


def chained(steps, radius=RADIUS):
    r"""The chain of some steps, and the region that it ends in, of the plain certificate."""
    region = Region.cube(torch.full((1, steps[0].size), radius, dtype=torch.float64))
    chain = Chain(region, 0)
    for step in steps:
        after = step.through(region, radius, 0.0)
        chain.add(step.link(region, radius, 0.0), after)
        region = after
    return chain, region


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 9))
def test_any_slopes_give_a_bound(seed, length):
    torch.manual_seed(seed)
    steps = random_steps(length)
    chain, region = chained(steps)
    reached = worst(steps).flatten()
    rows = Forms.of(region)
    widths = [
        node.low.shape[1]
        for link, node in zip(chain.links, chain.nodes[1:], strict=True)
        if isinstance(link, Course)
    ]
    for draw in (torch.rand, lambda *s: torch.rand(*s).round()):
        shares = [draw(len(rows.weight), n).double() for n in reversed(widths)]
        low, high, far = chain.read(rows, shares)
        tolerance = 1e-9 * (1 + region.largest)
        assert bool((reached <= torch.maximum(-low, high) + tolerance).all())
        assert bool((reached <= far + tolerance).all())


@pytest.mark.parametrize("g", ENVELOPES[:8])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_a_map_moves_is_bounded_where_its_input_is_subtracted(g, share):
    copied = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    apart = torch.tensor([[1.0, -share], [0.0, 0.0]], dtype=torch.float64)
    moved = Pointwise(envelope=g, mask=torch.tensor([True, False]))
    steps = [Noise(size=2), Linear(matrix=copied), moved, Linear(matrix=apart)]
    reached = worst(steps, tries=20).max().item()
    assert reached <= certificate(steps).tighten(0).bound(RADIUS) * ALMOST
    tight = certificate(steps).tighten(50).bound(RADIUS)
    assert reached <= tight * ALMOST
    assert tight <= 1.05 * beside(g, RADIUS, share)  # as near as the search comes in its steps


def test_the_search_comes_near_to_what_can_be_reached():
    torch.manual_seed(0)
    g = ENVELOPES[0]
    steps = [Noise(size=4)]
    for _ in range(3):
        w = OrthogonalConv1x1(4).weight.detach().double()
        scale = Scale(factor=2 ** double(4), offset=double(4))
        steps += [scale, Pointwise(envelope=g), Linear(matrix=w)]
    reached = worst(steps, tries=20, climbs=100).max().item()
    plain = certificate(steps).bound(RADIUS)
    tight = certificate(steps).tighten(100).bound(RADIUS)
    assert reached <= tight < 0.75 * plain
    assert tight < 1.6 * reached


def test_a_chain_starts_anew_after_a_step_that_tells_nothing_backwards():
    class Halved(Linear):
        r"""A product that another class does otherwise."""

        def through(self, region, radius, roundoff):
            return Region.cube(region.box / 2)

    half = Halved(matrix=torch.eye(2, dtype=torch.float64))
    region = Region.cube(torch.ones(1, 2, dtype=torch.float64))
    assert half.link(region, 1.0, 0.0) is None
    w = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    steps = [Noise(size=2), Linear(matrix=w), half, Linear(matrix=w)]
    assert certificate(steps).tighten(3).bound(1.0) == pytest.approx(2.0)
    flat = [Noise(size=2), Linear(matrix=w), Flatten(), Linear(matrix=w)]
    assert certificate(flat).tighten(3).bound(1.0) == pytest.approx(4.0)


def test_positions_are_told_apart_on_the_way_back():
    # Each position scales its channel; what is joined sees nothing of it.
    factor = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    none = torch.zeros(4, dtype=torch.float64)
    steps = [Noise(size=4), Scale(factor=factor, offset=none), Unsqueeze(factor=2)]
    chain, region = chained(steps)
    low, high, _ = chain.read(Forms.of(region), [torch.ones(4, 4, dtype=torch.float64)])
    assert high.tolist() == (-low).tolist() == [4.0, 8.0, 12.0, 16.0]


def test_a_permutation_is_undone_on_the_way_back():
    factor = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    scale = Scale(factor=factor, offset=torch.zeros(3, dtype=torch.float64))
    order = torch.tensor([1, 2, 0])  # whose inverse is another
    chain, region = chained([Noise(size=3), scale, Permute(order=order)])
    _, _, far = chain.read(Forms.of(region), [torch.ones(3, 3, dtype=torch.float64)])
    assert far.tolist() == (RADIUS * factor[order]).tolist()


def test_a_joined_feature_is_bounded_by_its_reach():
    rows = Forms.of(Region.cube(torch.ones(1, 3, dtype=torch.float64)))
    before = Node.of(Region.cube(torch.ones(1, 2, dtype=torch.float64)))
    back = Joined(7.0).back(rows, None, before, before)
    assert back.slack.tolist() == [0.0, 0.0, 7.0]
    assert torch.equal(back.weight, torch.eye(3, 2, dtype=torch.float64))


# Rounding


def test_the_margin_for_rounding_is_needed_and_enough_in_a_course():
    # A tenth is no float: sums of it round, some upwards.
    none = torch.zeros(1)
    f = RobustSpline(none, none, none, torch.tensor(-1e30), bound=0.1, shift_bound=0.1)
    layers = ComposeTransform([f] * 50)
    exact, allowed = (certify(layers, roundoff=u).tighten(0) for u in (0.0, 2.0**-24))
    z = RADIUS * torch.rand(100)
    x = layers.inv(z).double().tolist()
    pairs = list(zip(z.double().tolist(), x, strict=True))
    assert any(x > exact.bound(z) for z, x in pairs)
    assert all(x <= allowed.bound(z) for z, x in pairs)


def test_rounding_of_a_product_and_of_a_line_is_slack():
    w = torch.tensor([[0.1, 0.7], [0.3, -0.9]], dtype=torch.float64)
    region = Region.cube(torch.ones(1, 2, dtype=torch.float64))
    u = 1e-3
    link = Linear(matrix=w).link(region, 1.0, u)
    assert isinstance(link, Product)
    assert torch.allclose(link.slack, 5 * u / (1 - 5 * u) * w.abs().sum(1))
    node = Node.of(region)
    assert torch.equal(link.back(Forms.of(region), None, node, node).slack, link.slack[0])
    line = Scale(factor=w[0], offset=w[1]).link(region, 1.0, u)
    assert isinstance(line, Course)
    slack = 6 * u / (1 - 6 * u) * (w[0].abs() + w[1].abs())
    assert torch.allclose(line.high - line.low, 2 * slack)


def test_the_rounding_of_products_adds_up_on_the_way_back():
    steps = [Noise(size=1), *[Linear(matrix=torch.eye(1, dtype=torch.float64))] * 10]
    # Four operations each, of which every one may add its share.
    assert certificate(steps, 1e-3).tighten(0).bound(1.0) >= (1 + 4e-3) ** 10
    assert certificate(steps).tighten(0).bound(1.0) == 1.0


def image_flow(levels, steps, **options):
    flow = ConditionalMultiscaleFlow(3, 4, levels=levels, steps=steps, hidden=8, **options)
    with torch.no_grad():
        for name, p in flow.named_parameters():
            p.add_((1.0 if "coupling" in name or "net" in name else 0.1) * torch.randn_like(p))
    return flow.eval()


@pytest.mark.parametrize("mix", ["free", "orthogonal"])
@pytest.mark.parametrize(("levels", "steps", "size"), [(1, 3, 8), (2, 2, 16), (3, 1, 16)])
def test_no_sample_of_an_image_flow_exceeds_its_tightened_bound(levels, steps, size, mix):
    torch.manual_seed(levels)
    flow = image_flow(levels, steps, mix=mix)
    tight = certify(flow).tighten(5)
    bound = tight.bound(RADIUS)
    assert bound <= certify(flow).bound(RADIUS)
    for far in (1.0, 1e5, 1e30):
        y = [far * torch.randn(2, 4, size >> i, size >> i) for i in range(1, levels + 1)]
        for corners in (False, True):
            z = [2 * torch.rand(2, *s) - 1 for s in flow.latent_shapes(size, size)]
            x, _ = flow.inverse([RADIUS * (t.sign() if corners else t) for t in z], y)
            assert bool((x.abs() <= bound).all())


# The certificate as an object


def test_a_tightened_certificate_keeps_all_but_its_bounds():
    torch.manual_seed(0)
    plain = certify(image_flow(2, 1))
    tight = plain.tighten(3)
    assert tight.certified
    assert tight.growth == plain.growth
    table = tight.table(RADIUS)
    assert [row.name for row in table] == [row.name for row in plain.table(RADIUS)]
    assert table[-1].bound_out == tight.bound(RADIUS) == tight.to_dict(RADIUS)["bound"]
    assert [row.bound_in for row in table[1:]] == [row.bound_out for row in table[:-1]]
    assert json.loads(json.dumps(tight.to_dict(2.0)))["certified"] is True
    assert pickle.loads(pickle.dumps(tight)).bound(RADIUS) == tight.bound(RADIUS)
    values = [tight.bound(r) for r in (0.0, 1.0, 4.0, 100.0, 1e6, 1e30)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1e30 * tight.growth, rel=1e-3)


def test_a_row_that_was_handed_out_is_the_callers_own():
    tight = certify(image_flow(1, 1)).tighten(0)
    tight.table(RADIUS).clear()
    assert len(tight.table(RADIUS)) == len(tight.steps)


def test_what_has_no_bound_has_none_tightened():
    steps = [Noise(size=2), Refused(reason="why not"), Linear(matrix=torch.eye(2))]
    tight = certificate(steps).tighten(2)
    assert not tight.certified
    assert tight.bound(1.0) == math.inf


def test_the_number_of_steps_must_not_be_negative():
    with pytest.raises(ValueError, match="steps must not be negative; got -1"):
        certify(image_flow(1, 1)).tighten(-1)


def test_the_flow_gets_no_gradients_and_gradients_may_be_off():
    flow = image_flow(1, 1)
    with torch.no_grad():
        bound = certify(flow).tighten(3).bound(RADIUS)
    assert bound == certify(flow).tighten(3).bound(RADIUS)
    assert all(p.grad is None for p in flow.parameters())
