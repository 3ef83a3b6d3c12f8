r"""How far one output can get: a certificate read backwards, from the last layer to the noise.

A :class:`Region` goes forwards and has to hold all outputs at once. Here each output is followed
by itself, as a linear function of what the layers before it made:

.. math:: x = a^\top h + c + e, \quad |e| \leq s

A linear layer takes :math:`a` to :math:`W^\top a`, exactly. An elementwise map is replaced by a line
of any slope :math:`\lambda`, and how far it can be from that line enters the slack :math:`s`. A slope
of zero is what a box does, a slope of one what a zonotope does; here each output has a slope of its
own for each feature of each map on its way. The bound holds for *any* slopes, which is why they may
be searched for, by gradient descent.

Elementwise maps after one another are taken together, as a :class:`Course`: two robust maps move a
feature by less than twice what one does.

References:
    | Fast and Complete: Enabling Complete Neural Network Verification with Rapid and Massively
      Parallel Incomplete Verifiers (Xu et al., 2021)
    | https://arxiv.org/abs/2011.13824
"""

__all__ = ["Chain", "Course", "Forms", "Joined", "Link", "Product", "Rearranged", "Unfolded"]

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flowguard.bounds.regions import Envelope, Region

#: The number of rectangles of a course; beyond, they are taken together.
MOST = 8
#: The number of slopes that are searched for at once.
SLOPES = 2**21
#: The slopes, as shares of the steepest, that the search may start from.
STARTS = (1.0, 0.9, 0.5, 0.0)
#: How far the search moves a share in its first step.
STRIDE = 0.05
#: What the search pays for how far a form reaches by the input of the first layer alone, beside
#: how far it reaches at all: else it would not look for slopes beyond what limits it at first.
AHEAD = 0.1


class Node(NamedTuple):
    r"""What is known of the features between two layers, as a region has it.

    Arguments:
        low: The least values, with shape :math:`(P, C)`.
        high: The largest values, with shape :math:`(P, C)`.
        ball: The largest Euclidean norms, with shape :math:`(P)`.
    """

    low: Tensor
    high: Tensor
    ball: Tensor

    @classmethod
    def of(cls, region: Region) -> "Node":
        r"""Returns what a region says."""
        low, high = region.limits
        return cls(low, high, region.ball)


@dataclass(frozen=True)
class Forms:
    r"""Linear forms in the features of a position, each known up to some slack.

    Arguments:
        position: The kind of position that each is of, with shape :math:`(N)`.
        weight: The coefficients :math:`a`, with shape :math:`(N, C)`.
        center: The constants :math:`c`, with shape :math:`(N)`.
        slack: How far each can be from that, with shape :math:`(N)`.
    """

    position: Tensor
    weight: Tensor
    center: Tensor
    slack: Tensor

    @classmethod
    def of(cls, region: Region) -> "Forms":
        r"""Returns the features of all positions themselves."""
        positions, features = region.box.shape
        weight = torch.eye(features, dtype=region.box.dtype).repeat(positions, 1)
        position = torch.arange(positions).repeat_interleave(features)
        none = weight.new_zeros(len(weight))
        return cls(position, weight, none, none)

    def split(self, size: int) -> list["Forms"]:
        r"""Returns parts of at most `size` forms."""
        columns = (self.position, self.weight, self.center, self.slack)
        return [Forms(*part) for part in zip(*(t.split(size) for t in columns), strict=True)]

    def at(self, t: Tensor) -> Tensor:
        r"""Returns what belongs to the position of each form, of what belongs to all."""
        return t.expand(len(self.weight), *t.shape[1:]) if len(t) == 1 else t[self.position]

    def limits(self, node: Node) -> tuple[Tensor, Tensor]:
        r"""Returns the least and the largest values, with shape :math:`(N)`."""
        low, high = self.at(node.low), self.at(node.high)
        middle = (self.weight * (low + high)).sum(1) / 2
        reach = (self.weight.abs() * (high - low)).sum(1) / 2
        sphere = self.weight.norm(dim=1) * self.at(node.ball)
        lowest = torch.maximum(middle - reach, -sphere) + self.center - self.slack
        return lowest, torch.minimum(middle + reach, sphere) + self.center + self.slack


class Link(Protocol):
    r"""A layer, as linear functions of its output see it."""

    def back(self, forms: Forms, share: Tensor | None, before: Node, after: Node) -> Forms:
        r"""Returns the same functions, of the input of the layer.

        Arguments:
            forms: The functions of its output.
            share: The slopes to replace it by, as shares of the steepest one; see
                :class:`Course`.
            before: What is known of its input.
            after: What is known of its output.
        """
        ...


