r"""No sample of a random model exceeds its certificate, whatever the model is made of.

The models come from the package ``fuzzing`` beside the benchmarks. A longer run, with counts:

    FLOWGUARD_FUZZ=20000 python -m pytest -m slow tests/bounds/test_fuzz.py
    python benchmarks/fuzz.py models --models 20000
"""

import os
from collections import Counter
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

for host in ("glasflow", "nflows", "normflows", "sbi", "zuko"):
    pytest.importorskip(host)

from fuzzing import covered, fuzz, registered  # noqa: E402

MODELS = int(os.environ.get("FLOWGUARD_FUZZ", "2000"))


def test_every_class_that_has_a_rule_is_made():
    assert registered() - covered() == set()


@pytest.mark.parametrize(
    "cls", sorted(covered(), key=str), ids=lambda c: f"{c.__module__}.{c.__name__}"
)
def test_a_class_is_made_where_it_is_wanted(cls):
    cases = [fuzz(Random(number), cls, plain=True) for number in range(2)]
    assert all(any(issubclass(made, cls) for made in case.made) for case, _ in cases)
    assert [verdict.found for _, verdict in cases] == [""] * 2


@settings(
    max_examples=250,
    derandomize=True,
    suppress_health_check=[*HealthCheck],
    phases=[Phase.generate],
)
@given(st.randoms(use_true_random=False))
def test_no_sample_of_a_random_model_exceeds_its_bound(random):
    case, verdict = fuzz(random)
    assert not verdict.found, (verdict, case)


@pytest.mark.slow
def test_no_sample_of_many_random_models_exceeds_its_bound():
    found, outcomes = {}, Counter()
    for number in range(MODELS):
        _, verdict = fuzz(Random(number))
        outcomes[verdict.outcome] += 1
        if verdict.found:
            found[number] = verdict.found
    assert found == {}
    # What is refused proves nothing.
    assert outcomes["certified"] > 0.4 * MODELS
