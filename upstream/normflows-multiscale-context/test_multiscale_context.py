import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

nf = pytest.importorskip("normflows")


class Net(nn.Module):
    r"""A convolution of what stays and of the maps of the level."""

    def __init__(self, inputs, context, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs + context, outputs, 3, padding=1)

    def forward(self, z, context=None):
        return self.conv(torch.cat((z, context), 1))


class Prior(nf.distributions.BaseDistribution):
    r"""A Gaussian around a convolution of what is kept."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, num_samples=1, context=None):
        normal = torch.distributions.Normal(self.conv(context), 1.0)
        z = normal.rsample()
        return z, normal.log_prob(z).flatten(1).sum(1)

    def log_prob(self, z, context=None):
        return torch.distributions.Normal(self.conv(context), 1.0).log_prob(z).flatten(1).sum(1)


def parts(priors=None):
    torch.manual_seed(0)
    layers = [
        [nf.flows.AffineCouplingBlock(Net(c // 2, 3, c)), nf.flows.Permute(c), nf.flows.Squeeze()]
        for c in (8, 4)
    ]
    q0 = [
        nf.distributions.DiagGaussian((8, 2, 2)),
        priors or nf.distributions.DiagGaussian((2, 4, 4)),
    ]
    return q0, layers, [nf.flows.Merge()]


X = (5, 1, 8, 8)
MAPS = [(5, 3, 2, 2), (5, 3, 4, 4)]  # coarsest first, of the levels' sizes before they unsqueeze


@pytest.mark.wound("normflows", "1.7.3", raises=pytest.RaisesExc(TypeError, match="context"))
def test_each_level_has_a_context_of_its_own(change):
    flow = nf.MultiscaleFlow(*parts(), class_cond=False)
    x, context = torch.randn(X), [torch.randn(m) for m in MAPS]
    before = flow.log_prob(x, context=context)
    for i in range(2):
        other = [c + (j == i) for j, c in enumerate(context)]
        assert not torch.equal(flow.log_prob(x, context=other), before)
    torch.testing.assert_close(flow.forward_kld(x, context=context), -before.mean())
    samples, log_q = flow.sample(5, context=context)
    torch.testing.assert_close(flow.log_prob(samples, context=context), log_q)


@pytest.mark.wound("normflows", "1.7.3", raises=pytest.RaisesExc(TypeError, match="context"))
def test_latents_go_there_and_back(change):
    flow = nf.MultiscaleFlow(*parts(), class_cond=False)
    x, context = torch.randn(X), [torch.randn(m) for m in MAPS]
    z, log_det = flow.inverse_and_log_det(x, context=context)
    back, log_back = flow.forward_and_log_det(z, context=context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_back, -log_det)


@pytest.mark.wound(
    "normflows", "1.7.3", raises=pytest.RaisesExc(TypeError, match="condition_priors")
)
def test_a_prior_may_depend_on_what_is_kept(change):
    q0, layers, merges = parts(Prior(2))
    for level in layers:
        del level[0]  # no condition but that
    flow = nf.MultiscaleFlow(q0, layers, merges, class_cond=False, condition_priors=True)
    samples, log_q = flow.sample(5)
    torch.testing.assert_close(flow.log_prob(samples), log_q)
    flow.log_prob(samples.detach()).sum().backward()
    assert q0[1].conv.weight.grad.abs().max() > 0


@pytest.mark.wound("normflows", "1.7.3", raises=TypeError)
def test_a_wrong_number_of_contexts_is_refused(change):
    flow = nf.MultiscaleFlow(*parts(), class_cond=False)
    with pytest.raises(ValueError, match="each of the 2 levels; got 3"):
        flow.log_prob(torch.randn(X), context=[torch.randn(MAPS[0])] * 3)


@pytest.mark.parametrize("class_cond", [False, True])
def test_without_a_context_nothing_changes(class_cond, fix):
    torch.manual_seed(0)
    classes = 3 if class_cond else None
    q0 = [nf.distributions.GlowBase(s, classes) for s in ((8, 2, 2), (2, 4, 4))]
    layers = [[nf.flows.GlowBlock(c, 8), nf.flows.Squeeze()] for c in (8, 4)]
    flow = nf.MultiscaleFlow(q0, layers, [nf.flows.Merge()], class_cond=class_cond)
    y = torch.tensor([0, 1, 2, 1, 0]) if class_cond else None
    x = torch.randn(X)
    flow.log_prob(x, y)  # initialises

    def run():
        torch.manual_seed(1)
        return *flow.sample(5, y, temperature=0.7), flow.log_prob(x, y), flow.forward_kld(x, y)

    before = run()
    with fix.applied():
        after = run()
    torch.testing.assert_close(after, before)


def test_an_error_within_sample_leaves_the_temperature_as_it_was(fix):
    class Broken(nf.flows.Flow):
        def forward(self, z):
            raise RuntimeError("broken")

    q0 = nf.distributions.GlowBase((2, 2, 2))
    flow = nf.MultiscaleFlow([q0], [[Broken()]], [], class_cond=False)
    with fix.applied(), pytest.raises(RuntimeError, match="broken"):
        flow.sample(2, temperature=0.5)
    assert q0.temperature is None


def test_a_copy_without_the_layers_says_what_is_missing(fix, tmp_path):
    copied = tmp_path / "normflows-multiscale-context" / "fix.py"
    copied.parent.mkdir()
    copied.write_bytes(Path(fix.__file__).read_bytes())
    spec = importlib.util.spec_from_file_location("fix_copied", copied)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(FileNotFoundError, match="copy both folders"), module.applied():
        pass
