r"""Tests for the flow in dingo's models."""

import importlib.util
import pickle
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("dingo")
pytest.importorskip("glasflow")

import flowguard


@pytest.fixture(scope="module")
def dingo():
    r"""dingo's own module of flows. It imports packages that its flows have no use for."""
    needless = [n for n in ("bilby", "pandas") if importlib.util.find_spec(n) is None]
    with mock.patch.dict(sys.modules, {name: ModuleType(name) for name in needless}):
        yield pytest.importorskip("dingo.core.nn.nsf")


class Embedding(nn.Module):
    r"""A network of two contexts, as of strain and detector times."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, *x):
        return torch.tanh(self.linear(torch.cat(x, dim=-1)))


def made(dingo, **options):
    flow = dingo.create_nsf_model(
        input_dim=2,
        context_dim=4,
        num_flow_steps=2,
        base_transform_kwargs={
            "hidden_dim": 16,
            "num_transform_blocks": 1,
            "activation": "elu",
            "num_bins": 6,
            "base_transform_type": "rq-coupling",
            **options,
        },
    )
    return dingo.FlowWrapper(flow, Embedding()).eval()


def pairs(n=300):
    x = torch.randn(n, 3), torch.randn(n, 2)
    return x[0][:, :2] + 0.1 * torch.randn(n, 2), x


@pytest.mark.parametrize("kind", ["rq-coupling", "rq-autoregressive"])
def test_it_keeps_its_likelihood_and_is_certified(dingo, kind):
    old, (theta, x) = made(dingo, base_transform_type=kind), pairs()
    with torch.no_grad():
        for p in old.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert not flowguard.certify(old).certified
    robust, report = flowguard.migrate(old, theta, x)
    assert type(robust) is dingo.FlowWrapper
    with torch.no_grad():
        moved = (robust(theta, *x) - old(theta, *x)).mean().abs()
    assert moved < 1e-3
    assert report.sample_error.median < 1e-3
    certificate = flowguard.certify(robust)
    assert certificate.certified
    far = [1e8 * part[:3] for part in x]
    assert (robust.sample(*far, num_samples=20).abs() <= certificate.bound(8.0)).all()
    again = pickle.loads(pickle.dumps(robust))
    assert torch.equal(again(theta, *x), robust(theta, *x))


def test_all_of_its_contexts_are_attacked(dingo):
    robust, _ = flowguard.migrate(made(dingo), *pairs())
    _, x = pairs(2)
    result = flowguard.attack(robust, list(x), steps=5, restarts=1)
    assert [part.shape for part in result.context] == [(1, 3), (1, 2)]
    assert result.value <= flowguard.certify(robust).bound(4.0)


def test_batches_of_its_loaders_are_taken(dingo):
    theta, x = pairs(100)
    batches = [(theta[i : i + 50], [part[i : i + 50] for part in x]) for i in (0, 50)]
    _, report = flowguard.migrate(made(dingo), calibration=batches)
    assert report.certificate_after.certified


def test_a_flow_without_contexts_is_migrated(dingo):
    flow = dingo.create_nsf_model(
        input_dim=2,
        context_dim=None,
        num_flow_steps=2,
        base_transform_kwargs={
            "hidden_dim": 8,
            "num_transform_blocks": 1,
            "num_bins": 4,
            "base_transform_type": "rq-coupling",
        },
    )
    _, report = flowguard.migrate(dingo.FlowWrapper(flow), pairs()[0])
    assert report.certificate_after.certified
