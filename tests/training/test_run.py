"""Runs: what they leave in their folder, and that nothing is lost when they are stopped."""

import contextlib
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

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("lightning")
Image = pytest.importorskip("PIL.Image")

from flowguard.cli import main as cli  # noqa: E402
from flowguard.io.lock import alone  # noqa: E402
from flowguard.models import load  # noqa: E402
from flowguard.training.module import FlowModule  # noqa: E402
from flowguard.training.pictures import CropBatches, pairs_of  # noqa: E402
from flowguard.training.run import Loading, Run, steps_done  # noqa: E402

SMALL = ("--encoder-blocks", 1, "--flow-steps", 1, "--hidden", 8, "--features", 8, "--threads", 1)
TINY = (*SMALL, "--crop", 16, "--batch", 2, "--accelerator", "cpu", "--guard-pictures", 2)
#: The run that others are compared with: long enough to be stopped twice between validations.
STEPS = ("--steps", 12, "--validate-every", 5)

#: What the first runs had in their config.yaml.
FIRST_OPTIONS = """
version task data val steps batch crop lr seed coupling scale levels flow_steps hidden features
encoder_blocks validate_every checkpoint_minutes precision threads
""".split()
#: What a child process runs: its streams are a file, and its exit code is that of the command.
CHILD = """
import os, sys
from flowguard.cli.main import main
from flowguard.training.module import FlowModule
arguments, told, most, number, last, moved = given
if most is not None:  # bytes that a file may have
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
def signalled(self, *batch, made=FlowModule.training_step):
    if self.global_step == last:  # in the midst of the step after it
        if moved is not None:
            os.rename(*moved)
        os.kill(os.getpid(), number)
    return made(self, *batch)
FlowModule.training_step = signalled
sys.stdout = sys.stderr = open(told, "w", buffering=1)
sys.exit(main(arguments))
"""


@pytest.fixture(scope="module")
def folder(fill, tmp_path_factory):
    return fill(tmp_path_factory.mktemp("pictures"))


def options(folder, *more):
    return [str(a) for a in ("train", "superres", "--data", folder, *TINY, *more)]


