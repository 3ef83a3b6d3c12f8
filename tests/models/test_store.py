r"""Models saved in folders: what comes back, and what is refused."""

import contextlib
import copy
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowguard import certify
from flowguard.data import downsample, photograph
from flowguard.image import maps
from flowguard.models import (
    LowLightEncoder,
    LowLightFlow,
    PyramidEncoder,
    SuperResolutionFlow,
    load,
    store,
)
from flowguard.models.store import PretrainedError

COUPLINGS = {
    "affine": "affine",
    "reparametrized": "reparametrized",
    "bspline": "bspline",
    "robust": "robust",
    "eight bins": maps.Robust(bins=8, bound=4.0, slope=None),
    "free shift": maps.Robust(shift_bound=None),
    "other eps": maps.Affine(eps=0.01),
}


def build(coupling="robust", **options):
    torch.manual_seed(0)
    model = SuperResolutionFlow(
        **{"scale": 2, "levels": 2, "steps": 1, "hidden": 4, "features": 4, **options},
        coupling=coupling,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def guarded(model):
    model.conditioner.alpha = 0.02
    model.conditioner.boundary = 0.9
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.conditioner.fit(torch.rand(16, 3, 8, 8, dtype=dtype), progress=False)
        model.conditioner.calibrate(torch.rand(99, 3, 8, 8, dtype=dtype), progress=False)
    return model.eval()


def state_of(model):
    return {k: (v.dtype, v.clone()) for k, v in model.state_dict().items()}


def assert_same(first, second):
    a, b = state_of(first), state_of(second)
    assert list(a) == list(b)
    for name in a:
        assert a[name][0] == b[name][0], name
        assert torch.equal(*(t[name][1].flatten().view(torch.uint8) for t in (a, b))), name
    assert repr(first) == repr(second)
    dtype = next(first.parameters()).dtype
    lr = torch.rand(2, 3, 7, 5, dtype=dtype)
    samples = [m.sample(lr, 2, 0.8, torch.Generator().manual_seed(1)) for m in (first, second)]
    assert torch.equal(*samples)
    reports = [m.conditioner.report for m in (first, second)]
    if reports[0] is not None:
        assert torch.equal(reports[0].p_value, reports[1].p_value)
        for name, level in reports[0].levels.items():
            assert level.threshold == reports[1].levels[name].threshold
            assert torch.equal(level.map, reports[1].levels[name].map)


@pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS)
def test_everything_comes_back_bit_for_bit(coupling, tmp_path):
    model = guarded(build(coupling))
    model.save_pretrained(tmp_path)
    loaded = SuperResolutionFlow.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.conditioner.calibrated
    assert_same(model, loaded)
    # and once more, from the loaded one
    loaded.save_pretrained(tmp_path / "again")
    assert_same(model, store.load(tmp_path / "again"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_dtype_comes_back(dtype, tmp_path):
    model = guarded(build().to(dtype))
    model.save_pretrained(tmp_path)
    assert_same(model, SuperResolutionFlow.from_pretrained(tmp_path))


def test_options_of_the_guard_come_back(tmp_path):
    model = build(encoder=PyramidEncoder(4, scale=2, levels=2, blocks=1))
    fresh = type(model.conditioner)(
        model.conditioner.encoder,
        "shrink",
        levels=["fine", "coarse"],
        shrinkage=0.25,
        statistic="max",
    )
    model.conditioner = fresh
    guarded(model)
    model.save_pretrained(tmp_path)
    loaded = SuperResolutionFlow.from_pretrained(tmp_path).conditioner
    assert (loaded.policy, loaded.level_names, loaded.alpha, loaded.boundary) == (
        "shrink",
        ["fine", "coarse"],
        0.02,
        0.9,
    )
    assert (loaded.guard.shrinkage, loaded.guard.statistic) == (0.25, "max")
    x = torch.rand(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(loaded(x * 9)[0], model.conditioner(x * 9)[0])


@pytest.mark.parametrize("required", [False, True])
def test_whether_a_calibration_is_required_comes_back(required, tmp_path):
    model = build()
    model.conditioner.required = required
    model.save_pretrained(tmp_path)
    assert SuperResolutionFlow.from_pretrained(tmp_path).conditioner.required == required


def test_a_guard_that_does_not_say_whether_it_is_required(files):
    conditioners = json.loads((files / "config.json").read_text())["conditioners"]
    del conditioners["conditioner"]["required"]
    change(files, conditioners=conditioners)
    assert not SuperResolutionFlow.from_pretrained(files).conditioner.required


def test_numbers_of_numpy_come_back_as_numbers(tmp_path):
    model = build(hidden=np.int64(4), quant=np.int32(64), noise_std=np.float32(0.25)).eval()
    model.save_pretrained(tmp_path)
    again = SuperResolutionFlow.from_pretrained(tmp_path)
    assert repr(again) == repr(model)
    assert (again.quant, again.arguments["noise_std"]) == (64, 0.25)


def test_unfitted_and_fitted_only_guards_come_back(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    assert not SuperResolutionFlow.from_pretrained(tmp_path).conditioner.fitted
    model.conditioner.fit(torch.rand(16, 3, 8, 8), progress=False)
    model.save_pretrained(tmp_path)
    loaded = SuperResolutionFlow.from_pretrained(tmp_path).conditioner
    assert loaded.fitted
    assert not loaded.calibrated


def test_an_initialised_layer_is_not_initialised_again(tmp_path):
    model = build().train()
    model.nll(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8))
    model.save_pretrained(tmp_path)
    loaded = SuperResolutionFlow.from_pretrained(tmp_path).train()
    before = loaded.flow.steps[0][0].actnorm.bias.clone()
    loaded.nll(5 * torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8))
    assert torch.equal(loaded.flow.steps[0][0].actnorm.bias, before)


def test_copies_can_be_saved(tmp_path):
    model = guarded(build(maps.Robust(bins=4)))
    for i, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        twin.save_pretrained(tmp_path / str(i))
        assert_same(model, SuperResolutionFlow.from_pretrained(tmp_path / str(i)))


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    build().save_pretrained(tmp_path)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    SuperResolutionFlow.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), wanted)


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)

    def forward(self, y):
        y = self.conv(y)
        return [y, torch.nn.functional.avg_pool2d(y, 2)]


