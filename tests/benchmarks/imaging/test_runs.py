"""Runs of an experiment: what is trained, left, gone on with, and derived."""

import shutil

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("PIL.Image")

from imaging import runs

from flowguard import certify
from flowguard.cli.train import parser
from flowguard.demo.compare import COUPLINGS
from flowguard.io.pictures import Picture, write
from flowguard.models import PyramidEncoder, SuperResolutionFlow, load
from flowguard.training.run import Run


def asked_of(monkeypatch, run, steps, done=0):
    calls = []
    monkeypatch.setattr(runs, "main", lambda words: calls.append(words) or 0)
    monkeypatch.setattr(runs, "steps_done", lambda _: done)
    runs.train("superres", run, steps, ["--seed", "1"])
    return calls


def test_the_couplings_are_those_that_are_compared():
    assert {*runs.COUPLINGS} == {*COUPLINGS}
    for options in runs.COUPLINGS.values():
        parser().parse_args([*options, "--data", "d", "--out", "o"])


def test_a_run_is_begun_gone_on_with_and_left_when_it_is_finished(tmp_path, monkeypatch):
    run = Run(tmp_path / "a")
    begun = ["train", "superres", "--out", str(run.folder), "--steps", "20", "--seed", "1"]
    assert asked_of(monkeypatch, run, 20) == [begun]
    run.folder.mkdir()
    run.config.write_text("")
    begun[2] = "--resume"
    assert asked_of(monkeypatch, run, 20, done=5) == [begun]
    run.model.mkdir()
    assert asked_of(monkeypatch, run, 20, done=20) == []
    assert asked_of(monkeypatch, run, 40, done=20) != []
    with pytest.raises(ValueError, match=r"steps must not be fewer than .* has, 20; got 10"):
        asked_of(monkeypatch, run, 10, done=20)


def test_a_run_is_not_taken_for_one_with_other_options(tmp_path, monkeypatch):
    run = Run(tmp_path / "runs" / "affine-seed1")
    monkeypatch.setattr(runs, "main", lambda _: 2)
    with pytest.raises(SystemExit):
        runs.train("superres", run, 20, ["--lr", "much"])
    asked_of(monkeypatch, run, 20)  # of what was refused nothing is left
    run.model.mkdir(parents=True)
    for done in (5, 20):
        monkeypatch.setattr(runs, "steps_done", lambda _, done=done: done)
        with pytest.raises(
            ValueError, match=r"begun with, --seed 1; got --seed 1 --lr 0\.1: name"
        ):
            runs.train("superres", run, 20, ["--seed", "1", "--lr", "0.1"])
    assert asked_of(monkeypatch, run, 20, done=20) == []


def test_a_training_that_was_ended_ends_the_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "main", lambda _: 143)
    with pytest.raises(SystemExit) as end:
        runs.train("superres", Run(tmp_path), 20, [])
    assert end.value.code == 143


def test_all_couplings_of_a_seed_come_before_the_next_seed(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(runs, "train", lambda *call: begun.append(call))
    made = runs.train_all("superres", tmp_path, ["affine", "robust8"], [0, 3], 9, ["--batch", "4"])
    assert list(made) == ["affine-seed0", "robust8-seed0", "affine-seed3", "robust8-seed3"]
    _, run, steps, options = begun[3]
    assert (run.folder, steps) == (tmp_path / "robust8-seed3", 9)
    assert options == [*runs.COUPLINGS["robust8"], "--seed", "3", "--batch", "4"]


def test_of_an_affine_model_one_shrinks_and_one_is_certified(tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder = PyramidEncoder(4, scale=4, levels=2, blocks=0)
    model = SuperResolutionFlow(levels=2, steps=1, hidden=4, encoder=encoder, coupling="affine")
    with torch.no_grad():
        model.train().nll(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 8, 8))
    model.eval().conditioner.fit(torch.rand(16, 3, 8, 8), progress=False)
    model.conditioner.calibrate(torch.rand(49, 3, 8, 8), progress=False)
    run = Run(tmp_path / "runs" / "affine-seed0")
    model.save_pretrained(run.model)
    (tmp_path / "pictures").mkdir()
    write(tmp_path / "pictures" / "one.png", Picture(torch.rand(3, 24, 24)))
    asked = ("superres", "affine-seed0", run, str(tmp_path / "pictures"), 16, tmp_path / "derived")
    made = runs.derive(*asked)
    assert list(made) == ["affine+shrink-seed0", "affine+migrated-seed0"]
    shrinking, migrated = (load(place) for place in made.values())
    assert shrinking.conditioner.policy == "shrink"
    assert torch.equal(
        shrinking.flow.state_dict()["steps.0.0.coupling.first_kept.weight"],
        model.flow.state_dict()["steps.0.0.coupling.first_kept.weight"],
    )
    assert certify(migrated).certified
    assert not certify(model).certified
    assert migrated.conditioner.calibrated
    # What is there is left, until the run has another model.
    made_anew = []
    monkeypatch.setattr(runs, "_migrated", lambda _, m, *__: made_anew.append(m) or m)
    runs.derive(*asked)
    assert made_anew == []
    with torch.no_grad():
        next(model.flow.parameters()).add_(0.1)
    model.save_pretrained(run.model)
    assert list(runs.derive(*asked)) == list(made)
    assert len(made_anew) == 1
    assert not certify(load(made["affine+migrated-seed0"])).certified  # that which was handed on
    shutil.rmtree(made["affine+shrink-seed0"])
    runs.derive(*asked)
    assert load(made["affine+shrink-seed0"]).conditioner.policy == "shrink"
    assert len(made_anew) == 1
    # A migration with other crops is another one.
    *before, _, folder = asked
    runs.derive(*before, 8, folder)
    assert len(made_anew) == 2


def test_of_bounded_couplings_a_margin_is_taken_or_given(tmp_path):
    torch.manual_seed(0)
    encoder = PyramidEncoder(4, scale=4, levels=2, blocks=0)
    model = SuperResolutionFlow(levels=2, steps=1, hidden=4, encoder=encoder, margin=0.25)
    with torch.no_grad():
        model.train().nll(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 8, 8))
    model.eval().conditioner.policy = "shrink"
    names = ("robust2-seed1", "robust8-seed0", "reparametrized-seed1")
    made = {}
    for name in names:
        model.save_pretrained(Run(tmp_path / name).model)
        model.limit(None).conditioner.policy = "warn"
        made |= runs.derive("superres", name, Run(tmp_path / name), "", 16, tmp_path / "derived")
    found = {name: load(place) for name, place in made.items()}
    assert {name: (m.margin, m.conditioner.policy) for name, m in found.items()} == {
        "robust2+bare-seed1": (None, "report"),
        "robust8+limited-seed0": (0.25, "shrink"),
    }


def test_the_seconds_of_a_step_are_those_between_two(tmp_path):
    ends = (9.0, 9.5, 10.2, 3.0, 13.0)  # gone on with after the third
    rows = "".join(f"{i},{s}\n" for i, s in enumerate(ends))
    (tmp_path / "metrics.csv").write_text(f"step,seconds\n{rows}")
    assert runs.seconds_of_a_step(Run(tmp_path)) == pytest.approx(0.7)
