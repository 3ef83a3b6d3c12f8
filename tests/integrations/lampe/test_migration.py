r"""Tests for the flow in lampe's estimators."""

import pickle

import pytest
import torch

pytest.importorskip("lampe")

import zuko
from lampe.inference import NPE

import flowguard
from flowguard.integrations.zuko import GuardedFlow
from flowguard.ood import OODConditioner


def pairs(n=400):
    theta = 2 * torch.rand(n, 2) - 1
    return theta, torch.cat((theta, theta[:, :1]), 1) + 0.1 * torch.randn(n, 3)


@pytest.mark.parametrize("build", [zuko.flows.MAF, zuko.flows.NICE, zuko.flows.NSF])
def test_it_keeps_its_likelihood_and_is_certified(build):
    old, (theta, x) = NPE(2, 3, build=build, transforms=2, hidden_features=[16]), pairs()
    with torch.no_grad():
        for p in old.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert not flowguard.certify(old).certified
    robust, report = flowguard.migrate(old, theta, x)
    assert type(robust) is NPE
    with torch.no_grad():
        moved = (robust(theta, x) - old(theta, x)).mean().abs()
    assert moved < 1e-3
    assert report.nll_before == pytest.approx(-old(theta, x).mean().item(), abs=1e-4)
    certificate = flowguard.certify(robust)
    assert certificate.certified
    assert all(row.name.startswith("flow.") for row in certificate.table())
    assert flowguard.attack(robust, x[:2], steps=10, restarts=1).value <= certificate.bound(4.0)
    again = pickle.loads(pickle.dumps(robust))
    assert torch.equal(again(theta, x), robust(theta, x))


def test_its_guard_is_heard():
    guard = OODConditioner(policy="report", alpha=0.01)
    x = torch.randn(2000, 3)
    guard.fit(x[:1000], progress=False).calibrate(x[1000:], progress=False)

    def build(features, context):
        flow = zuko.flows.NSF(features, context)
        return GuardedFlow(flow, guard)

    npe = NPE(2, 3, build=build).eval()
    with flowguard.monitor(npe) as watch:
        npe(torch.zeros(1, 2), 1e3 * torch.ones(1, 3))
    assert watch.report.flagged.tolist() == [True]
