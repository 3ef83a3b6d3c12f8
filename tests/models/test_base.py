r"""What image models share: their conditions, their words, and what a further one needs."""

import copy
import inspect
import math
import pickle
import re
import warnings

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn as nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from flowguard.bounds import certify
from flowguard.image import ActNorm, ConditionalMultiscaleFlow
from flowguard.models import (
    ImageModel,
    LowLightEncoder,
    LowLightFlow,
    PyramidEncoder,
    SuperResolutionFlow,
    base,
)
from flowguard.numerics import normal_log_prob
from flowguard.ood import NotFittedError, OODContextWarning


class Denoiser(ImageModel):
    r"""A third model: its encoder and its base."""

    words = (("clean", "clean images"), ("noisy", "noisy images"))

    def __init__(self, levels=2):
        encoder = PyramidEncoder(6, scale=1, levels=levels)
        super().__init__(encoder, ConditionalMultiscaleFlow(3, 6, levels=levels, steps=1))

    def base_of(self, padded):
        return padded


def superres(**options):
    return SuperResolutionFlow(scale=2, levels=2, steps=1, hidden=6, features=6, **options)


def low_light(**options):
    encoder = LowLightEncoder(8, growth=4, blocks=1, stacked=(0,), levels=2)
    return LowLightFlow(levels=2, steps=1, hidden=6, encoder=encoder, **options)


MODELS = {"superres": superres, "low light": low_light, "denoiser": Denoiser}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    torch.manual_seed(0)
    made = request.param().eval()
    with torch.no_grad():
        for p in made.flow.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return made


def pair(model, height=9, width=6):
    scale = model.scale
    y = torch.rand(2, 3, height, width)
    return torch.rand(2, 3, scale * height, scale * width), y


# -- conditions know whose they are -----------------------------------------------------------


@torch.no_grad()
def use(model, x, condition):
    z, _ = model.encode(x, condition)
    model.nll(x, condition)
    model.sample(condition, 2, 0.5)
    return model.decode(z, condition)


def train_once(model, x, y):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.nll(x, y).mean().backward()
    optimizer.step()


