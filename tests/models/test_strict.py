r"""What a file may ask for."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import nn

from flowguard.image.maps import Coupling, Robust
from flowguard.models.strict import check_counts, check_dtypes, check_kinds, within


class Told:
    def __init__(
        self,
        count: int = 1,
        share: float | None = None,
        switch: bool = False,
        word: Literal["a", "b"] = "a",
        counts: int | Sequence[int] = 1,
        coupling: Coupling = "robust",
        module: nn.Module | None = None,
        table: Mapping[str, int] | None = None,
        thing: Any = None,
    ) -> None:
        pass


FITTING = {
    "count": [0, -3],
    "share": [1, 0.5, None],
    "switch": [True, False],
    "word": ["a"],
    "counts": [1, [1, 2], ()],
    "coupling": ["robust", Robust(), Robust],
    "module": [None, nn.Linear(1, 1)],
    "table": [None, {"a": 1}],
}
WRONG = {
    "count": [True, 1.0, None, "1", [1]],
    "share": [True, "0.5", [0.5]],
    "switch": [0, 1, None, "yes"],
    "word": ["c", 1, None],
    "counts": [1.5, [True], [1, None], "12"],
    "coupling": [3, True, None, [1]],
    "module": [3, "Linear", {}],
    "table": [3, [1]],
}


@pytest.mark.parametrize("name", FITTING)
def test_what_is_told_is_taken(name):
    for value in FITTING[name]:
        check_kinds(Told, {name: value, "further": 3})


@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_refused(name):
    for value in WRONG[name]:
        with pytest.raises(TypeError, match=f"{name} of Told must be .*; got"):
            check_kinds(Told, {name: value})


def test_counts_are_held_against_the_weights():
    state = {str(i): torch.zeros(1) for i in range(3)}
    check_counts({"levels": 3, "steps": [3, 1], "hidden": 1000}, state)
    for fields in ({"levels": 4}, {"steps": [1, 4]}):
        with pytest.raises(ValueError, match="is 4, but the weights are 3 tensors"):
            check_counts(fields, state)


def test_parameters_are_counted_as_they_are_made():
    state = nn.Linear(300, 300).state_dict()
    with within(state):
        nn.Linear(300, 300)
    with pytest.raises(ValueError, match="larger model than the weights, which are 2 tensors"):
        with within(state):
            nn.Linear(600, 600)
    with pytest.raises(ValueError, match="larger model"):
        with within(state):
            nn.ModuleList(nn.Linear(1, 1) for _ in range(100))
    nn.Linear(600, 600)  # nobody looks any more


def test_other_threads_are_not_looked_at():
    made = []
    with within({}):
        thread = threading.Thread(target=lambda: made.append(nn.Linear(600, 600)))
        thread.start()
        thread.join()
    assert made


def test_one_dtype_for_all_but_what_has_its_own():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.register_buffer("moments", torch.zeros(2, dtype=torch.float64))
    state = model.state_dict()
    check_dtypes(model, state)
    half = {k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()}
    check_dtypes(model, half)
    for name in state:
        with pytest.raises(
            TypeError, match=f"{name} has the dtype torch.complex64, (the|and not)"
        ):
            check_dtypes(model, {**state, name: state[name].to(torch.complex64)})


def test_the_error_of_a_dtype_names_the_one_that_there_must_be():
    model = nn.Linear(2, 2)
    model.register_buffer("moments", torch.zeros(2, dtype=torch.float64))
    every = {k: v.half() for k, v in model.state_dict().items()}
    with pytest.raises(TypeError, match=r"moments has .*float16, and not torch\.float64; convert"):
        check_dtypes(model, every)
    some = {**model.state_dict(), "bias": model.bias.data.half()}
    with pytest.raises(TypeError, match=r"bias has .*float16, the model torch\.float32; convert"):
        check_dtypes(model, some)
