r"""Tests for the conditional multiscale flow of the normflows adapter."""

import copy
import pickle

import pytest
import torch

import flowguard

nf = pytest.importorskip("normflows")

from flowguard.integrations.normflows import (  # noqa: E402
    ConditionalMultiscaleFlow,
    GaussianPrior,
    RobustGlowBlock,
)

CONTEXT = 2
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


def make(context=CONTEXT, dtype=torch.float32, merge="channel", transform=None, p=None):
    r"""Two levels with priors that look at everything, layers of normflows in between."""
    bases = [GaussianPrior(24, context), GaussianPrior(6, context, given_channels=6)]
    levels = [
        [
            RobustGlowBlock(24, 8, context),
            nf.flows.Reverse(RobustGlowBlock(24, 8, context)),
            nf.flows.Invertible1x1Conv(24, use_lu=True),
            nf.flows.Squeeze(),
        ],
        [
            RobustGlowBlock(12, 8, context),
            nf.flows.AffineCouplingBlock(nf.nets.ConvNet2d((6, 8, 12), (3, 3))),
            nf.flows.Squeeze(),
        ],
    ]
    flow = ConditionalMultiscaleFlow(bases, levels, [nf.flows.Merge(merge)], transform, p).to(
        dtype
    )
    with torch.no_grad():
        for q in flow.parameters():
            q.add_(0.05 * torch.randn_like(q))
    return flow.eval()


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def contexts(size, dtype=torch.float32, rows=4):
    h, w = size
    return {
        "map": torch.randn(rows, CONTEXT, h, w, dtype=dtype),
        "small map": torch.randn(rows, CONTEXT, h // 2, w // 2, dtype=dtype),
        "list": [torch.randn(rows, CONTEXT, h // s, w // s, dtype=dtype) for s in (4, 2)],
        "vector": torch.randn(rows, CONTEXT, dtype=dtype),
    }


@pytest.mark.parametrize("kind", ["map", "small map", "list", "vector"])
@pytest.mark.parametrize("size", [(8, 8), (16, 4), (12, 20)])
@pytest.mark.parametrize("merge", ["channel", "channel_inv"])
def test_round_trip_and_density(kind, size, merge, dtype):
    flow, y = make(dtype=dtype, merge=merge), contexts(size, dtype)[kind]
    tolerance = TOLERANCE[dtype]
    x = torch.randn(4, 3, *size, dtype=dtype)
    z, log_det = flow.inverse_and_log_det(x, y)
    assert [t.shape[1] for t in z] == [24, 6]
    out, back = flow.forward_and_log_det(z, y)
    torch.testing.assert_close(out, x, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(back, -log_det, atol=tolerance, rtol=tolerance)
    x, log_q = flow.sample(8, y, size=size)
    assert x.shape == (8, 3, *size)
    assert x.dtype == log_q.dtype == dtype
    torch.testing.assert_close(flow.log_prob(x, y), log_q, atol=10 * tolerance, rtol=tolerance)


def test_log_det_is_that_of_the_jacobian():
    flow, y = make(dtype=torch.float64), torch.randn(1, CONTEXT, 4, 4, dtype=torch.float64)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)

    def latents(x):
        return torch.cat([z.flatten() for z in flow.inverse_and_log_det(x, y)[0]])

    jacobian = torch.autograd.functional.jacobian(latents, x).reshape(48, 48)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow.inverse_and_log_det(x, y)[1][0], expected)


def test_every_level_sees_its_map():
    flow, maps = make(), contexts((8, 8))["list"]
    x = torch.randn(4, 3, 8, 8)
    z, _ = flow.inverse_and_log_det(x, maps)
    for level in range(2):
        other = list(maps)
        other[level] = maps[level] + 1
        assert not torch.allclose(flow.log_prob(x, other), flow.log_prob(x, maps))
        moved, _ = flow.inverse_and_log_det(x, other)
        # On the way to the noise, the block of the fine level changes the half that leaves there.
        assert torch.allclose(moved[1], z[1]) == (level == 0)
        assert torch.allclose(moved[0], z[0]) == (level == 1)


def test_maps_may_come_finest_first():
    flow, maps = make(), contexts((8, 8))["list"]
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(flow.log_prob(x, maps[::-1]), flow.log_prob(x, maps))
    named = {"coarse": maps[0], "fine": maps[1]}
    torch.testing.assert_close(flow.log_prob(x, named), flow.log_prob(x, maps))


def test_the_prior_of_a_split_looks_at_what_remains():
    flow, y = make(), torch.randn(4, CONTEXT, 8, 8)
    x = torch.randn(4, 3, 8, 8)
    z, log_det = flow.inverse_and_log_det(x, y)
    half, quarter = (
        torch.nn.functional.interpolate(y, s, mode="bilinear", antialias=True) for s in (4, 2)
    )
    given = z[0]
    for layer in flow.flows[0]:  # what the coarse level makes of its latent
        takes = isinstance(layer, RobustGlowBlock)
        if isinstance(layer, nf.flows.Reverse):
            given = layer.flow.inverse(given, quarter)[0]
        else:
            given = layer(given, quarter)[0] if takes else layer(given)[0]
    expected = (
        log_det
        + flow.q0[0].log_prob(z[0], context=quarter)
        + flow.q0[1].log_prob(z[1], context=half, given=given)
    )
    torch.testing.assert_close(flow.log_prob(x, y), expected)
    wrong = flow.q0[1].log_prob(z[1], context=half, given=given + 1)
    assert not torch.allclose(wrong, flow.q0[1].log_prob(z[1], context=half, given=given))


def test_density_integrates_the_prior():
    prior = GaussianPrior(2, CONTEXT, given_channels=3).double()
    torch.nn.init.normal_(prior.net.weight)
    z = torch.randn(5, 2, 3, 3, dtype=torch.double)
    y, given = torch.randn(5, CONTEXT, 3, 3).double(), torch.randn(5, 3, 3, 3).double()
    mean, logs = prior.moments(z, y, given)
    expected = torch.distributions.Normal(mean, logs.exp()).log_prob(z).sum((1, 2, 3))
    torch.testing.assert_close(prior.log_prob(z, y, given), expected)
    assert mean.abs().max() <= 3
    assert logs.abs().max() <= 2


@pytest.mark.parametrize(("samples", "rows"), [(None, 1), (None, 3), (6, 1), (6, 3), (0, 3)])
def test_number_of_samples(samples, rows):
    flow, y = make(), torch.randn(rows, CONTEXT, 8, 8)
    x, log_q = flow.sample(samples, y)
    n = rows if samples is None else samples
    assert x.shape == (n, 3, 8, 8)
    torch.testing.assert_close(
        flow.log_prob(x, y.repeat(n // rows, 1, 1, 1)), log_q, atol=1e-2, rtol=1e-4
    )


def test_temperature():
    flow, y = make(), torch.randn(1, CONTEXT, 8, 8)
    cold, _ = flow.sample(5, y, 0.0)
    torch.testing.assert_close(cold, cold[:1].expand(5, -1, -1, -1))
    zeros = [torch.zeros(1, *shape) for shape in flow.noise_shapes(y)]
    torch.testing.assert_close(flow.decode(zeros, y), cold[:1])
    torch.manual_seed(1)
    warm, log_q = flow.sample(5, y, 0.5)
    assert all(base.temperature is None for base in flow.q0)
    torch.manual_seed(1)
    noise = [0.5 * torch.randn(5, *shape) for shape in flow.noise_shapes(y)]
    torch.testing.assert_close(flow.decode(noise, y), warm, atol=1e-4, rtol=1e-4)
    flow.set_temperature(0.5)
    torch.testing.assert_close(flow.log_prob(warm, y), log_q, atol=1e-2, rtol=1e-4)


def test_a_failed_sample_leaves_no_temperature():
    flow = make()
    with pytest.raises(ValueError, match="context of 2 channels"):
        flow.sample(1, None, 0.5, size=(8, 8))
    assert all(base.temperature is None for base in flow.q0)


def test_forward_and_losses():
    flow, y = make(), torch.randn(4, CONTEXT, 8, 8)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(flow(x, y), -flow.log_prob(x, y))
    torch.testing.assert_close(flow.forward_kld(x, y), -flow.log_prob(x, y).mean())


class Target(torch.nn.Module):
    def log_prob(self, x, context):
        assert context.shape[0] == x.shape[0]
        return -0.5 * (x - context.mean((1, 2, 3), keepdim=True)).square().sum((1, 2, 3))


@pytest.mark.parametrize("score_fn", [True, False])
def test_reverse_kld(score_fn):
    flow, y = make(p=Target()), torch.randn(2, CONTEXT, 8, 8)
    frozen = flow.flows[0][0].mix.logs.requires_grad_(False)
    torch.manual_seed(1)
    loss = flow.reverse_kld(4, y, score_fn=score_fn)
    torch.manual_seed(1)
    x, log_q = flow.sample(4, y)
    expected = log_q.mean() - Target().log_prob(x, y.repeat(2, 1, 1, 1)).mean()
    torch.testing.assert_close(loss, expected, atol=1e-2, rtol=1e-4)
    loss.backward()
    assert flow.flows[1][0].coupling.param_map[0].weight.grad.abs().sum() > 0
    assert not frozen.requires_grad
    with pytest.raises(ValueError, match="construct the flow with p"):
        make().reverse_kld(4, y)


def test_trains_with_a_normalized_start():
    flow = make().train()
    x, y = torch.randn(64, 3, 8, 8) * 3 + 1, torch.randn(64, CONTEXT, 8, 8)
    x = x + 2 * y[:, :1]
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = flow.forward_kld(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_save_and_load(tmp_path, suffix):
    flow, x, y = make(), torch.randn(2, 3, 8, 8), torch.randn(2, CONTEXT, 8, 8)
    path = tmp_path / f"flow{suffix}"
    flow.save(path)
    other = make()
    other.load(path)
    torch.testing.assert_close(other.log_prob(x, y), flow.log_prob(x, y), rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


class Malice:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_load_runs_no_code(tmp_path, capsys):
    torch.save({"q0.0.constant": Malice()}, tmp_path / "flow.pt")
    with pytest.raises(ValueError, match="must hold weights alone"):
        make().load(tmp_path / "flow.pt")
    assert "must not run" not in capsys.readouterr().out


def test_copies():
    flow, x, y = make(), torch.randn(2, 3, 8, 8), torch.randn(2, CONTEXT, 8, 8)
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(other.log_prob(x, y), flow.log_prob(x, y), rtol=0, atol=0)


def test_without_context_it_is_the_flow_of_normflows():
    shapes = [(24, 2, 2), (6, 4, 4)]
    bases = [nf.distributions.DiagGaussian(shape) for shape in shapes]
    levels = [[nf.flows.GlowBlock(c, 8), nf.flows.Squeeze()] for c in (24, 12)]
    theirs = nf.MultiscaleFlow(bases, levels, [nf.flows.Merge()], class_cond=False)
    ours = ConditionalMultiscaleFlow(bases, levels, [nf.flows.Merge()])
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x, None))
    torch.manual_seed(1)
    sample = ours.sample(3, temperature=0.7)
    torch.manual_seed(1)
    torch.testing.assert_close(sample, theirs.sample(3, temperature=0.7))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_classes_reach_the_bases_that_take_them():
    base = nf.distributions.ClassCondDiagGaussian((12, 4, 4), 3)
    torch.nn.init.normal_(base.loc)
    flow = ConditionalMultiscaleFlow([base], [[RobustGlowBlock(12, 8), nf.flows.Squeeze()]], [])
    y = torch.tensor([0, 2, 1])
    x, log_q = flow.sample(3, y)
    torch.testing.assert_close(flow.log_prob(x, y), log_q)
    onehot = torch.nn.functional.one_hot(y, 3).float()
    torch.testing.assert_close(flow.log_prob(x, onehot), log_q)
    torch.testing.assert_close(flow.log_prob(x, onehot.long()), log_q)
    assert flow.sample(2)[0].shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="needs classes"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match="takes classes"):
        flow.log_prob(x, torch.randn(3, 3, 8, 8))


def test_transform_comes_last_and_inputs_stay_as_they_are():
    flow, y = make(transform=nf.transforms.Shift(0.5)), torch.randn(2, CONTEXT, 8, 8)
    x = torch.rand(2, 3, 8, 8)
    kept = x.clone()
    flow.log_prob(x, y)
    assert torch.equal(x, kept)  # normflows' shift writes into its input
    flow.transform = None
    plain = flow.log_prob(x + 0.5, y)
    flow.transform = nf.transforms.Shift(0.5)
    torch.testing.assert_close(flow.log_prob(x, y), plain)


@pytest.mark.parametrize("scale", [1e3, 1e10, torch.inf])
def test_no_context_explodes(scale):
    levels = [[RobustGlowBlock(12, 8, CONTEXT, init_zeros=False), nf.flows.Squeeze()]]
    flow = ConditionalMultiscaleFlow([GaussianPrior(12, CONTEXT)], levels, []).eval()
    y = scale * torch.randn(16, CONTEXT, 8, 8)
    x, log_q = flow.sample(16, y, 1.5)
    assert x.isfinite().all()
    assert log_q.isfinite().all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda f, y: f.sample(3, y), "multiple of the number of contexts, 2"),
        (lambda f, y: f.sample(-2, y), "multiple of the number of contexts"),
        (lambda f, y: f.sample(2, y, -1.0), "temperature must not be negative"),
        (lambda f, y: f.sample(2, y[..., :6]), "multiples of 4"),
        (lambda f, y: f.sample(2, y[..., 0, 0]), "give size"),
        (lambda f, y: f.sample(2, [y]), "one map for each of the 2 levels"),
        (lambda f, y: f.sample(2, [y, y]), r"sizes \[\(8, 8\), \(16, 16\)\]"),
        (lambda f, y: f.log_prob(torch.randn(3, 3, 8, 8), y), "multiple of the contexts' number"),
        (lambda f, y: f.log_prob(torch.randn(2, 3, 8, 8)), "made for a context of 2 channels"),
        (lambda f, y: f.log_prob(torch.randn(2, 3, 8, 8), y[:, :1]), "shape"),
        (lambda f, y: f.forward_and_log_det([torch.randn(2, 24, 2, 2)], y), "2 latents; got 1"),
        (lambda f, y: ConditionalMultiscaleFlow(f.q0, f.flows, []), "one merge fewer"),
        (lambda f, y: f.log_prob(torch.randn(2, 3, 8, 6), y), "multiples of 4"),
        (lambda f, y: GaussianPrior(2)(3), "give size"),
        (lambda f, y: GaussianPrior(2, 0), "context_channels must be a positive number"),
        (lambda f, y: GaussianPrior(2, mean_bound=0.0), "mean_bound must be positive"),
        (lambda f, y: f.q0[1].log_prob(torch.randn(2, 6, 4, 4), y), "size|known already"),
    ],
)
def test_mistakes_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(make(), torch.randn(2, CONTEXT, 8, 8))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda f, y: f.sample("2", y), "num_samples must be an integer, or None; got '2'"),
        (lambda f, y: f.sample(2.0, y), "num_samples must be an integer, or None; got 2.0"),
        (lambda f, y: f.sample(2, "y"), "the context must be a tensor, a list or dictionary"),
        (lambda f, y: f.log_prob(torch.randn(2, 3, 8, 8), 3), "context must be a tensor.*got 3"),
        (lambda f, y: f.log_prob(torch.randn(2, 3, 8, 8), [1, 2]), "context must be a tensor"),
    ],
)
def test_mistaken_types_are_named(call, match):
    with pytest.raises(TypeError, match=match):
        call(make(), torch.randn(2, CONTEXT, 8, 8))


