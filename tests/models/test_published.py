r"""The published super-resolution models, against numbers that the published code computed."""

import copy
import itertools
import math
import os
import pickle
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from flowguard import certify, migrate
from flowguard.image import (
    Affine,
    ConditionalCoupling,
    CubicBSpline,
    ReparametrizedAffine,
    Robust,
    ZeroConv2d,
    published_flow,
)
from flowguard.image.conditioning import convolve
from flowguard.models import CheckpointError, RRDBEncoder, SuperResolutionFlow
from flowguard.models.checkpoints import FLOW, FlowLayout, plan_flow, read_state

PUBLISHED = Robust(bound=0.5, shift_bound=None, slope=None)
KEYS = {torch.float64: "f64", torch.float32: "f32"}


def weights(g, dtype):
    """The state dict of a golden file, whose weights are stored as small integers."""
    state = {}
    for key, value in g.items():
        if key.startswith("sd."):
            name = key.removeprefix("sd.")
            state[name] = value.to(dtype) * g.get(f"sdscale.{name}", torch.tensor(1.0)).to(dtype)
    return state


def normal(z):
    return (-0.5 * (z.square() + math.log(2 * math.pi))).flatten(1).sum(1)


# -- one coupling -----------------------------------------------------------------------------

MAPS = {
    "Affine": ("affine", Affine()),
    "AffineReparam": ("affinereparam", ReparametrizedAffine()),
    "RQspline": ("rqspline", PUBLISHED),
    "Bspline": ("bspline", CubicBSpline(bound=0.5, shift_bound=None)),
}


def coupling(file, name, dtype):
    g = load_file(file)
    published, family = MAPS[name]
    flow = published_flow(
        3, 320, levels=1, steps=1, coupling=family, transition_steps=0, noise_channels=3
    ).to(dtype)
    layout = FlowLayout((((), (1,), None),), published, 320, 64, 3, False)
    prefix = f"{FLOW}layers.1.{published}."
    plan = {
        k.removeprefix(prefix): e
        for k, e in plan_flow(flow, layout, "").items()
        if k.startswith(prefix)
    }
    state, ours = weights(g, dtype), flow.state_dict()
    assert set(state) == set(plan)
    for key, entry in plan.items():
        for target, part in entry.parts:
            ours[target].copy_(part(state[key]))
    return g, flow.steps[0][0].coupling.eval()


@pytest.mark.parametrize("dtype", KEYS, ids=str)
@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_couplings_compute_what_the_published_ones_do(golden, name, dtype):
    file = golden(f"coupling_Cond{name}SeparatedAndCond.safetensors")
    g, layer = coupling(file, name, dtype)
    key = KEYS[dtype]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    noises = {
        "nostd": None,
        "stdimg": g["std_img"],
        "stdscalar": g["std_scalar"],
        "stdzero": torch.zeros(2, 1, 1, 1),
    }
    tried = 0
    for mode, noise in noises.items():
        if f"{key}.{mode}.fwd" not in g:
            continue
        tried += 1
        condition = layer.condition(g["ft"].to(dtype), None if noise is None else noise.to(dtype))
        z, ladj = layer(g["z"].to(dtype), condition)
        x, inverse_ladj = layer.inverse(g["y"].to(dtype), condition)
        close = {"rtol": tolerance, "atol": tolerance}
        summed = {"rtol": tolerance, "atol": 100 * tolerance}  # a sum over hundreds of elements
        torch.testing.assert_close(z, g[f"{key}.{mode}.fwd"], **close)
        torch.testing.assert_close(ladj, g[f"{key}.{mode}.fwd_logdet"], **summed)
        if name == "Bspline":
            # The published inverse is itself off: by 1e-9, and in float32 by 1e-2. Ours undoes
            # the forward direction, which agrees.
            torch.testing.assert_close(layer(x, condition)[0], g["y"].to(dtype), **close)
            torch.testing.assert_close(layer(x, condition)[1], -inverse_ladj, **summed)
            continue
        torch.testing.assert_close(x, g[f"{key}.{mode}.rev"], **close)
        torch.testing.assert_close(inverse_ladj, g[f"{key}.{mode}.rev_logdet"], **summed)
    assert tried >= 2


# -- whole models -----------------------------------------------------------------------------

TINY = {"blocks": 2, "stacked": (0, 1), "features": 4, "growth": 2, "hidden": 6, "steps": 2}
NETS = {
    "srflow, scale 4": {},
    "srflow, scale 8": {"scale": 8, "levels": 4, "steps": 1},
    "srflow, two levels": {"levels": 2, "steps": 3},
    "robustnf, affine": {"noise_steps": (0, 1, 2)},
    "robustnf, reparametrised": {"coupling": "affinereparam", "noise_steps": (0, 2, 2)},
    "robustnf, rational-quadratic": {"coupling": "rqspline", "noise_steps": (0, 2, 2)},
    "robustnf, rotations that are not trained": {
        "coupling": "rqspline",
        "noise_steps": (1, 2, 2),
        "fixed": True,
    },
    "robustnf, cubic": {"coupling": "bspline", "noise_steps": (0, 2, 2)},
}


