r"""Image flows of nflows with a context for each level, alone and within ``nflows.flows.Flow``."""

import copy
import pickle
import warnings
from math import prod

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import flowguard

try:
    from flowguard.integrations import nflows as ours
    from flowguard.integrations.nflows.host import part
except ImportError:
    pytest.skip("neither nflows nor glasflow is installed", allow_module_level=True)

T = part("transforms")
Flow = part("flows.base").Flow
StandardNormal = part("distributions").StandardNormal
Multiscale = ours.ConditionalMultiscaleTransform

SIZE = (3, 8, 12)
MAPS = [(8, 4, 6), (5, 2, 3)]
N = 4


def stir(layer, std=0.05):
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(std * torch.randn_like(p))
    return layer


def multiscale(channels=(8, 5), **options):
    r"""Two levels of a squeeze and two steps, the finest first."""
    flow = Multiscale(2, **options)
    shape = SIZE
    for c in channels:
        squeeze = T.SqueezeTransform()
        shape = squeeze.get_output_shape(*shape)
        steps = [ours.RobustFlowStep(shape[0], c, 16, num_bins=4, mix=m) for m in MIXES]
        shape = flow.add_transform(T.CompositeTransform([squeeze, *steps]), shape)
    return stir(flow).eval()


MIXES = ("orthogonal", "free")