@dataclass(frozen=True)
class Product:
    r"""A product with a matrix, :math:`y = W x + \delta`.

    Arguments:
        matrix: The matrix :math:`W`, with shape :math:`(C, C)`.
        slack: How large :math:`|\delta|` is, with shape :math:`(P, C)`.
    """

    matrix: Tensor
    slack: Tensor

    def back(self, forms: Forms, share: Tensor | None, before: Node, after: Node) -> Forms:
        r"""Returns the functions of the input of the product, with its rounding error."""
        slack = forms.slack + (forms.weight.abs() * forms.at(self.slack)).sum(1)
        return replace(forms, weight=forms.weight @ self.matrix, slack=slack)


@dataclass(frozen=True)
class Rearranged:
    r"""A permutation: feature `i` of the output is feature `order[i]` of the input."""

    order: Tensor

    def back(self, forms: Forms, share: Tensor | None, before: Node, after: Node) -> Forms:
        r"""Returns the functions with their weights in the order of the input."""
        return replace(forms, weight=forms.weight[:, torch.argsort(self.order)])


@dataclass(frozen=True)
class Joined:
    r"""Further features that come in, of at most `reach`.

    Arguments:
        reach: Their largest absolute value.
    """

    reach: float

    def back(self, forms: Forms, share: Tensor | None, before: Node, after: Node) -> Forms:
        r"""Returns the functions of the features that were there before the others joined."""
        kept, joined = forms.weight.tensor_split((before.low.shape[1],), dim=1)
        slack = forms.slack + self.reach * joined.abs().sum(1)
        return replace(forms, weight=kept, slack=slack)


