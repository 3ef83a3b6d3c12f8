r"""``flowguard convert``: what its options come to."""

import pytest

from flowguard.cli import convert
from flowguard.cli.parsing import UserError
from flowguard.models import SuperResolutionFlow, load


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    def imported(args):
        return SuperResolutionFlow.published(steps=1, blocks=1, stacked=(0,), hidden=4)

    monkeypatch.setattr(convert, "_imported", imported)
    file = tmp_path / "checkpoint.pth"
    file.write_bytes(b"read by another")
    return file


def run(checkpoint, folder, *more):
    return convert.run(
        convert.parser().parse_args(["srflow", str(checkpoint), str(folder), *more])
    )


@pytest.mark.parametrize(("more", "margin"), [([], None), (["--margin", "0.5"], 0.5)], ids=str)
def test_a_checkpoint_gets_a_margin_where_it_is_asked_for(more, margin, checkpoint, tmp_path):
    assert run(checkpoint, tmp_path / "model", *more) == 0
    assert load(tmp_path / "model").margin == margin


def test_a_margin_without_room_for_a_grey_level_is_told(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"at least a grey level, 0\.003922 of 256; got 0\.001"):
        run(checkpoint, tmp_path / "model", "--margin", "0.001")
    assert not (tmp_path / "model").exists()