def maps(n=N, size=(8, 12)):
    sizes = [(size[0] // 2**i, size[1] // 2**i) for i in (1, 2)]
    return [torch.randn(n, c, *s) for (c, *_), s in zip(MAPS, sizes, strict=True)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- the transform alone -------------------------------------------------------------------------


def test_flat_latents_and_back():
    flow, x, context = multiscale(), torch.randn(N, *SIZE), maps()
    z, ladj = flow(x, context)
    assert z.shape == (N, prod(SIZE))
    assert ladj.shape == (N,)
    y, back = flow.inverse(z, context)
    assert_close(y, x, atol=1e-5, rtol=1e-4)
    assert_close(ladj, -back, atol=1e-3, rtol=1e-4)


def test_ladj_is_that_of_autograd():
    flow, x = multiscale().double(), torch.randn(1, *SIZE, dtype=torch.float64)
    context = [m.double() for m in maps(1)]
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v, context)[0], x)
    n = x.numel()
    expected = torch.linalg.slogdet(jacobian.reshape(n, n)).logabsdet
    # The rotations were rounded to float32, where they are orthogonal but for 1e-7.
    assert_close(flow(x, context)[1][0], expected, atol=1e-5, rtol=0)


def test_every_level_gets_its_own_map():
    flow, x, context = multiscale(), torch.randn(1, *SIZE), maps(1)
    z, _ = flow(x, context)
    fine = prod(SIZE) // 2  # the first half of the latents leaves at level 1
    for level in (0, 1):
        other = list(context)
        other[level] = other[level] + 1
        changed = (flow(x, other)[0] - z).abs() > 1e-6
        assert bool(changed[:, :fine].any()) is (level == 0)
        assert bool(changed[:, fine:].any())


def test_without_contexts_it_is_the_hosts_multiscale_transform():
    flow, theirs = Multiscale(3), T.MultiscaleCompositeTransform(3)
    shape = (9, 4)
    for scale in (2.0, 3.0, 4.0):
        layer = T.PointwiseAffineTransform(scale=scale)
        ours_next, next_shape = (
            flow.add_transform(layer, shape),
            theirs.add_transform(layer, shape),
        )
        assert ours_next == next_shape
        shape = next_shape
    x = torch.randn(N, 9, 4)
    for a, b in zip(flow(x), theirs(x), strict=True):
        assert_close(a, b)
    z = torch.randn(N, 36)
    for a, b in zip(flow.inverse(z), theirs.inverse(z), strict=True):
        assert_close(a, b)
    assert isinstance(flow, type(theirs))


@pytest.mark.parametrize(("shape", "dim"), [((64,), 1), ((65,), 1), ((3, 21), 2), ((2, 3, 9), 3)])
def test_any_shape_and_dimension(shape, dim):
    flow = Multiscale(3, dim)
    for scale in (2.0, 0.25, 0.5):
        shape = flow.add_transform(T.PointwiseAffineTransform(scale=scale), shape) or shape
    z = torch.randn(N, prod(flow._level_shapes[0]))
    x, ladj = flow.inverse(z)
    back, forth = flow(x)
    assert_close(back, z)
    assert_close(ladj, -forth)


def test_vectors_get_the_context_as_it_is():
    def net(i, o):
        return part("nn.nets").ResidualNet(i, o, 16, context_features=2)

    flow = Multiscale(2)
    shape = flow.add_transform(ours.RobustSplineCouplingTransform([1, 0, 1, 0], net), (4,))
    flow.add_transform(ours.RobustSplineCouplingTransform([1, 0], net), shape)
    stir(flow)
    x, c = torch.randn(N, 4), torch.randn(N, 2)
    z, _ = flow(x, c)
    assert_close(flow.inverse(z, c)[0], x, atol=1e-5, rtol=1e-5)
    assert_close(flow(x, [c, c])[0], z)


def test_a_list_of_maps_tells_the_size_of_the_image():
    flow = multiscale()
    for size in ((12, 20), (4, 4), (16, 8)):
        x, context = torch.randn(2, 3, *size), maps(2, size)
        z, _ = flow(x, context)
        assert z.shape == (2, x[0].numel()) == (2, flow.latent_size(context))
        assert_close(flow.inverse(z, context)[0], x, atol=1e-5, rtol=1e-4)


def test_packed_maps_are_the_list_of_maps():
    flow, context = multiscale(context_channels=(8, 5)), maps()
    packed = ours.pack_maps(context)
    for m, same in zip(context, ours.unpack_maps(packed, (8, 5), [(4, 6), (2, 3)]), strict=True):
        assert torch.equal(m, same)
    x = torch.randn(N, *SIZE)
    assert torch.equal(flow(x, packed)[0], flow(x, context)[0])
    bigger = maps(2, (16, 12))
    x = torch.randn(2, 3, 16, 12)
    assert torch.equal(flow(x, ours.pack_maps(bigger))[0], flow(x, bigger)[0])


def test_a_dictionary_of_maps_is_a_list_of_maps():
    flow, x, context = multiscale(), torch.randn(N, *SIZE), maps()
    named = {"fine": context[0], "coarse": context[1]}
    assert torch.equal(flow(x, named)[0], flow(x, context)[0])
    assert torch.equal(ours.pack_maps(named), ours.pack_maps(context))


def test_gradients_pass_through_packed_maps():
    flow, context = multiscale(context_channels=(8, 5)), [m.requires_grad_() for m in maps()]
    x = torch.randn(N, *SIZE)
    for given in (context, ours.pack_maps(context)):
        grads = torch.autograd.grad(flow(x, given)[0].square().sum(), context)
        expected = grads if given is context else expected  # noqa: F821
        for a, b in zip(grads, expected, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (3, 5), (1, 1)])
def test_one_map_is_resized_to_each_level(size):
    flow, x, y = multiscale((8, 8)), torch.randn(N, *SIZE), torch.randn(N, 8, *size)
    z, _ = flow(x, y)
    assert_close(flow.inverse(z, y)[0], x, atol=1e-5, rtol=1e-4)


def test_images_grow_with_one_map_of_known_size():
    flow = multiscale((8, 8), context_size=(4, 6))
    for h, w in ((4, 6), (8, 6), (12, 18)):
        x, y = torch.randn(2, 3, 2 * h, 2 * w), torch.randn(2, 8, h, w)
        z, _ = flow(x, y)
        assert_close(flow.inverse(z, y)[0], x, atol=1e-5, rtol=1e-4)


def test_infinite_maps_give_finite_images():
    flow = multiscale()
    z = torch.randn(N, prod(SIZE))
    bound = flowguard.certify(flow).bound(z.abs().max().item())
    for far in (1e6, 1e30, torch.inf):
        x, ladj = flow.inverse(z, [far * m for m in maps()])
        assert bool(x.isfinite().all() and ladj.isfinite().all())
        assert x.abs().max() <= bound


