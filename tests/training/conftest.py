"""Trainings that take seconds, by the command."""

import csv

import numpy as np
import pytest


@pytest.fixture(scope="session")
def fill():
    """Puts three pictures of 48 by 56 pixels into a folder."""
    image = pytest.importorskip("PIL.Image")

    def filled(folder):
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for name in "abc":
            coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            large = image.fromarray(coarse).resize((56, 48), image.BICUBIC)
            large.save(folder / f"{name}.png")
        return folder

    return filled


@pytest.fixture
def pictures(fill, tmp_path):
    """A folder of three pictures."""
    return fill(tmp_path / "pictures")


@pytest.fixture(scope="session")
def train():
    """Runs ``flowguard train``; returns its exit code."""
    pytest.importorskip("lightning")
    from flowguard.cli import main as cli

    def run(*arguments):
        try:
            return cli.main(["train", *map(str, arguments)])
        except SystemExit as stop:
            return stop.code

    return run


@pytest.fixture(scope="session")
def rows():
    """What tells the steps of a run from those of another."""

    def read(run):
        with (run / "metrics.csv").open() as file:
            return [(row["step"], row["loss"], row["norm"]) for row in csv.DictReader(file)]

    return read
