r"""The encoder of a training: made, read, frozen or tuned, and kept."""

import re
import shutil

import pytest
import torch

pytest.importorskip("lightning")
Image = pytest.importorskip("PIL.Image")

from flowguard.models import LowLightEncoder, PyramidEncoder, RRDBEncoder, SuperResolutionFlow  # noqa: E402
from flowguard.training.build import build  # noqa: E402
from flowguard.training.encoders import (  # noqa: E402
    encoder_for,
    groups,
    keep_encoder,
    kept_encoder,
)


def rrdb(**options):
    torch.manual_seed(0)
    return RRDBEncoder(**{"features": 8, "growth": 4, "blocks": 2, "stacked": ()} | options)


@pytest.fixture(scope="module")
def made_sources(ncnn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    encoder = rrdb(long_skip="first")
    torch.save(encoder.state_dict(), folder / "rrdb.pth")
    ncnn.Writer(half=False).encoder(encoder).write(folder)
    model = SuperResolutionFlow(
        levels=2, steps=1, hidden=8, encoder=rrdb(long_skip="first", stacked=(0, 1), levels=2)
    )
    model.save_pretrained(folder / "m")
    return folder


@pytest.fixture
def sources(made_sources, tmp_path):
    r"""The same network as a checkpoint, in ncnn's format, and as that of a model in a folder."""
    return shutil.copytree(made_sources, tmp_path, dirs_exist_ok=True)


def test_the_usual_encoders():
    assert type(encoder_for("superres", features=4, blocks=1)) is PyramidEncoder
    made = encoder_for("superres", "rrdb", scale=2, levels=3, features=8, blocks=9)
    assert (made.scale, made.levels, made.RRDB_trunk.stacked) == (2, 3, (1, 3, 5, 8))
    assert all(p.grad_fn is None for p in made.parameters())
    sum(m.sum() for m in made(torch.rand(1, 3, 4, 4))).backward()
    assert all(p.grad is not None for p in made.parameters())  # none is there for nothing
    assert type(encoder_for("lowlight", features=4, blocks=1)) is LowLightEncoder


@pytest.mark.parametrize("name", ["net.param", "net.bin", "m", "rrdb.pth"])
@pytest.mark.parametrize("kind", ["rrdb", None])
@torch.no_grad()
def test_weights_come_from_all_that_holds_them(sources, name, kind):
    before = torch.get_rng_state()
    made = encoder_for("superres", kind, levels=2, weights=sources / name)
    skip = "last" if name == "rrdb.pth" else "first"  # the names of the first do not tell
    wanted = rrdb(long_skip=skip, stacked=(0, 1), levels=2)
    y = torch.rand(1, 3, 5, 6)
    assert all(torch.equal(a, b) for a, b in zip(made(y), wanted(y), strict=True))
    assert not made.head or name == "m"
    torch.set_rng_state(before)


WRONG = {
    "scale": ({"scale": 2, "weights": "rrdb.pth"}, "encoder of scale 4; got 2"),
    "levels": ({"levels": 3, "weights": "m"}, "encoder of levels 2; got 3"),
    "features": ({"features": 64, "weights": "net.bin"}, "encoder of features 8; got 64"),
    "blocks": ({"blocks": 23, "weights": "net.bin"}, "encoder of blocks 2; got 23"),
    "kind": (
        {"kind": "pyramid", "weights": "rrdb.pth"},
        "of an encoder of superres, pyramid; .* holds a RRDBEncoder",
    ),
    "task": ({"task": "lowlight", "weights": "m"}, "of lowlight, lowlight; .* holds a RRDB"),
    "rrdb for lowlight": ({"task": "lowlight", "kind": "rrdb"}, "must be one of lowlight; got 'r"),
    "no blocks": ({"kind": "rrdb", "blocks": 0}, "at least 1 block; got 0"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_go_together_is_refused(sources, options, message):
    options = {"task": "superres", "levels": 2} | options
    if "weights" in options:
        options["weights"] = sources / options["weights"]
    with pytest.raises(ValueError, match=message):
        encoder_for(**options)


ENCODERS = {
    "rrdb": lambda: rrdb(head=False, long_skip="first", stacked=(0, 1)),
    "pyramid": lambda: PyramidEncoder(4, levels=2, blocks=1),
    "lowlight": lambda: LowLightEncoder(4, growth=4, blocks=1, stacked=(0,), levels=2),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_kept_in_a_file(kind, tmp_path):
    encoder = ENCODERS[kind]()
    keep_encoder(encoder, tmp_path / "e.safetensors")
    before = torch.get_rng_state()
    made = kept_encoder(tmp_path / "e.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(made) is type(encoder)
    assert repr(made) == repr(encoder)
    weights = encoder.state_dict()
    assert made.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[name]) for name, t in made.state_dict().items())


def test_a_file_that_holds_no_encoder_is_refused(tmp_path):
    (tmp_path / "e.safetensors").write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match=re.escape("e.safetensors must hold the encoder of a run")
    ):
        kept_encoder(tmp_path / "e.safetensors")
    with pytest.raises(FileNotFoundError):
        kept_encoder(tmp_path / "absent")


def small(**options):
    return build("superres", levels=1, steps=1, hidden=8, features=8, blocks=1, **options)


def test_the_encoder_has_a_learning_rate_of_its_own():
    model = small()
    encoder = set(model.conditioner.encoder.parameters())
    (one,) = groups(model, 0.1, None)
    assert len(one["params"]) == len(list(model.parameters()))
    flow, own = groups(model, 0.1, 0.01)
    assert (flow["lr"], own["lr"]) == (0.1, 0.01)
    assert set(own["params"]) == encoder
    assert set(flow["params"]) == set(model.parameters()) - encoder
    model.freeze_encoder()
    for (only,) in (groups(model, 0.1, 0.01), groups(model, 0.1, None)):
        assert set(only["params"]) == set(model.parameters()) - encoder


def test_a_model_is_built_with_an_encoder_that_is_there():
    encoder = PyramidEncoder(6, scale=2, levels=1, blocks=1)
    model = build("superres", scale=2, levels=1, steps=1, hidden=8, encoder=encoder)
    assert model.conditioner.encoder is encoder
    assert (
        build("superres", encoder="rrdb", features=8, blocks=1).conditioner.encoder.channels == 16
    )


TINY = ("--flow-steps", 1, "--hidden", 8, "--crop", 16, "--batch", 2, "--accelerator", "cpu")
TINY += ("--threads", 1, "--validate-every", 9, "--guard-pictures", 2)


def encoder_in(folder):
    return SuperResolutionFlow.from_pretrained(folder).conditioner.encoder.state_dict()


def test_a_frozen_encoder_is_saved_once_and_a_run_goes_on_without_its_file(
    sources, pictures, tmp_path, train, rows
):
    weights = encoder_for("superres", levels=2, weights=sources / "net.bin").state_dict()
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = ("--data", pictures, *TINY, "--encoder-weights", sources / "net.bin")
    options += ("--freeze-encoder", "--schedule", "constant")
    assert train(*options, "--out", whole, "--steps", 4) == 0
    for folder in (whole / "model", whole / "best"):
        found = encoder_in(folder)
        assert found.keys() == weights.keys()
        assert all(torch.equal(t, weights[name]) for name, t in found.items())
    held = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    for state in ("state_dict", "current_model_state"):
        assert held[state].keys()
        assert not any(".encoder." in name for name in held[state])

    assert train(*options, "--out", run, "--steps", 2) == 0
    (sources / "net.bin").unlink()  # the run has what it needs
    assert train("--resume", run, "--steps", 4) == 0
    assert rows(run) == rows(whole)
    assert all(torch.equal(t, weights[n]) for n, t in encoder_in(run / "model").items())


def test_an_encoder_is_tuned_at_its_own_rate(sources, pictures, tmp_path, train):
    weights = encoder_for("superres", levels=2, weights=sources / "net.bin").state_dict()
    options = ("--data", pictures, *TINY, "--encoder-weights", sources / "net.bin")
    run, still = tmp_path / "run", 1e-12
    options += ("--steps", 3, "--out", run, "--average", 0, "--encoder-lr", still)
    assert train(*options) == 0
    moved = [(t - weights[name]).abs().max() for name, t in encoder_in(run / "model").items()]
    assert max(moved) < 1e-9  # at the rate of the flow it would be 1e-3
    assert train("--resume", run, "--steps", 4) == 0
    held = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    lrs = [group["initial_lr"] for group in held["optimizer_states"][0]["param_groups"]]
    assert lrs == [1e-3, still]


MISTAKES = {
    "untrained": (
        ["--freeze-encoder"],
        "--encoder-weights, or --model, must be given with a frozen",
    ),
    "both": (["--freeze-encoder", "--encoder-lr", 0.1], "--encoder-lr must be 0, or be left out"),
    "no file": (["--encoder-weights", "absent.pth"], "absent.pth"),
    "no network": (["--encoder-weights", "pictures/a.png"], "cannot be read as a file of tensors"),
    "half of a pair": (["--encoder-weights", "half.bin"], "half.param must lie beside half.bin"),
    "no model": (["--encoder-weights", "pictures"], "holds no config.json"),
    "another scale": (["--encoder-weights", "net.bin", "--scale", 2], "of scale 4; got 2"),
    "another kind": (["--encoder-weights", "net.bin", "--encoder", "pyramid"], "RRDBEncoder"),
    "an unknown kind": (["--encoder", "resnet"], "invalid choice"),
}


@pytest.mark.parametrize(("more", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_no_run(
    sources, pictures, more, message, monkeypatch, capsys, train
):
    monkeypatch.chdir(sources)
    (sources / "half.bin").write_bytes(b"")
    assert train("--data", pictures, "--out", "run", *TINY, *more) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1, errors
    assert message in errors
    assert not (sources / "run").exists()
