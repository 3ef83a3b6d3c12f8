"""The short way to train."""

import math
import signal

import pytest
import torch

from flowguard.models import SuperResolutionFlow
from flowguard.training import train

pytest.importorskip("lightning")


def model():
    torch.manual_seed(0)
    return SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)


def batches(count=None, spoilt=()):
    generator = torch.Generator().manual_seed(0)
    number = 0
    while number != count:
        hr = torch.rand(4, 3, 8, 8, generator=generator)
        if number in spoilt:
            hr = torch.full_like(hr, math.nan)
        yield hr, torch.rand(4, 3, 4, 4, generator=generator)
        number += 1


def test_losses_are_finite_and_repeat_with_the_seed():
    results = []
    for _ in range(2):
        flow = model()
        results.append((train(flow, batches(), steps=8, progress=False), flow.state_dict()))
        assert not flow.training
    (first, weights), (second, others) = results
    assert len(first.losses) == 8
    assert all(map(math.isfinite, first.losses))
    assert first.losses == second.losses
    assert first.skipped == 0
    assert first.seconds > 0
    assert first.cpu_seconds > 0
    assert all(value.equal(others[name]) for name, value in weights.items())


def test_the_loss_falls():
    lr = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    hr = torch.nn.functional.interpolate(lr, scale_factor=2.0).square()
    losses = train(model(), [(hr, lr)] * 60, steps=60, lr=1e-2, progress=False).losses
    assert sum(losses[-5:]) < sum(losses[:5]) - 5


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    flow = model()
    result = train(flow, batches(spoilt={5, 6}), steps=7, progress=False)
    assert result.skipped == 2
    assert math.isnan(result.losses[5])
    assert math.isnan(result.losses[6])
    # The schedule is that of 7 steps in both.
    same = model()
    kept = [pair for _, pair in zip(range(5), batches(), strict=False)]
    with pytest.raises(ValueError, match="for each of the 7 steps; got 5"):
        train(same, kept, steps=7, progress=False)
    for name, value in flow.state_dict().items():
        assert value.equal(same.state_dict()[name]), name


def test_batches_that_do_not_suffice_are_refused_and_exactly_enough_are_not():
    with pytest.raises(ValueError, match="for each of the 4 steps; got 3"):
        train(model(), list(batches(3)), steps=4, progress=False)
    assert len(train(model(), batches(3), steps=3, progress=False).losses) == 3


def stopping(error):
    yield from batches(2)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
def test_what_ends_a_training_is_raised_as_it_is_and_the_model_left_in_evaluation_mode(error):
    flow = model()
    with pytest.raises(error):
        train(flow, stopping(error), steps=5, progress=False)
    assert not flow.training


def test_batches_that_are_no_pairs_are_refused():
    hr = torch.rand(2, 3, 8, 8)
    for wrong, got in (([hr], "Tensor"), ([(hr, hr, hr)], "3 of them"), ([{"hr": hr}], "dict")):
        with pytest.raises(ValueError, match=f"must be a pair of targets and cond.*; got {got}"):
            train(model(), wrong, steps=1, progress=False)
    with pytest.raises(TypeError, match=r"batches must be an iterable of pairs .*; got int"):
        train(model(), 3, steps=1, progress=False)


WRONG = {
    "steps as a word": ({"steps": "10"}, "steps must be a whole number; got '10'"),
    "half a step": ({"steps": 1.5}, "steps must be a whole number; got 1.5"),
    "a switch for steps": ({"steps": True}, "steps must be a whole number; got True"),
    "a rate as a word": ({"lr": "1e-3"}, "lr must be a number; got '1e-3'"),
    "nothing to clip at": ({"clip": None}, "clip must be a number; got None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_of_another_kind_are_refused(name):
    more, words = WRONG[name]
    with pytest.raises(TypeError, match=f"^{words}$"):
        train(model(), batches(), **{"steps": 1, "progress": False, **more})


def test_what_is_no_image_model_is_refused():
    for wrong, got in (
        (torch.nn.Linear(3, 3), "an object of Linear"),
        (type(model()), "SuperResolutionFlow"),
        ("run/model", "an object of str"),
    ):
        with pytest.raises(TypeError, match=f"model must be an image model, .*; got {got}: make"):
            train(wrong, batches(), steps=1, progress=False)


def test_a_model_of_which_nothing_can_be_trained_is_refused():
    with pytest.raises(ValueError, match="a parameter that requires a gradient; got none"):
        train(model().requires_grad_(False), batches(), steps=1, progress=False)


def test_nothing_is_trained_in_inference_mode_and_without_gradients_it_is():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="needs gradients; got a call"):
        train(model(), batches(), steps=1, progress=False)
    with torch.no_grad():
        assert len(train(model(), batches(), steps=1, progress=False).losses) == 1


def test_what_the_caller_draws_next_does_not_hang_on_the_steps():
    drawn = []
    for steps in (1, 3):
        flow = model()
        torch.manual_seed(5)
        train(flow, batches(), steps=steps, progress=False)
        drawn.append(torch.rand(3))
    assert drawn[0].equal(drawn[1])


def test_a_bar_is_called_by_its_name(capsys):
    train(model(), batches(), steps=2, name="mine")
    told = capsys.readouterr().err
    assert "mine" in told
    assert "bits/dim" in told


def test_whoever_interrupts_it_gets_the_interrupt_and_can_interrupt_again():
    def interrupted():
        yield from batches(1)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(model(), interrupted(), steps=3, progress=False)
    assert signal.getsignal(signal.SIGINT) is before
