r"""Migrated models that are saved in folders: what comes back, and what is refused."""

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flowguard
from flowguard.image import Split, maps
from flowguard.image.migration import BoundedSplit, InscribedCoupling
from flowguard.models import LowLightEncoder, LowLightFlow, SuperResolutionFlow, store
from flowguard.models.store import PretrainedError

GOLDEN = Path(__file__).parents[1] / "golden" / "saved" / "migrated"
SMALL = {"scale": 2, "levels": 2, "steps": 1, "hidden": 4}


def superres(coupling="affine", **options):
    options = {"coupling": coupling, "margin": None, **options}
    return SuperResolutionFlow(**SMALL, features=4, **options)


def published():
    return SuperResolutionFlow.published(
        **SMALL, splits=1, blocks=1, stacked=(0,), coupling="affine", residual=False
    )


def noisy():
    return superres(noise_std=0.05)


def lowlight():
    encoder = LowLightEncoder(features=4, growth=4, blocks=1, stacked=(0,), levels=2)
    return LowLightFlow(levels=2, steps=(1, 2), hidden=4, encoder=encoder, coupling="affine")


MODELS = {
    "affine": superres,
    "reparametrized": lambda: superres("reparametrized"),
    "noise": noisy,
    "published": published,
    "low light": lowlight,
}


def scale_of(model):
    return getattr(model, "scale", 1)


def pairs(model, n=8):
    low = torch.rand(n, 3, 8, 8)
    high = low.repeat_interleave(scale_of(model), 2).repeat_interleave(scale_of(model), 3)
    return (high + 0.05 * torch.randn_like(high)).clamp(0, 1), low


