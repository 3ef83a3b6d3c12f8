"""Runs: what they leave in their folder, and that nothing is lost when they are stopped."""

import csv
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("lightning")
Image = pytest.importorskip("PIL.Image")

from flowguard.cli import main as cli  # noqa: E402
from flowguard.models import load  # noqa: E402
from flowguard.training.run import Run, steps_done  # noqa: E402

SMALL = ("--encoder-blocks", 1, "--flow-steps", 1, "--hidden", 8, "--features", 8, "--threads", 1)
TINY = (*SMALL, "--crop", 16, "--batch", 4, "--accelerator", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in "abc":
        coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((56, 48), Image.BICUBIC).save(made / f"{name}.png")
    return made


def options(folder, *more):
    return [str(a) for a in ("train", "superres", "--data", folder, *TINY, *more)]


@pytest.fixture(scope="module")
def start():
    """Processes that have everything imported when they begin."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowguard.training.run", "flowguard.cli.main"])

    def begin(arguments):
        code = "import sys; from flowguard.cli.main import main; sys.exit(main(arguments))"
        process = context.Process(target=exec, args=(code, {"arguments": arguments}))
        process.start()
        return process

    return begin


def rows(run, name="metrics.csv"):
    file = run / name
    if not file.exists():
        return []
    with file.open() as stream:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)]


def wait_for(process, run, steps):
    """Until the run has that many steps behind it, or is over."""
    while process.is_alive() and len(rows(run)) < steps:
        time.sleep(0.001)


def assert_same(run, other):
    assert rows(run) == rows(other)
    assert rows(run, "validation.csv") == rows(other, "validation.csv")
    for name in ("model", "best"):
        first, second = (load_file(r / name / "model.safetensors") for r in (run, other))
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert value.equal(second[key]), key


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory, start):
    run = tmp_path_factory.mktemp("whole") / "run"
    process = start(options(folder, "--steps", 30, "--validate-every", 7, "--out", run))
    process.join()
    assert process.exitcode == 0
    return run


def killed(run, arguments, start, times):
    """A run that is killed at random moments, and then let be."""
    rng = random.Random(0)
    for _ in range(times):
        process = start(arguments)
        wait_for(process, run, max(0, len(rows(run)) - 1) + rng.randrange(1, 6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        arguments = ["train", "--resume", str(run)]
    process = start([*arguments, "--workers", "1"])
    process.join()
    return process.exitcode


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_makes_the_steps_of_one_that_was_not(
    folder, tmp_path, start, whole, times
):
    run = tmp_path / "run"
    arguments = options(folder, "--steps", 30, "--validate-every", 7, "--out", run)
    assert killed(run, [*arguments, "--checkpoint-minutes", "0"], start, times) == 0
    assert_same(run, whole)
    assert not list(run.rglob(".*"))[1:], "what was half written is left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_saves_first(folder, tmp_path, start, whole, number, capfd):
    run = tmp_path / "run"
    arguments = options(folder, "--steps", 30, "--validate-every", 7, "--out", run)
    process = start(arguments)  # whose next checkpoint by time is far
    wait_for(process, run, 3)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    assert f"saved; flowguard train --resume {run} goes on" in capfd.readouterr().out
    assert steps_done(Run(run)) == len(rows(run)) >= 3
    process = start(["train", "--resume", str(run)])
    process.join()
    assert process.exitcode == 0
    assert_same(run, whole)


def test_a_run_goes_further_and_a_whole_one_is_left_as_it_is(folder, tmp_path, start, whole):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    process = start(["train", "--resume", str(run)])
    process.join()
    assert process.exitcode == 0
    assert_same(run, whole)
    process = start(["train", "--resume", str(run), "--steps", "33", "--validate-every", "10"])
    process.join()
    assert process.exitcode == 0
    table = rows(run)
    assert [int(row["step"]) for row in table] == list(range(1, 34))
    assert table[:30] == rows(whole)
    assert float(table[30]["lr"]) > float(table[29]["lr"])  # by the schedule of 33 steps
    assert [int(row["step"]) for row in rows(run, "validation.csv")] == [7, 14, 21, 28, 30, 33]


def test_what_a_run_leaves(whole):
    assert {p.name for p in whole.iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "validation.csv",
        "checkpoints",
        "best",
        "model",
    }
    assert [int(row["step"]) for row in rows(whole)] == list(range(1, 31))
    assert [int(row["step"]) for row in rows(whole, "validation.csv")] == [7, 14, 21, 28, 30]
    for name in ("best", "model"):
        model = load(whole / name)
        assert model.conditioner.calibrated
        sample = model.sample(torch.rand(1, 3, 8, 8))
        assert sample.shape == (1, 1, 3, 32, 32)


def test_two_processes_are_one(folder, tmp_path):
    """By the command, as a user has it: Lightning starts the second one."""
    found = []
    for count in (1, 2):
        run = tmp_path / str(count)
        arguments = [*options(folder, "--steps", 20, "--out", run), "--precision", "64-true"]
        arguments += ["--devices", str(count), "--validate-every", "9", "--average", "0"]
        done = subprocess.run(
            [sys.executable, "-m", "flowguard", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.append(run)
    first, second = (load_file(run / "model" / "model.safetensors") for run in found)
    for key, value in first.items():
        if "guard" not in key:  # which follows the weights
            assert torch.allclose(value.double(), second[key].double(), rtol=1e-5, atol=1e-5), key
    for name in ("metrics.csv", "validation.csv"):
        for row, other in zip(rows(found[0], name), rows(found[1], name), strict=True):
            assert {k: float(v) for k, v in row.items()} == pytest.approx(
                {k: float(v) for k, v in other.items()}, rel=1e-6
            )


def told(capsys, arguments):
    """The exit code of a mistake, and its one line."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1, lines
    return code, lines[0]


def contents(run):
    return {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


MISTAKES = {
    "no folder": (["--data", "{tmp}/nothing"], r"there is no folder .*nothing"),
    "an empty folder": (["--data", "{tmp}"], "there must be a picture of at least 16 rows"),
    "a large crop": (["--crop", "64"], "there must be a picture of at least 64 rows"),
    "an odd crop": (["--crop", "18"], "--crop must be a multiple of 4; got 18"),
    "an empty folder to validate with": (["--val", "{tmp}"], "there must be a picture"),
    "many devices": (
        ["--devices", "999"],
        r"--devices must be at most the \d+ core\(s\) here; got 999",
    ),
    "an odd batch": (
        ["--batch", "5", "--num-nodes", "2"],
        "--batch must be a multiple of the 2 processes; got 5",
    ),
    "no such accelerator": (["--accelerator", "tpu"], "[Tt][Pp][Uu]"),
    "no such strategy": (["--strategy", "faith"], "faith"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_line(name, folder, tmp_path, capsys):
    more, words = MISTAKES[name]
    more = [a.format(tmp=tmp_path) for a in more]
    code, line = told(capsys, [*options(folder), "--out", tmp_path / "run", *more])
    assert code == 2
    assert re.search(words, line), line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_not_written_to(folder, tmp_path, capsys, whole):
    before = contents(whole)
    code, line = told(capsys, options(folder, "--out", whole, "--steps", 99))
    assert code == 2
    assert f"holds a run already: go on with it by --resume {whole}" in line
    (tmp_path / "mine.txt").write_text("mine")
    code, line = told(capsys, options(folder, "--out", tmp_path))
    assert code == 2
    assert "must be a new or an empty folder" in line
    assert contents(whole) == before
    assert contents(tmp_path) == {tmp_path / "mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--lr", "0.5"], "--lr must be that of the run"),
        (["--scale", "8"], "--scale must be that of the run in .*, 4; got 8"),
        (["--coupling", "affine"], "--coupling must be that of the run in .*, robust; got affine"),
        (["--compile"], "--compile must be that of the run in .*, False; got True"),
        (["lowlight"], "task must be that of the run in .*, superres; got lowlight"),
        (["--steps", "29"], "--steps must be at least the 30 that are done; got 29"),
        (["--out", "elsewhere"], "--out must be the run that is resumed; got elsewhere"),
    ],
)
def test_a_run_goes_on_by_its_own_options(more, words, whole, capsys):
    before = contents(whole)
    code, line = told(capsys, ["train", *more, "--resume", whole])
    assert code == 2
    assert re.search(words, line), line
    assert contents(whole) == before


def test_what_is_no_run_cannot_be_resumed(tmp_path, capsys):
    code, line = told(capsys, ["train", "--resume", tmp_path])
    assert code == 2
    assert "--resume must name a run folder" in line
    (tmp_path / "config.yaml").write_text("- 1")
    code, line = told(capsys, ["train", "--resume", tmp_path])
    assert code == 2
    assert "config.yaml cannot be read" in line
    code, line = told(capsys, ["train", "--data", tmp_path])
    assert code == 2
    assert "--data and --out must be given, or --resume" in line


def test_a_disk_that_is_full_is_told_of_and_what_was_saved_stays_whole(
    folder, tmp_path, capfd, start
):
    run = tmp_path / "run"
    arguments = options(folder, "--steps", 4, "--out", run)
    process = start(arguments)
    process.join()
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    capfd.readouterr()
    # No file may grow beyond this: the checkpoint is larger, the tables are not.
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
    limited += "from flowguard.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", limited, "train", "--resume", str(run), "--steps", "6"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2
    assert lines == [
        f"flowguard: error: cannot write to {run}: File too large; what was saved before is whole:"
        f" make room and go on by --resume {run}"
    ]
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_options_come_from_a_file_and_are_printed(folder, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(f"task: lowlight\ndata: {folder}\nsteps: 7\nlr: 0.01\n")
    arguments = ["train", "--config", str(file), "--steps", "9", "--print_config"]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["task"], printed["steps"], printed["lr"]) == ("lowlight", 9, 0.01)
    assert printed["crop"] == 48


def test_low_light_is_trained_from_bright_photographs_alone(folder, tmp_path, start):
    run = tmp_path / "run"
    arguments = options(folder, "--steps", 3, "--out", run, "--features", 8)
    arguments[1] = "lowlight"
    process = start(arguments)
    process.join()
    assert process.exitcode == 0
    model = load(run / "model")
    assert model.conditioner.calibrated
    assert model.sample(torch.rand(1, 3, 12, 10) / 10).shape == (1, 1, 3, 12, 10)


def test_corrupt_files_are_named_and_left_out(folder, tmp_path, start, capfd):
    pictures = tmp_path / "pictures"
    shutil.copytree(folder, pictures)
    (pictures / "text.png").write_text("no picture")
    Image.new("RGB", (8, 90)).save(pictures / "narrow.png")
    process = start(options(pictures, "--steps", 2, "--out", tmp_path / "run"))
    process.join()
    assert process.exitcode == 0
    errors = capfd.readouterr().err
    assert "left out: " + str(pictures / "text.png") in errors
    assert "left out: " + str(pictures / "narrow.png") in errors