class Known(store.Recorded, Own):
    pass


def test_an_encoder_of_ones_own_is_given_again(tmp_path):
    model = guarded(build(encoder=Own()))
    model.save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match=r"a Own as `encoder`.*pass encoder="):
        SuperResolutionFlow.from_pretrained(tmp_path)
    assert_same(model, SuperResolutionFlow.from_pretrained(tmp_path, encoder=Own()))
    with pytest.raises(PretrainedError, match="do not fit"):
        SuperResolutionFlow.from_pretrained(tmp_path, encoder=torch.nn.Conv2d(3, 5, 1))
    with pytest.raises(TypeError, match="'coupling' is not taken"):
        SuperResolutionFlow.from_pretrained(tmp_path, encoder=Own(), coupling="affine")


def test_a_recorded_encoder_is_built_again(tmp_path):
    model = guarded(build(encoder=Known()))
    model.save_pretrained(tmp_path)
    assert_same(model, SuperResolutionFlow.from_pretrained(tmp_path))


class Shadow(store.Recorded, Own):
    """Called like one of flowguard's own."""


Shadow.__name__ = Shadow.__qualname__ = "PyramidEncoder"


class Optioned(store.Recorded, Own):
    def __init__(self, first=1, **options):
        super().__init__()
        self.first, self.options = first, options


def test_names_of_users_classes_do_not_collide(tmp_path):
    store.Recorded.__init_subclass__.__func__(Shadow)  # registered under its new name
    for i, encoder in enumerate((Shadow(), PyramidEncoder(4, scale=2, levels=2, blocks=1))):
        model = guarded(build(encoder=encoder))
        model.save_pretrained(tmp_path / str(i))
        loaded = SuperResolutionFlow.from_pretrained(tmp_path / str(i))
        assert type(loaded.conditioner.encoder) is type(encoder)
        assert_same(model, loaded)


