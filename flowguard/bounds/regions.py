r"""Sets that hold all samples of a flow, and what its layers make of them.

A :class:`Region` over-approximates, by three descriptions that all hold at once, the values that
the channels of one position can take:

.. math::
    |x_i| \leq \mathrm{box}_i, \quad \lVert x \rVert_2 \leq \mathrm{ball}, \quad
    x = c + G \xi + \mathrm{diag}(e) \eta, \; |\xi|_\infty, |\eta|_\infty \leq 1

None replaces another. The box is exact for couplings without mixing; the ball does not grow under
rotations; and the third, a zonotope, composes all linear maps of the flow, so that a rotation and
its inverse, or a scale and its inverse, do not add up even with splines in between.

All is computed in float64 on the CPU. `roundoff` is the relative error of one operation of the
*model*, whose effect each method adds to the region (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, chapter 3).
"""

__all__ = ["Envelope", "Region", "gamma"]

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

#: From this size on, a zonotope is replaced by its box.
LIMIT = 2**24


class Envelope(NamedTuple):
    r"""What is known of a univariate map :math:`g` from noise to data, whatever its parameters are.

    .. math::
        |g(z)| \leq \mathrm{offset} + \max(\mathrm{floor}, \mathrm{gain} \, |z|), \quad
        |g(z) - z| \leq \mathrm{displacement}

    Arguments:
        gain: By how much :math:`|z|` may be multiplied.
        offset: What may be added, :math:`\infty` if there is no bound.
        floor: What :math:`|g(z)| - \mathrm{offset}` may be for small :math:`|z|`.
        displacement: The largest distance from the identity, :math:`\infty` if there is none.
        inside: The largest :math:`|g(z)|` where :math:`|g(z) - z|` exceeds `offset`, as it may
            within the box of a spline; :math:`\infty` if there is none.
        edge: The largest :math:`|z|` there.
        depends: How the map depends on its parameters, in words.
        reason: Why there is no bound, in words. Not empty means that the map is *not certified*.
        roundings: The number of operations whose rounding the bound has to allow for.
        limit: In place of `gain`, `offset` and `floor`, a function that gives for the largest
            :math:`|z|` the largest :math:`|g(z)|`.

    Example:
        >>> spline = flowguard.RobustSpline(*torch.zeros(3, 1), torch.zeros(()), shift_bound=1.0)
        >>> known = flowguard.bounds.envelope(spline)
        >>> known.gain, known.offset, known.floor, known.displacement
        (1.0, 1.0, 4.0, 11.0)
        >>> known.reach(2.0), known.reach(100.0)  # anywhere in the box, or moved by the shift
        (5.0, 101.0)
    """

    gain: float = math.inf
    offset: float = math.inf
    floor: float = 0.0
    displacement: float = math.inf
    inside: float = math.inf
    edge: float = math.inf
    depends: str = ""
    reason: str = ""
    roundings: int = 2
    limit: Callable[[float], float] | None = None

    def reach(self, radius: float) -> float:
        r"""The largest :math:`|g(z)|` for :math:`|z|` up to `radius`."""
        if self.limit is not None:
            return self.limit(radius)
        return self.offset + max(self.floor, self.gain * radius)

    def or_identity(self) -> "Envelope":
        r"""Returns what is known of a map that is this one or the identity."""
        if self.reason:
            return self
        limit = None if self.limit is None else partial(_at_least, self)
        return self._replace(gain=max(self.gain, 1.0), limit=limit)


def _at_least(g: Envelope, radius: float) -> float:
    return max(radius, g.reach(radius))


