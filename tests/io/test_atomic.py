r"""Files that are whole or not there."""

import os
import threading

import pytest

from flowguard.io.atomic import atomic, sweep


def test_threads_leave_the_mask_of_the_process_alone(tmp_path, monkeypatch):
    before = os.umask(0o027)
    barrier = threading.Barrier(2)
    own = os.umask

    def slow(mask):
        # Two threads in here at once would each take for the mask what the other has set.
        try:
            barrier.wait(0.2)
        except threading.BrokenBarrierError:
            barrier.reset()
        return own(mask)

    def write(name):
        with atomic(tmp_path / name) as temporary:
            temporary.write_text(name)

    try:
        monkeypatch.setattr(os, "umask", slow)
        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.undo()
        assert own(0o027) == 0o027
        assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o640]
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["a.png", "a name of many letters and more.png"])
def test_what_a_killed_process_left_is_removed_once_it_is_old(name, tmp_path):
    target = tmp_path / name
    with atomic(target) as temporary:
        temporary.write_text("half")
        left = temporary
    target.rename(left)  # as if the process had been killed before
    others = [tmp_path / n for n in (".b.png.abcdefgh.tmp", f"{left.name}.png", ".tmp")]
    for other in others:
        other.write_text("of others")
        os.utime(other, (0, 0))
    assert sweep([target], age=600) == []
    os.utime(left, (0, 0))
    assert sweep([target, tmp_path / "absent" / "c.png"], age=600) == [left]
    assert sorted(tmp_path.iterdir()) == sorted(others)
