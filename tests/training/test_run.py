"""Runs: what they leave in their folder, and that nothing is lost when they are stopped."""

import contextlib
import csv
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from safetensors.torch import load_file

pytest.importorskip("lightning")
Image = pytest.importorskip("PIL.Image")

from flowguard.cli import main as cli  # noqa: E402

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


def quietly(arguments):
    """What a child process runs."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        os._exit(cli.main(arguments))


@pytest.fixture(scope="module")
def start():
    """Processes that have everything imported when they begin."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowguard.training.run", "flowguard.cli.main"])

    def begin(arguments):
        process = context.Process(target=cli.main, args=(arguments,))
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


def test_a_run_killed_at_random_moments_makes_the_steps_of_one_that_was_not(
    folder, tmp_path, start, whole
):
    run, rng = tmp_path / "run", random.Random(0)
    arguments = options(folder, "--steps", 30, "--validate-every", 7, "--out", run)
    arguments += ["--checkpoint-minutes", "0"]
    for _ in range(10):
        process = start(arguments)
        wait_for(process, run, len(rows(run)) - 1 + rng.randrange(1, 6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        arguments = ["train", "--resume", str(run)]
    process = start(arguments)
    process.join()
    assert process.exitcode == 0
    assert_same(run, whole)