CHANGES = {
    "a step of training": train_once,
    "the encoder alone": lambda model, x, y: torch.nn.init.zeros_(
        next(model.conditioner.encoder.parameters())
    ),
    "the flow alone": lambda model, x, y: torch.nn.init.zeros_(
        model.flow.steps[0][0].coupling.rest[3].logs
    ),
    "the same weights once more": lambda model, x, y: model.load_state_dict(model.state_dict()),
    "to and fro": lambda model, x, y: model.double().float(),
    "another encoder": lambda model, x, y: setattr(
        model.conditioner, "encoder", copy.deepcopy(model.conditioner.encoder)
    ),
    "another guard": lambda model, x, y: setattr(
        model, "conditioner", copy.deepcopy(model.conditioner)
    ),
    "another flow": lambda model, x, y: setattr(model, "flow", copy.deepcopy(model.flow)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_condition_is_refused_once_the_weights_change(model, change):
    x, y = pair(model)
    with torch.no_grad():
        condition = model.condition(y)
    use(model, x, condition)
    change(model, x, y)
    calls = (
        lambda: model.encode(x, condition),
        lambda: model.decode([torch.zeros(2, *s) for s in model.latent_shapes(y)], condition),
        lambda: model.nll(x, condition),
        lambda: model.sample(condition),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"got one from before they changed.*condition\(\.\."):
            call()


@pytest.mark.parametrize(
    "other", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_condition_is_refused_by_a_copy(model, other):
    x, y = pair(model)
    with torch.no_grad():
        condition = model.condition(y)
    with pytest.raises(ValueError, match=f"serves the {type(model).__name__} that made it; got"):
        other(model).decode([torch.zeros(2, *s) for s in model.latent_shapes(y)], condition)
    use(model, x, condition)


def test_a_condition_is_refused_by_another_model(model):
    _, y = pair(model)
    for make in MODELS.values():
        with pytest.raises(ValueError, match="that made it; got one of another"):
            make().sample(model.condition(y))


def test_weights_of_a_model_of_ones_own_are_remembered():
    class Balanced(Denoiser):
        def __init__(self):
            super().__init__()
            self.balance = nn.Conv2d(3, 3, 1)

        def base_of(self, padded):
            return self.balance(padded)

    model, y = Balanced().eval(), torch.rand(1, 3, 8, 8)
    condition = model.condition(y)
    model.sample(condition)
    nn.init.zeros_(model.balance.weight)
    with pytest.raises(ValueError, match="got one from before they changed"):
        model.sample(condition)


def test_what_a_file_holds_can_be_vouched_for(model):
    x, y = pair(model)
    with torch.no_grad():
        condition = pickle.loads(pickle.dumps(model.condition(y)))
    with pytest.raises(ValueError, match=r"of which that is not known.*sign\(condition\)"):
        use(model, x, condition)
    use(model, x, model.sign(condition))


def test_a_condition_with_gradients_serves_one_step_of_training(model):
    x, y = pair(model)
    model.train()
    model.nll(x, y)  # initialises
    condition = model.condition(y)
    model.nll(x, condition).mean().backward()
    assert all(p.grad is not None for p in model.conditioner.encoder.parameters())
    torch.optim.Adam(model.parameters()).step()
    with pytest.raises(ValueError, match="got one from before they changed"):
        model.nll(x, condition)


def test_conditions_work_in_inference_mode_and_under_autocast(model):
    x, y = pair(model)
    condition = model.condition(y)
    with torch.inference_mode():
        expected = use(model, x, condition)
        again = use(model, x, model.condition(y))
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        use(model, x, condition)
        use(model, x, model.condition(y))


@pytest.mark.slow
def test_compiled_code_takes_conditions(model):
    _, y = pair(model)
    with torch.no_grad():
        condition = model.condition(y)
        z = [torch.randn(2, *s) for s in model.latent_shapes(y)]
        torch._dynamo.reset()
        decode = torch.compile(model.decode, backend="eager")
        torch.testing.assert_close(decode(z, condition), model.decode(z, condition))


# -- padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, 16])
def test_an_image_is_padded_once(model, monkeypatch, tile):
    padded = []
    pad = base.F.pad

    def heard(x, *args, **kwargs):
        padded.append(tuple(x.shape))
        return pad(x, *args, **kwargs)

    _, y = pair(model)
    monkeypatch.setattr(base.F, "pad", heard)
    model.sample(y, 2, tile=tile)
    assert len([shape for shape in padded if shape[-2:] == y.shape[-2:]]) == 1


# -- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nll", "encode", "decode", "latent_shapes", "sample"])
def test_methods_speak_the_words_of_the_model(model, method):
    (x, _), (y, conditions) = model.words
    told = inspect.getdoc(getattr(model, method))
    names = set(inspect.signature(getattr(model, method)).parameters)
    assert y in names
    assert (x in names) == (method in ("nll", "encode"))
    assert names.isdisjoint({"x", "y"})
    assert f"{y}: The {conditions}" in told


def test_words_are_keywords(model):
    image, given = pair(model)
    (x, _), (y, _) = model.words
    named = {x: image, y: given}
    torch.manual_seed(0)
    bits = model.nll(**named)
    torch.manual_seed(0)
    assert torch.equal(model.nll(image, given), bits)
    z, _ = model.encode(**named)
    assert torch.equal(model.decode(z, **{y: given}), model.decode(latents=z, **{y: given}))
    assert model.latent_shapes(**{y: given}) == model.latent_shapes(given)
    assert model.sample(**{y: given}, temperature=0.0).shape == (1, *image.shape)
    assert model.sample(model.condition(**{y: given})).shape == (1, *image.shape)
    with pytest.raises(TypeError, match="unexpected keyword argument 'picture'"):
        model.nll(picture=image, **{y: given})
    if y != "y":  # the general names are not the model's
        with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
            model.sample(given, y=given)


def test_a_model_may_change_the_words_of_another():
    class Zoom(SuperResolutionFlow):
        words = (("large", "large images"), ("small", "small images"))

        def latent_shapes(self, small):
            return super().latent_shapes(small)[:1]

    assert list(inspect.signature(Zoom.nll).parameters)[1:3] == ["large", "small"]
    assert Zoom.condition is SuperResolutionFlow.condition  # has words of its own
    model = Zoom(scale=2, levels=1, steps=1, hidden=4, features=4)
    assert model.latent_shapes(torch.rand(1, 3, 4, 4)) == [(12, 4, 4)]


# -- a third model ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 6), (8, 8), (1, 1)], ids=str)
@torch.no_grad()
def test_a_third_model_is_its_encoder_and_its_base(size):
    model = Denoiser()
    x, y = pair(model, *size)
    assert model.nll(x, y).shape == (2,)  # initialises
    model.eval()
    z, _ = model.encode(x, y)
    torch.testing.assert_close(model.decode(z, y), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.decode(z, y, tile=8), x, rtol=0, atol=1e-4)
    assert model.sample(y, 3).shape == (3, *x.shape)
    with pytest.raises(ValueError, match=r"noisy must have shape \(B, 3, H, W\); got"):
        model.sample(y[:, :1])
    with pytest.raises(ValueError, match=r"clean must have shape \(2, 3, .* for noisy of shape"):
        model.nll(x[:1], y)
    assert certify(model.flow).certified


def test_a_third_model_without_a_rule_is_refused():
    certificate = certify(Denoiser().eval())
    assert not certificate.certified


# -- wrappers --------------------------------------------------------------------------------


def test_calling_a_model_gives_its_likelihood(model):
    x, y = pair(model)
    options = {"dequantize": False, "bits_per": "pixel"}
    assert torch.equal(model(x, y, **options), model.nll(x, y, **options))
    assert torch.equal(model(x, y, 32, dequantize=False), model.nll(x, y, dequantize=False))
    (first, _), (second, _) = model.words
    assert torch.equal(model(**{first: x, second: y}, **options), model.nll(x, y, **options))
    assert torch.equal(DataParallel(model)(x, y, **options), model.nll(x, y, **options))
    with pytest.raises(TypeError, match=rf"forward\(\): missing a required argument: '{second}'"):
        model(x)


class Bare(nn.Module):
    r"""A flow by itself, which is called as it is."""

    def __init__(self):
        super().__init__()
        self.flow = ConditionalMultiscaleFlow(3, 3, levels=1, steps=2, hidden=6, normed=True)
        self.scale = 2

    def forward(self, x, y, dequantize=False):
        latents, ladj = self.flow(x, [y])
        return -(ladj + normal_log_prob(latents)) / x[0].numel()


TRAINED = {
    "superres": lambda: superres(architecture="published"),
    "low light": lambda: low_light(target_ratio=0.0),  # no draws
    "a flow": Bare,
}
STEPS = 3


def _trained(name, rank=0, world=1):
    r"""The weights after a few steps, on the share that a process has of each batch."""
    torch.manual_seed(rank)  # weights of its own; those of rank 0 are sent to all
    model = TRAINED[name]().double()
    called = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        y = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=generator)
        size = 8 * model.scale
        x = torch.rand(4, 3, size, size, dtype=torch.float64, generator=generator)
        x = x + torch.arange(4.0).reshape(4, 1, 1, 1)  # each process sees something else
        optimizer.zero_grad()
        called(x[rank::world], y[rank::world], dequantize=False).mean().backward()
        optimizer.step()
    return model.state_dict()


def _rank(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=world
    )
    torch.save({name: _trained(name, rank, world) for name in TRAINED}, folder / f"{rank}.pt")
    x = 5 + torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    layer, wanted = ActNorm(2), nn.BatchNorm2d(2, momentum=None)
    layer(torch.full_like(x, math.nan) if rank else x)
    assert layer.pending
    layer(x[:0] if rank else x)  # nothing to add
    wanted(x)
    assert torch.allclose(layer.bias.flatten(), -wanted.running_mean, atol=1e-6)
    torch.distributed.destroy_process_group()


def test_processes_train_one_model_on_the_whole_batch(tmp_path):
    mp.spawn(_rank, (2, tmp_path), nprocs=2)  # raises what one of them raises, and ends the other
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in TRAINED:
        alone = _trained(name)
        assert list(first[name]) == list(alone)
        apart = {
            k: float((v.double() - second[name][k].double()).abs().max())
            for k, v in first[name].items()
        }
        assert max(apart.values()) == 0, (name, apart)
        for key, value in first[name].items():
            assert torch.allclose(value, alone[key], rtol=1e-6, atol=1e-6), (name, key)


CALLS = {
    "condition": lambda m, x, y: m.condition(y),
    "sample": lambda m, x, y: m.sample(y),
    "nll": lambda m, x, y: m.nll(x, y),
    "encode": lambda m, x, y: m.encode(x, y),
    "decode": lambda m, x, y: m.decode([torch.zeros(2, *s) for s in m.latent_shapes(y)], y),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_conditions_of_0_to_255_are_warned_of_once(model, call):
    x, y = pair(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, x, y)
    name = model.words[1][0]
    y = (255 * y).round()
    with pytest.warns(
        UserWarning, match=rf"{name} must have values in \[0, 1\]; got a max"
    ) as told:
        call(model, x, y)
    assert len(told) == 1
    assert "divide by 255" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, x, y)


@pytest.mark.parametrize("peak", [255, 65535])
def test_images_of_0_to_255_have_no_likelihood(model, peak):
    x, y = pair(model)
    name = model.words[0][0]
    for images in ((peak * x).round(), peak * x):
        with pytest.raises(ValueError, match=rf"{name} must have .*\[0, 1\].*divide by {peak}"):
            model.nll(images, y)
        with pytest.raises(ValueError, match=f"divide by {peak}"):
            model.nll(images, model.condition(y))


@pytest.mark.parametrize("autocast", [False, True])
def test_whole_numbers_are_refused(model, autocast):
    x, y = pair(model)
    whole = (255 * y).to(torch.uint8)
    with torch.autocast("cpu", enabled=autocast):
        for call in (model.condition, model.sample, lambda y: model.nll(x, y)):
            with pytest.raises(TypeError, match="divide those of 0 to 255 by 255"):
                call(whole)


@pytest.mark.parametrize("quant", [256.5, True, "256"])
def test_grey_levels_are_whole_numbers(quant):
    with pytest.raises(TypeError, match="quant must be a whole number"):
        superres(quant=quant)


def test_compiled_code_does_not_look_at_values():
    model = superres().eval()
    sample = torch.compile(
        lambda y: model.look(y).base + 0 * model.known(y).base, backend="eager", fullgraph=True
    )
    model.conditioner = nn.Sequential(model.conditioner.encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(torch.full((1, 3, 4, 4), 255.0))
    assert not model.warned


@pytest.mark.slow  # half a minute of tracing
def test_compiled_for_sizes_that_change():
    encoder = PyramidEncoder(4, scale=2, levels=1, blocks=0)
    model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=4, encoder=encoder).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        sample = torch.compile(lambda y: model.sample(y), backend="eager", dynamic=True)
        for height in (8, 12):
            y = torch.rand(2, 3, height, 6)
            torch.manual_seed(0)
            made = sample(y)
            torch.manual_seed(0)
            torch.testing.assert_close(made, model.sample(y))


# -- what the guard says -----------------------------------------------------------------------


def guarded(model):
    model.conditioner.alpha = 0.1
    model.conditioner.fit(torch.rand(20, 3, 8, 8), progress=False)
    return model.conditioner.calibrate(torch.rand(60, 3, 8, 8), progress=False)


@pytest.mark.parametrize("tile", [None, 8])
def test_sampling_a_flagged_condition_warns_once_and_says_what_to_do(tile):
    model = superres().eval()
    guarded(model)
    strange = 50 * torch.rand(1, 3, 8, 8)
    with pytest.warns(OODContextWarning) as caught:
        model.sample(strange, 2, tile=tile)
    (warning,) = [w for w in caught if w.category is OODContextWarning]
    assert re.search(r"1 of 1 contexts is .*p = 0\.\d+", str(warning.message))
    assert "policy to 'shrink', 'raise' or 'report'" in str(warning.message)
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.conditioner.policy = "report"
        model.sample(strange)


def test_a_model_whose_guard_was_never_fitted_says_nothing(model):
    x, y = pair(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model.sample(y)
        model.nll(x, y)
        model.train()
        model.nll(x, y)


def _fitted(model, folder):
    model.conditioner.fit(torch.rand(20, 3, 8, 8), progress=False)
    return model


def _loaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "lack"), [(_fitted, "fitted but not calibrated"), (_loaded, "not fitted")]
)
def test_a_model_that_was_meant_to_guard_says_once_that_it_does_not(make, lack, tmp_path):
    model = make(superres().eval(), tmp_path)
    y = torch.rand(1, 3, 8, 8)
    with pytest.warns(UserWarning, match=f"{lack}.*no condition is checked.*`fit"):
        model.sample(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(y)
    again = make(superres().eval(), tmp_path)
    again.conditioner.policy = "report"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.sample(y)


@pytest.mark.parametrize("policy", ["raise", "shrink"])
def test_a_model_that_is_asked_to_act_refuses_without_calibration(policy):
    model = superres().eval()
    model.conditioner.policy = policy
    with pytest.raises(NotFittedError, match="call `fit"):
        model.sample(torch.rand(1, 3, 8, 8))


def test_a_frozen_encoder_stays_as_it_is():
    encoder = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5))

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = encoder

        def forward(self, y):
            return [self.inner(y)]

    model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8, encoder=Listed())
    hr, lr = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4)
    model.nll(hr, lr)  # initialises
    assert not model.frozen
    assert model.freeze_encoder() is model
    assert model.frozen
    assert model.training
    assert not encoder.training
    model.eval().train()
    assert not encoder.training  # dropout is off
    assert not any(m.requires_grad for m in model.conditioner.encoder(lr))  # there is no graph
    model.nll(hr, lr).mean().backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad is not None for p in model.flow.parameters())
    lr.requires_grad_()
    model.eval().nll(hr, lr).sum().backward()
    assert lr.grad.abs().sum() > 0  # attacks see through it
    model.train().freeze_encoder(False)
    assert encoder.training
    assert not model.frozen