@pytest.fixture(scope="module")
def start():
    """Processes that have everything imported when they begin."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowguard.training.run", "flowguard.cli.main"])

    def begin(arguments, told=os.devnull, *, most=None, number=0, last=None, moved=None):
        given = {"given": (arguments, str(told), most, number, last, moved)}
        process = context.Process(target=exec, args=(CHILD, given))
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
    for name in ("validation.csv", "outside.csv"):
        assert rows(run, name) == rows(other, name)
    for name in ("model", "best"):
        first, second = (load_file(r / name / "model.safetensors") for r in (run, other))
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert value.equal(second[key]), key


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory, start):
    run = tmp_path_factory.mktemp("whole") / "run"
    process = start(options(folder, *STEPS, "--out", run))
    process.join()
    assert process.exitcode == 0
    return run


def test_a_run_that_is_killed_makes_the_steps_of_one_that_was_not(folder, tmp_path, start, whole):
    run = tmp_path / "run"
    arguments = options(folder, *STEPS, "--out", run, "--checkpoint-minutes", "0.0001")
    process = start(arguments, number=signal.SIGKILL, last=7)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 5 <= steps_done(Run(run)) <= 7  # that before the validation, if none by time
    process = start(["train", "--resume", str(run), "--workers", "1"])
    process.join()
    assert process.exitcode == 0
    assert_same(run, whole)


def killed(run, arguments, start, times):
    """A run that is killed at random moments, and then let be."""
    rng = random.Random(0)
    for _ in range(times):
        process = start(arguments)
        # Not for its last step: a run that is over cannot be killed.
        wait_for(process, run, min(11, max(0, len(rows(run)) - 1) + rng.randrange(1, 5)))
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        arguments = ["train", "--resume", str(run)]
    process = start([*arguments, "--workers", "1"])
    process.join()
    return process.exitcode


@pytest.mark.slow
def test_a_run_killed_at_random_moments_makes_the_steps_of_one_that_was_not(
    folder, tmp_path, start, whole
):
    run = tmp_path / "run"
    arguments = options(folder, *STEPS, "--out", run)
    assert killed(run, [*arguments, "--checkpoint-minutes", "0"], start, 10) == 0
    assert_same(run, whole)
    assert not list(run.rglob(".*")), "what was half written is left"


def test_what_a_killed_run_left_half_written_is_removed(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    names = ["checkpoints/last.ckpt", "best/model.safetensors", "model/config.json", "config.yaml"]
    left = [run / name for name in (*names, "validation.csv", "pictures/held-out.png")]
    left = [file.parent / f".{file.name}.abcd1234.tmp" for file in left]
    mine = run / ".notes.abcd1234.tmp"
    for file in (*left, mine):
        file.write_bytes(b"half")
    Run(run).sweep()
    assert [file for file in run.rglob(".*")] == [mine]
    assert len(contents(run)) == len(contents(whole)) + 1


def test_a_run_that_is_asked_to_end_saves_first(folder, tmp_path, start, whole):
    run, told = tmp_path / "run", tmp_path / "told.txt"
    arguments = options(folder, *STEPS, "--out", run)  # the next checkpoint by time is far
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 7)):
        process = start(arguments, told, number=number, last=step)
        process.join()
        assert process.exitcode == 128 + number
        assert f"saved; flowguard train --resume {run} goes on" in told.read_text()
        assert steps_done(Run(run)) == len(rows(run)) == step + 1
        arguments = ["train", "--resume", str(run)]
    process = start(arguments)
    process.join()
    assert process.exitcode == 0
    assert_same(run, whole)


def test_a_run_goes_further_and_a_whole_one_is_left_as_it_is(folder, tmp_path, start, whole):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    held = yaml.safe_load((run / "config.yaml").read_text())
    # As an earlier version wrote it, but for what that did otherwise.
    held = {name: held[name] for name in (*FIRST_OPTIONS, "margin", "policy", "boundary")}
    (run / "config.yaml").write_text(yaml.safe_dump(held))
    process = start(["train", "--resume", str(run)])
    process.join()
    assert process.exitcode == 0
    assert_same(run, whole)
    process = start(["train", "--resume", str(run), "--steps", "15", "--validate-every", "7"])
    process.join()
    assert process.exitcode == 0
    table = rows(run)
    assert [int(row["step"]) for row in table] == list(range(1, 16))
    assert table[:12] == rows(whole)
    assert float(table[12]["lr"]) > float(table[11]["lr"])  # by the schedule of 15 steps
    assert [int(row["step"]) for row in rows(run, "validation.csv")] == [5, 10, 12, 14, 15]


def test_what_a_run_leaves(whole):
    assert {p.name for p in whole.iterdir()} - {"tensorboard"} == {
        "config.yaml",
        "metrics.csv",
        "validation.csv",
        "outside.csv",
        "pictures",
        "report.html",
        "checkpoints",
        "best",
        "model",
    }
    assert [int(row["step"]) for row in rows(whole)] == list(range(1, 13))
    assert [int(row["step"]) for row in rows(whole, "validation.csv")] == [5, 10, 12]
    for name in ("best", "model"):
        model = load(whole / name)
        assert model.conditioner.calibrated
        sample = model.sample(torch.rand(1, 3, 8, 8))
        assert sample.shape == (1, 1, 3, 32, 32)


def test_two_processes_are_one(folder, tmp_path, start):
    """By the command, as a user has it: Lightning starts the second one."""
    found = [tmp_path / "1", tmp_path / "2"]
    arguments = options(folder, "--steps", 8, "--validate-every", 5, "--precision", "64-true")
    # One of the two has no picture to fit the guard on.
    arguments += ["--average", "0", "--guard-pictures", "1", "--out"]
    process = start([*arguments, str(found[0])])
    process.join()
    assert process.exitcode == 0
    command = [sys.executable, "-m", "flowguard", *arguments, str(found[1]), "--devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
    "an empty folder": (["--data", "{tmp}/empty"], "there must be a picture of at least 16 rows"),
    "a large crop": (["--crop", "64"], "there must be a picture of at least 64 rows"),
    "a mistyped option": (["--step", "3"], r"there is no option --step; did you mean --steps\?"),
    "no weights": (
        ["--encoder-weights", "{tmp}/nothing.pth"],
        r"--encoder-weights must name a file, or a model folder; there is no .*nothing.pth",
    ),
    "an error that counts nothing": (
        ["--pixel-loss", "l2"],
        "--pixel-loss l2 must come with --pixel-weight",
    ),
    "pairs of nothing": (["--val-pairs", "{tmp}"], "--val-pairs must come with --val"),
    "a long name": (["--data", "x" * 300], "error: .*File name too long: '.*xxx"),
    "an odd crop": (["--crop", "18"], "--crop must be a multiple of 4; got 18"),
    "an empty folder to validate with": (["--val", "{tmp}/empty"], "there must be a picture"),
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
    (tmp_path / "empty").mkdir()
    more = [a.format(tmp=tmp_path) for a in more]
    code, line = told(capsys, [*options(folder), "--out", tmp_path / "run", *more])
    assert code == 2
    assert re.search(words, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_were_started_are_told_of_or_none_of_them_trains(
    rank, folder, tmp_path, monkeypatch, capsys
):
    """Each would be the only one that it knows of, and write into the same folder."""
    started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    code, line = told(capsys, options(folder, "--out", tmp_path / "run", "--steps", 1))
    assert code == 2
    assert "must be the 2 processes that torchrun or srun started; got 1 times 1" in line
    assert "add --devices 2" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--data", "--val", "--ood"])
def test_a_run_does_not_lie_among_the_pictures_that_it_reads(option, folder, tmp_path, capsys):
    """When it goes on, it would learn from the pictures that it wrote."""
    pictures = tmp_path / "pictures"
    shutil.copytree(folder, pictures)
    (tmp_path / "link").symlink_to(pictures)
    for place in (pictures / "deep" / "run", tmp_path / "link" / "run"):
        arguments = options(folder, option, pictures, "--out", place, "--steps", 1)
        code, line = told(capsys, arguments)
        assert code == 2
        assert f"--out must not lie in {option}, as the pictures that a run writes" in line
        assert not place.exists()


def test_low_light_has_no_scale(folder, tmp_path, capsys):
    arguments = options(folder, "--out", tmp_path / "run", "--scale", 2)
    arguments[1] = "lowlight"
    code, line = told(capsys, arguments)
    assert code == 2
    assert "--scale must be left out for lowlight, whose pictures keep their size; got 2" in line


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
        (["--steps", "11"], "--steps must be at least the 12 that are done; got 11"),
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


CONFIGS = {
    "words for a number": ("batch: twelve", "batch.*must be a whole number; got 'twelve'"),
    "a number out of range": ("steps: -4", "steps.*must be at least 1"),
    "nothing for a number": ("steps: null", "steps must be given a value; got none"),
    "an unknown option": ("bacth: 3", "bacth"),
    "an unknown task": ("task: enlarge", "task.*enlarge"),
    "no pictures": ("data: null", "data must name a folder; got nothing"),
    "words for the version": ("version: new", "version.*must be a whole number; got 'new'"),
    "a newer version": ("version: 99", "was written by a newer flowguard; got 99"),
}


@pytest.mark.parametrize(("line", "words"), CONFIGS.values(), ids=CONFIGS)
def test_options_that_were_changed_by_hand_are_checked(line, words, folder, tmp_path, capsys):
    options = {"version": 1, "task": "superres", "data": str(folder)} | yaml.safe_load(line)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    code, told_of = told(capsys, ["train", "--resume", tmp_path])
    assert code == 2
    assert re.search(rf"error: --resume: .*{words}", told_of), told_of


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no checkpoint"])
def test_a_checkpoint_that_cannot_be_read_is_told_of(content, whole, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(whole / "config.yaml", tmp_path)
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(content)
    code, line = told(capsys, ["train", "--resume", tmp_path])
    assert code == 2
    assert "last.ckpt must be a checkpoint, and cannot be read: put a copy of it there" in line


def test_a_run_begins_with_the_options_of_another(whole, tmp_path, capsys):
    arguments = ["train", "--config", str(whole / "config.yaml"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    wanted = yaml.safe_load((whole / "config.yaml").read_text())
    assert {name: printed[name] for name in wanted} == wanted
    assert printed["out"] == str(tmp_path / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks of folders")
def test_a_run_is_trained_by_one_command_at_a_time(whole, capsys):
    before = contents(whole)
    with alone(whole):
        code, line = told(capsys, ["train", "--resume", whole, "--steps", 99])
    assert code == 2
    assert f"must be trained by one command at a time; another is at {whole}" in line
    assert contents(whole) == before


def test_a_run_that_makes_up_for_a_validation_ends_when_it_is_asked_to(
    whole, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    table = run / "validation.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))  # not that of 12

    def asked(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"bits_per_dim": 1.0}

    monkeypatch.setattr("flowguard.training.module.measure", asked)
    arguments = ["train", "--resume", run, "--steps", 14, "--validate-every", 6]
    assert cli.main([str(a) for a in arguments]) == 128 + signal.SIGTERM
    assert f"saved; flowguard train --resume {run} goes on" in capsys.readouterr().out
    assert [row["step"] for row in rows(run, "validation.csv")] == ["5", "10"]
    assert len(rows(run)) == 12


def test_a_run_that_is_asked_twice_ends_at_once(whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)

    def asked(self, *_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(FlowModule, "training_step", asked)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["train", "--resume", str(run), "--steps", "14"]) == 128 + signal.SIGINT
    told_of = capsys.readouterr().out
    assert "what was done since the last checkpoint is lost; flowguard train --resume" in told_of
    assert signal.getsignal(signal.SIGINT) is before
    assert steps_done(Run(run)) == 12
    with alone(run):  # which is free for the next command
        pass


def test_a_run_whose_folder_is_removed_says_so(folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    step = FlowModule.training_step

    def removing(self, *batch):
        if self.global_step == 1:
            shutil.rmtree(run)
        return step(self, *batch)

    monkeypatch.setattr(FlowModule, "training_step", removing)
    code, line = told(capsys, options(folder, "--steps", 3, "--out", run))
    assert code == 2
    assert "No such file or directory; the run folder must stay while the run goes on" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_pictures_are_gone_says_so_and_goes_on_when_they_are_back(
    workers, folder, tmp_path, start, whole
):
    """It does not train with those that it has in memory, nor with those that are left."""
    pictures, away = tmp_path / "pictures", tmp_path / "away"
    run, told = tmp_path / "run", tmp_path / "told.txt"
    shutil.copytree(folder, pictures)
    arguments = options(pictures, *STEPS, "--out", run, "--cache", 0, "--workers", workers)
    process = start(
        [*arguments, "--checkpoint-minutes", "0"], told, moved=(pictures, away), last=3
    )
    process.join()
    lines = [line for line in told.read_text().splitlines() if "error" in line]
    assert process.exitcode == 2, told.read_text()
    assert len(lines) == 1, told.read_text()
    assert re.search(rf"error: cannot read {pictures}/\w.png: No such file", lines[0]), lines
    assert f"bring them back and go on by --resume {run}" in lines[0]
    assert "Traceback" not in told.read_text()
    away.rename(pictures)
    process = start(["train", "--resume", str(run)])
    process.join()
    assert process.exitcode == 0
    assert_same(run, whole)


def test_a_run_that_goes_on_with_other_pictures_says_so(folder, tmp_path, recwarn):
    pictures = tmp_path / "pictures"
    shutil.copytree(folder, pictures)

    def loading():
        return Loading(
            CropBatches(pairs_of(pictures, scale=4, crop=16)[0], size=16, batch=2, seed=0)
        )

    before = loading().state_dict()
    loading().load_state_dict(before)
    loading().load_state_dict({})  # of an earlier version
    assert not recwarn
    (pictures / "b.png").rename(pictures / "d.png")
    with pytest.warns(UserWarning, match="the pictures are not those that the run was at before"):
        loading().load_state_dict(before)


def test_a_run_of_which_all_pictures_are_corrupt_says_so(folder, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "ab":
        (pictures / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes()[:200])
    more = ["--val", folder, "--out", tmp_path / "run"]
    code, line = told(capsys, options(pictures, "--steps", 3, *more))
    assert code == 2
    assert f"a picture that can be decoded; got 2 that cannot in {pictures}" in line


def test_a_disk_that_is_full_is_told_of_and_what_was_saved_stays_whole(tmp_path, start, whole):
    run, told = tmp_path / "run", tmp_path / "told.txt"
    shutil.copytree(whole, run)
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    # No file may grow beyond this: the checkpoint is larger, tables and decoded pictures are not.
    process = start(["train", "--resume", str(run), "--steps", "14"], told, most=30000)
    process.join()
    lines = [line for line in told.read_text().splitlines() if "error" in line]
    assert process.exitcode == 2
    assert lines == [
        f"flowguard: error: cannot write to {run}: File too large; what was saved before is whole:"
        f" make room and go on by --resume {run}"
    ]
    assert len(before) > 30000
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert len(rows(run)) == 14  # it was not full before


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


def test_corrupt_files_are_named_and_left_out(folder, tmp_path, start):
    pictures, told = tmp_path / "pictures", tmp_path / "told.txt"
    shutil.copytree(folder, pictures)
    (pictures / "text.png").write_text("no picture")
    Image.new("RGB", (8, 90)).save(pictures / "narrow.png")
    process = start(options(pictures, "--steps", 2, "--out", tmp_path / "run"), told)
    process.join()
    errors = told.read_text()
    assert process.exitcode == 0, errors
    assert "left out: " + str(pictures / "text.png") in errors
    assert "left out: " + str(pictures / "narrow.png") in errors
