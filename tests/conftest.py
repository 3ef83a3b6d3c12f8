r"""What all tests share: a seed for each, and nothing of torch's global state left changed."""

import hypothesis
import pytest
import torch

# The tensors of the tests are small: a second thread costs more than it brings, and the processes
# that share the tests need the cores.
torch.set_num_threads(1)

# No test depends on how busy the machine is.
hypothesis.settings.register_profile("flowguard", deadline=None)
hypothesis.settings.load_profile("flowguard")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _global_state_is_left_alone():
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    assert before == after, "a test left torch's global state changed"
