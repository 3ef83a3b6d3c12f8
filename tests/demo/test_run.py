r"""The demo end to end, and what it says to mistakes."""

import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import torch

from flowguard.cli import demo as command
from flowguard.cli import main as cli
from flowguard.cli.parsing import UserError
from flowguard.demo import report as demo_report
from flowguard.demo import run as demo
from flowguard.io.atomic import atomic
from flowguard.models import load
from flowguard.training.build import build

Image = pytest.importorskip("PIL.Image")


def flowguard(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "flowguard.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "2"},  # what --threads wins against
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    runs = []
    for name in ("first", "second"):
        out = folder / name
        arguments = ("demo", "--quick", "--steps", 12, "--threads", 1, "--out", out)
        runs.append((flowguard(*arguments, cwd=folder), out))
    return runs


def test_the_quick_demo_writes_what_it_says(quick):
    done, out = quick[0]
    assert done.returncode == 0, done.stderr
    assert "affine artefacts" in done.stdout
    assert "bits/dim" in done.stderr  # the progress bar
    names = {p.name for p in out.iterdir()}
    assert {"report.html", "metrics.json", "headline.png"} <= names
    assert {"affine", "robust"} <= names
    assert not [n for n in names if n.endswith(".tmp")]
    numbers = json.loads((out / "metrics.json").read_text())
    panels = [n for n in names if n.startswith("panel-")]
    assert len(panels) == len(numbers["conditions"])
    for condition in numbers["conditions"]:
        robust = condition["models"]["robust"]
        assert robust["non_finite"] == 0, condition["name"]
        assert math.isfinite(robust["max_abs"])
        assert set(robust["ood"]) == {"level1", "level2"}
    for name in ("affine", "robust"):
        assert 0 < numbers["models"][name]["bits_per_dim"] < 8
        assert numbers["models"][name]["psnr_temperature_0"] > 25


def test_the_threads_are_those_of_the_run(quick):
    _, out = quick[0]
    assert json.loads((out / "metrics.json").read_text())["threads"] == 1


def test_the_report_is_one_self_contained_page(quick):
    _, out = quick[0]
    page = (out / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    # Condition, bicubic, two samples, two maps.
    assert len(sources) >= 6 * len(list(out.glob("panel-*.png")))
    assert all(s.startswith(("data:image/", "#")) for s in sources)
    assert "held-out photograph" in page


def test_a_rerun_gives_the_same_numbers(quick):
    first, second = (json.loads((out / "metrics.json").read_text()) for _, out in quick)
    for numbers in (first, second):
        del numbers["timing"]
    assert first == second


@pytest.mark.parametrize("name", ["affine", "robust"])
def test_the_models_load_with_their_guards(quick, name):
    _, out = quick[0]
    model = load(out / name)
    assert model.conditioner.calibrated
    assert model.arguments["coupling"] == name
    x = model.sample(torch.rand(1, 3, 8, 8), 1, 0.0)
    assert torch.isfinite(x).all()


def test_the_models_are_those_that_inspect_superres_and_compare_take(quick, tmp_path, capsys):
    _, out = quick[0]
    assert cli.main(["inspect", str(out / "robust")]) == 0
    told = capsys.readouterr().out
    assert "SuperResolutionFlow" in told
    assert "fitted and calibrated" in told
    picture = tmp_path / "x.png"
    Image.new("RGB", (12, 10), (90, 120, 60)).save(picture)
    target = tmp_path / "y.png"
    assert cli.main(["superres", str(picture), str(target), "--model", str(out / "affine")]) == 0
    assert Image.open(target).size == (48, 40)
    arguments = ["compare", "--quick", "--samples", "1", "--couplings", "--models"]
    arguments += [str(out / "affine"), str(out / "robust"), "--out", str(tmp_path / "c")]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    for name in ("affine", "robust"):
        assert re.search(rf"^{name} +\d", told, re.M)


def test_times_are_told_in_seconds_of_the_processor(quick):
    done, out = quick[0]
    assert done.stdout.count(" CPU s\n") == 2
    timing = json.loads((out / "metrics.json").read_text())["timing"]
    for name in ("affine", "robust"):
        assert timing[name]["training_cpu_seconds"] > 0
        assert timing[name]["sampling_cpu_seconds"] > 0


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    r"""The folder of a super-resolution model whose encoder is not that of the demo."""
    folder = tmp_path_factory.mktemp("weights") / "mine"
    torch.manual_seed(0)
    build("superres", levels=2, steps=1, hidden=8, features=8, blocks=1).save_pretrained(folder)
    return folder


def test_an_encoder_from_elsewhere_stays_as_it_is(encoder):
    model = demo.TASKS["superres"].build("affine", True, encoder)
    before = {name: p.clone() for name, p in model.flow.state_dict().items()}
    pairs = [(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 4, 4))] * 2
    demo.train(model, pairs, steps=2, progress=False)
    theirs = load(encoder).conditioner.encoder.state_dict()
    ours = model.conditioner.encoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not all(torch.equal(p, before[name]) for name, p in model.flow.state_dict().items())


def test_both_flows_are_built_on_the_encoder(encoder, tmp_path, monkeypatch):
    asked = []

    def built(coupling, quick, weights):
        asked.append((coupling, weights))
        raise UserError("enough")

    monkeypatch.setattr(demo.TASKS["superres"], "build", built)
    options = demo.DemoOptions(out=tmp_path, quick=True, encoder=encoder)
    for coupling in ("affine", "robust"):
        with pytest.raises(UserError, match="enough"):
            demo._train(coupling, coupling, [], options)
    assert asked == [("affine", encoder), ("robust", encoder)]


@pytest.mark.parametrize("task", ["superres", "lowlight"])
def test_an_encoder_fits_its_own_task_alone(task, encoder):
    if task == "superres":
        assert demo.TASKS[task].build("affine", True, encoder).frozen
    else:
        with pytest.raises(ValueError, match="holds a PyramidEncoder"):
            demo.TASKS[task].build("affine", True, encoder)


@pytest.mark.parametrize(
    ("arguments", "used"),
    [
        ([], True),
        (["--encoder-weights", "none"], False),
        (["--quick", "--encoder-weights", "superres-x4"], True),
        (["--quick"], False),
        (["--task", "lowlight"], False),
    ],
    ids=["by default", "none", "by name", "quick", "another task"],
)
def test_the_encoder_is_that_of_the_package_unless_none_is_wanted(
    arguments, used, encoder, tmp_path, monkeypatch
):
    asked = []

    def stop(options):
        asked.append(options.encoder)
        raise UserError("enough")

    own = {"superres-x4": encoder}
    monkeypatch.setattr(
        "flowguard.models.store.located", lambda name: own.get(name, pathlib.Path(name))
    )
    monkeypatch.setattr(demo, "run_demo", stop)
    assert cli.main(["demo", *arguments, "--out", str(tmp_path)]) == 2
    assert asked == [encoder if used else None]


MISTAKES = {
    "absent encoder": (["--encoder-weights", "absent"], "a model folder or none; there is no abs"),
    "encoder of a long name": (["--encoder-weights", "x" * 5000], "--encoder-weights: xxx"),
    "an encoder that is none": (["--encoder-weights", "file"], "--encoder-weights: "),
    "no steps": (["--steps", "0"], "must be at least 1 and at most 1000000000; got 0"),
    "steps in words": (["--steps", "many"], "must be a whole number; got 'many'"),
    "unknown device": (["--device", "abacus"], "--device: 'abacus' cannot be used here"),
    "absent device": (["--device", "cuda:99"], "--device: 'cuda:99' cannot be used here"),
    "out is a file": (["--out", "file"], "--out must be a folder"),
    "out below a file": (["--out", "file/below"], "--out must be a folder"),
    "out without a value": (["--out"], "expected one argument"),
    "unknown coupling": (["--coupling", "cubic"], "invalid choice: 'cubic'"),
    "no threads": (["--threads", "0"], "must be at least 1"),
    "too many threads": (["--threads", "999999999"], "at most 1024"),
    "negative seed": (["--seed", "-1"], "must be at least 0"),
    "huge seed": (["--seed", "9" * 23], "must be at least 0 and at most"),
    "huge number of steps": (["--steps", "9" * 20], "must be at least 1 and at most"),
    "device without numbers": (["--device", "meta"], "--device: 'meta' cannot be used here"),
    "device without a build": (["--device", "hpu"], "--device: 'hpu' cannot be used here"),
    "out is nothing": (["--out", ""], "must name a folder"),
    "a report that is a folder": (["--out", "taken"], "is a folder, and shall become a file"),
    "a model that is a file": (["--out", "models"], "is a file, and shall become a folder"),
    "unknown task": (["--task", "night"], "invalid choice: 'night'"),
    "mistyped option": (["--stepz", "3"], "there is no option --stepz; did you mean --steps?"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "robust").write_text("")
    monkeypatch.setattr(demo, "run_demo", lambda options: pytest.fail("it ran"))
    try:
        code = cli.main(["demo", *arguments])
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    assert code == 2
    assert told.out == ""
    assert message in told.err
    assert told.err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "taken", "models", "flowguard-demo"}
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["report.html"]


def test_a_folder_that_is_not_writable(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:  # who may write everywhere but to what is no folder of a disk
        locked = pathlib.Path("/proc/self")
        if not locked.is_dir():
            pytest.skip("root may write everywhere")
    done = flowguard("demo", "--quick", "--out", locked, cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot write to the folder" in done.stderr


def test_the_tasks_of_the_command_are_those_of_the_demo():
    assert set(command.TASKS) == set(demo.TASKS)
    with pytest.raises(ValueError, match="superres, lowlight; got 'night'"):
        demo.DemoOptions(out=pathlib.Path(), task="night")


def test_no_command_and_an_unknown_one(tmp_path):
    for arguments in ((), ("dmeo",)):
        done = flowguard(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1


# In the midst of training, the program tells so and waits. What it was started by may ignore Ctrl-C.
PAUSED = """
import signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from flowguard.cli import main as cli

signal.signal(signal.SIGINT, signal.default_int_handler)
steps = []

def pausing(optimizer, arguments, options):
    steps.append(optimizer)
    if len(steps) == 3:
        print("paused", flush=True)
        sys.stdin.read()

register_optimizer_step_post_hook(pausing)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupting_the_training_leaves_no_half_written_file(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", PAUSED, "demo", "--quick", "--steps", "6", "--out", out]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    paused = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert paused == b"paused\n", rest
    assert process.returncode == 130
    assert b"interrupted" in rest
    assert b"Traceback" not in rest
    assert list(pathlib.Path(out).iterdir()) == []


def test_numbers_that_are_not_finite_are_written_as_words(tmp_path, monkeypatch):
    """A run that goes wrong must not lose what it made."""
    monkeypatch.setattr(demo, "CALIBRATION_CROPS", 200)
    options = demo.DemoOptions(out=tmp_path, steps=2, quick=True, progress=False)
    result = demo.run_demo(options)
    for trained in result.models.values():
        trained.training.losses[:] = [math.nan]
        trained.held_out.update(psnr=math.inf, bits_per_dim=math.nan)
    files = demo_report.write(result)
    assert all(f.exists() for f in files)
    numbers = json.loads((tmp_path / "metrics.json").read_text())["models"]["robust"]
    assert (numbers["psnr"], numbers["bits_per_dim"]) == ("inf", "nan")


def test_panels_of_an_earlier_run_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CALIBRATION_CROPS", 200)
    options = demo.DemoOptions(out=tmp_path, steps=2, quick=True, progress=False)
    result = demo.run_demo(options)
    demo_report.write(result)
    mine = {"panel-99-mine.png", "panel-00-held-out-photograph.txt", "notes.txt"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    before = {p.name for p in tmp_path.iterdir()}
    fewer = dataclasses.replace(
        result, conditions=result.conditions[2:], sampled=result.sampled[2:]
    )
    written = {p.name for p in demo_report.write(fewer)}
    after = {p.name for p in tmp_path.iterdir()}
    assert len([n for n in before if n.startswith("panel-")]) == len(result.conditions) + 2
    assert after == written | mine
    for text in ("", "[]", '{"conditions": [{"name": 3}, 4]}', '{"conditions": 5}'):
        (tmp_path / "metrics.json").write_text(text)
        demo_report.write(fewer)
        assert {p.name for p in tmp_path.iterdir()} == after


def test_a_file_is_whole_or_untouched(tmp_path):
    file = tmp_path / "file"
    file.write_text("before")

    def interrupted():
        with atomic(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_attacked_is_what_the_model_adds():
    """Beside hard edges the plain bicubic enlargement overshoots what the model adds to."""
    task = demo.TASKS["superres"]
    model = task.build("robust", quick=True).eval()
    condition = torch.zeros(1, 3, 60, 80)
    condition[..., 1::4] = condition[..., 2::4] = 1.0
    residual, y = task.sampler(model, condition)
    noise = [y.new_zeros(1, *shape) for shape in model.latent_shapes(y)]
    with torch.no_grad():
        # An untrained model adds nothing to it.
        assert float(residual(noise, y).abs().max()) < 1e-6
