r"""What the tests of sbi share: it writes logs of its trainings to where it runs."""

import pytest


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