def noises(net):
    """None, zero and an image for nets that know of noise, as they and as our models take it."""
    if net.noise_steps is None:
        return {None: None}
    image = 0.05 * torch.randn(2, 3, 16, 24, dtype=torch.float64)
    return {None: None, 0.0: torch.zeros(2, 3, 1, 1, dtype=torch.float64), image: image}


@pytest.mark.parametrize("dtype", KEYS, ids=str)
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_imported_models_follow_the_published_formulas(published, name, dtype):
    net = published.Net(**TINY | NETS[name])
    state = published.random_state(net)
    options = {} if net.noise_steps is None else {"noise_steps": net.noise_steps}
    method = "from_srflow" if net.noise_steps is None else "from_robustnf"
    model = getattr(SuperResolutionFlow, method)(state, stacked=net.stacked, **options).to(dtype)
    lr = torch.rand(2, 3, 4, 6, dtype=torch.float64)
    # Some pixels within the box of the splines, and some beyond.
    x = 0.3 * torch.randn(2, 3, 4 * net.scale, 6 * net.scale, dtype=torch.float64)
    maps = published.encoder_maps(state, net, lr)
    near = 1e-10 if dtype == torch.float64 else 1e-4
    found = []
    for noise, seen in noises(net).items():
        latents, logdet = published.flow(state, net, x, maps, seen)
        told = noise.to(dtype) if torch.is_tensor(noise) else noise
        condition = model.condition(lr.to(dtype), told)
        base = 0.0 if condition.base is None else condition.base
        ours, ladj = model.encode(x.to(dtype) + base, condition)
        for a, b in zip(ours, latents, strict=True):
            torch.testing.assert_close(a, b.to(dtype), rtol=near, atol=near)
        # The published log-determinant holds the prior of what splits off.
        ladj = ladj + sum(map(normal, ours[:-1]))
        torch.testing.assert_close(ladj, logdet.to(dtype), rtol=near, atol=near)
        bits = model.nll(x.to(dtype) + base, condition, dequantize=False, bits_per="pixel")
        expected = published.bits(logdet, latents[-1], x).to(dtype)
        torch.testing.assert_close(bits, expected, rtol=near, atol=near)
        back = model.decode([z.to(dtype) for z in latents], condition) - base
        torch.testing.assert_close(back, x.to(dtype), rtol=10 * near, atol=10 * near)
        found.append(latents[-1])
    for a, b in itertools.combinations(found, 2):  # to know of no noise is not to know nothing
        assert (a - b).abs().max() > 1e-3


# -- the formulas and the models, against numbers that the published code computed --------------

MODELS = {
    "srflow_x4_tiny": SuperResolutionFlow.from_srflow,
    "srflow_x8_tiny": SuperResolutionFlow.from_srflow,
    "robustnf_x4_affine_tiny": SuperResolutionFlow.from_robustnf,
    "robustnf_x4_rqs_tiny": SuperResolutionFlow.from_robustnf,
}


LARGE_NETS = {
    "srflow_x4_tiny": {},
    "srflow_x8_tiny": {"scale": 8, "levels": 4},
    "robustnf_x4_affine_tiny": {"noise_steps": (0, 2, 2)},
    "robustnf_x4_rqs_tiny": {"noise_steps": (0, 2, 2), "coupling": "rqspline", "fixed": True},
}


@pytest.mark.parametrize("name", LARGE_NETS)
@torch.no_grad()
def test_the_formulas_give_the_published_numbers(golden, published, name):
    g = load_file(golden(f"{name}.safetensors"))
    net = published.Net(steps=2, blocks=2, stacked=(0, 0, 1, 1), **LARGE_NETS[name])
    state = weights(g, torch.float64)
    assert {k: tuple(v.shape) for k, v in state.items()} == published.shapes(net)
    lr = (g["lr_uint8"].permute(0, 3, 1, 2).float() / 255).double()
    maps = published.encoder_maps(state, net, lr)
    image = g["std_img"].double() if "std_img" in g else None
    seen = {"nostd": None, "stdzero": torch.zeros(1, 3, 1, 1).double(), "stdimg": image}
    for mode, noise in seen.items():
        if f"f64.{mode}.fwd.logdet" in g:
            latents, logdet = published.flow(state, net, g["gt"].double(), maps, noise)
            bits = published.bits(logdet, latents[-1], g["gt"])
            torch.testing.assert_close(logdet, g[f"f64.{mode}.fwd.logdet"], rtol=0, atol=1e-8)
            torch.testing.assert_close(bits, g[f"f64.{mode}.fwd.nll"], rtol=0, atol=1e-12)
            for i, z in enumerate(latents):
                what = "z" if i == len(latents) - 1 else f"eps{i}"
                expected = g.get(f"f64.{mode}.fwd.{what}", z)
                atol = 1e-12 if expected.dtype == torch.float64 else 1e-6
                torch.testing.assert_close(z, expected.double(), rtol=0, atol=atol)