@dataclass(frozen=True)
class Unfolded:
    r"""Features become positions, `factor` × `factor` of each.

    Arguments:
        factor: The factor in each direction.
    """

    factor: int

    def back(self, forms: Forms, share: Tensor | None, before: Node, after: Node) -> Forms:
        r"""Returns the functions of the cells that the positions were made of."""
        cells = self.factor**2
        where = torch.nn.functional.one_hot(forms.position % cells, cells).to(forms.weight)
        weight = (forms.weight.unsqueeze(2) * where.unsqueeze(1)).flatten(1)
        return replace(forms, position=forms.position // cells, weight=weight)


class Rectangle(NamedTuple):
    r"""Pairs of input and output between limits, with shape :math:`(P, C)` each.

    Arguments:
        some: Where there are such pairs at all.
        low: The least output.
        high: The largest output.
        start: The least input.
        end: The largest input.
    """

    some: Tensor
    low: Tensor
    high: Tensor
    start: Tensor
    end: Tensor


@dataclass(frozen=True)
class Course:
    r"""What elementwise maps make of each feature, whatever their parameters are.

    All pairs of input and output lie in a band around a line, or in one of some rectangles:

    .. math::
        \mathrm{low} \leq y - \mathrm{slope} \, x \leq \mathrm{high} \quad \text{or} \quad
        y \in [l_k, h_k], \; x \in [s_k, e_k]

    A robust map is the identity up to its shift, or stays within its box: this is exact.

    Arguments:
        slope: The slope of the line, with shape :math:`(P, C)`, as all that follows.
        low: The least distance from the line.
        high: The largest distance from the line.
        band: Where there is a band.
        boxes: The rectangles.
    """

    slope: Tensor
    low: Tensor
    high: Tensor
    band: Tensor
    boxes: tuple[Rectangle, ...] = ()

    @classmethod
    def line(cls, factor: Tensor, offset: Tensor, slack: Tensor) -> "Course":
        r"""Returns that of :math:`x_i \mapsto s_i x_i + b_i`.

        Arguments:
            factor: The factors :math:`s`, with shape :math:`(C)`.
            offset: The vector :math:`b`, with shape :math:`(C)`.
            slack: How far the result may be from that, with shape :math:`(P, C)`.
        """
        band = torch.ones_like(slack, dtype=torch.bool)
        return cls(factor.expand_as(slack), offset - slack, offset + slack, band)

    @classmethod
    def map(cls, g: Envelope, mask: Tensor, box: Tensor, grown: Tensor, slack: Tensor) -> "Course":
        r"""Returns that of a univariate map of the features in `mask`.

        Arguments:
            g: What is known of the map.
            mask: The features that are transformed, with shape :math:`(C)`.
            box: The largest absolute values before it, with shape :math:`(P, C)`.
            grown: The largest absolute values after it, in exact arithmetic.
            slack: How far rounding may move a value, zero outside of the mask.
        """
        mask = mask.expand_as(box)
        edges = math.isfinite(g.inside) and math.isfinite(g.edge)
        far = g.offset if edges else g.displacement
        none = torch.zeros_like(box)
        if edges:
            reach, edge = none + g.inside, none + g.edge
        else:
            reach, edge = grown, box
        band = torch.full_like(mask, math.isfinite(far)) | ~mask
        beyond = torch.where(band & mask, far, none) + slack
        some = mask & ~band if not edges else mask
        reach, edge = (torch.where(some, t + slack, none) for t in (reach, edge))
        rectangle = Rectangle(some, -reach, reach, -edge, edge)
        return cls(torch.ones_like(box), -beyond, beyond, band, _told([rectangle]))

    def then(self, other: "Course") -> "Course":
        r"""Returns the course of this one, and then another."""
        low, high = _along(other.slope, self.low, self.high)
        boxes = []
        for a in self.boxes:
            down, up = _along(other.slope, a.low, a.high)
            on = Rectangle(a.some & other.band, down + other.low, up + other.high, *a[3:])
            boxes.append(on)
            for b in other.boxes:
                some = a.some & b.some & (a.low <= b.end) & (b.start <= a.high)
                held = on.some & (on.low <= b.low) & (b.high <= on.high)
                start, end = self._source(b)
                held |= self.band & (start <= a.start) & (a.end <= end)
                boxes.append(Rectangle(some & ~held, b.low, b.high, a.start, a.end))
        for b in other.boxes:
            boxes.append(Rectangle(self.band & b.some, b.low, b.high, *self._source(b)))
        return Course(
            self.slope * other.slope,
            low + other.low,
            high + other.high,
            self.band & other.band,
            _told(boxes),
        )

    def _source(self, b: Rectangle) -> tuple[Tensor, Tensor]:
        r"""From where the band leads to the inputs of a rectangle."""
        inner, outer = (b.start - self.high) / self.slope, (b.end - self.low) / self.slope
        flat = self.slope == 0  # where it leads there from anywhere
        start, end = torch.minimum(inner, outer), torch.maximum(inner, outer)
        return torch.where(flat, -math.inf, start), torch.where(flat, math.inf, end)

    def back(self, forms: Forms, share: Tensor | None, before: Node, after: Node) -> Forms:
        r"""Returns the functions of the input of the map, by a line below and one above it."""
        assert share is not None  # the chain has slopes for every course
        low, high = self.beside(forms, share, before, after)
        weight = forms.weight
        return replace(
            forms,
            weight=weight * share * forms.at(self.slope),
            center=forms.center + (weight * (low + high)).sum(1) / 2,
            slack=forms.slack + (weight.abs() * (high - low)).sum(1) / 2,
        )

    def beside(
        self, forms: Forms, share: Tensor, before: Node, after: Node
    ) -> tuple[Tensor, Tensor]:
        r"""Returns the least and the largest :math:`y - \lambda x`, with :math:`\lambda` that share
        of the slope, for inputs and outputs that are known to be within limits."""
        at = forms.at
        slope, left, right = at(self.slope), at(before.low), at(before.high)
        least, most = at(after.low), at(after.high)
        rest = 1 - share
        # Along the band, y - λ x is (slope - λ) x + d as well as (1 - share) y + share d.
        a, b = _along(slope, left, right)
        low = torch.maximum(rest * a + at(self.low), rest * least + share * at(self.low))
        high = torch.minimum(rest * b + at(self.high), rest * most + share * at(self.high))
        band = at(self.band)
        low, high = torch.where(band, low, math.inf), torch.where(band, high, -math.inf)
        steep = share * slope
        for box in self.boxes:
            some, down, up, start, end = map(at, box)
            start, end = torch.maximum(start, left), torch.minimum(end, right)
            down, up = torch.maximum(down, least), torch.minimum(up, most)
            some = some & (start <= end) & (down <= up)
            a, b = _along(steep, start, end)
            low = torch.minimum(low, torch.where(some, down - b, math.inf))
            high = torch.maximum(high, torch.where(some, up - a, -math.inf))
        return low, high


def _along(slope: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    r"""The least and the largest of slope times what lies between two values."""
    a, b = slope * low, slope * high
    return torch.minimum(a, b), torch.maximum(a, b)


def _told(boxes: list[Rectangle]) -> tuple[Rectangle, ...]:
    r"""The rectangles that there are, not too many."""
    boxes = [box for box in boxes if bool(box.some.any())]
    while len(boxes) > MOST:
        a, b = boxes.pop(), boxes.pop()
        both = [torch.minimum, torch.maximum, torch.minimum, torch.maximum]
        merged = [
            torch.where(a.some & b.some, f(s, t), torch.where(a.some, s, t))
            for f, s, t in zip(both, a[1:], b[1:], strict=True)
        ]
        boxes.insert(0, Rectangle(a.some | b.some, *merged))
    return tuple(boxes)


class Chain:
    r"""Creates the layers so far, to be read backwards.

    Arguments:
        region: What is known of the input of the first of them.
        steps: The number of steps of the search for slopes.
    """

    def __init__(self, region: Region, steps: int) -> None:
        self.steps = steps
        self.links: list[Link] = []
        self.nodes = [Node.of(region)]

    def add(self, link: Link | None, region: Region) -> None:
        r"""Adds a layer.

        Arguments:
            link: The layer. If :py:`None`, nothing is known of it but what comes out, and the
                chain starts anew.
            region: What is known of its output.
        """
        node = Node.of(region)
        if link is None:
            self.links, self.nodes = [], [node]
        elif isinstance(link, Course) and self.links and isinstance(self.links[-1], Course):
            self.links[-1], self.nodes[-1] = self.links[-1].then(link), node
        else:
            self.links.append(link)
            self.nodes.append(node)

    def tighten(self, region: Region) -> Region:
        r"""Returns a part of the region that holds all outputs as well.

        Arguments:
            region: What is known of the output of the last layer.
        """
        courses = [n for link, n in zip(self.links, self.nodes[1:], strict=True) if _bends(link)]
        size = max(SLOPES // max(sum(n.low.shape[1] for n in courses), 1), 1)
        parts = [self._search(forms) for forms in Forms.of(region).split(size)]
        low, high = (torch.cat(t).view_as(region.box) for t in zip(*parts, strict=True))
        node = self.nodes[-1]
        low, high = torch.maximum(low, node.low), torch.minimum(high, node.high)
        region = region.within(torch.maximum(low.abs(), high.abs()))
        self.nodes[-1] = Node(low, high, region.ball)
        return region

    def read(self, forms: Forms, shares: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns the least and the largest value of each form, and the largest absolute value
        by what is known of the input of the first layer alone.

        Arguments:
            forms: Linear functions of the output.
            shares: The slopes of each course, from the last one on, between 0 and 1.
        """
        left = iter(shares)
        low, high = forms.limits(self.nodes[-1])
        far = torch.maximum(-low, high)
        for i in reversed(range(len(self.links))):
            link, before, after = self.links[i], self.nodes[i], self.nodes[i + 1]
            forms = link.back(forms, next(left) if _bends(link) else None, before, after)
            least, most = forms.limits(before)
            far = torch.maximum(-least, most)
            # What is known in between may be more than what is left of it at the start.
            low, high = torch.maximum(low, least), torch.minimum(high, most)
        return low, high, far

    def _search(self, forms: Forms) -> tuple[Tensor, Tensor]:
        r"""The least and the largest value of each form, for the best slopes that are found."""
        widths = [
            node.low.shape[1]
            for link, node in zip(self.links, self.nodes[1:], strict=True)
            if _bends(link)
        ]
        blank = [forms.weight.new_ones(len(forms.weight), n) for n in reversed(widths)]
        with torch.no_grad():
            tried = [self.read(forms, [s * t for t in blank]) for s in STARTS]
            low = torch.stack([t[0] for t in tried]).amax(0)
            high = torch.stack([t[1] for t in tried]).amin(0)
            best = torch.stack([t[2] for t in tried]).argmin(0)
            first = forms.weight.new_tensor(STARTS)[best].unsqueeze(1)
        shares = [(first * t).requires_grad_() for t in blank]
        if not shares or not self.steps:
            return low, high
        optimizer = torch.optim.Adam(shares, STRIDE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with torch.enable_grad():
            for _ in range(self.steps):
                least, most, far = self.read(forms, shares)
                optimizer.zero_grad()
                ((most - least) / 2 + AHEAD * far).sum().backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    low, high = torch.maximum(low, least), torch.minimum(high, most)
                    for share in shares:
                        share.clamp_(0.0, 1.0)
        with torch.no_grad():
            least, most, _ = self.read(forms, shares)
        return torch.maximum(low, least), torch.minimum(high, most)


def _bends(link: Link) -> bool:
    return isinstance(link, Course)
