r"""Models in training and strange conditions."""

import math
import warnings

import pytest
import torch

from flowguard import data
from flowguard.functional import limited
from flowguard.io import pictures
from flowguard.models import LowLightEncoder, LowLightFlow, PyramidEncoder, SuperResolutionFlow
from flowguard.models.encoders.lowlight import low_light_input
from flowguard.ood import OODContextWarning

pytest.importorskip("lightning")
pytest.importorskip("PIL.Image")

from flowguard.training.guard import Conditions, guarded
from flowguard.training.outside import Questions, ask, middle, questions, raw_condition


def smooth(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*shape[:-2], 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse[None], shape[-2:], mode="bicubic")[0].clamp(0, 1)


def pairs(count=6, size=(12, 14)):
    lr = [smooth(3, *size, seed=i) for i in range(count)]
    return [(torch.nn.functional.interpolate(y[None], scale_factor=4.0)[0], y) for y in lr]


def enlarging(coupling="robust"):
    torch.manual_seed(0)
    encoder = PyramidEncoder(8, scale=4, levels=1, blocks=0)
    model = SuperResolutionFlow(
        scale=4, levels=1, steps=1, hidden=8, features=8, coupling=coupling, encoder=encoder
    )
    model.train()
    x, y = (torch.stack(p) for p in zip(*pairs(), strict=True))
    model.nll(x, y)  # sets the normalisation
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return guarded(model, Conditions(pairs(), pairs(), size=8, crops=60))


def test_questions_are_the_middles_of_held_out_conditions(tmp_path):
    asked, left_out = questions(pairs(), size=8, most=4)
    assert left_out == []
    expected = torch.stack([middle(y, 8) for _, y in pairs()[:4]])
    assert torch.equal(asked.usual, expected)
    assert asked.folder is None
    names = [f"{c.name} {s:g}" for c in data.corruptions(0) for s in c.strengths]
    assert list(asked.corrupted) == names
    assert torch.equal(asked.corrupted["gain 5"], 5 * expected)
    # No larger than the smallest of them.
    assert questions(pairs(), size=24)[0].usual.shape == (6, 3, 12, 12)