def model_and_golden(file, name, dtype):
    g = load_file(file)
    model = MODELS[name](weights(g, dtype), stacked=(0, 0, 1, 1))
    lr = (g["lr_uint8"].permute(0, 3, 1, 2).float() / 255).to(dtype).contiguous()
    return g, model, lr


@pytest.mark.parametrize("dtype", KEYS, ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_imported_models_compute_what_the_published_ones_do(golden, name, dtype):
    g, model, lr = model_and_golden(golden(f"{name}.safetensors"), name, dtype)
    key = KEYS[dtype]
    exact = dtype == torch.float64
    tried = 0
    for mode, noise in {"nostd": None, "stdzero": 0.0, "stdimg": g.get("std_img")}.items():
        if f"{key}.{mode}.fwd.logdet" not in g:
            continue
        tried += 1
        condition = model.condition(lr, noise.to(dtype) if torch.is_tensor(noise) else noise)
        base = 0.0 if condition.base is None else condition.base
        hr = g["gt"].to(dtype) + base  # robustNF's golden input is the residual
        latents, ladj = model.encode(hr, condition)
        names = [*(f"eps{i}" for i in range(len(latents) - 1)), "z"]
        for latent, what in zip(latents, names, strict=True):
            expected = g.get(f"{key}.{mode}.fwd.{what}")
            if expected is not None:
                # Where the golden numbers were rounded to float32, so are the demands.
                atol = 1e-9 if expected.dtype == torch.float64 else (1e-6 if exact else 1e-5)
                torch.testing.assert_close(latent, expected.to(dtype), rtol=atol, atol=atol)
        # The published log-determinant holds the prior of what splits off.
        logdet = ladj + sum(normal(z) for z in latents[:-1])
        expected = g[f"{key}.{mode}.fwd.logdet"].to(dtype)
        torch.testing.assert_close(logdet, expected, rtol=0, atol=1e-6 if exact else 0.05)
        nll = model.nll(hr, condition, dequantize=False, bits_per="pixel")
        expected = g[f"{key}.{mode}.fwd.nll"].to(dtype)
        torch.testing.assert_close(nll, expected, rtol=1e-9 if exact else 1e-4, atol=0)
        sr = model.decode([g[f"rev_in.{n}"].to(dtype) for n in names], condition) - base
        expected = g.get(f"{key}.{mode}.rev.sr", g[f"f64.{mode}.rev.sr"])
        atol = 1e-4
        if exact:
            atol = 1e-9 if expected.dtype == torch.float64 else 2e-6
        torch.testing.assert_close(sr, expected.to(dtype), rtol=1e-9 if exact else 1e-4, atol=atol)
    assert tried >= 1


@torch.no_grad()
def test_dequantised_input_gives_the_published_latents(golden):
    name = "srflow_x4_tiny"
    g, model, lr = model_and_golden(golden(f"{name}.safetensors"), name, torch.float64)
    noisy = g["gt"].double() + (g["f64.dequant.u"].double() - 0.5) / 32
    latents, ladj = model.encode(noisy, lr)
    assert torch.allclose(latents[-1].square().sum(), g["f64.dequant.z_sqsum"], rtol=1e-9)
    published = ladj + sum(normal(z) for z in latents[:-1]) - math.log(32) * 160 * 160
    assert torch.allclose(published, g["f64.dequant.logdet"], rtol=0, atol=1e-6)


# -- checkpoints of full size -------------------------------------------------------------------

EIGHT = {"scale": 8, "levels": 4}
NOISE = {3: {"noise_steps": (0, 16, 16)}, 4: {"noise_steps": (0, 0, 16, 16), "steps": 20}}

#: The published configurations, and how many parameters their checkpoints hold.
FULL_SIZE = {
    "SRFlow_DF2K_4X": ({}, 39_541_811),
    "SRFlow_DF2K_8X": (EIGHT, 50_821_891),
    "SRFlow_CelebA_8X": ({**EIGHT, "blocks": 8, "stacked": (1, 3, 5, 7)}, 40_030_531),
    "robustNF_4X_affine": (NOISE[3], 41_662_643),
    "robustNF_4X_RQspline": ({**NOISE[3], "coupling": "rqspline"}, 46_545_587),
    "robustNF_4X_RQspline_permfixed": (
        {**NOISE[3], "coupling": "rqspline", "fixed": True},
        46_724_435,
    ),
    "robustNF_8X_affine": ({**EIGHT, **NOISE[4]}, 64_520_163),
    "robustNF_8X_RQspline": ({**EIGHT, **NOISE[4], "coupling": "rqspline"}, 77_282_403),
}


def test_the_shapes_are_those_of_the_published_checkpoints(golden, published):
    for name, (options, total) in FULL_SIZE.items():
        text = golden(f"keys/{name}.txt").read_text()
        lines = re.findall(r"^(\S+) \[(.*)\] float32$", text, re.MULTILINE)
        listed = {key: tuple(int(n) for n in shape.split(", ")) for key, shape in lines}
        assert published.shapes(published.Net(**options)) == listed, name
        assert int(re.search(r"(\d+) parameters", text)[1]) == total


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_key_of_a_full_size_checkpoint_is_imported(published, name):
    options, total = FULL_SIZE[name]
    net = published.Net(**options)
    # Each tensor has a value of its own, and next to no memory.
    shapes = enumerate(published.shapes(net).items())
    state = {key: torch.tensor(float(n)).expand(shape) for n, (key, shape) in shapes}
    method = "from_srflow" if name.startswith("SRFlow") else "from_robustnf"
    model = getattr(SuperResolutionFlow, method)(state)
    report, noise_steps = model.import_report, net.noise_steps and list(net.noise_steps)
    family = {"affine": "Affine", "rqspline": "Robust"}[net.coupling]

    assert set(report.keys) == set(state)
    assert report.elements == total
    dead = [k for k, names in report.keys.items() if not names]
    assert sorted(dead) == [f"{FLOW}f.0.bias", f"{FLOW}f.0.weight"]
    ours = model.state_dict()
    for key, names in report.keys.items():
        assert all((ours[n] == state[key].flatten()[0]).all() for n in names), key
    filled = [n for names in report.keys.values() for n in names]
    assert len(filled) == len(set(filled))
    rest = {k for k in ours if not k.endswith("initialized") and ".guard." not in k}
    assert rest == set(filled)
    assert report.unread + sum(ours[n].numel() for n in filled) == total

    assert (model.scale, model.flow.levels) == (net.scale, net.levels)
    assert report.inferred["steps"] == [net.steps] * net.levels
    assert type(report.inferred["coupling"]).__name__ == family
    assert report.inferred["noise_steps"] == noise_steps
    assert "keys" in str(report)


# -- small models -----------------------------------------------------------------------------


def small(**kwargs):
    options = {"levels": 3, "steps": 2, "blocks": 1, "stacked": (0,), "coupling": "affine"}
    options |= {"residual": False, "hidden": 8, **kwargs}
    return SuperResolutionFlow.published(**options)


def published_state(model):
    """A checkpoint as the published code would write it, of a model of ours."""
    text = {"Affine": "affine", "Robust": "rqspline"}
    family = type(model.flow.steps[0][0].coupling.map).__name__
    n, numbers = 0, []
    for level in range(model.flow.levels):
        first = n + 1
        middle = first + len(model.flow.transitions[level])
        last = middle + len(model.flow.steps[level])
        split = last if level < len(model.flow.splits) else None
        numbers.append((tuple(range(first, middle)), tuple(range(middle, last)), split))
        n = last if split is None else last + 1
    layout = FlowLayout(
        tuple(numbers),
        text[family],
        model.conditioner.encoder.channels,
        model.flow.steps[0][0].coupling.first_kept.out_channels,
        model.flow.noise_channels,
        False,
    )
    generator = torch.Generator().manual_seed(0)
    state = OrderedDict(
        (key, 0.1 * torch.randn(e.shape, generator=generator))
        for key, e in plan_flow(model.flow, layout).items()
    )
    for key in state:
        if "invconv" in key:
            state[key] = torch.linalg.qr(state[key])[0].contiguous()
    for key, value in model.conditioner.encoder.state_dict().items():
        state[f"RRDB.{key}"] = value
    state[f"{FLOW}f.0.weight"], state[f"{FLOW}f.0.bias"] = torch.zeros(3, 4, 3, 3), torch.zeros(3)
    return state


STATE = published_state(small())
NOISY = published_state(small(noise_std=0.05, residual=True))
LR = torch.rand(1, 3, 6, 8)


def load(state, method="from_srflow", **options):
    return getattr(SuperResolutionFlow, method)(state, stacked=(0,), **options)


def without(*keys):
    return {k: v for k, v in STATE.items() if k not in keys}


@pytest.mark.parametrize("form", ["raw", "nested", "module", "file", "safetensors", "resume"])
@torch.no_grad()
def test_checkpoints_of_all_forms_load(form, tmp_path):
    state, source = STATE, None
    if form == "nested":
        source = {"iter": 5, "params": {}, "state_dict": state}
    if form == "module":
        source = {f"module.{k}": v for k, v in state.items()}
    if form == "file":
        source = tmp_path / "5_G.pth"
        torch.save(state, source)
    if form == "safetensors":
        source = str(tmp_path / "5_G.safetensors")
        save_file(dict(state), source)
    if form == "resume":
        source = {"model": state, "ema": {}, "optimizer": {"state": {}}}
    model = load(state if source is None else source)
    latents = [torch.ones(1, *s) for s in model.latent_shapes(LR)]
    assert torch.equal(model.decode(latents, LR), load(STATE).decode(latents, LR))
    assert not model.training


def test_loading_draws_no_random_numbers():
    torch.manual_seed(3)
    load(STATE)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "run"),))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="not opened"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "run").exists()