def guarded(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.conditioner.fit(torch.rand(16, 3, 8, 8), progress=False)
        model.conditioner.calibrate(torch.rand(49, 3, 8, 8), progress=False)
    return model.eval()


def migrated(make, **options):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    high, low = pairs(model)
    with torch.no_grad():
        model.train().encode(high, low)  # initialises the normalisations
    robust, report = flowguard.migrate(guarded(model), high, low, **options)
    assert report.certificate_after.certified
    assert not report.certificate_before.certified
    return robust


def assert_same(first, second):
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert repr(first) == repr(second)
    low = torch.rand(2, 3, 7, 5)
    samples = [m.sample(low, 2, 0.8, torch.Generator().manual_seed(1)) for m in (first, second)]
    assert torch.equal(*samples)
    reports = [m.conditioner.report for m in (first, second)]
    assert torch.equal(reports[0].p_value, reports[1].p_value)
    bounds = [flowguard.certify(m).bound(4.0) for m in (first, second)]
    assert bounds[0] == bounds[1]


def steps_of_training(model):
    model.train()
    optimizer = torch.optim.Adam(model.flow.parameters(), 1e-3)  # the guard knows its encoder
    high, low = pairs(model)
    for _ in range(2):
        optimizer.zero_grad()
        latents, ladj = model.encode(high, low)
        (sum(z.square().sum() for z in latents) - ladj.sum()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_migrated_model_comes_back_bit_for_bit(make, tmp_path):
    robust = migrated(make)
    robust.save_pretrained(tmp_path / "one")
    loaded = type(robust).from_pretrained(tmp_path / "one")
    assert loaded.conditioner.calibrated
    assert_same(robust, loaded)
    # further training, of the loaded one too, and once more
    for model in (robust, loaded):
        torch.manual_seed(1)
        steps_of_training(model)
    assert_same(robust, loaded)
    loaded.save_pretrained(tmp_path / "two")
    again = store.load(tmp_path / "two")
    assert type(again) is type(robust)
    assert_same(loaded, again)


def test_each_part_of_a_coupling_is_replaced():
    robust = migrated(noisy)
    parts = {tuple(m.units) for m in robust.modules() if isinstance(m, InscribedCoupling)}
    assert parts == {("injector", "noise", "rest")}


def test_options_and_dtypes_of_the_splines_come_back(tmp_path):
    robust = migrated(superres, bound=4.0, shift_bound=2.5, slope=0.01)
    robust.double().save_pretrained(tmp_path)
    loaded = SuperResolutionFlow.from_pretrained(tmp_path)
    found = [m for m in loaded.modules() if isinstance(m, InscribedCoupling)]
    assert found
    for coupling in found:
        for units in coupling.units.values():
            assert units.options == {"bound": 4.0, "shift_bound": 2.5, "slope": 0.01}
            assert units.scale_in.dtype == torch.float64
    assert all(torch.equal(v, robust.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_what_is_compiled_is_saved_as_it_is_without(tmp_path):
    robust = migrated(superres)
    compiled = copy.deepcopy(robust)
    step = compiled.flow.steps[0][0]
    step.coupling = torch.compile(step.coupling, backend="eager")
    compiled.flow = torch.compile(compiled.flow, backend="eager")
    compiled.save_pretrained(tmp_path)
    assert_same(robust, SuperResolutionFlow.from_pretrained(tmp_path))


def test_bounds_of_priors_come_back(tmp_path):
    robust = migrated(published)
    robust.save_pretrained(tmp_path)
    loaded = SuperResolutionFlow.from_pretrained(tmp_path)
    splits = [
        [m for m in model.modules() if isinstance(m, BoundedSplit)] for model in (robust, loaded)
    ]
    assert len(splits[0]) == 1
    assert splits[0][0].changes() == splits[1][0].changes()
    assert splits[1][0].faithful


def test_what_was_migrated_twice_is_saved(tmp_path):
    robust = migrated(superres)
    again, report = flowguard.migrate(robust, *pairs(robust))
    assert not report.replaced
    again.save_pretrained(tmp_path)
    assert_same(robust, SuperResolutionFlow.from_pretrained(tmp_path))


def test_the_format_is_raised_for_migrated_and_limited_models_alone(tmp_path):
    torch.manual_seed(0)
    robust = migrated(superres)
    models = {
        "plain": superres().limit(None),
        "migrated": copy.deepcopy(robust).limit(None),
        "limited": superres().limit(0.25),
        "both": robust.limit(0.25),
    }
    formats = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        formats[name] = json.loads((tmp_path / name / "config.json").read_text())["format"]
        assert repr(SuperResolutionFlow.from_pretrained(tmp_path / name)) == repr(model.eval())
    assert formats == {"plain": 2, "migrated": 3, "limited": 4, "both": 4}
    # All that reads no more than format 2 refuses a higher number by it.
    assert "replaced" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def change(folder, change_it):
    """A configuration changed in both of its places."""
    config = json.loads((folder / "config.json").read_text())
    change_it(config)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"flowguard": json.dumps(config)})


COUPLING = "flow.steps.0.0.coupling"
OPTIONS = {"bound": 5.0, "shift_bound": 5.0, "slope": 1e-3}
SPOILED = {
    "a class of torch": (
        lambda c: c["replaced"].update({COUPLING: {"type": "Linear"}}),
        "is a Linear, which this flowguard",
    ),
    "a function of the system": (
        lambda c: c["replaced"].update({COUPLING: {"type": "os.system", "command": "true"}}),
        r"is a os\.system, which this flowguard",
    ),
    "a map in place of a layer": (
        lambda c: c["replaced"].update({COUPLING: {"type": "Robust"}}),
        "is a Robust, which this flowguard",
    ),
    "no name": (lambda c: c["replaced"].update({COUPLING: {"type": [1]}}), r"is a \[1\]"),
    "no record": (lambda c: c["replaced"].update({COUPLING: 3}), "is a None"),
    "no records": (lambda c: c.pop("replaced"), "lacks 'replaced'"),
    "records of another format": (lambda c: c.update(format=2), "that format 2 does not"),
    "no such layer": (
        lambda c: c["replaced"].update({"flow.nothing": {"type": "BoundedSplit"}}),
        "do not fit",
    ),
    "the whole model": (
        lambda c: c["replaced"].update({"": {"type": "InscribedCoupling", "units": {}}}),
        "do not fit.*got SuperResolutionFlow",
    ),
    "another layer": (
        lambda c: c["replaced"].update(
            {COUPLING: {"type": "BoundedSplit", "mean_bound": 1.0, "scale_bound": 1.0}}
        ),
        "do not fit.*got ConditionalCoupling",
    ),
    "another part": (
        lambda c: c["replaced"][COUPLING]["units"].update(all=OPTIONS),
        "do not fit.*all",
    ),
    "a part without noise": (
        lambda c: c["replaced"][COUPLING]["units"].update(noise=OPTIONS),
        "do not fit.*noise",
    ),
    "options that there are not": (
        lambda c: c["replaced"][COUPLING]["units"]["rest"].update(bound=-1.0),
        "do not fit",
    ),
    "an unknown option": (
        lambda c: c["replaced"][COUPLING]["units"]["rest"].update(bins=8),
        "do not fit",
    ),
    "too few": (lambda c: c["replaced"].pop(COUPLING), "do not fit"),
    "a bound that is none": (
        lambda c: c["replaced"].update(
            {"flow.splits.0": {"type": "BoundedSplit", "mean_bound": True, "scale_bound": 1.0}}
        ),
        "do not fit.*mean_bound of flow.splits.0 must be a number; got True",
    ),
    "a prior that is bounded already": (
        lambda c: c["replaced"].update(
            {"flow.splits.0": {"type": "BoundedSplit", "mean_bound": 1.0, "scale_bound": 1.0}}
        ),
        "do not fit.*free prior",
    ),
    "no bound": (
        lambda c: c["replaced"][COUPLING]["units"]["rest"].pop("bound"),
        f"do not fit.*{COUPLING} lacks 'bound'",
    ),
    "no bound of the shift": (
        lambda c: c["replaced"][COUPLING]["units"]["injector"].pop("shift_bound"),
        "lacks 'shift_bound'",
    ),
    "no units": (lambda c: c["replaced"][COUPLING].pop("units"), "do not fit.*units"),
    "another map": (
        lambda c: c["arguments"].update(coupling={"type": "Robust"}),
        "do not fit.*affine maps alone",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    migrated(superres).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("spoil", "match"), SPOILED.values(), ids=SPOILED)
def test_what_is_refused(spoil, match, folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    change(tmp_path, spoil)
    for loader in (SuperResolutionFlow.from_pretrained, store.load):
        with pytest.raises(PretrainedError, match=match):
            loader(tmp_path)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_units_that_are_none_are_refused(factor, tmp_path):
    model = store.load(GOLDEN)
    unit = next(b for name, b in model.named_buffers() if name.endswith("scale_in"))
    unit.mul_(factor)
    with pytest.raises(RuntimeError, match="scale_in must be finite and positive; got"):
        store.load(GOLDEN).load_state_dict(model.state_dict())
    with pytest.raises(PretrainedError, match="scale_in must be finite and positive; got"):
        model.save_pretrained(tmp_path)


def test_bounds_of_a_prior_are_checked():
    bounded = next(m for m in migrated(published).modules() if isinstance(m, BoundedSplit))
    with pytest.raises(ValueError, match="free prior"):
        BoundedSplit.restore(bounded, 1.0, 1.0)
    with pytest.raises(ValueError, match="scale_bound must be"):
        BoundedSplit.restore(Split(12, mean_bound=None, scale_bound=None), 1.0, math.inf)


def test_maps_within_the_library_are_no_couplings_of_a_file():
    assert set(store.MAPS) == {"Affine", "CubicBSpline", "ReparametrizedAffine", "Robust"}
    for kind in (maps.Inscribed, maps.Ahead):
        assert kind.__name__ not in store.MAPS


def test_a_state_dict_goes_into_a_second_migrated_copy():
    first, second = migrated(superres), migrated(superres)
    steps_of_training(first)
    second.load_state_dict(first.state_dict())
    assert_same(first, second)


def test_what_is_kept_of_a_migrated_model():
    model = store.load(GOLDEN)
    assert sum(isinstance(m, InscribedCoupling) for m in model.modules()) == 2
    assert flowguard.certify(model).certified
    with safe_open(GOLDEN / "model.safetensors", framework="pt") as opened:
        config = json.loads(opened.metadata()["flowguard"])
    assert config["format"] == 3
    assert sum(p.stat().st_size for p in GOLDEN.iterdir()) < 200_000