# -- the margin ------------------------------------------------------------------------------

MARGIN = 0.25


def far_latents(model, y, times=1.0):
    generator = torch.Generator().manual_seed(1)
    shapes = model.latent_shapes(y)
    return [times * torch.randn(len(y), *s, generator=generator) for s in shapes]


@torch.no_grad()
def test_within_its_margin_a_model_is_what_it_is_without(model):
    x, y = pair(model, 8, 8)
    model.limit(None)
    latents, ladj = model.encode(x, y)
    bits = model.nll(x, y, dequantize=False)
    near = model.decode(latents, y)
    model.limit(MARGIN)
    (*others, last), limited_ladj = model.encode(x, y)
    assert all(torch.equal(a, b) for a, b in zip((*others, last), latents, strict=True))
    assert torch.equal(limited_ladj, ladj)
    assert torch.equal(model.nll(x, y, dequantize=False), bits)
    inside = (near >= -MARGIN / 2) & (near <= 1 + MARGIN / 2)
    assert inside.all()
    assert torch.equal(model.decode(latents, y), near)


@torch.no_grad()
@pytest.mark.parametrize("times", [3.0, 1e3, 1e30])
def test_no_picture_leaves_the_margin(model, times):
    _, y = pair(model, 8, 8)
    far = far_latents(model, y, times)
    strange = torch.stack((20 * y[0], torch.full_like(y[1], torch.inf)))
    free = model.limit(None).decode(far, y)
    assert free.abs().max() > 1.5
    for condition in (y, strange):
        x = model.limit(MARGIN).decode(far, condition)
        assert x.nan_to_num(0.5).min() >= -MARGIN
        assert x.nan_to_num(0.5).max() <= 1 + MARGIN


