r"""The command line on pictures: what is written, what is told of, and mistakes."""

import contextlib
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import flowguard
from flowguard.cli import COMMANDS
from flowguard.cli import main as cli
from flowguard.io import pictures as files
from flowguard.models import LowLightEncoder, LowLightFlow, RRDBEncoder, SuperResolutionFlow

pytest.importorskip("jsonargparse")
sampling = pytest.importorskip("flowguard.cli.sampling")
Image = pytest.importorskip("PIL.Image")
tifffile = pytest.importorskip("tifffile")


def small(model):
    """Noise that a picture survives, and a guard."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in model.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
        model.conditioner.fit(0.5 + 0.01 * torch.rand(16, 3, 16, 16), progress=False)
        model.conditioner.calibrate(0.5 + 0.01 * torch.rand(49, 3, 16, 16), progress=False)
    return model


@pytest.fixture(scope="module")
def superres(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("superres")
    model = SuperResolutionFlow(scale=2, levels=2, steps=1, hidden=8, features=8)
    small(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lowlight(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lowlight")
    encoder = LowLightEncoder(features=4, growth=4, blocks=1, stacked=(0,), levels=2)
    small(LowLightFlow(levels=2, steps=1, hidden=8, encoder=encoder)).save_pretrained(folder)
    return folder


SIZES = {  # of the pictures as they are seen
    "grey.png": (30, 20),
    "odd.png": (37, 53),
    "opaque.png": (12, 14),
    "deep.png": (20, 24),
    "deep.tif": (9, 8),
    "turned.jpg": (24, 16),
    "one.png": (1, 1),
}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def eight(*shape):
        return Image.fromarray(rng.integers(100, 156, shape, dtype=np.uint8))

    def deep(*shape):
        return rng.integers(25000, 40000, shape, dtype=np.uint16)

    eight(30, 20).save(folder / "grey.png")
    eight(37, 53, 3).save(folder / "odd.png")
    eight(12, 14, 4).save(folder / "opaque.png")
    eight(1, 1, 3).save(folder / "one.png")
    (folder / "deep.png").write_bytes(files.png16(deep(20, 24, 3)))
    tifffile.imwrite(folder / "deep.tif", deep(9, 8, 3), photometric="rgb")
    exif = Image.Exif()
    exif[0x0112] = 6
    eight(16, 24, 3).save(folder / "turned.jpg", exif=exif)
    whole = (folder / "odd.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("This is no picture.")
    (folder / "notes.txt").write_text("Nor is this, and it does not say it were.")
    (folder / "within").mkdir()
    (folder / "folder.png").mkdir()
    return folder


def run(capsys, *arguments):
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    return code, told.out, told.err


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def written_name(name):
    """The samples of deep.png and deep.tif would be the same file."""
    return (name if name.startswith("deep") else name.rpartition(".")[0]) + ".png"


@pytest.mark.parametrize("command", ["superres", "lowlight"])
def test_a_folder_is_done_as_far_as_it_can_be(command, pictures, tmp_path, capsys, request):
    model, out = request.getfixturevalue(command), tmp_path / "out"
    factor = 2 if command == "superres" else 1
    options = ("--model", model, "--temperature", 0)
    code, told, errors = run(capsys, command, pictures, out, *options)
    assert code == 1
    assert "9 picture(s): 7 written, 0 skipped, 2 failed" in told
    assert "cut.png: image file is truncated" in errors
    assert "text.png: it is no picture" in errors
    assert {p.name for p in out.iterdir()} == {written_name(n) for n in SIZES}
    for name, (height, width) in SIZES.items():
        made, source = (files.read(p) for p in (out / written_name(name), pictures / name))
        assert made.colour.shape == (3, factor * height, factor * width), name
        assert (made.bits, made.grey) == (source.bits, source.grey), name
        assert (made.alpha is None) == (source.alpha is None), name
        if command == "superres":  # an untrained model is bicubic
            wanted = torch.nn.functional.interpolate(
                source.colour[None], scale_factor=2.0, mode="bicubic"
            )
            assert (made.colour - wanted[0]).abs().mean() < 0.2, name
        elif source.alpha is not None:
            assert torch.equal(made.alpha, source.alpha)


def test_a_second_run_skips_what_exists(superres, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("superres", pictures, out, "--model", superres, "--samples", 2)
    run(capsys, *arguments)
    first = contents(out)
    (out / "odd-2.png").unlink()
    (out / "grey-1.png").write_text("mine")
    stamps = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    code, told, errors = run(capsys, *arguments)
    assert code == 1  # the corrupt ones are still corrupt
    assert "1 written, 5 skipped, 3 failed" in told
    assert "grey-1.png exists, and is not known to be made of this picture" in errors
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    assert (out / "odd-2.png").read_bytes() == first["odd-2.png"]  # whatever was there before
    assert (out / "grey-1.png").read_text() == "mine"
    run(capsys, *arguments, "--overwrite")
    assert contents(out) == first


def test_samples_differ_and_temperature_zero_does_not(superres, pictures, tmp_path, capsys):
    for temperature, different in ((0.9, True), (0, False)):
        out = tmp_path / f"out{temperature}"
        options = ("--model", superres, "--samples", 2, "--temperature", temperature)
        code, _, _ = run(capsys, "superres", pictures / "odd.png", out, *options)
        assert code == 0
        assert {p.name for p in out.iterdir()} == {"odd-1.png", "odd-2.png"}
        one, two = (files.read(p).colour for p in sorted(out.iterdir()))
        assert (not torch.equal(one, two)) == different


def test_one_picture_becomes_one_file(lowlight, pictures, tmp_path, capsys):
    target = tmp_path / "new" / "bright.tif"
    means = []
    for brightness in (0.1, 0.7):
        options = ("--model", lowlight, "--overwrite", "--brightness", brightness)
        code, _, _ = run(capsys, "lowlight", pictures / "deep.png", target, *options)
        assert code == 0
        made = files.read(target)
        assert made.bits == 16
        means.append(made.colour.mean().item())
        assert [p.name for p in target.parent.iterdir()] == ["bright.tif"]
    assert means[1] > 1.5 * means[0]


@pytest.mark.parametrize("command", ["superres", "lowlight"])
def test_pictures_in_bf16_are_those_of_float32_but_for_rounding(
    command, pictures, tmp_path, capsys, request, monkeypatch
):
    made, seen = [], []
    decode = flowguard.models.ImageModel.decode

    def watched(*args, **options):
        seen.append(options.get("precision"))
        return decode(*args, **options)

    monkeypatch.setattr(flowguard.models.ImageModel, "decode", watched)
    for kind in (SuperResolutionFlow, LowLightFlow):
        monkeypatch.setattr(kind, "decode", watched)
    for precision in ("float32", "bf16"):
        out = tmp_path / f"{precision}.tif"
        options = ("--model", request.getfixturevalue(command), "--precision", precision)
        code, _, errors = run(capsys, command, pictures / "deep.png", out, *options)
        assert code == 0, errors
        made.append(files.read(out).colour)
    assert seen == [None, "bf16"]
    assert (made[0] - made[1]).abs().max() < 0.01


def test_auto_says_which_precision_it_took(superres, pictures, tmp_path, capsys):
    options = ("--model", superres, "--precision", "auto")
    code, _, errors = run(capsys, "superres", pictures / "odd.png", tmp_path / "out", *options)
    assert code == 0
    told = (
        r"flowguard: (bf16|float32), the quickest on a tile here \(float32 \d+ ms, bf16 \d+ ms\)"
    )
    assert len(re.findall(told, errors)) == 1


def test_a_mistake_in_the_precision(superres, pictures, tmp_path, capsys):
    options = ("--model", superres, "--precision", "half")
    code, _, errors = run(capsys, "superres", pictures, tmp_path / "out", *options)
    assert (code, errors.count("\n")) == (2, 1)
    assert "bf16" in errors


def test_a_model_in_float64_has_no_other_precision(superres, pictures, tmp_path, capsys):
    model = flowguard.models.load(superres).double()
    model.save_pretrained(tmp_path / "double")
    arguments = (
        "superres",
        pictures / "odd.png",
        tmp_path / "out",
        "--model",
        tmp_path / "double",
    )
    code, _, errors = run(capsys, *arguments, "--precision", "bf16")
    assert code == 2
    assert "--precision: precision is for models in torch.float32; got 'bf16'" in errors
    code, told, errors = run(capsys, *arguments)
    assert (code, "1 written" in told) == (0, True), errors


def test_globs_and_several_inputs(superres, pictures, tmp_path, capsys):
    out, options = tmp_path / "out", ("--model", superres, "--format", "tiff")
    arguments = (f"{pictures}/o*.png", pictures / "grey.png", out)
    code, told, _ = run(capsys, "superres", *arguments, *options)
    assert (code, "4 written" in told) == (0, True)
    assert {p.name for p in out.iterdir()} == {"odd.tif", "one.tif", "opaque.tif", "grey.tif"}
    assert files.read(out / "opaque.tif").alpha is not None


def test_output_within_input_is_not_enlarged_again(superres, pictures, tmp_path, capsys):
    arguments = (f"{pictures}/**/o*.png", pictures / "within" / "out", "--model", superres)
    code, told, _ = run(capsys, "superres", *arguments)
    assert "3 written" in told
    code, told, _ = run(capsys, "superres", *arguments)
    assert (code, "3 picture(s): 0 written, 3 skipped" in told) == (0, True)
    assert "Left out: 3 picture(s) in OUTPUT that flowguard wrote itself" in told


def test_pictures_below_the_current_folder(superres, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ("superres", "in/o*.png", "in/turned.jpg", ".", "--model", superres)
    code, told, _ = run(capsys, *arguments)
    assert (code, "4 picture(s): 4 written" in told) == (0, True)
    assert files.read(tmp_path / "turned.png").colour.shape == (3, 48, 32)
    code, told, _ = run(capsys, *arguments)
    assert (code, "0 written, 4 skipped" in told) == (0, True)


def test_the_limit_of_pixels_is_told_and_set(superres, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    names = [pictures / name for name in ("odd.png", "deep.png", "deep.tif")]
    options = (*names, out, "--model", superres, "--max-pixels")
    code, _, errors = run(capsys, "superres", *options, 30)
    assert (code, out.is_dir(), contents(out)) == (1, True, {})
    for name, (height, width) in SIZES.items():
        told = f"{name}: it has {height * width} pixels, and at most 30 are read"
        assert (told in errors) == (pictures / name in names), name
    assert "--max-pixels" in errors
    assert run(capsys, "superres", *options, 2000)[0] == 0
    assert run(capsys, "superres", *options, 0)[0] == 2


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_another_picture_of_that_name_does_not_count_as_done(
    kind, superres, pictures, tmp_path, capsys
):
    out = tmp_path / "out"
    options = (out, "--model", superres, "--format", kind)
    other = pictures / "within" / "odd.png"
    other.write_bytes((pictures / "opaque.png").read_bytes())
    jpeg = pictures / "odd.jpg"
    jpeg.write_bytes((pictures / "turned.jpg").read_bytes())
    assert run(capsys, "superres", pictures / "odd.png", *options)[0] == 0
    before = contents(out)
    for source in (jpeg, other):
        code, told, errors = run(capsys, "superres", source, *options)
        assert (code, "0 written, 0 skipped, 1 failed" in told) == (1, True)
        assert f"failed: {source}: " in errors
        assert "--overwrite replaces it" in errors
        assert contents(out) == before
    code, told, _ = run(capsys, "superres", pictures / "odd.png", *options)
    assert (code, "1 skipped" in told) == (0, True)
    code, told, _ = run(capsys, "superres", jpeg, *options, "--overwrite")
    assert (code, "1 written" in told) == (0, True)
    assert contents(out) != before


@pytest.mark.parametrize("features", [0, sampling.FEATURES], ids=["condition cut", "flow cut"])
def test_tiles_agree_with_the_whole(features, superres, tmp_path, capsys, monkeypatch):
    """An encoder and flow of small reach: to a grey level."""
    monkeypatch.setattr(sampling, "FEATURES", features)
    rng = np.random.default_rng(0)
    pixels = rng.integers(100, 156, (150, 131, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    made = {}
    for tile in ("none", 80, "auto"):
        target = tmp_path / f"{tile}.png"
        options = ("--model", superres, "--tile", tile)
        code, _, _ = run(capsys, "superres", tmp_path / "x.png", target, *options)
        assert code == 0
        made[tile] = files.read(target).colour
    assert torch.equal(made["none"], made["auto"])  # it is small
    assert (made["none"] - made[80]).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("features", [0, sampling.FEATURES], ids=["condition cut", "flow cut"])
def test_tiles_of_a_low_light_picture(features, lowlight, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "FEATURES", features)
    pixels = np.random.default_rng(0).integers(20, 60, (150, 131, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    made = {}
    for tile in ("none", 40):
        target = tmp_path / f"{tile}.png"
        options = ("--model", lowlight, "--tile", tile, "--temperature", 0.5)
        run(capsys, "lowlight", tmp_path / "x.png", target, *options)
        made[tile] = files.read(target).colour
    assert (made["none"] - made[40]).abs().max() <= 1.01 / 255


def test_the_report_is_one_page(superres, pictures, tmp_path, capsys):
    page = tmp_path / "pages" / "report.html"
    options = ("--model", superres, "--report", page)
    _, told, _ = run(capsys, "superres", pictures, tmp_path / "out", *options)
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(sources) >= 2 * len(SIZES)
    assert all(s.startswith("data:image/") for s in sources)
    assert 'data-side="bicubic"' in text
    assert "× its threshold" in text
    for name in (*SIZES, "cut.png", "text.png"):
        assert name in text
    assert "image file is truncated" in text
    assert "unlike the training set" in told  # noise is; the guard knows flat grey only


# In the midst of a file, the program tells so and waits. What it was started by may ignore Ctrl-C.
PAUSED = """
import pathlib, signal, sys
from flowguard.cli import main as cli