@dataclass(frozen=True)
class Region:
    r"""What the :math:`C` channels of each of :math:`P` kinds of positions can be.

    Arguments:
        box: The largest absolute values, with shape :math:`(P, C)`.
        ball: The largest Euclidean norms, with shape :math:`(P)`.
        center: The center of the zonotope, with shape :math:`(P, C)`.
        spread: The generators :math:`G` of the zonotope, with shape :math:`(P, C, M)`.
        own: The generators :math:`e` that move one channel alone, with shape :math:`(P, C)`.
    """

    box: Tensor
    ball: Tensor
    center: Tensor
    spread: Tensor
    own: Tensor

    @classmethod
    def cube(cls, box: Tensor) -> "Region":
        r"""Returns the region that is known by its box alone.

        Arguments:
            box: The largest absolute values, with shape :math:`(P, C)`.
        """
        center = torch.zeros_like(box)
        return cls(box, box.norm(dim=1), center, center.new_zeros(*box.shape, 0), box)

    @property
    def largest(self) -> float:
        r"""The largest absolute value, :math:`\infty` rather than NaN."""
        return self.box.max().nan_to_num(math.inf, math.inf).item() if self.box.numel() else 0.0

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        r"""The least and the largest values, with shape :math:`(P, C)` each."""
        around = self.spread.abs().sum(-1) + self.own
        low = torch.maximum(self.center - around, -self.box)
        return low, torch.minimum(self.center + around, self.box)

    def within(self, box: Tensor) -> "Region":
        r"""The region of what is within a box as well.

        Arguments:
            box: The largest absolute values, with shape :math:`(P, C)`.
        """
        return replace(self, box=torch.minimum(self.box, box))._meet()

    def _meet(self) -> "Region":
        r"""Lets each description tighten the others."""
        hull = self.center.abs() + self.spread.abs().sum(-1) + self.own
        box = torch.minimum(torch.minimum(self.box, hull), self.ball.unsqueeze(1))
        out = replace(self, box=box, ball=torch.minimum(self.ball, box.norm(dim=1)))
        if out.spread.numel() <= LIMIT:
            return out
        return replace(Region.cube(box), ball=out.ball)

    def linear(
        self, matrix: Tensor, error: Tensor, roundoff: float, factors: float = 0.0
    ) -> "Region":
        r"""The region after :math:`x \mapsto W x`.

        Arguments:
            matrix: The matrix :math:`W`, with shape :math:`(C, C)`.
            error: What the rounding error is relative to, :math:`|W|` for a product.
            roundoff: The relative error of one operation.
            factors: The relative error to which the factors of a product are rounded before.
        """
        slack = self.product_slack(error, roundoff, factors)
        rows = matrix.norm(dim=1) * self.ball.unsqueeze(1)
        return Region(
            box=torch.minimum(self.box @ matrix.abs().T, rows) + slack,
            ball=torch.linalg.matrix_norm(matrix, 2) * self.ball + slack.norm(dim=1),
            center=self.center @ matrix.T,
            spread=matrix @ torch.cat((self.spread, torch.diag_embed(self.own)), dim=-1),
            own=slack,
        )._meet()

    def product_slack(self, error: Tensor, roundoff: float, factors: float = 0.0) -> Tensor:
        r"""How far rounding may move each feature after :meth:`linear`, whose arguments it takes."""
        relative = gamma(error.shape[1] + 3, roundoff)
        relative += factors * (2 + factors) * (1 + relative)
        return relative * (self.box @ error.T)

    def scale(self, factor: Tensor, offset: Tensor, roundoff: float) -> "Region":
        r"""The region after :math:`x_i \mapsto s_i x_i + b_i`.

        Arguments:
            factor: The factors :math:`s`, with shape :math:`(C)`.
            offset: The vector :math:`b`, with shape :math:`(C)`.
            roundoff: The relative error of one operation.
        """
        box = self.box * factor.abs() + offset.abs()
        slack = self.scale_slack(factor, offset, roundoff)
        ball = factor.abs().max() * self.ball + offset.norm()
        return Region(
            box=box + slack,
            ball=ball + slack.norm(dim=1),
            center=self.center * factor + offset,
            spread=self.spread * factor.unsqueeze(-1),
            own=self.own * factor.abs() + slack,
        )._meet()

    def scale_slack(self, factor: Tensor, offset: Tensor, roundoff: float) -> Tensor:
        r"""How far rounding may move each feature after :meth:`scale`, whose arguments it takes."""
        return gamma(6, roundoff) * (self.box * factor.abs() + offset.abs())

    def permute(self, order: Tensor) -> "Region":
        r"""The region after channel `i` is read from channel `order[i]`.

        Arguments:
            order: The indices, with shape :math:`(C)`.
        """
        return replace(
            self,
            box=self.box[:, order],
            center=self.center[:, order],
            spread=self.spread[:, order],
            own=self.own[:, order],
        )

    def elementwise(self, g: Envelope, mask: Tensor, roundoff: float) -> "Region":
        r"""The region after a univariate map of the channels in `mask`.

        Arguments:
            g: What is known of the map.
            mask: The channels that are transformed, with shape :math:`(C)`.
            roundoff: The relative error of one operation.
        """
        grown, slack = self.growth(g, mask, roundoff)
        box = torch.where(mask, grown, self.box) + slack
        if not math.isfinite(g.gain + g.offset + g.floor):
            return Region.cube(box)
        # As vectors, |x| <= offset + max(floor, gain |z|); the second is at most the root of the
        # sum of both squares.
        n = mask.sum().to(self.box)  # not an integer, whose root were of float32
        ball = n.sqrt() * g.offset + ((max(g.gain, 1) * self.ball) ** 2 + n * g.floor**2).sqrt()
        ball = ball + slack.norm(dim=1)
        if math.isinf(g.displacement):
            return replace(Region.cube(box), ball=ball)._meet()
        # A mask times a number were of float32.
        own = self.own + mask.to(self.box) * g.displacement + slack
        return replace(self, box=box, ball=ball, own=own)._meet()

    def growth(self, g: Envelope, mask: Tensor, roundoff: float) -> tuple[Tensor, Tensor]:
        r"""The largest absolute values after :meth:`elementwise`, whose arguments it takes, in
        exact arithmetic, and how far rounding may move them; with shape :math:`(P, C)` each."""
        if g.limit is None:
            grown = g.offset + (g.gain * self.box).clamp(min=g.floor)
        else:
            limits = [g.reach(r) for r in self.box.flatten().tolist()]
            grown = self.box.new_tensor(limits).reshape(self.box.shape)
        return grown, torch.where(mask, gamma(g.roundings, roundoff) * grown, 0.0)

    def join(self, features: int, radius: float) -> "Region":
        r"""The region with further channels of at most `radius`, that depend on anything.

        Arguments:
            features: The number of channels.
            radius: Their largest absolute value.
        """
        shape = (self.box.shape[0], features)
        more = Region.cube(self.box.new_full(shape, radius))
        return Region(
            box=torch.cat((self.box, more.box), dim=1),
            ball=torch.hypot(self.ball, more.ball),
            center=torch.cat((self.center, more.center), dim=1),
            spread=torch.cat(
                (self.spread, self.spread.new_zeros(*shape, self.spread.shape[2])), dim=1
            ),
            own=torch.cat((self.own, more.own), dim=1),
        )

    def unsqueeze(self, factor: int) -> "Region":
        r"""The region after channels are laid out as `factor` × `factor` positions each.

        Arguments:
            factor: The factor in each direction.
        """

        if self.box.shape[1] % factor**2:  # one number stands for all channels
            return Region.cube(self.box.amax(1, keepdim=True))

        def rearrange(t: Tensor) -> Tensor:
            return t.unflatten(1, (-1, factor**2)).transpose(1, 2).flatten(0, 1)

        return Region(
            box=rearrange(self.box),
            ball=self.ball.repeat_interleave(factor**2),
            center=rearrange(self.center),
            spread=rearrange(self.spread),
            own=rearrange(self.own),
        )._meet()


def gamma(operations: int, roundoff: float) -> float:
    r"""Returns the relative error of operations after one another, infinite where there is no bound
    of it (Higham, 2002, lemma 3.1).

    Arguments:
        operations: The number of operations.
        roundoff: The relative error of one.
    """
    share = operations * roundoff
    return share / (1 - share) if share < 1 else math.inf