@torch.no_grad()
@pytest.mark.parametrize("levels", [5, 16, 256])
def test_the_noise_within_grey_levels_is_in_the_margin(model, levels):
    x, y = pair(model, 8, 8)
    x = (x > 0.5).float()  # black and white, with noise on both sides
    assert model.limit(MARGIN).nll(x, y, levels).isfinite().all()


@torch.no_grad()
def test_a_picture_in_the_margin_has_a_density_and_one_beyond_has_none(model):
    model.limit(MARGIN)
    x, y = pair(model, 8, 8)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 1.2, 1.3
    bits = model.nll(x, y, dequantize=False)
    assert bits.isfinite().tolist() == [True, False]
    assert bits[1] == torch.inf
    latents, ladj = model.encode(x, y)
    assert ladj.isneginf().tolist() == [False, True]
    assert all(z.isfinite().all() for z in latents)
    back = model.decode(latents, y)
    assert back[0, 0, 0, 0] == pytest.approx(1.2, abs=1e-4)
    assert back[1, 0, 0, 0] == pytest.approx(1.25, abs=1e-4)


def test_the_likelihood_with_a_margin_is_a_density():
    """The log-determinant is that of the whole map, also where the limit bends."""
    torch.manual_seed(0)
    model = superres(margin=MARGIN).double().eval()
    y = torch.rand(1, 3, 2, 2, dtype=torch.float64)
    z = far_latents(model, y, 0.6)
    x = model.decode([t.double() for t in z], y).detach()
    assert (x > 1.13).any() or (x < -0.13).any()
    flat = lambda v: torch.cat([t.flatten() for t in model.encode(v, y)[0]])  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(flat, x).reshape(x.numel(), x.numel())
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert model.encode(x, y)[1].item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradients_pass_the_margin(model):
    model.limit(MARGIN)
    x, y = pair(model, 8, 8)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 1.2, 1.3
    model.nll(x, y, dequantize=False)[0].backward()
    for p in model.flow.parameters():
        assert p.grad is None or p.grad.isfinite().all()
    y.requires_grad_()
    model.decode(far_latents(model, y, 1e3), y).sum().backward()
    assert y.grad.isfinite().all()