@torch.no_grad()
def test_imported_normalisations_count_as_initialised():
    model = load(STATE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train().nll(torch.rand(1, 3, 24, 32), LR)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_imported_coupling_may_be_read_as_another():
    model = load(STATE, coupling=ReparametrizedAffine())
    assert isinstance(model.flow.steps[0][0].coupling.map, ReparametrizedAffine)


def test_a_scale_of_two_leaves_the_other_doublings_unread():
    state = published_state(small(scale=2))
    for leaf, shape in (("weight", (64, 64, 3, 3)), ("bias", (64,))):
        state[f"RRDB.upconv2.{leaf}"] = torch.zeros(shape)
    model = load(state, scale=2)
    assert model.import_report.keys["RRDB.upconv1.bias"]
    assert not model.import_report.keys["RRDB.upconv2.bias"]
    assert model.sample(LR).shape == (1, 1, 3, 12, 16)


SOME = f"{FLOW}layers.4.affine.fFeatures.2.weight"
ITEMS, PARTS = STATE.items(), ("weight", "bias")
FOREIGN = {
    "missing": (lambda: load(without(SOME)), f"1 missing: {re.escape(SOME)}"),
    "unexpected": (lambda: load(STATE | {"head.bias": torch.ones(1)}), "1 unexpected: head.bias"),
    "misshapen": (
        lambda: load(STATE | {SOME: torch.zeros(8, 9, 1, 1)}),
        re.escape(f"{SOME} (8, 9, 1, 1) instead of (8, 8, 1, 1)"),
    ),
    "a whole layer": (
        lambda: load({k: v for k, v in STATE.items() if not k.startswith(f"{FLOW}layers.4.")}),
        r"layers\.",
    ),
    "no encoder": (
        lambda: load({k: v for k, v in STATE.items() if not k.startswith("RRDB.")}),
        "RRDB.conv_first.weight is missing",
    ),
    "no flow": (lambda: load({"conv.weight": torch.ones(2)}), "no checkpoint of SRFlow"),
    "training state": (lambda: load({"epoch": 3, "optimizers": [], "iter": 5}), "no tensors"),
    "not a dictionary": (lambda: load([1, 2]), "holds a list"),
    "two couplings": (
        lambda: load(STATE | {f"{FLOW}layers.5.rqspline.x": torch.ones(1)} | {}),
        "one kind of couplings|do not fit",
    ),
    "robustNF's": (lambda: load(NOISY), "use from_robustnf"),
    "SRFlow's": (lambda: load(STATE, "from_robustnf"), "use from_srflow"),
    "stacked": (lambda: SuperResolutionFlow.from_srflow(STATE), "stacked"),
    "NaN": (
        lambda: load(STATE | {SOME: STATE[SOME] / 0}),
        f"1 not of finite real numbers: {re.escape(SOME)}",
    ),
    "integers": (lambda: load({k: v.long() for k, v in ITEMS}), "no floating-point numbers"),
    "too few stacked": (
        lambda: SuperResolutionFlow.from_srflow(STATE, stacked=()),
        r"stacks 1 blocks: stacked must name as many; got \(\)",
    ),
    "LLFlow's": (
        lambda: load(STATE | {"RRDB.conv_second.weight": torch.zeros(1)}),
        "use LowLightFlow.from_llflow",
    ),
    "a greater scale": (
        lambda: load(
            STATE | {f"RRDB.upconv3.{leaf}": STATE[f"RRDB.upconv2.{leaf}"] for leaf in PARTS},
            scale=4,
        ),
        "2 unexpected: RRDB.upconv3.weight, RRDB.upconv3.bias",
    ),
    "no kernel": (
        lambda: load(STATE | {"RRDB.conv_first.weight": torch.zeros(5)}),
        r"conv_first.weight must be the kernel of a convolution; it has shape \(5,\)",
    ),
    "no kernel in a block": (
        lambda: load(STATE | {"RRDB.RRDB_trunk.0.RDB1.conv1.weight": torch.zeros(())}),
        r"conv1.weight must be the kernel of a convolution; it has shape \(\)",
    ),
    "no kernel in a coupling": (
        lambda: load({k: v.sum() if k.endswith("fFeatures.0.weight") else v for k, v in ITEMS}),
        "fFeatures.0.weight must be the kernel of a convolution",
    ),
    "a block without a number": (
        lambda: load(STATE | {"RRDB.RRDB_trunk.x.weight": torch.zeros(1)}),
        "1 unexpected: RRDB.RRDB_trunk.x.weight",
    ),
    "a name cut short": (
        lambda: load(STATE | {"RRDB.RRDB_trunk": torch.zeros(1)}),
        "1 unexpected: RRDB.RRDB_trunk$",
    ),
    "a number without end": (
        lambda: load(STATE | {f"RRDB.RRDB_trunk.{10**9}.weight": torch.zeros(1)}),
        "1 unexpected: RRDB.RRDB_trunk.1000000000.weight",
    ),
}


@pytest.mark.parametrize(("call", "match"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_checkpoints_are_told(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    assert issubclass(CheckpointError, ValueError)
    with pytest.raises(FileNotFoundError):
        read_state("nowhere.pth")


class Code:
    def __reduce__(self):
        return print, ("run",)


def truncated(file):
    torch.save({"a": torch.zeros(100)}, file)
    file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize(
    "write",
    [
        truncated,
        lambda file: file.write_text("a page of text"),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(pickle.dumps(Code(), protocol=2)),
    ],
    ids=["truncated", "text", "empty", "code"],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_file_that_is_no_checkpoint_is_named_and_not_run(tmp_path, capsys, write, name):
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read as a file of tensors"):
        read_state(tmp_path / name)
    assert "run" not in capsys.readouterr().out


# -- one computation, two paths ---------------------------------------------------------------


@torch.no_grad()
def move(model):
    """Moves the last layers away from zero; any others make decoding chaotic soon."""
    for layer in model.modules():
        if isinstance(layer, ZeroConv2d):
            layer.weight.normal_(std=0.01)
            layer.bias.normal_(std=0.1)


def shaken(**kwargs):
    model = small(**kwargs).double()
    hr, lr = torch.rand(2, 3, 32, 48).double(), torch.rand(2, 3, 8, 12).double()
    model.train()
    with torch.no_grad():
        model.nll(hr, lr)  # initialises
        move(model)
    return model.eval(), hr, lr


@pytest.mark.parametrize("mix", ["free", "orthogonal", "fixed"])
@pytest.mark.parametrize("noise_std", [None, 0.1])
@pytest.mark.parametrize("coupling", ["affine", "robust"])
def test_with_and_without_gradients_is_the_same(coupling, noise_std, mix):
    """With them every layer runs by itself, without them what can be merged is."""
    model, hr, lr = shaken(coupling=coupling, noise_std=noise_std, mix=mix)
    noise = torch.rand_like(hr) if noise_std else 0.0
    latents, ladj = model.encode(hr, model.condition(lr, noise))
    x = model.decode(latents, model.condition(lr, noise))
    with torch.no_grad():
        condition = model.condition(lr, noise)
        fast, fast_ladj = model.encode(hr, condition)
        assert condition.maps.steps[0][0].mix is not None
        assert torch.allclose(model.decode(latents, condition), x, atol=1e-10)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(latents, fast, strict=True))
    assert torch.allclose(ladj, fast_ladj, atol=1e-7)
    # The random rotations are some up to float32.
    assert torch.allclose(x, hr, atol=1e-9 if mix == "free" else 1e-4)
    # A condition made without gradients does not stop those of the latents.
    latents = [z.detach().requires_grad_() for z in latents]
    model.decode(latents, condition).sum().backward()
    assert all(torch.isfinite(z.grad).all() for z in latents)


@torch.no_grad()
def test_a_condition_serves_many_calls_and_checkpoints_know_nothing_of_it():
    model, hr, lr = shaken(coupling="robust")
    names = set(model.state_dict())
    condition = model.condition(lr)
    assert set(model.state_dict()) == names
    a = model.sample(condition, 3, generator=torch.Generator().manual_seed(1))
    b = model.sample(lr, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    assert torch.equal(
        model.nll(hr, condition, dequantize=False), model.nll(hr, lr, dequantize=False)
    )
    latents = [torch.randn(6, *s).double() for s in model.latent_shapes(condition)]
    each = [model.decode([z[i : i + 2] for z in latents], condition) for i in (0, 2, 4)]
    assert torch.allclose(model.decode(latents, condition), torch.cat(each), atol=1e-12)


@pytest.mark.parametrize("what", ["hooked", "parametrised"])
def test_changed_layers_are_still_asked(what):
    model, hr, lr = shaken()
    layer = model.flow.steps[1][0].coupling
    if what == "hooked":
        layer.injector[2].register_forward_hook(lambda m, args, out: out + 1)
    else:
        conv = nn.Conv2d(8, 8, 1, dtype=torch.float64)
        layer.rest[1] = nn.utils.parametrizations.weight_norm(conv)
    plain = model.encode(hr, lr)[0]
    with torch.no_grad():
        fast = model.encode(hr, lr)[0]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(plain, fast, strict=True))


@pytest.mark.parametrize("size", [(6, 10), (2, 2), (5, 8)], ids=str)
@pytest.mark.parametrize("coarse", [0, 5, 8, 9])
def test_convolution_of_coarse_maps(size, coarse):
    x = torch.randn(2, 9, *size, dtype=torch.float64)
    if coarse:
        small = torch.randn(2, coarse, 5, 5, dtype=torch.float64)
        x[:, 9 - coarse :] = F.interpolate(small, scale_factor=2.0)[..., : size[0], : size[1]]
    x[0, 0, 0, 0] += 1
    weight = torch.randn(4, 9, 3, 3, dtype=torch.float64)
    assert torch.allclose(convolve(x, weight), F.conv2d(x, weight, padding=1), atol=1e-12)


# -- use --------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["affine", "robust"])
@pytest.mark.parametrize("size", [(37, 53), (64, 64), (101, 40)], ids=str)
def test_round_trip_at_any_size(size, coupling):
    model = small(coupling=coupling, residual=True)
    hr, lr = torch.rand(1, 3, *size), torch.rand(1, 3, *(math.ceil(n / 4) for n in size))
    model.nll(hr, lr)
    model.eval()
    with torch.no_grad():
        latents, _ = model.encode(hr, lr)
        back = model.decode(latents, lr)[..., : size[0], : size[1]]
    assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes(lr)
    assert (back - hr).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_scales(scale):
    model = small(scale=scale, levels=4, steps=1)
    lr = torch.rand(1, 3, 5, 7)
    assert model.sample(lr).shape == (1, 1, 3, 5 * scale, 7 * scale)


def test_every_parameter_learns():
    model = small(noise_std=0.1, coupling="robust", noise_steps=[2, 2, 2]).train()
    hr, lr = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 4, 4)
    model.nll(hr, lr)
    move(model)
    model.nll(hr, lr).mean().backward()
    head = ("HRconv", "conv_last", "upconv2")  # the encoder's own image, which no flow reads
    for name, p in model.named_parameters():
        if not any(h in name for h in head):
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name


def test_the_first_batch_normalises_the_hidden_layers():
    layer = ConditionalCoupling(4, 3, hidden=6, normed=True, noise_channels=1)
    x, context, noise = (
        torch.randn(4, 4, 8, 8),
        3 + torch.randn(4, 3, 8, 8),
        torch.rand(4, 1, 8, 8),
    )
    heard = []
    layer.rest[0].register_forward_pre_hook(lambda m, args: heard.append(args[0].detach().clone()))
    layer(x, layer.condition(context, noise))
    layer(x, layer.condition(context, noise))
    for hidden in heard:
        assert torch.allclose(hidden.mean((0, 2, 3)), torch.zeros(6), atol=1e-4)
        assert torch.allclose(hidden.std((0, 2, 3), correction=0), torch.ones(6), atol=1e-3)


def test_bits_per_pixel_are_those_of_three_dimensions():
    model, hr, lr = shaken()
    per_dim = model.nll(hr, lr, dequantize=False)
    per_pixel = model.nll(hr, lr, dequantize=False, bits_per="pixel")
    assert torch.allclose(per_pixel, 3 * per_dim)


def test_quant_is_the_number_of_grey_levels():
    torch.manual_seed(0)
    coarse = small(quant=32).eval()
    torch.manual_seed(0)
    fine = small().eval()
    hr, lr = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 4, 4)
    torch.manual_seed(1)
    a = coarse.nll(hr, lr)
    torch.manual_seed(1)
    assert torch.equal(a, fine.nll(hr, lr, 32))


@torch.no_grad()
def test_autocast_does_not_break_the_inverse():
    model, hr, lr = shaken(coupling="robust")
    model, hr, lr = model.float(), hr.float(), lr.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents, ladj = model.encode(hr, lr)
        back = model.decode(latents, lr)
    assert latents[0].dtype == ladj.dtype == torch.float32
    assert (back - hr).abs().max() < 1e-2  # bfloat16 keeps two digits, and many layers follow


def test_training_under_autocast():
    model, hr, lr = shaken(coupling="robust")
    model, hr, lr = model.float().train(), hr.float(), lr.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.nll(hr, lr).mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.flow.parameters() if p.grad is not None)


@pytest.mark.parametrize("coupling", ["affine", "robust"])
@torch.no_grad()
def test_steps_compile_without_a_break(coupling):
    model, _, lr = shaken(coupling=coupling, levels=1, steps=1)
    step = model.flow.steps[0][0]
    x = torch.randn(2, 12, 16, 24).double()
    condition = model.condition(lr).maps.steps[0][0]
    torch._dynamo.reset()
    encode = torch.compile(step.forward, fullgraph=True, backend="aot_eager")
    decode = torch.compile(step.inverse, fullgraph=True, backend="aot_eager")
    z, ladj = encode(x, condition)
    assert torch.allclose(z, step(x, condition)[0], atol=1e-10)
    assert torch.allclose(decode(z, condition)[0], x, atol=1e-8)
    assert torch.allclose(ladj, step(x, condition)[1], atol=1e-8)


def test_what_is_bounded_is_certified():
    published = certify(small(coupling="robust"))
    assert not published.certified
    assert "flow.splits.0" in str(published)  # its prior is free
    bounded = SuperResolutionFlow(
        encoder=RRDBEncoder(blocks=1, stacked=(0,)),
        levels=3,
        steps=1,
        hidden=4,
        transition_steps=1,
        mix="fixed",
        noise_std=0.1,
    )
    assert certify(bounded).certified


# -- migration --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_std", [None, 0.1])
def test_a_migrated_model_starts_where_it_was_and_is_certified(noise_std):
    model, _, _ = shaken(noise_std=noise_std, mix="orthogonal", noise_steps=[0, 2, 2])
    model = model.float()
    hr = torch.rand(4, 3, 32, 48)
    lr = F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True)
    robust, report = migrate(model, hr, lr)
    assert len(report.replaced) == 6 * 2 + 1 + (4 if noise_std else 0)
    assert abs(report.nll_before - report.nll_swapped) < 1e-2
    assert not report.certificate_before.certified
    assert report.certificate_after.certified
    assert type(robust.flow.steps[0][0].coupling.map) is Affine

    latents = [torch.randn(1, *s) for s in model.latent_shapes(lr)]
    with torch.no_grad():
        far = [1e4 * f for f in model.conditioner(lr[:1])]
        noise = torch.zeros(1, 1, 1, 1) if noise_std else None
        image, _ = robust.flow.inverse(latents, robust.flow.condition(far, noise))
        largest = max(z.abs().max().item() for z in latents)
        assert image.abs().max() <= report.certificate_after.bound(largest)
        exploded, _ = model.flow.inverse(latents, model.flow.condition(far, noise))
        assert not exploded.abs().max() < 1e6

    # What was replaced travels with the weights, and is trained on.
    again = copy.deepcopy(robust)
    again.load_state_dict(robust.state_dict())
    robust.train().nll(hr, lr).mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in robust.parameters() if p.grad is not None)
    with torch.no_grad():
        assert torch.equal(
            again.eval().decode(latents, lr[:1]), robust.eval().decode(latents, lr[:1])
        )


