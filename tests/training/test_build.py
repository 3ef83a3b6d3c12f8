"""The models that are trained from a folder: fresh ones, and trained ones that go on."""

import pytest
import torch

from flowguard.migration import migrate
from flowguard.models import (
    LowLightEncoder,
    LowLightFlow,
    SuperResolutionFlow,
    load,
)
from flowguard.training.build import build

TINY = ("--crop", 16, "--batch", 2, "--accelerator", "cpu", "--threads", 1)
TINY += ("--validate-every", 9, "--guard-pictures", 2)

pytestmark = pytest.mark.filterwarnings("ignore:Calibrated on")


def test_the_standard_model_has_one_million_and_eight():
    model = build("superres")
    assert isinstance(model, SuperResolutionFlow)
    assert sum(p.numel() for p in model.parameters()) == 1838592


def test_one_for_low_light():
    model = build("lowlight", levels=2, steps=1, hidden=8, features=8, blocks=1)
    assert isinstance(model, LowLightFlow)
    assert model.multiple == 4


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="task must be one of superres, lowlight; got 'x'"):
        build("x")
    with pytest.raises(ValueError, match="at least 1 block; got 0"):
        build("lowlight", blocks=0)


@pytest.mark.parametrize("task", ["superres", "lowlight"])
@pytest.mark.parametrize("options", [{}, {"margin": None}, {"margin": 0.5}], ids=str)
def test_models_have_the_margin_that_is_asked_for(task, options):
    model = build(task, levels=1, steps=1, hidden=8, features=8, blocks=1, **options)
    assert model.margin == options.get("margin", 0.25)


@pytest.mark.parametrize("task", ["superres", "lowlight"])
@pytest.mark.parametrize("residual", [True, False])
def test_models_are_of_the_residual_unless_they_shall_not(task, residual):
    model = build(task, levels=1, steps=1, hidden=8, features=8, blocks=1, residual=residual)
    y = torch.rand(1, 6 if task == "lowlight" else 3, 4, 4)
    assert (model.base_of(y) is not None) == residual


def saved(folder, kind=SuperResolutionFlow, **options):
    torch.manual_seed(0)
    options = {"levels": 1, "steps": 2, "hidden": 8, **options}
    if kind is SuperResolutionFlow:
        options |= {"features": 8}
    else:
        encoder = LowLightEncoder(8, growth=4, blocks=1, stacked=(0,), levels=1)
        options |= {"encoder": encoder}
    model = kind(**options)
    size = 16 if kind is LowLightFlow else 4
    model(torch.rand(4, 3, 16, 16), torch.rand(4, 3, size, size))  # initialises it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.eval()
    model.conditioner.fit(torch.rand(8, 3, size, size), progress=False)
    model.conditioner.calibrate(torch.rand(8, 3, size, size), progress=False)
    model.save_pretrained(folder)
    return model


def test_a_run_begins_with_the_weights_of_a_model_and_goes_on_without_its_folder(
    pictures, tmp_path, train, rows
):
    folder, whole, run = tmp_path / "mine", tmp_path / "whole", tmp_path / "run"
    model = saved(folder, margin=0.5)
    options = ("--data", pictures, *TINY, "--model", folder, "--schedule", "constant")
    assert train(*options, "--out", whole, "--steps", 4, "--lr", 1e-12, "--average", 0) == 0
    found = load(whole / "model")
    assert found.margin == 0.5
    assert found.conditioner.calibrated
    for name, value in model.state_dict().items():
        if "guard" not in name:
            assert torch.allclose(found.state_dict()[name], value, atol=1e-9), name
    assert not load(whole / "start").conditioner.fitted

    whole = tmp_path / "whole2"
    assert train(*options, "--out", whole, "--steps", 4) == 0
    assert train(*options, "--out", run, "--steps", 2) == 0
    folder.rename(tmp_path / "moved")
    assert train("--resume", run, "--steps", 4) == 0
    assert rows(run) == rows(whole)
    told = pytest.importorskip("yaml").safe_load((run / "config.yaml").read_text())
    assert told["model"] == str(folder)
    assert "levels" not in told
    assert load(run / "model").arguments["levels"] == 1


def test_what_is_not_given_follows_from_the_model(pictures, tmp_path, train):
    folder, run = tmp_path / "mine", tmp_path / "run"
    model = saved(folder, LowLightFlow, margin=None)
    model.conditioner.policy, model.conditioner.boundary = "report", 0.7
    model.save_pretrained(folder)
    options = ("--data", pictures, *TINY, "--model", folder, "--steps", 2, "--freeze-encoder")
    assert train(*options, "--out", run) == 0
    found = load(run / "model")
    assert isinstance(found, LowLightFlow)
    assert found.margin is None
    assert (found.conditioner.policy, found.conditioner.boundary) == ("report", 0.7)
    theirs = found.conditioner.encoder.state_dict()
    for name, value in model.conditioner.encoder.state_dict().items():
        assert torch.equal(theirs[name], value), name
    again, file = tmp_path / "again", tmp_path / "options.yaml"
    file.write_text("boundary: 0.8\n")
    more = ("--margin", 0.25, "--policy", "warn", "--config", file)
    assert train(*options, "--out", again, *more) == 0
    found = load(again / "model")
    assert found.margin == 0.25
    assert (found.conditioner.policy, found.conditioner.boundary) == ("warn", 0.8)


def test_a_migrated_model_is_trained_on(pictures, tmp_path, train, rows):
    folder, run = tmp_path / "mine", tmp_path / "run"
    affine = saved(folder, coupling="affine", margin=None)
    model, _ = migrate(affine, torch.rand(8, 3, 16, 16), torch.rand(8, 3, 4, 4))
    model.save_pretrained(folder)
    options = ("--data", pictures, *TINY, "--model", folder, "--steps", 3)
    assert train(*options, "--out", run) == 0
    assert float(rows(run)[-1][1]) < 50
    replaced = {type(m).__name__ for m in load(run / "model").modules()}
    assert "InscribedCoupling" in replaced


MISTAKES = {
    "what it is": (["--levels", 2], "--levels must be left out with --model"),
    "its usual value": (["--hidden", 64], "--hidden must be left out with --model"),
    "by a file": (["--config", "options.yaml"], "--flow-steps must be left out with --model"),
    "its encoder": (["--encoder-weights", "superres-x4"], "--encoder-weights must be left out"),
    "another task by a file": (["--config", "task.yaml"], "--model must name a model of lowlight"),
    "another task": (["lowlight"], "--model must name a model of lowlight"),
    "no folder": (["--model", "absent"], "--model: there is no folder"),
    "no model": (["--model", "pictures"], "--model: "),
    "a small margin": (["--margin", 0.001], "the margin must be at least a grey level"),
}


@pytest.mark.parametrize(("more", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_no_run(
    pictures, tmp_path, more, message, monkeypatch, capsys, train
):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "mine")
    (tmp_path / "options.yaml").write_text("flow_steps: 9\n")
    (tmp_path / "task.yaml").write_text("task: lowlight\n")
    assert train("--model", "mine", "--data", pictures, "--out", "run", *TINY, *more) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1, errors
    assert message in errors
    assert not (tmp_path / "run").exists()


def test_a_run_from_a_model_is_resumed_without_what_the_model_is(
    pictures, tmp_path, capsys, train
):
    saved(tmp_path / "mine")
    options = ("--data", pictures, *TINY, "--model", tmp_path / "mine", "--steps", 1)
    assert train(*options, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert train("--resume", tmp_path / "run", "--levels", 3) == 2
    assert "--levels must be left out with --model" in capsys.readouterr().err