@torch.no_grad()
def test_tiles_and_several_samples_keep_the_margin(model):
    model.limit(MARGIN)
    _, y = pair(model, 40, 24)
    whole = model.sample(y, 3, 5.0, torch.Generator().manual_seed(0))
    tiled = model.sample(y, 3, 5.0, torch.Generator().manual_seed(0), tile=16)
    assert whole.shape == (3, *pair(model, 40, 24)[0].shape)
    assert torch.allclose(whole, tiled, atol=1e-4)
    assert whole.max() <= 1 + MARGIN
    assert (whole > 1 + MARGIN / 2).any()


def test_a_condition_of_another_margin_is_refused(model):
    model.limit(MARGIN)
    x, y = pair(model)
    with torch.no_grad():
        condition = model.condition(y)
        model.sample(condition)
        model.limit(0.5)
        for call in (lambda: model.sample(condition), lambda: model.nll(x, condition)):
            with pytest.raises(ValueError, match=r"of the margin 0\.25 .* got one of 0\.5: make"):
                call()
        model.limit(MARGIN).sample(condition)


@pytest.mark.parametrize(
    "other", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_keep_the_margin(model, other):
    assert other(model.limit(0.3)).margin == 0.3


def test_what_was_pickled_before_there_were_margins_has_none():
    model = superres(margin=None)
    del model.__dict__["_margin"]
    assert pickle.loads(pickle.dumps(model)).margin is None


def test_a_model_says_its_margin(model):
    assert "margin=0.3" in repr(model.limit(0.3))
    assert "margin" not in repr(model.limit(None))


@pytest.mark.parametrize(
    ("margin", "error", "match"),
    [
        (0, ValueError, "positive and finite; got 0"),
        (-0.5, ValueError, "positive and finite; got -0.5"),
        (math.inf, ValueError, "positive and finite; got inf"),
        ("0.25", TypeError, "must be a number; got str"),
        (0.001, ValueError, r"at least a grey level, 0\.003922 of 256; got 0\.001"),
    ],
)
def test_margins_that_cannot_be_are_told(model, margin, error, match):
    before = model.margin
    with pytest.raises(error, match=match):
        model.limit(margin)
    assert model.margin == before


def test_fewer_grey_levels_than_the_margin_has_room_for_are_told(model):
    x, y = pair(model)
    with pytest.raises(ValueError, match=r"at least a grey level, 1 of 2; got 0\.25: limit"):
        model.limit(MARGIN).nll(x, y, 2)
    model.limit(None).nll(x, y, 2)


@pytest.mark.parametrize("make", [superres, low_light], ids=["superres", "low light"])
def test_new_models_have_a_margin_and_their_certificate_says_it(make):
    torch.manual_seed(0)
    model = make().eval()
    assert model.margin == MARGIN
    certificate = certify(model)
    for radius in (4.0, 1e6):
        assert 1 + MARGIN <= certificate.bound(radius) < 1 + MARGIN + 1e-4
    assert certify(model.limit(0.5)).bound(1e6) == pytest.approx(1.5, abs=1e-4)
    assert certify(model.limit(None)).bound(1e6) > 1e5
    assert "images within [-0.5, 1.5]" in str(certify(model.limit(0.5)))


class Ours(SuperResolutionFlow):
    r"""A class of a user with a constructor of its own."""

    def __init__(self, **options):
        super().__init__(levels=1, steps=1, hidden=8, features=8, **options)


class Free(Ours):
    r"""One whose images are anywhere."""

    def base_of(self, padded):
        return 1e9 * self.upsample(padded)


def test_a_class_with_a_constructor_of_its_own_alone_is_certified():
    assert certify(Ours(margin=MARGIN)).bound(4.0) == pytest.approx(1 + MARGIN, abs=1e-4)
    assert "overrides base_of" in certify(Free()).refused[0].reason


def test_images_on_another_device_than_the_model_are_refused():
    model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
    with pytest.raises(
        ValueError, match=r"device cpu of the model; got meta: call lr\.to\('cpu'\)"
    ):
        model.sample(torch.rand(1, 3, 8, 8, device="meta"))
