r"""The choice of kernels: for the process or for a block, in threads and tasks."""

import asyncio
import os
import subprocess
import sys
import threading
import weakref

import pytest

import flowguard
from flowguard.functional import kernels
from flowguard.spline import choice


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(choice, "_state", choice._State())
    monkeypatch.setattr(choice._state, "first", "eager")
    monkeypatch.setattr(choice._state, "which", "eager", raising=False)


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_call_is_for_all_threads_from_here_on():
    flowguard.kernels("compiled")
    assert kernels.chosen() == "compiled"
    assert in_a_thread(kernels.chosen) == "compiled"
    kernels("eager")
    assert in_a_thread(kernels.chosen) == kernels.chosen() == "eager"


def test_a_block_is_for_its_thread_and_ends():
    kernels("traced")
    with kernels("compiled"):
        assert kernels.chosen() == "compiled"
        assert in_a_thread(kernels.chosen) == "traced"
    assert kernels.chosen() == in_a_thread(kernels.chosen) == "traced"


def test_an_error_ends_a_block_too():
    with pytest.raises(KeyError), kernels("compiled"):
        raise KeyError
    assert kernels.chosen() == "eager"


def test_blocks_can_be_nested_and_entered_again():
    outer = kernels("compiled")
    with outer:
        with kernels("traced"):
            assert kernels.chosen() == "traced"
            with outer:
                assert kernels.chosen() == "compiled"
            assert kernels.chosen() == "traced"
        assert kernels.chosen() == "compiled"
    assert kernels.chosen() == "eager"


def test_a_call_inside_of_a_block_is_seen_behind_it():
    with kernels("traced"):
        kernels("compiled")
        assert kernels.chosen() == "traced"
    assert kernels.chosen() == "compiled"


def test_blocks_that_two_threads_begin_at_once_leave_nothing_behind():
    made = [kernels("compiled"), kernels("traced")]  # both are there before either is entered
    seen = []

    def run(block):
        with block:
            seen.append(kernels.chosen())

    for block in made:
        in_a_thread(lambda block=block: run(block))
    assert seen == ["compiled", "traced"]
    assert kernels.chosen() == "eager"


def test_many_choices_are_not_kept():
    held = [kernels("compiled") for _ in range(3)]
    for _ in range(50):
        last = weakref.ref(kernels("traced"))
        assert last() is None
    assert len(choice._state._choices) <= 2
    assert kernels.chosen() == "traced"
    for block in held:  # which take nothing back that was said since
        with block:
            assert kernels.chosen() == "compiled"
    assert kernels.chosen() == "traced"


def test_blocks_of_generators_may_end_in_any_order():
    def generate():
        with kernels("compiled"):
            yield

    generator = generate()
    next(generator)
    with kernels("traced"):
        generator.close()
        assert kernels.chosen() == "traced"
    assert kernels.chosen() == "eager"


def test_a_block_that_did_not_begin_here_cannot_end_here():
    def end():
        with pytest.raises(RuntimeError, match=r"began it; got the end of kernels\('compiled'\)"):
            block.__exit__(None, None, None)
        return kernels.chosen()

    block = kernels("compiled")
    assert end() == "compiled"
    with block:
        assert in_a_thread(end) == "eager"
        assert kernels.chosen() == "compiled"


def test_tasks_do_not_see_the_blocks_of_others():
    async def task(which, seen):
        with kernels(which):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(kernels.chosen())

    async def both():
        await asyncio.gather(task("compiled", one), task("traced", other))

    one, other = [], []
    asyncio.run(both())
    assert one == ["compiled"] * 3
    assert other == ["traced"] * 3


@pytest.mark.parametrize("wrong", ["fast", "Compiled", "", None])
def test_other_names_are_refused_and_change_nothing(wrong):
    with pytest.raises(
        ValueError, match="kernels must be one of 'eager', 'compiled', 'traced'; got"
    ):
        kernels(wrong)
    assert kernels.chosen() == "eager"


def test_a_process_begins_with_what_its_environment_says(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "traced")
    assert choice._State().first == "traced"
    monkeypatch.setenv(choice.VARIABLE, "")
    assert choice._State().first == "eager"
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(
        ValueError, match=r"the variable FLOWGUARD_KERNELS must be one of .*'fast'"
    ):
        choice._State()


def test_neither_the_import_nor_the_choice_loads_the_compiler():
    code = (
        "import sys, torch; before = 'torch._dynamo' in sys.modules; import flowguard;"
        "assert flowguard.kernels.chosen() == 'compiled';"
        "assert before or 'torch._dynamo' not in sys.modules"
    )
    environment = os.environ | {choice.VARIABLE: "compiled"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