def test_what_is_robust_already_is_kept():
    model, hr, lr = shaken(coupling="robust")
    _, report = migrate(model, hr, lr)
    assert [r.name for r in report.replaced] == ["flow.splits.0"]
    assert len(report.kept) == 6


MODEL = small()
OTHER = small(levels=2, steps=1, scale=4)
MISTAKES = {
    "channels": (lambda: MODEL.sample(LR[:, :1]), r"\(B, 3, H, W\); got"),
    "empty": (lambda: MODEL.sample(LR[..., :0]), r"\(B, 3, H, W\); got"),
    "condition of another": (lambda: MODEL.sample(OTHER.condition(LR)), "another"),
    "noise": (lambda: MODEL.condition(LR, torch.zeros(1, 3, 24, 32)), "knows of no noise"),
    "noise channels": (
        lambda: small(noise_std=0.1).condition(LR, torch.zeros(1, 2, 24, 32)),
        r"\(B, 3, H, W\)",
    ),
    "negative noise": (
        lambda: small(noise_std=0.1).condition(LR, -1.0),
        "noise must be finite and not negative; got -1.0",
    ),
    "no noise at all": (
        lambda: small(noise_std=0.1).condition(LR, torch.zeros(1, 3, 0, 0)),
        r"\(B, 3, H, W\)",
    ),
    "noise rows": (
        lambda: small(noise_std=0.1).condition(LR, torch.zeros(2, 3, 24, 32)),
        "one noise map for each",
    ),
    "latents": (lambda: MODEL.decode([torch.zeros(1, 6, 12, 16)], LR), "one latent for each"),
    "bits": (lambda: MODEL.nll(torch.rand(1, 3, 24, 32), LR, bits_per="byte"), "dim, pixel"),
    "architecture": (lambda: SuperResolutionFlow(architecture="x"), "bounded, published"),
    "features": (
        lambda: SuperResolutionFlow(features=3, encoder=RRDBEncoder(blocks=1, stacked=(0,))),
        "128 channels of the encoder; got 3",
    ),
    "quant": (lambda: small(quant=1), "2 grey levels"),
    "noise_std": (lambda: small(noise_std=-1.0), "not be negative"),
    "steps": (lambda: small(steps=[2, 2]), "each of the 3 levels"),
    "splits": (lambda: small(splits=4), "splits"),
    "noise steps": (lambda: small(noise_std=0.1, noise_steps=[1]), "each of the 3 levels"),
}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: MODEL.sample([1]), "a tensor of LR images, or what condition"),
        (lambda: small(noise_std=0.1).condition(LR, "x"), "a tensor, a number or None; got str"),
        (lambda: MODEL.sample(LR.double()), "the dtype torch.float32 of the model"),
    ],
)
def test_mistaken_types_are_told(call, match):
    with pytest.raises(TypeError, match=match):
        call()


@pytest.mark.parametrize(("call", "match"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(call, match):
    with pytest.raises(ValueError, match=match):
        call()
