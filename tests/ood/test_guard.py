"""The guard at work: an affine flow that explodes without it, and what it costs."""

import subprocess
import sys

import pytest
import torch
import zuko

from flowguard.ood import OODConditioner

AFFINE_COUPLING = getattr(zuko.flows, "RealNVP", zuko.flows.NICE)  # as it is called from 1.5 on


def draw(n, generator):
    y = torch.randn(n, 2, generator=generator)
    angle = torch.pi * torch.rand(n, generator=generator)
    side = (torch.rand(n, generator=generator) < 0.5).float() * 2 - 1
    moon = torch.stack([side * (angle.cos() - 0.5), side * (angle.sin() - 0.25)], dim=1)
    return moon + 0.5 * y + 0.05 * torch.randn(n, 2, generator=generator), y


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    flow = AFFINE_COUPLING(2, 2, transforms=8, hidden_features=(64, 64))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    for _ in range(800):
        x, y = draw(256, generator)
        optimizer.zero_grad()
        (-flow(y).log_prob(x).mean()).backward()
        optimizer.step()
    return flow


@pytest.fixture(scope="module")
def conditioner():
    generator = torch.Generator().manual_seed(1)
    conditioner = OODConditioner(policy="shrink")
    conditioner.fit(draw(20_000, generator)[1], progress=False)
    return conditioner.calibrate(draw(4_000, generator)[1], progress=False)


def exploded(flow, y):
    with torch.no_grad():
        x = flow(y).sample((8,))
    return float((~(x.abs() <= 30).all(dim=-1)).double().mean())


@pytest.mark.filterwarnings("ignore::flowguard.ood.OODContextWarning")
@pytest.mark.parametrize("distance", [10, 100, 1e4, 1e30])
def test_shrink_keeps_an_affine_flow_from_exploding(flow, conditioner, distance):
    generator = torch.Generator().manual_seed(2)
    direction = torch.nn.functional.normalize(torch.randn(2000, 2, generator=generator))
    assert exploded(flow, conditioner(direction * distance)) == 0
    if distance >= 100:
        assert exploded(flow, direction * distance) > 0.5


@pytest.mark.filterwarnings("ignore::flowguard.ood.OODContextWarning")
def test_shrink_keeps_the_flow_finite_for_contexts_that_are_not(flow, conditioner):
    y = torch.tensor([[torch.nan, 0.0], [torch.inf, -torch.inf], [3e38, -3e38]])
    assert exploded(flow, conditioner(y)) == 0
    assert conditioner.report.non_finite.tolist() == [True, True, False]


@pytest.mark.filterwarnings("ignore::flowguard.ood.OODContextWarning")
def test_shrink_leaves_the_likelihood_in_distribution(flow, conditioner):
    x, y = draw(4000, torch.Generator().manual_seed(3))
    with torch.no_grad():
        moved = conditioner(y)
        guarded, plain = flow(moved).log_prob(x).mean(), flow(y).log_prob(x).mean()
    assert (moved == y).all(dim=1).double().mean() > 0.997
    assert float(guarded) == pytest.approx(float(plain), abs=2e-3)


MEMORY = r"""
import re, torch
from flowguard.ood import OODConditioner

torch.set_num_threads(1)
conditioner = OODConditioner(policy="shrink", alpha=0.05)
conditioner.fit(torch.randn(16, {channels}, 64, 64), progress=False)
conditioner.calibrate(torch.randn(64, {channels}, 64, 64), progress=False)
image = torch.randn(1, {channels}, 1356, 2040)
report = conditioner.score(image)
assert report.levels["level1"].map.shape == (1, 1356, 2040)
# The resource module would count what the process that started this one has.
status = open("/proc/self/status").read()
print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("channels", [3, 64])
def test_a_2040_by_1356_image_is_scored_in_little_memory(channels):
    """The 64 channels alone are 0.66 GB."""
    code = MEMORY.format(channels=channels)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5