def test_empty_batch():
    flow, context = multiscale(), [m[:0] for m in maps()]
    z, ladj = flow(torch.zeros(0, *SIZE), context)
    assert z.shape == (0, prod(SIZE))
    assert flow.inverse(z, context)[0].shape == (0, *SIZE)
    assert ladj.shape == (0,)


def test_copies_behave_alike():
    flow, x, context = multiscale(), torch.randn(N, *SIZE), maps()
    loaded = multiscale()
    loaded.load_state_dict(flow.state_dict())
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), loaded):
        assert torch.equal(other(x, context)[0], flow(x, context)[0])


def test_compiles_into_one_graph():
    flow, x, context = multiscale(), torch.randn(N, *SIZE), maps()
    with torch.no_grad():
        compiled = torch.compile(flow, fullgraph=True, backend="eager")
        assert_close(compiled(x, context)[0], flow(x, context)[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda f: f(torch.randn(2, *SIZE), maps(2)[:1]), "each of the 2 levels"),
        (lambda f: f(torch.randn(2, *SIZE), [maps(2)[0], None]), "each of the 2 levels"),
        (lambda f: f(torch.randn(2, *SIZE), [maps(2)[0]] * 2), r"sizes \[\(4, 6\), \(2, 3\)\]"),
        (lambda f: f(torch.randn(2, 3, 8, 8), maps(2)), "288 numbers in a sample; got 192"),
        (lambda f: f(torch.randn(2, 3, 8, 8)), "288 numbers in a sample; got 192"),
        (lambda f: f.inverse(torch.randn(2, 287), maps(2)), "288 numbers in a sample; got 287"),
        (lambda f: f.inverse(torch.randn(2, *SIZE), maps(2)), "flatten them"),
        (lambda f: f(torch.randn(2, *SIZE), torch.randn(2, 7, 4, 6)), "13 channels.*got 7"),
        (lambda f: f(torch.randn(2, *SIZE), torch.randn(2, 13, 3, 5)), "must fit the levels"),
        (lambda f: Multiscale(2, context_channels=(1,)), "each of the 2 levels"),
        (lambda f: Multiscale(2, context_size=(1,)), "height and width"),
        (lambda f: Multiscale(2, context_size=(1, 1), context_channels=(1, 1)), "give one"),
        (lambda f: Multiscale(2).add_transform(T.IdentityTransform(), (1, 4, 4)), "at least 2"),
        (lambda f: Multiscale("2"), "num_transforms must be a positive integer; got '2'"),
        (lambda f: Multiscale(0), "num_transforms must be a positive integer; got 0"),
        (lambda f: ours.RobustFlowStep(1), "at least 2 channels"),
        (lambda f: ours.RobustFlowStep(4.0), "channels must be a positive integer; got 4.0"),
        (lambda f: ours.RobustFlowStep(4, 0), "context_channels must be a positive integer"),
        (lambda f: ours.RobustFlowStep(4, 2, 0), "hidden_channels must be a positive integer"),
        (lambda f: ours.RobustFlowStep(4, mix="fere"), "mix must be one of"),
        (lambda f: ours.pack_maps([torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 3, 4)]), "multiple"),
        (lambda f: ours.pack_maps([torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4)]), "rows"),
        (lambda f: ours.pack_maps([torch.zeros(2, 1)]), "for each level"),
        (lambda f: ours.pack_maps([]), "for each level"),
    ],
)
def test_mistakes(call, match):
    with pytest.raises(ValueError, match=match):
        call(multiscale(context_channels=(8, 5)))


def test_mistakes_of_type_and_order():
    with pytest.raises(RuntimeError, match="2 transforms must be added; got 0"):
        Multiscale(2)(torch.randn(2, *SIZE))
    with pytest.raises(TypeError, match="a list of tensors"):
        ours.pack_maps(torch.zeros(2, 1, 4, 4))
    with pytest.raises(TypeError, match="context_channels must be a sequence of integers; got 8"):
        Multiscale(2, context_channels=8)
    with pytest.raises(TypeError, match="context_size must be a sequence of integers"):
        Multiscale(2, context_size=("8", "8"))