signal.signal(signal.SIGINT, signal.default_int_handler)
replace = pathlib.Path.replace

def pausing(path, target):
    if pathlib.Path(target).name == "03.png":
        print("paused", flush=True)
        sys.stdin.read()
    return replace(path, target)

pathlib.Path.replace = pausing
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_leaves_whole_files_and_is_resumed(sent, code, superres, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    for i in range(6):
        Image.fromarray(pixels).save(source / f"{i:02d}.png")
    arguments = ["superres", source, out, "--model", superres]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", PAUSED, *arguments], **pipes)
    paused = process.stdout.readline()
    half_written = [p.name for p in out.iterdir() if p.suffix == ".tmp"]
    process.send_signal(sent)
    _, told = process.communicate()
    assert (paused, len(half_written)) == (b"paused\n", 1), told
    assert process.returncode == code
    assert b"interrupted" in told
    assert b"Traceback" not in told
    assert sorted(p.name for p in out.iterdir()) == ["00.png", "01.png", "02.png"]
    for path in out.iterdir():
        assert files.read(path).colour.shape == (3, 96, 80)
    before = contents(out)
    code, done, errors = run(capsys, *arguments)
    assert code == 0, errors
    assert "3 written, 3 skipped" in done
    assert len(contents(out)) == 6
    assert {k: v for k, v in contents(out).items() if k in before} == before


RANKS = {
    "torchrun": lambda rank: {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
    "srun": lambda rank: {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2"},
}
VARIABLES = {"RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"}


def as_ranks(launcher, arguments, code=("-m", "flowguard")):
    r"""Starts two processes, as a launcher would."""
    own = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, *code, *map(str, arguments)]
    return [
        subprocess.Popen(command, env=own | RANKS[launcher](rank), text=True, **pipes)
        for rank in (0, 1)
    ]


def ended(processes):
    told = [p.communicate() for p in processes]
    return [(p.returncode, out, errors) for p, (out, errors) in zip(processes, told, strict=True)]


@pytest.fixture
def six(tmp_path):
    folder = tmp_path / "six"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    for i in range(6):
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def test_two_processes_share_the_pictures(superres, six, tmp_path, capsys):
    (six / "05.png").write_text("This is no picture.")
    arguments = ["superres", six, tmp_path / "out", "--model", superres]
    report = tmp_path / "report.html"
    first, second = ended(as_ranks("torchrun", [*arguments, "--report", report]))
    assert "6 picture(s) by 2 processes: 5 written, 0 skipped, 1 failed" in first[1]
    assert first[2].count("05.png: it is no picture") == 1  # in the share of the other
    assert (first[0], second[0], second[1]) == (1, 1, "")
    assert "05.png" not in second[2]
    sections = re.findall(r"<h2>(.*?)</h2>", report.read_text())
    assert sections == [*(f"{i:02d}.png" for i in range(5)), "All pictures"]
    assert sorted(contents(tmp_path / "out")) == [f"{i:02d}.png" for i in range(5)]
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == []
    arguments[2] = tmp_path / "alone"
    assert run(capsys, *arguments)[0] == 1
    assert contents(tmp_path / "alone") == contents(tmp_path / "out")


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_share_of_a_process_that_was_killed_is_done_by_the_next_run(
    superres, six, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = ["superres", six, out, "--model", superres]
    code = PAUSED.replace('== "03.png"', 'in ("03.png", "04.png")')
    first, second = as_ranks("srun", [*arguments, "--patience", 2], code=("-c", code))
    assert [p.stdout.readline() for p in (first, second)] == ["paused\n"] * 2
    second.kill()  # in the midst of 03.png
    second.communicate()
    ((code, told, errors),) = ended([first])
    assert code == 1
    assert "3 picture(s) by 1 processes: 3 written, 0 skipped, 0 failed" in told
    assert "rank 1 gave no sign of life in 2 s: 2 of its 3 picture(s) have no result" in errors
    before = contents(out)
    assert sorted(n for n in before if n.endswith(".png")) == [
        "00.png",
        "01.png",
        "02.png",
        "04.png",
    ]
    (half,) = (out / n for n in before if n.endswith(".tmp"))
    os.utime(half, (0, 0))
    code, told, errors = run(capsys, *arguments)
    assert code == 0, errors
    assert "6 picture(s): 2 written, 4 skipped, 0 failed" in told
    after = contents(out)
    assert sorted(after) == [f"{i:02d}.png" for i in range(6)]
    assert all(before[name] == after[name] for name in before if name in after)
    assert [p.name for p in out.iterdir() if p.is_dir()] == []


@pytest.mark.slow
def test_torchrun_starts_what_shares_the_pictures(superres, six, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--standalone", "-m", "flowguard", "superres", six, tmp_path / "out"]
    command = [*map(str, torchrun), "--model", str(superres)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("picture(s)") == 1
    assert "6 picture(s) by 2 processes: 6 written" in done.stdout
    (six / "05.png").write_text("This is no picture.")
    (six / "06.png").write_bytes((six / "01.png").read_bytes())
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("exists, and is not known to be made of this picture") == 1
    assert "7 picture(s) by 2 processes: 1 written, 5 skipped, 1 failed" in done.stdout
    assert "interrupted" not in done.stderr


def test_variables_that_cannot_be(superres, six, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = run(capsys, "superres", six, tmp_path / "out", "--model", superres)
    assert (code, errors.count("\n")) == (2, 1)
    assert "RANK must be a number from 0 and less than that of WORLD_SIZE" in errors


MISTAKES = {
    "no arguments": ([], "INPUT, OUTPUT must be given; got nothing"),
    "no such input": (["absent", "out", "--model", "m"], "there is no file or folder absent"),
    "no such glob": (["in/*.gif", "out", "--model", "m"], "matches in/*.gif"),
    "an empty folder": (["in/within", "out", "--model", "m"], "there is no picture"),
    "no such folder of a model": (["in", "out", "--model", "absent"], "no folder absent"),
    "a folder without a model": (["in", "out", "--model", "in"], "holds no config.json"),
    "another scale": (["in", "out", "--model", "m", "--scale", "4"], "enlarges by 2; got 4"),
    "scale of one": (["in", "out", "--model", "m", "--scale", "1"], "at least 2"),
    "no samples": (["in", "out", "--model", "m", "--samples", "0"], "at least 1"),
    "cold": (["in", "out", "--model", "m", "--temperature", "-1"], "at least 0"),
    "not a number": (["in", "out", "--model", "m", "--temperature", "nan"], "at least 0"),
    "tile in words": (["in", "out", "--model", "m", "--tile", "big"], "whole number; got 'big'"),
    "tiny tile": (["in", "out", "--model", "m", "--tile", "2"], "at least 8"),
    "unknown format": (["in", "out", "--model", "m", "--format", "gif"], "invalid choice: 'gif'"),
    "unknown device": (["in", "out", "--model", "m", "--device", "abacus"], "cannot be used"),
    "file for many": (["in", "out.png", "--model", "m"], "OUTPUT must be a folder"),
    "file for two samples": (
        ["in/odd.png", "o.png", "--model", "m", "--samples", "2"],
        "OUTPUT must be a folder",
    ),
    "output is a file": (["in", "in/notes.txt", "--model", "m"], "OUTPUT must be a folder"),
    "output is input": (["in", "in", "--model", "m"], "is a picture of INPUT"),
    "output is the picture": (["in/odd.png", "in", "--model", "m"], "is a picture of INPUT"),
    "report is a folder": (["in", "out", "--model", "m", "--report", "in"], "is a folder"),
    "mistyped option": (["in", "out", "--model", "m", "--sampels", "2"], "--sampels"),
    "short option": (["in", "out", "--model", "m", "--sam", "2"], "--sam"),
    "absent configuration": (["in", "out", "--model", "m", "--config", "x.yaml"], "x.yaml"),
    "input of no name": (["", "out", "--model", "m"], "got nothing"),
    "input of a long name": (["x" * 300, "out", "--model", "m"], "File name too long"),
    "model of a long name": (
        ["in", "out", "--model", "x" * 5000],
        "--model: " + "x" * 60 + "… (5000 characters) cannot be read: File name too long",
    ),
    "a model at home": (["in", "out", "--model", "~/m"], "--model: there is no folder ~/m; ~ is"),
    "model of no name": (["in", "out", "--model", ""], "--model: must name a folder; got nothing"),
    "model of a zero byte": (
        ["in", "out", "--model", "a\0"],
        "--model: must name a folder; got a",
    ),
    "a model that is a file": (["in", "out", "--model", "in/odd.png"], "--model: there is no fol"),
    "report of a long name": (
        ["in", "out", "--model", "m", "--report", "x" * 300 + ".html"],
        "long",
    ),
    "a zero byte": (["in", "out\0", "--model", "m"], "zero byte"),
    "a glob of folders": (["in/f*.png", "out", "--model", "m"], "matches in/f*.png"),
    "output of another kind": (["in/odd.png", "o.jpg", "--model", "m"], ".png or .tif"),
    "report is a picture": (["in", "out", "--model", "m", "--report", "in/odd.png"], ".html"),
    "report is of the model": (
        ["in", "out", "--model", "m", "--report", "m/config.json"],
        ".html",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(
    arguments, message, superres, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").symlink_to(superres)
    before = contents(pictures)
    code, out, errors = run(capsys, "superres", *arguments)
    assert code == 2
    assert out == ""
    assert message in errors
    assert errors.count("\n") == 1
    assert contents(pictures) == before


MISTAKEN_OPTIONS = {
    "nothing for a number": ("samples: null", "samples"),
    "nothing for tiles": ("tile: null", "tile"),
    "a switch in words": ("overwrite: maybe", "overwrite"),
    "a switch as number": ("overwrite: 3", "overwrite"),
    "one for several": ("input: in", "input"),
    "several for one": ("device: [cpu, cuda]", "device"),
    "several names for one": ("report: [a.html, b.html]", "report"),
    "no format": ("format: gif", "format"),
    "unknown": ("sampels: 3", "sampels"),
    "a list": ("- 3", "config"),
    "not YAML": ("samples: [3", "config"),
    "not text": (b"\xff\xfe\x00", "config"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKEN_OPTIONS.values(), ids=MISTAKEN_OPTIONS)
def test_a_mistake_in_a_file_of_options(text, message, superres, pictures, tmp_path, capsys):
    config = tmp_path / "options.yaml"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = (pictures, tmp_path / "out", "--model", superres, "--config", config)
    code, out, errors = run(capsys, "superres", *arguments)
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_one_coupling_for_several(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("couplings: affine\n")
    options = ("--config", tmp_path / "options.yaml", "--out", tmp_path / "out")
    code, out, errors = run(capsys, "compare", *options)
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert "config" in errors
    assert not (tmp_path / "out").exists()


def test_a_file_called_probe_is_kept(superres, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "probe").write_text("mine")
    arguments = (pictures / "odd.png", out, "--model", superres)
    assert run(capsys, "superres", *arguments)[0] == 0
    assert (out / "probe").read_text() == "mine"
    assert {p.name for p in out.iterdir()} == {"odd.png", "probe"}


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_odd_names(superres, pictures, tmp_path, capsys):
    """Bytes that are no text, a name as long as names can be, links to nothing and to themselves."""
    source, out = tmp_path / "odd", tmp_path / "out"
    source.mkdir()
    picture = (pictures / "odd.png").read_bytes()
    names = [b"\xff\xfe.png", b"n" * 251 + b".png", "日本 [1]*?.png".encode()]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(source), name))).write_bytes(picture)
    (source / "link.png").symlink_to("nowhere.png")
    (source / "loop.png").symlink_to("loop.png")
    page = tmp_path / "report.html"
    code, told, errors = run(
        capsys, "superres", source, out, "--model", superres, "--report", page
    )
    assert code == 1
    assert "5 picture(s): 3 written, 0 skipped, 2 failed" in told
    assert "link.png" in errors
    assert "loop.png" in errors
    assert sorted(os.listdir(os.fsencode(out))) == sorted(names)
    assert "日本 [1]*?" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_of_few_letters(encoding, superres, pictures, tmp_path):
    (pictures / "日本.png").write_bytes((pictures / "odd.png").read_bytes())
    arguments = ["superres", pictures / "日本.png", tmp_path / "out", "--model", superres]
    for text in (["superres", "--help"], ["demo", "--help"], arguments):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            try:
                code = cli.main([str(a) for a in text])
            except SystemExit as stop:
                code = stop.code
        stream.flush()
        assert code == 0, stream.buffer.getvalue()
        assert stream.buffer.getvalue()


def test_python_m_flowguard(superres, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "flowguard", "inspect", superres], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "SuperResolutionFlow" in done.stdout
    code, _, errors = run(capsys, "bogus")
    assert code == 2
    assert errors.startswith("flowguard: error: ")


def test_a_model_of_the_other_kind(superres, lowlight, pictures, tmp_path, capsys):
    for command, model in (("superres", lowlight), ("lowlight", superres)):
        arguments = (command, pictures, tmp_path / "out", "--model", model)
        code, _, errors = run(capsys, *arguments)
        assert code == 2
        assert re.search(r"holds a \w+Flow; this needs a \w+Flow", errors)
        assert errors.count("\n") == 1


def test_options_from_a_file(superres, pictures, tmp_path, capsys):
    config = tmp_path / "options.yaml"
    config.write_text(f"model: {superres}\nsamples: 3\n")
    arguments = (pictures / "odd.png", tmp_path / "out", "--config", config)
    code, _, errors = run(capsys, "superres", *arguments)
    assert code == 0, errors
    assert len(list((tmp_path / "out").iterdir())) == 3
    config.write_text(f"model: {superres}\nsamples: -3\n")
    code, _, errors = run(capsys, "superres", *arguments)
    assert (code, errors.count("\n")) == (2, 1)
    assert "at least 1" in errors


@pytest.mark.parametrize("command", COMMANDS)
def test_the_configuration_is_printed(command, tmp_path, capsys):
    arguments = {
        "superres": ["in", "out", "--model", "m", "--report", "r.html"],
        "lowlight": ["in", "out", "--model", "m", "--brightness", "0.4"],
        "convert": ["srflow", "x.pth", "m", "--stacked", "1", "8"],
        "inspect": ["m"],
        "compare": ["--models", "a", "b", "--images", "c"],
        "demo": ["--out", "d"],
        "app": ["--model", "m", "--affine", "a", "b", "--port", "7000"],
        "train": ["lowlight", "--data", "d", "--out", "r", "--steps", "9"],
        "doctor": ["--extra", "train", "hub"],
    }[command]
    code, text, errors = run(capsys, command, *arguments, "--print_config")
    assert code == 0, errors
    (tmp_path / "options.yaml").write_text(text)
    options = ["--config", tmp_path / "options.yaml", "--print_config"]
    assert run(capsys, command, *arguments, *options)[1] == text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(command, capsys):
    code, text, _ = run(capsys, command, "--help")
    assert code == 0
    parser = __import__(f"flowguard.cli.{command}", fromlist=["parser"]).parser()
    for action in parser._actions:
        name = action.option_strings[0] if action.option_strings else (action.metavar or "")
        assert name in text
        if action.dest not in ("help", "print_config"):
            assert action.help, action.dest
        if action.option_strings and action.default not in (None, False) and action.help:
            assert "default" in action.help or action.dest in ("help", "print_config"), action.dest
    assert "==SUPPRESS==" not in text
    assert "<function" not in text


def test_help_names_all_commands(capsys):
    code, text, _ = run(capsys, "--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"^ +{command} ", text, re.MULTILINE)


def test_without_jsonargparse(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "flowguard.cli.parsing", raising=False)
    code, _, errors = run(capsys, "superres", "--help")
    assert code == 2
    assert 'pip install "flowguard-nf[cli]" (in a clone: pip install -e ".[cli]")' in errors
    assert run(capsys, "--version") == (0, f"flowguard {flowguard.__version__}\n", "")


#: What newcomers type, and what they are told.
NEWCOMERS = {
    "no command": ("", "COMMAND must be one of superres, "),
    "a command misspelt": (
        "superes a.png out",
        "invalid choice: 'superes' .*; did you mean superres?",
    ),
    "nothing given": (
        "superres",
        "superres: error: INPUT, OUTPUT must be given; got nothing",
    ),
    "no such model": ("superres a.png out --model nowhere", "--model: there is no folder nowhere"),
    "a file for a model": (
        "inspect a.png",
        "there is no folder a.png, but a file of that name; a model is a folder",
    ),
    "an option misspelt": ("train --step 3", "there is no option --step; did you mean --steps?"),
    "an option of another name": ("demo --epochs 3 --devise cuda", "there is no option --epochs"),
    "a word for a number": (
        "superres a.png out --model . --temperature hot",
        "--temperature: must be a number; got 'hot'",
    ),
    "a number out of range": (
        "superres a.png out --model . --threads 0",
        "--threads: must be at least 1 and at most 1024; got 0",
    ),
    "a value misspelt": (
        "demo --task lowligh",
        "invalid choice: 'lowligh' .*; did you mean lowlight?",
    ),
    "an option without its value": ("demo --out", "--out: expected one argument"),
    "a picture for a checkpoint": (
        "convert srflow a.png b",
        "a.png cannot be read as a file of tensors",
    ),
}


@pytest.mark.parametrize("name", NEWCOMERS)
def test_an_ordinary_mistake_is_answered_in_one_line(name, tmp_path, monkeypatch, capsys):
    line, answer = NEWCOMERS[name]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    code, out, errors = run(capsys, *line.split())
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert re.search(answer, errors), errors


def test_inspect(superres, lowlight, capsys):
    for folder, name in ((superres, "SuperResolutionFlow"), (lowlight, "LowLightFlow")):
        code, text, _ = run(capsys, "inspect", folder)
        assert code == 0
        assert name in text
        assert "Robust(bins=2" in text
        assert "fitted and calibrated" in text
        assert "49 images" in text
        assert "no element of the flow's output exceeds" in text


def test_inspect_an_affine_model_without_guard(tmp_path, capsys):
    model = SuperResolutionFlow(
        scale=2, levels=1, steps=1, hidden=4, features=4, coupling="affine"
    )
    model.save_pretrained(tmp_path)
    code, text, _ = run(capsys, "inspect", tmp_path, "--radius", 3)
    assert code == 0
    assert "none: " in text
    assert "not fitted" in text
    for arguments in ([tmp_path / "absent"], [tmp_path, "--radius", "-1"], []):
        code, _, errors = run(capsys, "inspect", *arguments)
        assert (code, errors.count("\n")) == (2, 1)


def test_convert_says_what_is_wrong(superres, tmp_path, capsys, recwarn):
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(print, protocol=4))
    cases = [
        ["srflow", tmp_path / "absent.pth", tmp_path / "out"],
        ["srflow", tmp_path / "text.pth", tmp_path / "out"],
        ["srflow", tmp_path / "code.pth", tmp_path / "out"],
        ["srflow", tmp_path / "other.pth", tmp_path / "out"],
        ["llflow", tmp_path / "other.pth", tmp_path / "out"],
        ["srflow", tmp_path / "other.pth", superres],
        ["ncsr", tmp_path / "other.pth", tmp_path / "out"],
        ["srflow", tmp_path / "other.pth"],
    ]
    before = contents(superres)
    for arguments in cases:
        code, _, errors = run(capsys, "convert", *arguments)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert not (tmp_path / "out").exists()
    assert not recwarn.list  # they would be lines more
    assert contents(superres) == before


def test_convert_an_encoder(tmp_path, capsys):
    torch.manual_seed(0)
    encoder = RRDBEncoder(features=8, growth=4, blocks=2, stacked=())
    torch.save(encoder.state_dict(), tmp_path / "rrdb.pth")
    arguments = ("convert", "esrgan", tmp_path / "rrdb.pth", tmp_path / "m", "--stacked", 0, 1)
    code, told, errors = run(capsys, *arguments)
    assert code == 0, errors
    assert "SuperResolutionFlow" in told
    model = SuperResolutionFlow.from_pretrained(tmp_path / "m")
    loaded = model.conditioner.encoder.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in encoder.state_dict().items())
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert "--overwrite replaces it" in errors
    (tmp_path / "m" / "config.json").unlink()  # the weights alone are a model too
    assert run(capsys, *arguments)[0] == 2
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert run(capsys, *arguments, "--overwrite", "--scale", 4)[0] == 2


def test_convert_a_network_of_another_format(ncnn, tmp_path, capsys):
    torch.manual_seed(0)
    encoder = RRDBEncoder(features=8, growth=4, blocks=2, stacked=(), long_skip="first")
    file = ncnn.Writer(half=False).encoder(encoder).write(tmp_path)
    arguments = ("convert", "ncnn", file.with_suffix(".bin"), tmp_path / "m", "--stacked", 0, 1)
    code, told, errors = run(capsys, *arguments)
    assert code == 0, errors
    assert "SuperResolutionFlow" in told
    loaded = SuperResolutionFlow.from_pretrained(tmp_path / "m").conditioner.encoder
    y = torch.rand(1, 3, 5, 6)
    assert torch.equal(loaded.image(y), encoder.image(y))
    file.with_suffix(".bin").write_bytes(b"")
    for mistake in (file, file.with_suffix(".pth"), tmp_path / "absent.bin"):
        code, _, errors = run(capsys, "convert", "ncnn", mistake, tmp_path / "n")
        assert (code, errors.count("\n")) == (2, 1), errors
        assert not (tmp_path / "n").exists()


CONVERTED = {
    "srflow": (SuperResolutionFlow, {}),
    "robustnf": (
        SuperResolutionFlow,
        {"noise_steps": (0, 1, 1), "coupling": "rqspline", "fixed": True},
    ),
    "llflow": (LowLightFlow, {"lowlight": True, "splits": 0}),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_convert_a_flow(published, kind, tmp_path, capsys):
    cls, special = CONVERTED[kind]
    options = {"features": 4, "growth": 2, "hidden": 6, "steps": 1, "blocks": 2, "stacked": (0, 1)}
    net = published.Net(**options | special)
    state = {k: v.float() for k, v in published.random_state(net).items()}
    torch.save(state, tmp_path / "x.pth")
    options = ("--stacked", 0, 1)
    code, _, errors = run(capsys, "convert", kind, tmp_path / "x.pth", tmp_path / "m", *options)
    assert code == 0, errors
    wanted = getattr(cls, f"from_{kind}")(state, stacked=(0, 1))
    found = cls.from_pretrained(tmp_path / "m")
    before, after = wanted.state_dict(), found.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


PEAK = """
import resource, sys
from flowguard.cli import main as cli
code = cli.main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_a_large_picture_takes_less_than_four_gigabytes(tmp_path):
    torch.manual_seed(0)
    model = SuperResolutionFlow(scale=4, levels=2, steps=1, hidden=8, features=8)
    small(model).save_pretrained(tmp_path / "m")
    pixels = np.random.default_rng(0).integers(100, 156, (1356, 2040, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    arguments = ["superres", "x.png", "out", "--model", "m", "--report", "out/report.html"]
    command = [sys.executable, "-c", PEAK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "x.png") as image:
        assert image.size == (8160, 5424)
    assert float(done.stdout.split("peak")[1]) < 4


def test_the_version_is_told_once(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"flowguard {flowguard.__version__}\n"