def test_a_folder_is_asked_as_it_is(tmp_path):
    for i in range(5):
        colour = (255 * smooth(3, 20, 22, seed=i)).round() / 255
        pictures.write(tmp_path / f"{i}.png", pictures.Picture(colour))
    pictures.write(tmp_path / "small.png", pictures.Picture(torch.rand(3, 7, 30)))
    (tmp_path / "none.png").write_text("no picture")
    asked, left_out = questions(pairs(), folder=tmp_path, size=8, most=2)
    first = pictures.read(tmp_path / "0.png").colour[:, 6:14, 7:15]
    assert asked.folder.shape == (2, 3, 8, 8)
    assert torch.equal(asked.folder[0], first)
    assert {f.path.name for f in left_out} == {"small.png", "none.png"}
    for file in tmp_path.iterdir():
        file.write_text("no picture")
    with pytest.raises(ValueError, match=r"at least 12 rows.*got 7 other"):
        questions(pairs(), folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        questions(pairs(), folder=tmp_path / "absent")


def test_what_was_prepared_becomes_a_picture_again():
    dark = 0.1 * smooth(3, 6, 8)
    prepared = low_light_input(dark[None])[0]
    torch.testing.assert_close(raw_condition(prepared), dark, rtol=0, atol=1e-6)
    assert raw_condition(dark) is dark


def test_a_robust_model_has_a_certificate_that_no_attack_exceeds():
    asked, _ = questions(pairs(), size=8)
    numbers, shown = ask(enlarging(), asked)
    assert 0 <= numbers["artefacts"] <= 1
    assert numbers["non_finite"] == 0
    assert 0.5 < numbers["auroc"] <= 1
    assert 0 < numbers["reached"] < numbers["certificate"] < 100
    assert shown.shape == (3, 32, 32)
    assert "folder_auroc" not in numbers
    assert ask(enlarging(), asked)[0] == numbers


def test_an_affine_model_has_none():
    asked, _ = questions(pairs(), size=8)
    assert ask(enlarging("affine"), asked)[0]["certificate"] == math.inf


def test_artefacts_and_numbers_that_are_not_finite_are_counted():
    model, asked = enlarging(), questions(pairs(), size=8)[0]
    sample = model.sample

    def broken(y, *rest):
        x = sample(y, *rest)
        if float(y.max()) > 2:  # the strong gains
            x[..., :16] = 1e6
            x[..., :8] = torch.nan
        return x

    model.sample = broken
    strange = [float(y.max()) > 2 for y in asked.corrupted.values()]
    share = sum(strange) / len(strange)
    numbers, _ = ask(model, asked)
    assert 0 < share < 1
    assert numbers["artefacts"] == pytest.approx(share / 2, abs=0.02)
    assert numbers["non_finite"] == pytest.approx(share / 4, abs=1e-6)


def test_the_guard_is_judged_by_how_often_it_is_right():
    usual = torch.stack([middle(y, 8) for _, y in pairs()])
    model = enlarging()
    same = Questions(usual, {"none": usual}, usual)
    assert ask(model, same)[0]["auroc"] == pytest.approx(0.5)  # ties count half
    far = Questions(usual, {"far": 50 - 50 * usual}, usual)
    numbers = ask(model, far)[0]
    assert numbers["auroc"] == 1
    assert numbers["folder_auroc"] == pytest.approx(0.5)
    lost = Questions(usual, {"nan": usual * torch.nan})
    assert ask(model, lost)[0]["auroc"] == 1


def test_the_policy_of_the_model_is_left_as_it_was():
    model, asked = enlarging(), questions(pairs(), size=8)[0]
    model.conditioner.policy = "raise"
    ask(model, asked)  # which would raise
    assert model.conditioner.policy == "raise"


def test_low_light_models_are_asked_too():
    torch.manual_seed(0)
    encoder = LowLightEncoder(8, growth=4, blocks=1, stacked=(0,), levels=1)
    model = LowLightFlow(levels=1, steps=1, hidden=8, encoder=encoder)
    bright = [smooth(3, 16, 16, seed=i) for i in range(4)]
    dark = [(x, low_light_input(0.08 * x[None])[0]) for x in bright]
    model.train()
    x, y = (torch.stack(p) for p in zip(*dark, strict=True))
    model.nll(x, y)
    made = guarded(model, Conditions(dark, dark, size=16, crops=60))
    numbers, _ = ask(made, questions(dark, size=16)[0], steps=2)
    assert 0 < numbers["reached"] < numbers["certificate"] < math.inf
    assert numbers["auroc"] > 0.5


def test_what_a_margin_moves_is_counted():
    model, asked = enlarging(), questions(pairs(), size=8)[0]
    sample, far = model.sample, limited(torch.tensor(7.0), model.margin)[0]

    def broken(y, *rest):
        x = sample(y, *rest).clamp(0, 1)
        x[..., :16] = far
        x[..., 16:24] = 1.1  # within the inner half
        return x

    model.sample = broken
    asked = Questions(asked.usual, asked.corrupted, asked.usual)
    numbers, _ = ask(model, asked)
    assert numbers["bent"] == pytest.approx(0.5)
    assert numbers["folder_bent"] == pytest.approx(0.5)
    assert numbers["artefacts"] == 0  # which says nothing with a margin
    assert "bent" not in ask(model.limit(None), asked)[0]


def test_a_guard_that_shrinks_does_so_when_a_model_is_asked():
    model, asked = enlarging(), questions(pairs(), size=8)[0]
    model.conditioner.boundary = 0.5  # moves half of all pixels
    told = ask(model, asked)
    model.conditioner.policy = "shrink"
    with warnings.catch_warnings():
        warnings.simplefilter("error", OODContextWarning)
        shrunk = ask(model, asked)
    assert not torch.equal(told[1], shrunk[1])
    assert model.conditioner.policy == "shrink"
