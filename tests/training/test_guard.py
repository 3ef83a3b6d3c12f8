"""The guard of a trained model, on one process and on two."""

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.data import Dataset

from flowguard.io.pictures import ImageError
from flowguard.models import SuperResolutionFlow, load
from flowguard.training.guard import Conditions, guarded, save


class Pictures(Dataset):
    """Pairs by number, one of which may be corrupt."""

    def __init__(self, count, seed, corrupt=None):
        self.count, self.seed, self.corrupt = count, seed, corrupt

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        if number == self.corrupt:
            raise ImageError("cut")
        generator = torch.Generator().manual_seed(100 * self.seed + number)
        lr = torch.rand(3, 9 + number, 12, generator=generator)
        return torch.rand(3, *(2 * n for n in lr.shape[1:])), lr


def model():
    torch.manual_seed(0)
    return SuperResolutionFlow(scale=2, levels=2, steps=1, hidden=8, features=4)


def conditions(**options):
    return Conditions(Pictures(7, 1), Pictures(3, 2), crops=11, size=8, **options)


#: Of which one of two processes has no picture to fit on.
FEW = {
    "one": conditions(most=1),
    "one corrupt": Conditions(Pictures(2, 1, corrupt=1), Pictures(3, 2), crops=11, size=8),
}


def moments(made):
    return {k: v for k, v in made.state_dict().items() if "gaussian" in k or "calibration" in k}


def _rank(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=world
    )
    torch.save(moments(guarded(model(), conditions(), rank, world)), folder / f"{rank}.pt")
    for name, few in FEW.items():
        torch.save(moments(guarded(model(), few, rank, world)), folder / f"{rank} {name}.pt")
    save(folder / "model", model(), conditions(), rank, world)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A folder of what two processes made."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (2, folder), nprocs=2)  # raises what one of them raises, and ends the other
    return folder


def test_two_processes_fit_the_guard_of_one(ranks):
    alone = moments(guarded(model(), conditions()))
    for rank in (0, 1):
        found = torch.load(ranks / f"{rank}.pt")
        assert found.keys() == alone.keys()
        assert any("gaussian" in name for name in alone)
        for name, value in alone.items():
            apart = (found[name].double() - value.double()).abs().max()
            assert apart <= 1e-12 * max(1.0, float(value.double().abs().max())), name
    assert load(ranks / "model").conditioner.calibrated


@pytest.mark.parametrize("name", FEW)
def test_processes_without_a_picture_fit_the_guard_of_one_too(name, ranks):
    alone = moments(guarded(model(), FEW[name]))
    for rank in (0, 1):
        found = torch.load(ranks / f"{rank} {name}.pt")
        for key, value in alone.items():
            assert torch.allclose(found[key].double(), value.double(), 1e-12, 1e-12), key


def test_the_model_is_left_as_it_is_and_corrupt_pictures_are_left_out():
    flow = model().train()
    made = guarded(flow, Conditions(Pictures(7, 1, corrupt=2), Pictures(3, 2), crops=11, size=8))
    assert made.conditioner.calibrated
    assert not made.training
    assert flow.training
    assert not flow.conditioner.fitted


def test_conditions_are_taken_evenly_and_shared_out_by_turns():
    few = conditions(most=3)
    heights = [y.shape[-2] for y in few.to_fit(0, 1)]
    assert heights == [9, 11, 13]
    assert [y.shape[-2] for y in few.to_fit(0, 2)] == [9, 13]
    assert [y.shape[-2] for y in few.to_fit(1, 2)] == [11]
    crops = list(few.to_calibrate(0, 1))
    assert len(crops) == 11
    assert {tuple(c.shape) for c in crops} == {(1, 3, 8, 8)}
    shared = [list(few.to_calibrate(rank, 2)) for rank in (0, 1)]
    assert sorted(map(len, shared)) == [5, 6]
    assert all(any(c.equal(d) for d in crops) for part in shared for c in part)


def test_a_guard_has_the_policy_and_the_boundary_that_it_is_given(tmp_path):
    save(tmp_path, model(), conditions(policy="shrink", boundary=0.95))
    conditioner = load(tmp_path).conditioner
    assert (conditioner.policy, conditioner.boundary) == ("shrink", 0.95)
    conditioner = guarded(model(), conditions()).conditioner
    assert (conditioner.policy, conditioner.boundary) == ("warn", 0.999)


def test_a_guard_is_made_once_for_each_state_of_the_encoder():
    made, given = model(), conditions()
    seen = []
    made.conditioner.encoder.register_forward_hook(lambda *_: seen.append(1))  # copies have it
    first = guarded(made, given)
    asked = len(seen)
    assert asked > 0
    with torch.no_grad():
        next(made.flow.parameters()).add_(1.0)  # which the guard does not depend on
    again = guarded(made, given)
    assert len(seen) == asked
    assert again.conditioner.guard is not first.conditioner.guard
    assert all(torch.equal(v, moments(first)[k]) for k, v in moments(again).items())
    again(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 16, 16))  # scored: the seal holds
    with torch.no_grad():
        next(made.conditioner.encoder.parameters()).mul_(1.5)
    changed, fresh = guarded(made, given), guarded(made, conditions())
    assert len(seen) > asked
    assert all(torch.equal(v, moments(fresh)[k]) for k, v in moments(changed).items())
    assert not all(torch.equal(v, moments(first)[k]) for k, v in moments(changed).items())