def test_levels_are_lists():
    with pytest.raises(TypeError, match="one list of layers for each level"):
        ConditionalMultiscaleFlow([GaussianPrior(4)], [RobustGlowBlock(4, 8)], [])


def test_all_tensors_are_where_the_input_is():
    flow = make().to("meta")
    for y in contexts((8, 8)).values():
        on_meta = [t.to("meta") for t in y] if isinstance(y, list) else y.to("meta")
        x, log_q = flow.sample(4, on_meta, 0.7, size=(8, 8))
        assert x.is_meta
        assert log_q.is_meta
        assert flow.log_prob(x, on_meta).is_meta


def test_bases_of_a_fixed_shape_take_no_size():
    base = nf.distributions.DiagGaussian((12, 4, 4))
    flow = ConditionalMultiscaleFlow([base], [[RobustGlowBlock(12, 8), nf.flows.Squeeze()]], [])
    with pytest.raises(ValueError, match="fixed shape"):
        flow.sample(2, size=(8, 8))


@pytest.mark.parametrize("density", ["log_prob", "inverse_and_log_det", "forward_kld", "forward"])
def test_samples_have_the_size_of_the_images_that_came_with_such_maps(density):
    flow = make()
    small = torch.randn(4, CONTEXT, 4, 6)
    getattr(flow, density)(torch.randn(4, 3, 16, 24), small)
    for one in (flow, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert one.sample(4, small)[0].shape == (4, 3, 16, 24)
        assert one.sample(2, small[:2, :, :2, :2])[0].shape == (2, 3, 8, 8)
        assert one.sample(4, small, size=(8, 8))[0].shape == (4, 3, 8, 8)
        assert [s[1:] for s in one.noise_shapes(small)] == [(4, 6), (8, 12)]
    lists = contexts((8, 8))["list"]  # whose sizes tell all
    assert flow.sample(4, lists)[0].shape == (4, 3, 8, 8)


def test_maps_that_came_with_images_of_several_sizes_do_not_tell_that_of_samples():
    flow, y = make(), torch.randn(4, CONTEXT, 8, 8)
    flow.log_prob(torch.randn(4, 3, 16, 16), y)
    flow.log_prob(torch.randn(4, 3, 8, 8), y)
    with pytest.raises(ValueError, match=r"1 × 1 and 2 × 2 times as large.*give size="):
        flow.sample(4, y)
    assert flow.sample(4, y, size=(8, 8))[0].shape == (4, 3, 8, 8)


def test_a_size_that_does_not_fit_is_told_with_the_map_that_it_comes_from():
    flow, y = make(), torch.randn(4, CONTEXT, 5, 5)
    flow.log_prob(torch.randn(4, 3, 16, 16), y)
    assert flow.sample(4, y)[0].shape == (4, 3, 16, 16)
    with pytest.raises(ValueError, match=r"multiples of 4; got .*give size="):
        flow.sample(4, y[..., :3, :3])


def test_compiles():
    flow, x, y = make(), torch.randn(2, 3, 8, 8), torch.randn(2, CONTEXT, 8, 8)
    compiled = torch.compile(flow, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), flow(x, y), atol=1e-4, rtol=1e-4)


def test_attack_stays_below_the_certificate():
    levels = [
        [RobustGlowBlock(c, 8, CONTEXT, init_zeros=False), nf.flows.Squeeze()] for c in (24, 12)
    ]
    bases = [GaussianPrior(24), GaussianPrior(6, CONTEXT, given_channels=6)]
    flow = ConditionalMultiscaleFlow(bases, levels, [nf.flows.Merge()])
    flow.inverse_and_log_det(torch.randn(8, 3, 8, 8), torch.randn(8, CONTEXT, 8, 8))
    certificate = flowguard.certify(flow)
    assert certificate.certified
    for y in contexts((8, 8), rows=2).values():
        if isinstance(y, torch.Tensor) and y.dim() == 2:
            continue  # does not tell the size
        result = flowguard.attack(flow, y, steps=10, restarts=1)
        assert 4.0 < result.value <= certificate.bound(4.0)
