r"""Small guarded flows that answer."""

import warnings

import pytest
import torch

from flowguard.models import SuperResolutionFlow


@pytest.fixture
def model():
    def make(coupling, levels, **options):
        made = SuperResolutionFlow(
            levels=levels, steps=1, hidden=8, features=8, coupling=coupling, **options
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.conditioner.fit(0.1 * torch.rand(32, 3, 16, 16), progress=False)
            made.conditioner.calibrate(0.1 * torch.rand(49, 3, 16, 16), progress=False)
        return made

    return make
