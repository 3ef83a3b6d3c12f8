r"""What the page shows of a photograph: what was asked, what the flows answer, and what is known."""

__all__ = ["Asked", "panel"]

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowguard.io.pictures import to_uint8

from . import drawing, words
from .answers import Answer, Partner, answer

_MARKED = torch.tensor([0.95, 0.2, 0.2])  # the colour of artefacts


class Asked(NamedTuple):
    r"""What the flows are asked.

    Arguments:
        condition: The condition, with shape :math:`(3, H, W)`.
        told: What was done to the photograph to come to it, in words.
        truth: The photograph that should come out, with shape :math:`(3, sH, sW)`, if it is known.
        temperature: The standard deviation of the noise.
        seed: The seed of the noise.
    """

    condition: Tensor
    told: str = ""
    truth: Tensor | None = None
    temperature: float = 0.8
    seed: int = 0


def panel(partners: Sequence[Partner], asked: Asked) -> str:
    r"""Returns all that is shown of a condition, as HTML.

    Arguments:
        partners: The models that answer; the guard of the last one is the one that is told of.
        asked: What they are asked.

    Raises:
        ImportError: If Pillow or matplotlib is not installed.
    """
    y = asked.condition
    made = {p.name: answer(p, y, asked.temperature, asked.seed) for p in partners}
    first = [drawing.figure("condition", to_uint8(y), _range(y), sharp=True)]
    if asked.truth is not None:
        first.append(drawing.figure("photograph", to_uint8(asked.truth)))
    flows = [drawing.figure(name, to_uint8(a.sample[0]), _told(a)) for name, a in made.items()]
    masks = [
        drawing.figure(f"artefacts, {name}", _marked(a), f"{100 * a.share:.3g} % of the pixels")
        for name, a in made.items()
    ]
    last = made[partners[-1].name].report
    kind = "flagged" if last is not None and bool(last.flagged[0]) else ""
    parts = [drawing.sentence(asked.told)] if asked.told else []
    parts += [drawing.row(first), drawing.row(flows)]
    parts.append(drawing.sentence(words.chance(last), kind=kind))
    if last is not None:
        parts += [drawing.row(drawing.ood_maps(last)), drawing.bar()]
    parts.append(drawing.row(masks))
    parts += [drawing.sentence(f"{p.name}. {p.certificate}") for p in partners]
    return "".join(parts)


def _range(y: Tensor) -> str:
    size = f"{y.shape[-1]} × {y.shape[-2]}"
    low, high = float(y.min()), float(y.max())
    return f"{size}, values from {low:.3g} to {high:.3g}"


def _told(made: Answer) -> str:
    return f"{words.artefacts(made.share, made.largest)}; {made.seconds:.1f} s"


def _marked(made: Answer) -> object:
    r"""The sample, dark and grey, with the pixels that are artefacts in red."""
    grey = made.sample[0].nan_to_num(0.0).clamp(0, 1).mean(dim=0, keepdim=True).expand(3, -1, -1)
    marked = torch.where(made.mask[0], _MARKED[:, None, None], 0.4 * grey)
    return to_uint8(marked)
