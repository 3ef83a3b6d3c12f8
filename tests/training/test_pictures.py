r"""Folders of pictures as batches of crops."""

import collections
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from flowguard import data, metrics
from flowguard.io import pictures
from flowguard.io.pictures import Picture
from flowguard.models.encoders.lowlight import low_light_input
from flowguard.training.pictures import CropBatches, match, own_partners, pairs_of

pytest.importorskip("PIL.Image")
pytest.importorskip("tifffile")


def noise(height, width, bits=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 7, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    fine = 0.2 * torch.rand(3, height, width, generator=generator)
    return ((0.8 * smooth + fine) * (2**bits - 1)).round() / (2**bits - 1)


def put(path, height, width, *, bits=8, grey=False, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = noise(height, width, bits, seed)
    colour = colour[:1].expand(3, -1, -1) if grey else colour
    pictures.write(path, Picture(colour, bits=bits, grey=grey))
    return path


def tear(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.fixture
def folder(tmp_path):
    """Pictures of several kinds and sizes, one too small, and a file that is none."""
    top = tmp_path / "data"
    put(top / "a.png", 50, 70, seed=1)
    put(top / "in" / "deep.png", 41, 66, bits=16, seed=2)
    put(top / "in" / "grey.tif", 48, 48, grey=True, seed=3)
    put(top / "in" / "grey16.tif", 64, 33, grey=True, bits=16, seed=4)
    put(top / "small.png", 31, 90, seed=5)
    (top / "none.png").write_text("no picture")
    return top


def batches(folder, *, size=32, batch=6, seed=0, scale=4, corrupt=0.0, **options):
    pairs, _ = pairs_of(folder, scale=scale, crop=size, **options)
    return CropBatches(pairs, size=size, batch=batch, seed=seed, corrupt=corrupt)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def places(target, whole):
    """Where a target lies in a whole picture, in any of the eight positions."""
    size = target.shape[-1]
    for turns in range(4):
        for mirrored in (False, True):
            back = torch.rot90(target, -turns, (-2, -1))
            back = back.flip(-1) if mirrored else back
            windows = whole.unfold(1, size, 4).unfold(2, size, 4)
            hits = (windows == back[:, None, None]).all(-1).all(-1).all(0)
            for i, j in hits.nonzero().tolist():
                yield i, j, mirrored, turns


def test_a_condition_is_a_crop_of_that_of_the_whole_picture(folder):
    """At the border of a picture too, in 8 bits and in 16."""
    wholes = [pictures.read(p) for p in sorted(folder.rglob("*.*")) if p.stem[0] in "adg"]
    seen = collections.Counter()
    made = batches(folder, batch=40)
    for target, condition in (pair for n in range(2) for pair in zip(*made[n], strict=True)):
        ((index, (i, j, mirrored, turns)),) = [
            (k, place) for k, w in enumerate(wholes) for place in places(target, w.colour)
        ]
        whole = data.crop_to_multiple(wholes[index].colour, 4)
        if wholes[index].bits == 8:
            expected = metrics.imresize((255 * whole).round().to(torch.uint8), 1 / 4) / 255
        else:
            expected = metrics.imresize(whole.double(), 1 / 4).clamp(0, 1).float()
        expected = expected[:, i : i + 8, j : j + 8]
        expected = torch.rot90(expected.flip(-1) if mirrored else expected, turns, (-2, -1))
        torch.testing.assert_close(condition, expected, rtol=0, atol=1e-6)
        seen[index, turns, mirrored] += 1
        seen["border" if 0 in (i, j) else "inside"] += 1
    assert {k[0] for k in seen if len(k) == 3} == {0, 1, 2, 3}
    assert {k[1:] for k in seen if len(k) == 3} == {(t, m) for t in range(4) for m in (0, 1)}
    assert min(seen["border"], seen["inside"]) > 10


def test_what_is_left_out_is_told_before_anything_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(pictures, "levels", None)
    pairs, left_out = pairs_of(folder, scale=4, crop=32)
    assert len(pairs.sizes) == 4
    assert [(f.path.name, f.reason.split(",")[0]) for f in left_out] == [
        ("none.png", "it is no picture"),
        ("small.png", "it is smaller than 32 × 32: 31 × 90"),
    ]


def test_a_batch_depends_on_seed_and_number_alone(folder):
    first = batches(folder)
    in_order = [first[n] for n in range(4)]
    other = batches(folder, budget=0)
    assert same(other[3], in_order[3])  # without what was before it
    assert same(other[0], in_order[0])
    assert not same(other[1], in_order[0])
    assert not same(batches(folder, seed=1)[0], in_order[0])


def test_the_batches_of_a_version_stay_those(tmp_path):
    """A run that was begun with them goes on with them."""
    pixels = np.arange(3 * 40 * 52, dtype=np.uint32).reshape(40, 52, 3)
    pixels = ((pixels * 2654435761) >> 16).astype(np.uint8)  # no generator that could change
    colour = torch.from_numpy(pixels).movedim(-1, 0) / 255
    for name in ("a", "b"):
        pictures.write(tmp_path / f"{name}.png", Picture(colour))
        colour = 1 - colour[:, :36]
    found = batches(tmp_path, size=16, batch=3, seed=5)[7]
    assert [int((255 * p.double()).sum().round()) for p in found] == [293135, 18330]


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_makes_its_part_of_the_same_batch(folder, world):
    whole = batches(folder)[5]
    parts = []
    for rank in range(world):
        mine = batches(folder)
        mine.rows = range(rank * 6 // world, (rank + 1) * 6 // world)
        parts.append(mine[5])
    assert same(whole, [torch.cat(p) for p in zip(*parts, strict=True)])


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {}),
        (1, {"multiprocessing_context": "fork"}),
        (2, {"multiprocessing_context": "fork", "persistent_workers": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [0, 10_000, 10**9])
def test_workers_make_the_same_batches(folder, workers, options, budget):
    expected = [batches(folder)[n] for n in range(3, 9)]
    made = batches(folder, budget=budget)
    loader = DataLoader(made, batch_size=None, sampler=range(3, 9), num_workers=workers, **options)
    for _ in range(2):
        found = list(loader)
        assert len(found) == 6
        assert all(map(same, found, expected))


def test_a_worker_that_was_spawned_makes_them_too(folder):
    made = batches(folder, budget=10_000)
    expected = [batches(folder)[n] for n in range(2)]
    loader = DataLoader(
        made, batch_size=None, sampler=range(2), num_workers=1, multiprocessing_context="spawn"
    )
    assert all(map(same, loader, expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_file_is_named_and_skipped(folder, workers):
    tear(folder / "a.png")
    expected = [batches(folder)[n] for n in range(4)] if workers else None
    made = batches(folder)
    assert made.pairs.broken() == []
    loader = DataLoader(made, batch_size=None, sampler=range(4), num_workers=workers)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = list(loader)
    named = [str(w.message) for w in told if "left out" in str(w.message)]
    assert made.pairs.broken() == [folder / "a.png"]
    if workers:
        assert all(map(same, found, expected))
    else:
        assert len(named) == 1
        assert "a.png: " in named[0]
    whole = noise(50, 70, seed=1)
    assert not [p for t, _ in found for x in t for p in places(x, whole)]


def test_others_draw_what_they_drew_when_a_file_is_corrupt(folder):
    before = batches(folder, batch=30)[0]
    tear(folder / "a.png")
    with pytest.warns(UserWarning, match="left out"):
        after = batches(folder, batch=30)[0]
    alike = [same(a, b) for a, b in zip(zip(*before), zip(*after), strict=True)]  # noqa: B905
    whole = noise(50, 70, seed=1)
    assert alike == [not list(places(x, whole)) for x in before[0]]
    assert any(alike)
    assert not all(alike)


def test_a_folder_of_corrupt_files_is_an_error(tmp_path):
    for name in "ab":
        tear(put(tmp_path / f"{name}.png", 40, 40))
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="a picture that can be decoded; got 2 that cannot"),
    ):
        batches(tmp_path)[0]


def test_it_is_handed_on_without_its_pictures(tmp_path):
    put(tmp_path / "a.png", 400, 400)
    made = batches(tmp_path)
    expected = made[0]
    assert len(pickle.dumps(made)) < 5000
    assert same(pickle.loads(pickle.dumps(made))[0], expected)


# -- two folders ---------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """HR pictures and LR ones of other colours, so that nothing can make them of each other."""
    for i, name in enumerate(("0001", "in/0002", "img_003_SRF_4_HR", "0004")):
        put(tmp_path / "hr" / f"{name}.png", 48 + i, 64, seed=i)
    for i, name in enumerate(("0001x4", "in/0002", "img_003_SRF_4_LR", "0004_LRx4")):
        put(tmp_path / "lr" / f"{name}.png", 12, 16, seed=10 + i)
    return tmp_path / "hr", tmp_path / "lr"


def test_pairs_are_matched_by_name(two):
    hr, lr = two
    put(hr / "lonely.png", 48, 64)
    put(lr / "stray.png", 12, 16)
    put(hr / "twice.png", 48, 64)
    put(lr / "twicex4.png", 12, 16)
    put(lr / "twice_LR.png", 12, 16)
    found = match(hr, lr)
    names = [(x.relative_to(hr).stem, y.relative_to(lr).stem) for x, y in found.pairs]
    assert names == [
        ("0001", "0001x4"),
        ("0004", "0004_LRx4"),
        ("img_003_SRF_4_HR", "img_003_SRF_4_LR"),
        ("0002", "0002"),
    ]
    assert [(f.path.name, f.reason) for f in found.faults] == [
        ("lonely.png", f"there is no picture of that name in {lr}"),
        ("twice.png", "several pictures are called twice"),
        ("stray.png", f"there is no picture of that name in {hr}"),
        ("twice_LR.png", "several pictures are called twice"),
        ("twicex4.png", "several pictures are called twice"),
    ]


def test_one_folder_may_hold_both(tmp_path):
    for i in range(2):
        put(tmp_path / f"{i}_HR.png", 48, 64, seed=i)
        put(tmp_path / f"{i}_LRx4.png", 12, 16, seed=5 + i)
    found = match(tmp_path, tmp_path)
    assert [(x.stem, y.stem) for x, y in found.pairs] == [("0_HR", "0_LRx4"), ("1_HR", "1_LRx4")]
    assert found.faults == []
    assert own_partners(tmp_path) == tmp_path


def test_a_folder_of_single_pictures_holds_no_partners(tmp_path):
    put(tmp_path / "THR.png", 48, 64)
    assert own_partners(tmp_path) is None


def test_pairs_are_cropped_alike(two):
    hr, lr = two
    pairs, left_out = pairs_of(hr, scale=4, crop=32, pairs=lr)
    assert left_out == []
    assert pairs.sizes == [(12, 16)] * 4
    matched = match(hr, lr).pairs
    wholes = [(pictures.read(x).colour, pictures.read(y).colour) for x, y in matched]
    made = CropBatches(pairs, size=32, batch=20, seed=0)
    for target, condition in zip(*made[0], strict=True):
        ((small, (i, j, mirrored, turns)),) = [
            (y, place) for x, y in wholes for place in places(target, x)
        ]
        expected = small[:, i : i + 8, j : j + 8]
        expected = torch.rot90(expected.flip(-1) if mirrored else expected, turns, (-2, -1))
        assert torch.equal(condition, expected)


def test_pairs_of_other_sizes_are_left_out(two):
    hr, lr = two
    put(lr / "0001x4.png", 13, 16)
    put(hr / "0004.png", 31, 64)
    put(lr / "in" / "0002.png", 12, 16)
    tear(hr / "in" / "0002.png")
    (lr / "img_003_SRF_4_LR.png").write_text("no picture")
    put(hr / "good.png", 48, 64)
    put(lr / "good.png", 12, 16)
    pairs, left_out = pairs_of(hr, scale=4, crop=32, pairs=lr)
    assert {f.path.name: f.reason for f in left_out} == {
        "0004.png": "it is smaller than 32 × 32: 31 × 64",
        "img_003_SRF_4_LR.png": "it is no picture, or of an unknown kind",
        "0001.png": "it must be 4 times as large as 0001x4.png; got (48, 64) and (13, 16)",
    }
    with pytest.warns(UserWarning, match=r"left out: .*0002\.png"):
        CropBatches(pairs, size=32, batch=20, seed=0)[0]
    assert pairs.broken() == [hr / "in" / "0002.png"]


# -- low light -----------------------------------------------------------------------------------


def test_dark_pairs_are_equalised_as_whole_photographs(tmp_path):
    for i in range(2):
        put(tmp_path / "high" / f"{i}.png", 40, 52, seed=i)
        put(tmp_path / "low" / f"{i}.png", 40, 52, seed=5 + i, bits=8 + 8 * i)
    pairs, left_out = pairs_of(tmp_path / "high", task="lowlight", crop=16, pairs=tmp_path / "low")
    assert left_out == []
    targets, conditions = CropBatches(pairs, size=16, batch=6, seed=0)[0]
    assert conditions.shape == (6, 6, 16, 16)
    whole = [pictures.read(tmp_path / "low" / f"{i}.png").colour for i in range(2)]
    wholes = torch.stack([low_light_input(w[None])[0] for w in whole])
    for i in range(2):
        torch.testing.assert_close(pairs.whole(i, np.random.default_rng(0))[1], wholes[i])
    for condition in conditions:
        windows = wholes[:, 3:5].unfold(2, 16, 1).unfold(3, 16, 1)
        errors = []
        for turns in range(4):
            back = torch.rot90(condition[3:5], -turns, (-2, -1))
            for b in (back, back.flip(-1)):
                errors.append((windows - b[:, None, None]).abs().amax((1, 4, 5)).min())
        assert min(errors) < 1e-6
    assert targets.shape == (6, 3, 16, 16)


def test_dark_shots_are_made_as_they_are_asked_for(folder):
    made = batches(folder, task="lowlight", scale=1, batch=30)
    targets, conditions = made[2]
    assert conditions.shape == (30, 6, 32, 32)
    assert same(batches(folder, task="lowlight", scale=1, batch=30)[2], made[2])
    dark = (conditions[:, :3].exp() - 1e-3).clamp(0, 1)
    light = data.linearize(dark).mean((1, 2, 3)) / data.linearize(targets).mean((1, 2, 3))
    assert 1 / 26 < float(light.min()) < 1 / 18  # exposures from 1/24 to 1/12
    assert 1 / 15 < float(light.max()) < 1 / 11
    assert len({round(float(x), 5) for x in light}) > 20


def test_a_dark_crop_is_equalised_as_the_whole_picture(tmp_path):
    """By the histogram of pixels all over it: crops of a bright corner stay bright."""
    ramp = torch.linspace(0.05, 1, 200).expand(3, 150, -1).clone()
    pictures.write(tmp_path / "ramp.png", Picture((255 * ramp).round() / 255))
    pairs, _ = pairs_of(tmp_path, task="lowlight", crop=32)
    equal = []
    for left in (0, 84, 168):
        fetched = [pairs.fetch(0, 50, left, 32, np.random.default_rng(s)) for s in range(4)]
        equal.append(float(torch.stack([c[3:] for _, c in pairs.finish(fetched)]).mean()))
    whole = pairs.whole(0, np.random.default_rng(9))[1][3:]
    expected = [float(whole[:, 50:82, left : left + 32].mean()) for left in (0, 84, 168)]
    assert equal == pytest.approx(expected, abs=0.03)
    assert equal[2] - equal[0] > 0.6


# -- mistakes ------------------------------------------------------------------------------------

ERRORS = {
    "no folder": (lambda f: pairs_of(f / "x", crop=8), FileNotFoundError, "no folder .*x"),
    "empty": (lambda f: pairs_of(f, crop=8), ValueError, "a picture of at least 8 rows.*got 0"),
    "crop": (
        lambda f: pairs_of(f, crop=30, scale=4),
        ValueError,
        "multiple of the scale 4; got 30",
    ),
    "task": (lambda f: pairs_of(f, crop=8, task="x"), ValueError, "superres or lowlight; got 'x'"),
    "no pairs": (lambda f: pairs_of(f, crop=8, pairs=f), ValueError, "pairs of pictures"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, error, match, tmp_path):
    with pytest.raises(error, match=match):
        call(tmp_path)


def test_pairs_without_a_match_tell_the_first(two):
    hr, lr = two
    for i, file in enumerate(lr.rglob("*.png")):
        file.rename(lr / f"other{i}a.png")
    with pytest.raises(ValueError, match=r"got 8 other.*first of them: .*0001\.png: there is no"):
        pairs_of(hr, scale=4, crop=32, pairs=lr)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": 30}, "multiple of the scale 4; got 30"),
        ({"batch": 0}, "batch must be positive.*got 0 and 0"),
        ({"seed": -1}, "seed not negative; got 6 and -1"),
        ({"size": 64}, "at least 64 rows"),
    ],
)
def test_batches_must_fit(folder, options, match):
    pairs, _ = pairs_of(folder, scale=4, crop=32)
    with pytest.raises(ValueError, match=match):
        CropBatches(pairs, **{"size": 32, "batch": 6, "seed": 0} | options)


# -- pairs that are corrupted a little ----------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"task": "lowlight", "scale": 1}], ids=str)
def test_a_share_of_the_pairs_is_corrupted_and_the_others_stay(folder, options):
    clean, made = (batches(folder, batch=40, corrupt=c, **options)[3] for c in (0.0, 0.25))
    changed = (clean[1] != made[1]).flatten(1).any(1)
    targets = (clean[0] != made[0]).flatten(1).any(1)
    assert 4 <= changed.sum() <= 16
    assert not (targets & ~changed).any()
    assert bool(targets.any()) == (not options)  # patterns are for superres
    assert made[0].shape == clean[0].shape
    assert made[1].shape == clean[1].shape
    whole = batches(folder, batch=40, corrupt=1.0, **options)[3]
    assert ((clean[1] != whole[1]).flatten(1).any(1)).sum() >= 38


def test_corrupted_batches_depend_on_seed_and_number_alone(folder):
    first = batches(folder, corrupt=0.5)
    in_order = [first[n] for n in range(4)]
    assert same(batches(folder, corrupt=0.5, budget=0)[3], in_order[3])
    parts = []
    for rank in range(2):
        mine = batches(folder, corrupt=0.5)
        mine.rows = range(3 * rank, 3 * rank + 3)
        parts.append(mine[3])
    assert same(in_order[3], [torch.cat(p) for p in zip(*parts, strict=True)])


@pytest.mark.parametrize("corrupt", [-0.1, 1.5, float("nan")])
def test_the_share_that_is_corrupted_is_one(folder, corrupt):
    with pytest.raises(ValueError, match="corrupt must be a share, from 0 to 1; got"):
        batches(folder, corrupt=corrupt)
