r"""Folders that one process works in at a time."""

import os
import signal
import subprocess
import sys

import pytest

from flowguard.io import lock
from flowguard.io.lock import alone

pytest.importorskip("fcntl")


def test_a_folder_is_locked_once_and_free_again_afterwards(tmp_path):
    with alone(tmp_path):
        with pytest.raises(BlockingIOError), alone(tmp_path):
            pass
        with pytest.raises(BlockingIOError), alone(tmp_path):
            pass  # who was refused did not take the lock away
    with alone(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


#: A process that holds a folder, and has children as a loader has workers; it is not worth an
#: import of the package.
HOLD = """
import os, runpy, signal, sys
alone = runpy.run_path(sys.argv[1])["alone"]
def child():
    awake, told = os.pipe()
    pid = os.fork()
    if not pid:  # what the package does in a child is done by now
        os.write(told, b".")
        signal.pause()
    os.read(awake, 1)
    return pid
before = child()
with alone(sys.argv[2]):
    print(before, child(), flush=True)
    signal.pause()
"""


def test_a_process_that_was_killed_lets_go_though_its_children_live(tmp_path):
    command = [sys.executable, "-c", HOLD, lock.__file__, tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    children = process.stdout.readline().split()
    try:
        with pytest.raises(BlockingIOError), alone(tmp_path):
            pass
        process.kill()
        process.wait()
        with alone(tmp_path):
            pass
    finally:
        process.kill()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        process.communicate()