# -- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("context", [None, 5])
def test_step(mix, context):
    step = ours.RobustFlowStep(7, context, 16, mix=mix)
    x = 3 + 5 * torch.randn(N, 7, 4, 6)
    c = None if context is None else torch.randn(N, context, 4, 6)
    z, ladj = step.train()(x, c)
    assert_close(z.mean(), torch.zeros(()), atol=1e-3, rtol=0)  # as the normalisation starts
    stir(step)
    z, ladj = step(x, c)
    y, back = step.inverse(z, c)
    assert_close(y, x, atol=1e-4, rtol=1e-4)
    assert_close(ladj, -back, atol=1e-3, rtol=1e-4)


def test_step_with_a_network_of_a_users_own():
    def net(i, o):
        return ContextFree(nn.Conv2d(i, o, 3, padding=1))

    step = ours.RobustFlowStep(6, transform_net_create_fn=net)
    x = torch.randn(N, 6, 4, 4)
    assert_close(step.inverse(step(x)[0])[0], x, atol=1e-5, rtol=1e-4)


class ContextFree(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, context=None):
        return self.net(x)


# -- within the host's flow ----------------------------------------------------------------------


class Pyramid(nn.Module):
    r"""An encoder with a map for each level."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 2, 2)
        self.coarse = nn.Conv2d(8, 5, 2, 2)

    def forward(self, y):
        fine = self.fine(y)
        return [fine, self.coarse(fine.relu())]


def guarded_flow(policy="report"):
    conditioner = flowguard.OODConditioner(Pyramid(), policy=policy, alpha=0.05)
    flow = Flow(
        multiscale(context_channels=(8, 5)),
        StandardNormal([prod(SIZE)]),
        embedding_net=ours.PackMaps(conditioner),
    )
    return flow, conditioner


def calibrated_flow(policy="report"):
    flow, conditioner = guarded_flow(policy)
    conditioner.fit(torch.randn(64, *SIZE), progress=False)
    conditioner.calibrate(torch.randn(64, *SIZE), progress=False)
    return flow.eval(), conditioner


def test_flow_trains():
    flow, conditioner = guarded_flow()
    flow.train()
    y = torch.randn(16, *SIZE)
    x = y + 0.1 * torch.randn(16, *SIZE)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = -flow.log_prob(x, y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[1:6]) - 5 * 20
    assert all(p.grad is not None for p in conditioner.parameters())


def test_flow_samples_and_tells_the_density_of_its_samples():
    flow, _ = calibrated_flow()
    y = torch.randn(3, *SIZE)
    with torch.no_grad():
        assert flow.sample(5, y).shape == (3, 5, *SIZE)
        x, density = flow.sample_and_log_prob(5, y)
        again = flow.log_prob(x.flatten(0, 1), y.repeat_interleave(5, 0)).reshape(3, 5)
    assert_close(again, density, atol=1e-3, rtol=1e-4)


def test_samples_belong_to_their_own_contexts():
    flow, _ = calibrated_flow()
    y = torch.randn(2, *SIZE)
    with torch.no_grad():
        torch.manual_seed(1)
        samples = flow.sample(3, y)
        torch.manual_seed(1)
        noise = torch.randn(6, prod(SIZE))
        for row in (0, 1):
            context = [
                m.repeat_interleave(3, 0) for m in flow._embedding_net.net(y[row : row + 1])
            ]
            alone, _ = flow._transform.inverse(noise[3 * row : 3 * row + 3], context)
            assert_close(samples[row], alone, atol=1e-5, rtol=1e-4)


def test_flow_with_one_map_of_a_conditioner():
    encoder = nn.Conv2d(3, 8, 3, padding=1)
    flow = Flow(
        multiscale((8, 8)),
        StandardNormal([prod(SIZE)]),
        embedding_net=flowguard.OODConditioner(encoder, policy="report"),
    ).eval()
    y = torch.randn(3, *SIZE)
    with torch.no_grad():
        x, density = flow.sample_and_log_prob(2, y)
        again = flow.log_prob(x.flatten(0, 1), y.repeat_interleave(2, 0)).reshape(3, 2)
    assert_close(again, density, atol=1e-3, rtol=1e-4)


def test_report_and_monitor_see_each_level():
    flow, conditioner = calibrated_flow()
    y = torch.randn(3, *SIZE)
    y[1] *= 1000
    with torch.no_grad(), flowguard.monitor(flow) as monitor:
        x = flow.sample(2, y)
    assert bool(x.isfinite().all())
    assert conditioner.report.flagged.tolist() == [False, True, False]
    assert list(conditioner.report.levels) == ["level1", "level2"]
    assert monitor.reports


def test_policies():
    y = 1000 * torch.randn(2, *SIZE)
    flow, _ = calibrated_flow("raise")
    with pytest.raises(flowguard.ood.OODContextError, match="2 of 2 contexts"):
        flow.sample(1, y)
    flow, _ = calibrated_flow("warn")
    with pytest.warns(flowguard.ood.OODContextWarning, match="2 of 2 contexts"):
        flow.sample(1, y)
    flow, conditioner = calibrated_flow("shrink")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = flow._embedding_net(y)
    raw = ours.pack_maps(conditioner.encoder(y))
    assert packed.abs().max() < raw.abs().max() / 10


@pytest.mark.parametrize("size", [(8, 12), (4, 4), (12, 20)])
def test_one_flow_for_images_of_any_size(size):
    transform = multiscale(context_channels=(8, 5))
    flow = Flow(
        transform, ours.MultiscaleNormal(transform), embedding_net=ours.PackMaps(Pyramid())
    )
    for model in (flow, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        y = torch.randn(2, 3, *size)
        with torch.no_grad():
            x, density = model.sample_and_log_prob(3, y)
            again = model.log_prob(x.flatten(0, 1), y.repeat_interleave(3, 0)).reshape(2, 3)
        assert x.shape == (2, 3, 3, *size)
        assert_close(again, density, atol=1e-3, rtol=1e-4)
    theirs = Flow(transform, StandardNormal([288]), embedding_net=flow._embedding_net)
    assert_close(
        flow.log_prob(*2 * [torch.ones(2, *SIZE)]), theirs.log_prob(*2 * [torch.ones(2, *SIZE)])
    )
    assert flow.state_dict().keys() == theirs.state_dict().keys()
    assert flowguard.certify(flow).bound(3.0) == flowguard.certify(theirs).bound(3.0)
    result = flowguard.attack(flow, torch.randn(1, 3, *size), steps=2, restarts=1)
    assert result.sample.shape == (1, 3, *size)
    assert result.value <= flowguard.certify(flow).bound(4.0)


def test_base_of_any_size_without_context():
    flow = Multiscale(2)
    shape = flow.add_transform(T.PointwiseAffineTransform(scale=2.0), (4,))
    flow.add_transform(T.PointwiseAffineTransform(scale=2.0), shape)
    assert Flow(flow, ours.MultiscaleNormal(flow)).sample(5).shape == (5, 4)
    with pytest.raises(TypeError, match="must be the ConditionalMultiscaleTransform"):
        ours.MultiscaleNormal(4)
    with pytest.raises(ValueError, match=r"shape \(N, 4\); got \(2, 3\)"):
        ours.MultiscaleNormal(flow).log_prob(torch.randn(2, 3))


def test_without_context():
    flow = Multiscale(2)
    shape = SIZE
    for _ in range(2):
        squeeze = T.SqueezeTransform()
        shape = squeeze.get_output_shape(*shape)
        step = ours.RobustFlowStep(shape[0], None, 16)
        shape = flow.add_transform(T.CompositeTransform([squeeze, step]), shape)
    model = Flow(stir(flow).eval(), StandardNormal([prod(SIZE)]))
    assert model.sample(3).shape == (3, *SIZE)
    assert model.log_prob(torch.randn(3, *SIZE)).shape == (3,)
