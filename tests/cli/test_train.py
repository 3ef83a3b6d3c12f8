r"""``flowguard train``: what its options come to."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("PIL.Image")

from flowguard.cli import train
from flowguard.cli.parsing import UserError
from flowguard.image.maps import Robust
from flowguard.io.pictures import Picture, write
from flowguard.training import pictures


def test_the_processes_of_a_machine_share_the_cache(tmp_path, monkeypatch):
    for name in "ab":
        write(tmp_path / f"{name}.png", Picture(torch.rand(3, 40, 40)))
    asked, pairs_of = [], pictures.pairs_of

    def watched(*args, budget, **options):
        asked.append(budget)
        return pairs_of(*args, budget=budget, **options)

    monkeypatch.setattr(pictures, "pairs_of", watched)
    args = SimpleNamespace(
        data=str(tmp_path),
        pairs=None,
        val=None,
        task="superres",
        crop=16,
        batch=4,
        seed=0,
        corrupt=0.0,
    )
    for devices in (1, 4):
        train._pictures(SimpleNamespace(**vars(args), cache=1.0, devices=devices), 4)
    assert asked == [10**9, 10**9 // 4]


@pytest.mark.parametrize(
    ("more", "margin", "policy"),
    [
        ([], 0.25, "shrink"),
        (["lowlight"], 0.25, "warn"),
        (["--coupling", "bspline"], 0.25, "shrink"),
        (["--coupling", "affine"], 0.0, "warn"),  # whose artefacts are to be seen
        (["--coupling", "reparametrized"], 0.0, "warn"),
        (["--coupling", "affine", "--margin", "0.5", "--policy", "shrink"], 0.5, "shrink"),
        (["--margin", "0", "--policy", "raise"], 0.0, "raise"),
    ],
    ids=str,
)
def test_a_run_has_a_margin_and_shrinks_unless_its_coupling_is_affine(
    more, margin, policy, tmp_path
):
    (tmp_path / "pictures").mkdir()
    places = ["--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "run")]
    args = train.parser().parse_args([*places, *more])
    args.given = {}
    args.task = args.task or "superres"
    train._begin(args)
    assert (args.margin, args.policy) == (margin, policy)


def test_a_run_that_was_begun_before_there_were_margins_goes_on_without(tmp_path):
    text = f"version: 1\ntask: superres\ndata: {tmp_path}\n"
    (tmp_path / "config.yaml").write_text(text)
    args = SimpleNamespace(resume=tmp_path, given={"resume": tmp_path})
    train._resume(args)
    assert (args.margin, args.corrupt, args.policy, args.boundary) == (0.0, 0.0, "warn", 0.999)
    (tmp_path / "config.yaml").write_text(f"{text}margin: 0.5\ncorrupt: 0.2\npolicy: raise\n")
    train._resume(args)
    assert (args.margin, args.corrupt, args.policy) == (0.5, 0.2, "raise")


@pytest.mark.parametrize("task", ["superres", "lowlight"])
def test_a_run_that_was_begun_before_there_were_first_guesses_goes_on_without(task, tmp_path):
    text = f"version: 2\ntask: {task}\ndata: {tmp_path}\n"
    (tmp_path / "config.yaml").write_text(text)
    args = SimpleNamespace(resume=tmp_path, given={"resume": tmp_path})
    train._resume(args)
    assert args.no_residual == (task == "lowlight")
    (tmp_path / "config.yaml").write_text(f"{text}no_residual: false\n")
    train._resume(args)
    assert args.no_residual is False


def test_a_run_may_get_a_margin_and_no_corruption_when_it_goes_on(tmp_path):
    """The former changes no step."""
    (tmp_path / "config.yaml").write_text(f"version: 2\ntask: superres\ndata: {tmp_path}\n")
    given = {"resume": tmp_path, "margin": 0.25, "policy": "shrink"}
    args = SimpleNamespace(resume=tmp_path, given=given)
    train._resume(args)
    assert (args.margin, args.policy) == (0.25, "shrink")
    args = SimpleNamespace(resume=tmp_path, given={"resume": tmp_path, "corrupt": 0.3})
    with pytest.raises(UserError, match=r"--corrupt must be that of the run .*, 0\.0; got 0\.3"):
        train._resume(args)


def test_bins_are_those_of_the_robust_spline():
    options = SimpleNamespace(coupling="robust", bins=8)
    assert train._coupling(options) == Robust(bins=8)
    assert train._coupling(SimpleNamespace(coupling="bspline", bins=None)) == "bspline"


def test_bins_of_another_coupling_are_refused():
    with pytest.raises(
        UserError, match=r"--bins must come with --coupling robust.*got it with aff"
    ):
        train._coupling(SimpleNamespace(coupling="affine", bins=8))


def test_a_run_that_knew_of_no_bins_goes_on_with_the_usual_ones():
    given = train.parser().saved({"data": "pictures", "coupling": "robust"})
    assert given["bins"] is None
