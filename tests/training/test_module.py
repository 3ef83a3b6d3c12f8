"""What a step does, on one process and on two."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from flowguard.models import SuperResolutionFlow

pl = pytest.importorskip("lightning.pytorch")

from flowguard.training.build import build  # noqa: E402
from flowguard.training.callbacks import Averaging, StepLog  # noqa: E402
from flowguard.training.module import (  # noqa: E402
    Diverged,
    FlowModule,
    Optimization,
    draws_of_all,
    seed_of,
)
from flowguard.training.run import quiet  # noqa: E402


def model(**options):
    torch.manual_seed(0)
    return SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8, **options)


class Random(Dataset):
    """Batches by number, some of them spoilt."""

    def __init__(self, count, rows=4, spoilt=()):
        self.count, self.rows, self.spoilt = count, rows, spoilt

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        generator = torch.Generator().manual_seed(number)
        hr = torch.rand(self.rows, 3, 8, 8, generator=generator)
        if number in self.spoilt:
            hr[0, 0, 0, 0] = math.inf
        return hr, torch.rand(self.rows, 3, 4, 4, generator=generator)


class Losses(pl.Callback):
    """What each step descends."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def fit(module, data, callbacks=(), **options):
    quiet()
    log = StepLog(None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=module.optimization.steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[log, *callbacks],
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return log.losses, trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_that_is_not_finite_moves_neither_weights_nor_adam_nor_averages():
    states = []
    for spoilt in ((), (3, 4)):
        module = FlowModule(model(), Optimization(5, seed=1, most_skipped=1.0))
        averaging = Averaging(0.9)
        if not spoilt:
            module.optimization = Optimization(5, seed=1)
        losses, trainer = fit(module, Random(5 if spoilt else 3, spoilt=spoilt), [averaging])
        assert module.skipped == len(spoilt)
        assert [math.isfinite(loss) for loss in losses] == [True] * 3 + [False] * len(spoilt)
        adam = trainer.optimizers[0].state_dict()["state"]
        states.append((module.state_dict(), adam))
    (weights, moments), (others, same) = states  # the averages: they take the weights' place
    for name, value in weights.items():
        assert value.equal(others[name]), name
    for key, value in moments.items():
        for name, number in value.items():
            assert number.equal(same[key][name])


def test_a_run_in_which_more_than_one_in_a_hundred_steps_is_not_finite_is_ended():
    module = FlowModule(model(), Optimization(9))
    with pytest.raises(Diverged, match=r"at most 1% of the steps may be not finite; got 2 of 7"):
        fit(module, Random(9, spoilt={2, 6, 7}))
    module = FlowModule(model(), Optimization(9))
    fit(module, Random(9, spoilt={2}))  # one is forgiven
    assert module.skipped == 1


def test_batches_that_make_a_step_together_are_one_of_their_mean():
    class Halves(Random):
        def __getitem__(self, number):
            whole = super().__getitem__(number // 2)
            return tuple(t[2 * (number % 2) :][:2] for t in whole)

    class Plain(FlowModule):
        """Without noise, which is drawn for each batch anew."""

        def forward(self, x, y):
            return self.model(x, y, dequantize=False)

    found = []
    for data, parts in ((Random(4), 1), (Halves(8), 2)):
        flow = model()
        flow(*Random(1)[0])  # normalisations take the first batch that they see
        module = Plain(flow, Optimization(4))
        losses, _ = fit(module, data, accumulate_grad_batches=parts)
        assert len(losses) == 4
        found.append((losses, module.state_dict()))
    (first, weights), (second, others) = found
    assert first == pytest.approx(second, abs=1e-5)
    for name, value in weights.items():
        assert torch.allclose(value, others[name], atol=1e-5), name


def test_what_a_process_draws_is_its_share_of_what_one_would_draw():
    def drawn(x):
        size = (len(x), 2)
        more = torch.rand(size), torch.rand(len(x), 1, device=x.device)
        return torch.rand_like(x), torch.randn_like(x[:, :1]), torch.randn(*size), *more

    x = torch.zeros(6, 3, 2)
    torch.manual_seed(4)
    everything = drawn(x)
    for rank in range(3):
        torch.manual_seed(4)
        with draws_of_all(2, rank, 3):
            share = drawn(x[:2])
        for whole, part in zip(everything, share, strict=True):
            assert whole[2 * rank : 2 * rank + 2].equal(part)


def test_seeds_of_different_steps_differ():
    seeds = {
        seed_of(seed, step, part) for seed in range(3) for step in range(50) for part in (0, 1)
    }
    assert len(seeds) == 300


@pytest.mark.parametrize("coupling", ["robust", "affine", "bspline", "reparametrized"])
@pytest.mark.parametrize("architecture", ["bounded", "published"])
def test_in_half_precision_only_the_networks_compute_in_it(coupling, architecture):
    """Splines, normalisations, 1×1 convolutions and log-determinants stay in float32."""
    flow = model(coupling=coupling, architecture=architecture)
    flow.train()
    hr, lr = Random(1)[0]
    flow(hr, lr)
    seen, halves = [], []

    def watch(layer, given, out):
        tensors = tree_leaves((given[0], out))
        seen.extend((type(layer).__name__, t.dtype) for t in tensors)

    for layer in flow.flow.modules():
        if hasattr(layer, "inverse"):
            layer.register_forward_hook(watch)
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *a: halves.append(a[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bits = flow(hr, lr)
    names = {name for name, _ in seen}
    assert {"ActNorm", "InvertibleConv1x1", "ConditionalCoupling"} <= names
    assert bits.dtype == torch.float32
    assert seen
    assert {dtype for _, dtype in seen} == {torch.float32}, seen
    assert torch.bfloat16 in halves


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_steps():
    found = []
    for compiled in (False, True):
        module = FlowModule(model(), Optimization(4), compiled=compiled)
        with contextlib.suppress(AttributeError):
            torch._dynamo.reset()
        found.append(fit(module, Random(4))[0])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("task", ["superres", "lowlight"])
def test_the_pixel_weight_adds_the_error_of_the_image_of_no_noise(task, loss):
    torch.manual_seed(0)
    made = build(task, levels=1, steps=1, hidden=8, features=8, blocks=1, scale=2)
    size = made.scale * 4
    x, y = torch.rand(4, 3, size, size), torch.rand(4, 3, 4, 4)
    told = []
    for weight in (0.0, 3.0):
        optimization = Optimization(2, lr=1e-3, pixel_weight=weight, pixel_loss=loss)
        module = FlowModule(copy.deepcopy(made), optimization)
        fit(module, [(x, y)] * 2, callbacks=[each := Losses()])
        told.append(each.losses)
    plain, weighed = told
    first = copy.deepcopy(made)
    torch.manual_seed(seed_of(0, 0, 0))
    bits = first.train()(x, y).mean()
    errors = first.sample(y, temperature=0.0).reshape(x.shape) - x
    error = (errors.abs() if loss == "l1" else errors.square()).mean()
    assert plain[0] == pytest.approx(float(bits.detach()), rel=1e-5)
    assert weighed[0] == pytest.approx(float((bits + 3 * error).detach()), rel=1e-5)
    assert weighed[1] != pytest.approx(plain[1], rel=1e-3)


def test_options_out_of_range_are_refused():
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"must be finite and not negative; got {weight}"):
            Optimization(1, pixel_weight=weight)
    with pytest.raises(ValueError, match="must be positive; got 0, "):
        Optimization(0)
    with pytest.raises(
        ValueError, match="schedule must be one of cosine, steps, constant; got 'x'"
    ):
        Optimization(1, schedule="x")
    with pytest.raises(ValueError, match="pixel_loss must be one of l1, l2; got 'l3'"):
        Optimization(1, pixel_loss="l3")


def test_schedules():
    steps = Optimization(100, schedule="steps", warmup=0)
    assert [steps.factor(n) for n in (0, 49, 50, 75, 90, 95)] == [1, 1, 0.5, 0.25, 0.125, 0.0625]
    assert Optimization(100, schedule="constant", warmup=10).factor(4) == 0.5
    assert Optimization(100, schedule="constant", warmup=10).factor(99) == 1