def test_keywords_that_a_class_collects_come_back(tmp_path):
    model = guarded(build(encoder=Optioned(second=2, third=[3.0, None])))
    model.save_pretrained(tmp_path)
    encoder = SuperResolutionFlow.from_pretrained(tmp_path).conditioner.encoder
    assert (encoder.first, encoder.options) == (1, {"second": 2, "third": [3.0, None]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back(dtype, tmp_path):
    model = build().to(dtype)
    model.save_pretrained(tmp_path)
    found, wanted = SuperResolutionFlow.from_pretrained(tmp_path).state_dict(), model.state_dict()
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in wanted.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    guarded(build()).save_pretrained(folder)
    return folder


@pytest.fixture
def files(folder, tmp_path):
    """A copy of a good model, to spoil."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def refused(folder, match):
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    for loader in (SuperResolutionFlow.from_pretrained, store.load):
        with pytest.raises(PretrainedError, match=match) as told:
            loader(folder)
        assert len(str(told.value)) < 1000
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_truncated_file(name, files):
    whole = (files / name).read_bytes()
    places = random.Random(0).sample(range(len(whole) - 2), 20)
    for place in [0, 1, 8, *places]:
        (files / name).write_bytes(whole[:place])
        refused(files, "truncated")


def test_bytes_behind_the_end(files):
    with (files / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(files, "truncated, or no safetensors")


def test_a_foreign_safetensors(files):
    save_file({"weight": torch.rand(3)}, files / "model.safetensors")
    refused(files, "safetensors file of something else")


def test_foreign_configurations(files):
    for text in ("{}", "[]", "3", '{"model_type": "bert", "format": "x"}'):
        (files / "config.json").write_text(text)
        refused(files, "was not written by flowguard's save_pretrained")
    (files / "config.json").write_text("[" * 100000)
    refused(files, "no JSON")


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_pickle_is_never_opened(name, files, tmp_path_factory):
    mark = tmp_path_factory.mktemp("mark") / "executed"
    if name == "pytorch_model.bin":
        (files / "model.safetensors").unlink()
    for data in (pickle.dumps(Bomb(mark)), pickle.dumps(Bomb(mark), protocol=0)):
        (files / name).write_bytes(data)
        refused(
            files, "pickle, which can run code" if "bin" in name else "truncated or no|no safe"
        )
    torch.save({"x": Bomb(mark)}, files / name)
    refused(files, "pickle, which can run code" if "bin" in name else "truncated or no|no safe")
    assert not mark.exists()


def change(folder, **changes):
    """A configuration changed in both of its places."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"flowguard": json.dumps(config)})


def test_a_newer_version(files):
    newer = store.FORMAT + 1
    change(files, format=newer, flowguard="99.0")
    refused(files, rf"format {newer}, written by flowguard 99\.0.*upgrade flowguard")
    change(files, format=1, flowguard="0.1.0.dev0")
    refused(files, r"format 1, written by .*: train the model, or import its checkpoint, again")


def test_what_this_version_does_not_know(files):
    arguments = json.loads((files / "config.json").read_text())["arguments"]
    change(files, arguments={**arguments, "depth": 3})
    refused(files, "do not fit.*depth")
    change(files, arguments={**arguments, "coupling": {"type": "Quintic"}})
    refused(files, "`coupling` is a Quintic")
    change(files, arguments={**arguments, "coupling": {"type": "os.system", "command": "true"}})
    refused(files, "`coupling` is a os.system")
    change(files, arguments={**arguments, "hidden": 5})
    refused(files, "do not fit")
    change(files, arguments=arguments, **{"class": "Transformer"})
    refused(files, "holds a Transformer")


WRONG = {
    "steps": (True, "steps of SuperResolutionFlow must be int"),
    "quant": (256.5, r"quant of SuperResolutionFlow must be int; got 256\.5"),
    "residual": (1, "residual of SuperResolutionFlow must be bool; got 1"),
    "mix": (None, "mix of SuperResolutionFlow must be str; got None"),
    "noise_steps": ("12", "noise_steps of SuperResolutionFlow must be"),
    "encoder": (3, "encoder of SuperResolutionFlow must be"),
    "coupling": ({"type": "Robust", "bins": True}, "bins of Robust must be int; got True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_another_kind(name, files):
    arguments = json.loads((files / "config.json").read_text())["arguments"]
    value, match = WRONG[name]
    change(files, arguments={**arguments, name: value})
    refused(files, f"do not fit.*{match}")


SIZES = {
    "levels": (10**6, "levels is 1000000, but the weights are"),
    "steps": (100_000, "steps is 100000, but the weights are"),
    "steps of a level": ([1, 10**5], "steps is 100000, but the weights are"),
    "hidden": (20_000, "a larger model than the weights"),
    "features": (20_000, "a larger model than the weights"),
    "coupling": ({"type": "Robust", "bins": 10**6}, "a larger model than the weights"),
    "encoder": (
        {"type": "PyramidEncoder", "channels": 4, "scale": 2, "levels": 2, "blocks": 10**6},
        "blocks is 1000000, but the weights are",
    ),
    "transition_steps": (10**6, "transition_steps is 1000000, but the weights are"),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_model_that_is_larger_than_its_weights_is_not_built(name, files, monkeypatch):
    arguments = json.loads((files / "config.json").read_text())["arguments"]
    value, match = SIZES[name]
    change(files, arguments={**arguments, name.split()[0]: value})
    made = []
    drawn = torch.nn.init.kaiming_uniform_
    monkeypatch.setattr(
        torch.nn.init,
        "kaiming_uniform_",
        lambda tensor, *a, **k: made.append(tensor.numel()) or drawn(tensor, *a, **k),
    )
    refused(files, f"do not fit.*{match}")
    assert max(made, default=0) < 10**6  # before they were drawn
    assert len(made) < 200


def test_keys_that_there_are_not(files):
    change(files, auto_map={"AutoModel": "code.Model"})
    refused(files, "has 'auto_map', which this flowguard")


def test_a_guard_that_lacks_anything(files):
    conditioners = json.loads((files / "config.json").read_text())["conditioners"]
    options = conditioners["conditioner"]
    less = {k: v for k, v in options.items() if k != "alpha"}
    change(files, conditioners={})
    refused(files, "do not fit.*conditioners lacks 'conditioner'")
    change(files, conditioners={**conditioners, "other": options})
    refused(files, "do not fit.*conditioners has 'other'")
    change(files, conditioners={"conditioner": less})
    refused(files, "do not fit.*conditioner lacks 'alpha'")
    change(files, conditioners={"conditioner": {**options, "alpha": True}})
    refused(files, "do not fit.*alpha of OODConditioner must be float; got True")
    change(files, conditioners={"conditioner": 3})
    refused(files, "do not fit.*conditioner must be a record; got 3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("name", ["flow.steps.0.0.mix", "conditioner.guard"])
def test_a_single_tensor_of_another_dtype(name, dtype, files):
    weights = load_file(files / "model.safetensors")
    key = next(k for k in weights if name in k and not weights[k].isnan().any())
    weights[key] = weights[key].to(dtype)
    config = (files / "config.json").read_text()
    save_file(weights, files / "model.safetensors", metadata={"flowguard": config})
    refused(files, f"do not fit.*{key} has the dtype {dtype}, (the model|and not) torch.float")


def test_weights_of_a_dtype_that_no_model_has(files):
    weights = load_file(files / "model.safetensors")
    weights = {
        k: v.to(torch.float8_e5m2) if v.dtype.is_floating_point else v for k, v in weights.items()
    }
    config = (files / "config.json").read_text()
    save_file(weights, files / "model.safetensors", metadata={"flowguard": config})
    refused(files, "do not fit.*floating-point numbers of 16 bits or more; got torch.float8_e5m2")


KILLED = """
import os, signal, sys
from flowguard.models import load
import torch
made = load(sys.argv[1])
replace, left = os.replace, [int(sys.argv[3])]
def dying(*arguments):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    replace(*arguments)
    if left[0] == 0 and sys.argv[4] == "after":
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
made.save_pretrained(sys.argv[2])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("earlier", [True, False], ids=["another model", "nothing"])
@pytest.mark.parametrize(
    ("renames", "when"), [(0, "before"), (1, "after"), (2, "after")], ids=["none", "one", "two"]
)
def test_a_save_that_is_killed_leaves_one_model(renames, when, earlier, folder, tmp_path):
    target = tmp_path / "m"
    if earlier:
        other = guarded(build(maps.Robust(bound=4.0)))  # of the same shapes
        other.save_pretrained(target)
        other.save_pretrained(tmp_path / "before")
    command = [sys.executable, "-c", KILLED, folder, target, str(renames), when]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if renames == 0 and not earlier:
        with pytest.raises(PretrainedError, match=r"holds no config\.json"):
            store.load(target)
    else:
        wanted = store.load(folder if renames else tmp_path / "before")
        assert_same(wanted, store.load(target))
        assert store.read_config(target) == store.describe(wanted)
    # and it can be saved again, over what is there
    build("affine").save_pretrained(target)
    assert store.load(target).flow.steps[0][0].coupling.map == maps.Affine()


def test_files_of_two_saves(files, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    build(maps.Robust(bound=4.0)).save_pretrained(other)  # of the same shapes
    (files / "config.json").write_bytes((other / "config.json").read_bytes())
    refused(files, "was not saved together with")


def test_numbers_of_another_kind(files):
    """1.0 and true equal 1, and do not mean it."""
    config = json.loads((files / "config.json").read_text())
    for name, value in (("format", True), ("arguments", {**config["arguments"], "scale": 2.0})):
        (files / "config.json").write_text(json.dumps({**config, name: value}))
        refused(files, "was not saved together with|was not written by")


def test_what_is_not_there(tmp_path):
    refused(tmp_path, r"holds no config\.json")
    with pytest.raises(PretrainedError, match="there is no folder"):
        SuperResolutionFlow.from_pretrained(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(PretrainedError, match="there is no folder"):
        SuperResolutionFlow.from_pretrained(tmp_path / "file")


def test_another_class(folder):
    class Other(store.Pretrained, torch.nn.Module):
        pass

    with pytest.raises(PretrainedError, match=r"SuperResolutionFlow\.from_pretrained"):
        Other.from_pretrained(folder)
    del store.REGISTRY[store.known_as(Other)]


def test_a_failing_save_leaves_the_earlier_one(files, monkeypatch):
    before = {p.name: p.read_bytes() for p in files.iterdir()}

    def fail(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        build("affine").save_pretrained(files)
    assert {p.name: p.read_bytes() for p in files.iterdir()} == before


def test_a_changed_model_is_not_saved(files):
    before = {p.name: p.read_bytes() for p in files.iterdir()}
    wider = build()
    wider.conditioner.encoder = PyramidEncoder(4, scale=2, levels=2, blocks=5)
    other = build()
    other.flow.steps[0][0].coupling.map = maps.Robust(bound=7.0)
    for model in (wider, other):
        with pytest.raises(PretrainedError, match="changed after its construction"):
            model.save_pretrained(files)
    assert {p.name: p.read_bytes() for p in files.iterdir()} == before


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        with pytest.raises(PretrainedError, match="name a folder"):
            build().save_pretrained(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_where_a_file_should_be(name, files):
    (files / name).unlink()
    (files / name).mkdir()
    before = {p.name: p.read_bytes() for p in files.iterdir() if p.is_file()}
    with pytest.raises(PretrainedError, match=f"{name} is a folder"):
        build().save_pretrained(files)
    assert {p.name: p.read_bytes() for p in files.iterdir() if p.is_file()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files")
def test_a_disk_that_is_full(files):
    """An error of the system, and the earlier files are whole."""
    import resource

    before = {p.name: p.read_bytes() for p in files.iterdir()}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            build("affine").save_pretrained(files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in files.iterdir()} == before


def test_a_card_of_ones_own_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    build().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_weights_say_what_they_are(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        config = json.loads(opened.metadata()["flowguard"])
    assert config == json.loads((folder / "config.json").read_text())
    assert config["class"] == "SuperResolutionFlow"


def test_it_is_a_model_of_the_hub():
    hub = pytest.importorskip("huggingface_hub")
    assert issubclass(SuperResolutionFlow, hub.PyTorchModelHubMixin)


def test_without_the_hub(tmp_path):
    code = """
import sys
sys.modules["huggingface_hub"] = None
import torch, pytest
from flowguard.models import SuperResolutionFlow
from flowguard.models.store import PretrainedError
model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=4, features=4)
model.save_pretrained("m")
SuperResolutionFlow.from_pretrained("m")
for call in (lambda: model.save_pretrained("m", push_to_hub=True),
             lambda: SuperResolutionFlow.from_pretrained("name/model")):
    with pytest.raises((ImportError, PretrainedError), match=r"flowguard-nf\\[hub\\]"):
        call()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("coupling", ["affine", "robust"])
def test_a_low_light_model_comes_back(coupling, tmp_path):
    torch.manual_seed(0)
    encoder = LowLightEncoder(features=4, growth=4, blocks=1, stacked=(0,), levels=2)
    model = LowLightFlow(levels=2, steps=(1, 2), hidden=4, encoder=encoder, coupling=coupling)
    guarded(model).save_pretrained(tmp_path)
    loaded = store.load(tmp_path)
    assert type(loaded) is LowLightFlow
    assert_same(model, loaded)
    with pytest.raises(PretrainedError, match=r"LowLightFlow\.from_pretrained"):
        SuperResolutionFlow.from_pretrained(tmp_path)


PUBLISHED = {
    "srflow": {"coupling": "affine", "residual": False},
    "robustnf": {"coupling": maps.Robust(bound=0.5, shift_bound=None), "noise_std": 0.05},
    "rotations": {"coupling": "bspline", "mix": "fixed", "noise_std": 0.05, "noise_steps": [0, 1]},
}


@pytest.mark.parametrize("options", PUBLISHED.values(), ids=PUBLISHED)
def test_published_architectures_come_back(options, tmp_path):
    torch.manual_seed(0)
    model = SuperResolutionFlow.published(
        scale=2, levels=2, steps=1, blocks=1, stacked=(0,), hidden=4, **options
    )
    guarded(model).save_pretrained(tmp_path)
    assert_same(model, SuperResolutionFlow.from_pretrained(tmp_path))


def test_a_model_of_the_hub_is_loaded(folder, monkeypatch):
    pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"]))
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = SuperResolutionFlow.from_pretrained("someone/model", revision="v1")
    assert model.conditioner.calibrated
    assert {a[1] for a in asked} == {"config.json", "model.safetensors"}
    assert {(a[0], a[2]) for a in asked} == {("someone/model", "v1")}

    def fail(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(PretrainedError, match=r"no folder someone/model, and .*no network"):
        SuperResolutionFlow.from_pretrained("someone/model")


def test_what_is_pushed_to_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    pushed = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, **options):
            pushed.update({p.name: p.read_bytes() for p in folder_path.iterdir()})
            return "https://example.org"

    monkeypatch.setattr(hub.hub_mixin, "HfApi", Api)
    model = guarded(build())
    assert model.save_pretrained(tmp_path / "m", push_to_hub=True) == "https://example.org"
    assert set(pushed) == {"config.json", "model.safetensors", "README.md"}
    for name, data in pushed.items():
        (tmp_path / name).write_bytes(data)
    assert_same(model, SuperResolutionFlow.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "coupling", [maps.Robust, partial(maps.Robust, bins=3), partial(maps.Affine, 0.01)]
)
def test_a_coupling_that_is_made_by_a_callable(coupling, tmp_path):
    model = build(coupling)
    model.save_pretrained(tmp_path)
    again = SuperResolutionFlow.from_pretrained(tmp_path)
    assert again.flow.steps[0][0].coupling.map == coupling()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


# -- margins ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "margin", [None, 0.25, 0.5, 1, np.float32(0.25), np.float64(0.3), Fraction(1, 4)], ids=repr
)
def test_the_margin_comes_back(margin, tmp_path):
    model = guarded(build()).limit(margin)
    model.save_pretrained(tmp_path)
    loaded = SuperResolutionFlow.from_pretrained(tmp_path)
    assert loaded.margin == margin
    assert_same(model, loaded)
    config = json.loads((tmp_path / "config.json").read_text())
    # What an older flowguard can hold is in the format that it reads.
    assert config["format"] == (2 if margin is None else 4)
    assert ("margin" in config["arguments"]) == (margin is not None)


def test_folders_that_say_no_margin_have_none(files):
    config = json.loads((files / "config.json").read_text())
    del config["arguments"]["margin"]
    change(files, arguments=config["arguments"], format=2)
    assert SuperResolutionFlow.from_pretrained(files).margin is None


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("wide", "margin of SuperResolutionFlow must be"),
        (True, "margin of SuperResolutionFlow must be"),
        (-1.0, "must be positive and finite; got -1"),
        (1e-9, "at least a grey level"),
    ],
)
def test_a_margin_that_cannot_be(value, match, files):
    arguments = json.loads((files / "config.json").read_text())["arguments"]
    change(files, arguments={**arguments, "margin": value})
    refused(files, f"do not fit.*{match}")


@pytest.mark.parametrize("margin", [None, 0.25])
@pytest.mark.parametrize("halved", [False, True])
def test_a_first_guess_has_a_format_of_its_own(margin, halved, tmp_path):
    formats = {}
    for residual in (True, False):
        torch.manual_seed(0)
        model = Dim(residual=residual, margin=margin)
        model.save_pretrained(tmp_path)
        if halved:
            kept_in_halves(tmp_path, ("conditioner.encoder.",))
        formats[residual] = store.read_config(tmp_path)["format"]
        assert load(tmp_path).residual == residual
    # What an older flowguard can hold is in the format that it reads.
    assert formats == {True: 6, False: 5 if halved else 2 if margin is None else 4}


class Dim(LowLightFlow):
    """One for low light that hands on whatever it is given."""

    def __init__(self, **options):
        encoder = LowLightEncoder(4, growth=2, blocks=1, stacked=(), levels=1)
        super().__init__(levels=1, steps=1, hidden=4, encoder=encoder, **options)


class PlainDim(Dim):
    """One whose constructor knows of no first guess."""

    def __init__(self):
        super().__init__()


class PlainDull(Dim):
    """One that never had any."""

    def __init__(self):
        super().__init__(residual=False)


@pytest.mark.parametrize("cls", [Dim, PlainDim, PlainDull])
@pytest.mark.parametrize("residual", [True, False])
def test_first_guesses_of_users_classes_come_back(cls, residual, tmp_path):
    model = cls().eval()
    model.residual = residual
    low = 0.1 * torch.rand(1, 3, 5, 6)
    model.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    loaded = cls.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.residual == residual
    assert torch.equal(loaded.sample(low), model.sample(low))


class Plain(SuperResolutionFlow):
    """A model whose constructor knows of no margin."""

    def __init__(self, size=4):
        super().__init__(scale=2, levels=1, steps=1, hidden=size, features=size)


class Handing(SuperResolutionFlow):
    """One that hands on whatever it is given."""

    def __init__(self, **options):
        super().__init__(**{"levels": 1, "steps": 1, "hidden": 4, "features": 4, **options})


@pytest.mark.parametrize("cls", [Plain, Handing])
@pytest.mark.parametrize("margin", [None, 0.25, 0.5])
def test_margins_of_users_classes_come_back(cls, margin, tmp_path):
    cls().limit(margin).save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).margin == margin


def test_a_file_is_no_folder_of_a_model(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    for read in (load, SuperResolutionFlow.from_pretrained):
        with pytest.raises(
            PretrainedError, match=r"but a file of that name; .* `flowguard convert`"
        ):
            read(tmp_path / "weights.pth")


NAMES = {
    "too long": ("x" * 5000, r"xx… \(5000 characters\) cannot be read: File name"),
    "too long for the hub": (
        "someone/" + "x" * 5000,
        r"someone/x.*… \(5008 characters\) cannot be read: File name",
    ),
    "long altogether": (
        "a/" * 3000 + "b",
        r"a/a/.*… \(6001 characters\) cannot be read: File name",
    ),
    "a zero byte": ("a\0b", "must be named by its folder; got a name with a zero byte"),
    "a zero byte of the hub": ("someone/\0", "got a name with a zero byte"),
    "nothing": ("", "must be named by its folder; got an empty name"),
    "blanks": ("  ", "got an empty name"),
    "home": ("~", "~ is taken as it stands: write /home/me if that is meant"),
    "below home": ("~/mine", "no folder ~/mine; ~ is taken as it stands: write /home/me/mine if"),
    "below a file": ("./config/below", "there is no folder config/below"),
    "two lines": ("a\nb", r"no folder a\\nb;"),
    "a colour": ("./\x1b[31mred", r"no folder \\x1b\[31mred;"),
    "no letter": ("\udc80", r"no folder \\udc80;"),
    "a loop": ("loop", "loop cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("read", [load, SuperResolutionFlow.from_pretrained])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_model_can_have_are_told_in_short(name, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *a, **k: pytest.fail("the network was asked")
    )
    Path("config").write_text("a file")
    Path("loop").symlink_to("loop")
    given, match = NAMES[name]
    with pytest.raises(PretrainedError, match=match) as caught:
        read(given)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.fixture
def unprivileged():
    r"""A folder that others may enter, and a user to whom closed files are closed."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system closes files otherwise")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0

    @contextlib.contextmanager
    def become():
        if root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)

    yield folder, become
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("closed", "mode", "told"),
    [
        ("model", 0o000, "model cannot be read: Permission denied"),
        ("model", 0o444, "model cannot be read: Permission denied"),
        ("", 0o000, "model cannot be read: Permission denied"),
        ("model/config.json", 0o000, "config.json cannot be read: Permission denied"),
        ("model/model.safetensors", 0o000, "model.safetensors cannot be read: Permission denied"),
    ],
)
@pytest.mark.parametrize("read", [load, SuperResolutionFlow.from_pretrained])
def test_what_may_not_be_read_is_told(closed, mode, told, read, unprivileged):
    folder, become = unprivileged
    build().save_pretrained(folder / "model")
    read(folder / "model")
    (folder / closed).chmod(mode)
    with become(), pytest.raises(PretrainedError, match=told):
        read(folder / "model")


def test_a_folder_that_may_not_be_listed_is_told(unprivileged):
    folder, become = unprivileged
    (folder / "empty").mkdir(mode=0o111)
    with become(), pytest.raises(PretrainedError, match="empty cannot be read: Permission denied"):
        load(folder / "empty")


def test_a_folder_of_models_is_told_from_a_model(tmp_path):
    """As a run of training is one."""
    for name in ("best", "model"):
        build().save_pretrained(tmp_path / name)
    with pytest.raises(PretrainedError, match=r"folder\(s\) best, model do: name one of them"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("cls", "name"), [(SuperResolutionFlow, "superres-x4"), (LowLightFlow, "lowlight")]
)
def test_models_of_the_package_are_loaded_by_name_with_their_guard_and_without_a_network(
    cls, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "_downloaded", None)
    model = cls.from_pretrained(name)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.conditioner.guard.calibrated
    assert model.conditioner.policy == "shrink"
    files = {file.name: file.stat().st_size for file in store.located(name).iterdir()}
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert files["model.safetensors"] <= 8e6
    page = Path(__file__).parents[2] / "docs" / "models" / f"{name}.md"
    assert (store.located(name) / "README.md").read_text() == page.read_text()


@pytest.mark.parametrize(("name", "format"), [("superres-x4", 4), ("lowlight", 6)])
def test_a_copy_of_a_model_of_the_package_is_loaded_as_it_is_itself(name, format, tmp_path):
    shutil.copytree(store.SHIPPED / name, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    model = load(name)
    for folder in (tmp_path / "copy", tmp_path / "link", store.SHIPPED / ".." / "shipped" / name):
        loaded = type(model).from_pretrained(folder)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        state = loaded.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # What is saved again is a model in float32, in the format of those.
    loaded.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["format"], "halves" in config) == (format, False)
    weights = load_file(tmp_path / "again" / "model.safetensors")
    assert torch.float16 not in {value.dtype for value in weights.values()}


def test_an_upload_of_a_model_of_the_package_is_loaded_from_the_hub(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    shutil.copytree(store.SHIPPED / "lowlight", tmp_path / "snapshot")
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda name, filename, **options: str(tmp_path / "snapshot" / filename),
    )
    model = LowLightFlow.from_pretrained("someone/mine")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# -- in half precision -----------------------------------------------------------------------


NETWORKS = ("conditioner.encoder.", "flow.steps.0.0.coupling.")


def kept_in_halves(folder, networks=NETWORKS):
    r"""A saved model, some weights of which are kept in half precision from then on."""
    weights = load_file(folder / "model.safetensors")
    names = [name for name in weights if name.startswith(networks)]
    assert names
    store.write(folder, *store.halved(store.read_config(folder), weights, names))
    return names


def test_weights_in_half_precision_are_told_by_the_file_and_widened(tmp_path):
    model = guarded(build())
    model.save_pretrained(tmp_path)
    names = kept_in_halves(tmp_path)
    loaded = load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        expected = value.half().float() if name in names else value
        assert torch.equal(loaded.state_dict()[name], expected), name


@pytest.mark.parametrize(
    ("names", "told"),
    [("networks", "float32, the model .*float16"), ("all", r"float16, and not torch\.float64")],
)
def test_tensors_that_somebody_made_halves_are_refused_with_what_to_do(names, told, tmp_path):
    guarded(build()).save_pretrained(tmp_path)
    config, weights = store.read_config(tmp_path), load_file(tmp_path / "model.safetensors")
    for name, value in weights.items():
        if value.is_floating_point() and (names == "all" or name.startswith(NETWORKS)):
            weights[name] = value.half()
    store.write(tmp_path, config, weights)
    refused(tmp_path, f"do not fit.*({told}).*convert the model as a whole, by model.to")


@pytest.mark.parametrize(
    "changes",
    [
        {"halves": "float32"},
        {"format": store.HALVED},
        {"format": store.HALVED, "halves": "bfloat16"},
        {"format": store.HALVED, "halves": None},
        {"format": store.HALVED, "halves": ["float32"]},
        {"halves": None},
        {"format": 6, "halves": "bfloat16"},
    ],
    ids=str,
)
def test_a_mark_of_halves_that_cannot_be(changes, files):
    change(files, **changes)
    refused(files, "must have 'halves', as 'float32', in format 5, and none before; got")


def test_what_cannot_be_kept_in_halves_is_refused():
    config = {"format": 2}
    wide, huge, half = torch.ones(1).double(), torch.full((2,), 1e5), torch.ones(1).half()
    for state, names, match in (
        ({"a": wide}, ["a"], "in float32 alone are kept so; got torch.float64 for a"),
        ({"a": torch.ones(1), "b": half}, ["a"], "got torch.float16 for b"),
        ({"a": huge}, ["a"], "must be finite in half precision; got some of a beyond 65504"),
        ({"a": torch.ones(1)}, ["a", "c"], "must name weights; got 'c'"),
    ):
        with pytest.raises(ValueError, match=match):
            store.halved(config, state, names)


def test_a_folder_comes_before_a_model_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "superres-x4").mkdir()  # of pictures
    assert SuperResolutionFlow.from_pretrained("superres-x4").scale == 4
    model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
    model.save_pretrained("superres-x4")
    assert SuperResolutionFlow.from_pretrained("superres-x4").scale == 2


def test_the_name_of_no_model_is_told_which_there_are_and_asks_no_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PretrainedError, match="brings the models lowlight and superres-x4, and"):
        SuperResolutionFlow.from_pretrained("superres-x5")
    with pytest.raises(PretrainedError, match=r"holds a SuperResolutionFlow; load it by"):
        LowLightFlow.from_pretrained("superres-x4")


@pytest.mark.parametrize("name", ["superres-x4", "lowlight"])
def test_what_the_package_brings_is_bounded_by_its_margin(name):
    assert certify(load(name)).bound(4.0) <= 1.250001  # 1.25 and its rounding


def test_the_guard_of_the_package_tells_a_checkerboard_from_a_photograph():
    pytest.importorskip("skimage")
    model = load("superres-x4")
    model.conditioner.policy = "report"
    cat = downsample(photograph("chelsea.png")[None, :, 60:252, 120:312], 4)
    board = (torch.arange(48)[:, None] + torch.arange(48)) % 2 * torch.ones(1, 3, 1, 1)
    model.condition(torch.cat([cat, board]))
    usual, strange = model.conditioner.report.p_value
    assert usual > 0.05
    assert strange < 0.001
