r"""``flowguard app``: mistakes are told in a line."""

import importlib.util
import re
import socket
import warnings

import pytest
import torch

from flowguard.cli import main as cli
from flowguard.models import LowLightEncoder, LowLightFlow, SuperResolutionFlow

pytest.importorskip("jsonargparse")
app = pytest.importorskip("flowguard.cli.app")
pytest.importorskip("skimage")
SMALL = {"levels": 1, "steps": 1, "hidden": 8, "features": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    encoder = LowLightEncoder(features=4, growth=4, blocks=1, stacked=(0,), levels=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SuperResolutionFlow(**SMALL).save_pretrained(folder / "robust")
        affine = SuperResolutionFlow(**SMALL, coupling="affine", margin=None)
        affine.save_pretrained(folder / "demo" / "affine")
        SuperResolutionFlow(**SMALL, scale=2).save_pretrained(folder / "twice")
        LowLightFlow(levels=2, steps=1, hidden=8, encoder=encoder).save_pretrained(folder / "dark")
    return folder


def run(capsys, folder, *words):
    own = ["--model", folder / "robust", "--lowlight-model", folder / "dark", "--threads", "1"]
    code = cli.main(["app", *map(str, (*own, *words))])
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "nowhere"], "--model: there is no folder nowhere"),
        (["--lowlight-model", "{0}/robust"], "--lowlight-model: .* this needs a LowLightFlow"),
        (["--affine", "nowhere"], "--affine: there is no folder nowhere"),
        (["--affine", "{0}/twice"], "--affine must enlarge as often .*, 4 times; got 2"),
        (["--affine", "{0}/demo", "{0}/twice"], "--affine must name one folder of each kind"),
        (["--device", "toaster"], "--device: 'toaster' cannot be used here"),
        (
            ["--host", "999.1.1.1"],
            "error: --host must be an address .*; got '999.1.1.1', which is",
        ),
        (["--host", ""], "error: --host must be an address .*; got nothing: leave it out for 127"),
        (["--host", "name.invalid"], "error: --host must be an .*; got 'name.invalid', which is"),
    ],
)
def test_mistakes_are_told_in_a_line(words, told, folder, capsys):
    pytest.importorskip("gradio")
    code, out = run(capsys, folder, *(word.format(folder) for word in words))
    assert code == 2
    assert out.err.count("\n") == 1
    assert re.search(told, out.err), out.err


def test_without_gradio_it_says_what_to_install(folder, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(app, "find_spec", lambda name: None if name == "gradio" else find(name))
    code, out = run(capsys, folder)
    assert code == 2
    assert 'gradio is missing: pip install "flowguard-nf[app]" (in a clone: pip install' in out.err


def test_a_port_that_is_taken_is_told(folder, capsys):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, out = run(capsys, folder, "--port", taken.getsockname()[1])
    assert code == 2
    assert out.err.startswith("flowguard: error: --port must be free; got ")
    assert out.err.count("\n") == 1


def test_what_the_demo_made_is_found_and_its_absence_said(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(app, "DEMO", app.Path("demo"))
    args = app.parser().parse_args(["--model", "robust", "--lowlight-model", "dark"])
    args.model, args.lowlight_model = folder / "robust", folder / "dark"
    superres, lowlight, note = app._partners(args)
    assert [p.name for p in superres] == ["affine", "robust"]
    assert [p.name for p in lowlight] == ["robust"]
    assert note == ""
    monkeypatch.setattr(app, "DEMO", app.Path("elsewhere"))
    superres, _, note = app._partners(args)
    assert [p.name for p in superres] == ["robust"]
    assert "flowguard demo makes one in elsewhere/affine" in note


def test_it_listens_on_this_machine_alone_unless_told():
    assert app.parser().parse_args([]).host == "127.0.0.1"
