r"""Memory that processes share."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest

from flowguard.io.shelf import Shelf


def array(seed, shape=(3, 4), dtype=np.uint8):
    high = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype, endpoint=True)


def fill(shelf, index):
    shelf.put(index, array(index, shelf.shapes[index], shelf.dtypes[index]))
    shelf.refuse(2)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_what_another_process_puts_down_is_found(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"there is no {method} here")
    shelf = Shelf([(3, 4), (5, 1), (2, 2)], [np.uint8, np.uint16, np.uint8], budget=100)
    assert shelf.get(0) is None
    assert shelf.get(1) is None
    process = multiprocessing.get_context(method).Process(target=fill, args=(shelf, 1))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert shelf.get(0) is None
    assert (shelf.get(1) == array(1, (5, 1), np.uint16)).all()
    assert shelf.all_refused() == [2]
    assert shelf.refused(2)
    assert not shelf.refuse(2)  # it is no news


@pytest.mark.parametrize("budget", [0, 11, 12, 23, 24, 35, 36, 1000])
def test_it_keeps_as_many_as_the_budget_holds(budget):
    shelf = Shelf([(3, 4)] * 3, [np.uint8] * 3, budget=budget)
    for i in range(3):
        shelf.put(i, array(i))
    kept = [shelf.get(i) is not None for i in range(3)]
    assert kept == [i < budget // 12 for i in range(3)]
    for i in range(min(3, budget // 12)):
        assert (shelf.get(i) == array(i)).all()


def test_a_small_one_is_kept_behind_a_large_one_that_is_not():
    shelf = Shelf([(10, 10), (3, 4)], [np.uint8] * 2, budget=20)
    shelf.put(0, array(0, (10, 10)))
    shelf.put(1, array(1))
    assert shelf.get(0) is None
    assert (shelf.get(1) == array(1)).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_start_empty(copied):
    shelf = Shelf([(3, 4)], [np.uint8], budget=100)
    shelf.put(0, array(0))
    other = copied(shelf)
    assert other.get(0) is None
    other.put(0, array(1))
    assert (shelf.get(0) == array(0)).all()
    assert len(pickle.dumps(Shelf([(1000, 1000)], [np.uint8], budget=10**7))) < 2000


def test_nothing_has_no_memory():
    assert len(Shelf([], [], budget=0)) == 0


ERRORS = {
    "shape": (lambda s: s.put(0, array(0, (4, 3))), r"shape \(3, 4\).*got \(4, 3\)"),
    "dtype": (lambda s: s.put(0, array(0, dtype=np.uint16)), "dtype uint8; got.*uint16"),
    "budget": (lambda s: Shelf([], [], budget=-1), "budget must not be negative; got -1"),
}


@pytest.mark.parametrize(("call", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call(Shelf([(3, 4)], [np.uint8], budget=100))
