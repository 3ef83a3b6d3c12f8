r"""What a migration tells."""

__all__ = ["Migration", "Replacement", "SampleError"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from flowguard.bounds.certificate import Certificate


@dataclass(frozen=True)
class Replacement:
    r"""A layer that was replaced.

    Arguments:
        name: The name of the layer within the model.
        before: What it was.
        after: What it is.
        error: The root mean square error of the imitation on the calibration batch, in standard
            deviations of the layer's output; NaN without one.
        ladj_error: The mean absolute error of the logarithm of its slope; NaN without one.
        cut: The share of the rows at which it does not follow, outliers apart; NaN without
            calibration data.

    Example:
        >>> print(Replacement("layer", "an affine map", "a spline", error=0.01, ladj_error=0.002))
        layer: an affine map -> a spline, error 0.01 (log-slope 0.002)
    """

    name: str
    before: str
    after: str
    error: float
    ladj_error: float
    cut: float = math.nan

    def __str__(self) -> str:
        told = f"{self.name}: {self.before} -> {self.after}"
        if self.error == self.error:
            told += f", error {self.error:.3g} (log-slope {self.ladj_error:.3g})"
        return f"{told}, {self.cut:.2%} of the rows cut" if self.cut > 0 else told


class SampleError(NamedTuple):
    r"""How far the samples of two flows are apart for the same noise and contexts.

    The noise is what the old flow makes of the calibration data, paired with other contexts. The
    distances are those of single features, in their standard deviations over the data, where the
    old flow itself stays within ten of these.

    Arguments:
        median: The median distance.
        q99: The distance that one in a hundred exceeds.
        exploded: The share of samples that the old flow takes farther, which are left out.

    Example:
        >>> error = SampleError(median=0.001, q99=0.02, exploded=0.0)
        >>> f"1 in 100 moved by more than {error.q99} standard deviations"
        '1 in 100 moved by more than 0.02 standard deviations'
    """

    median: float
    q99: float
    exploded: float


@dataclass(frozen=True)
class Migration:
    r"""The report of a migration. It prints as a table.

    Arguments:
        replaced: The layers that were replaced.
        kept: The names of the layers that were not.
        nll_before: The negative log-likelihood of the given pairs before, in nats; outliers do not
            count.
        nll_swapped: The same after the layers were replaced.
        nll_after: The same after fine-tuning; :py:`None` without.
        certificate_before: The certificate before; see :func:`flowguard.certify`.
        certificate_after: The certificate after.
        reasons: Why layers were kept, for the names in `kept` of which the adapter tells.
        sample_error: How far samples moved when the layers were replaced, before fine-tuning;
            :py:`None` where the adapter cannot tell.
        dry_run: Whether nothing of this was done to the model.
        outliers: The share of the given pairs that the old flow finds absurd, which were left out
            of everything; see :func:`flowguard.migrate`.
        cut: The share of the given pairs that the new flow does not follow: the outliers, and those
            whose log-density moved by more than a hundredth when the layers were replaced.
        hooked: The names of the modules with hooks of torch's, which went over to the new model.

    Example:
        >>> import zuko
        >>> flow = zuko.flows.MAF(2, 1, transforms=1, hidden_features=[8])
        >>> robust, report = flowguard.migrate(flow, torch.randn(256, 2), torch.randn(256, 1))
        >>> [layer.name for layer in report.replaced], report.kept
        (['transform.transforms.0'], ())
        >>> report.certificate_before.certified, report.certificate_after.certified
        (False, True)
        >>> abs(report.nll_swapped - report.nll_before) < 1e-3
        True
    """

    replaced: tuple[Replacement, ...]
    kept: tuple[str, ...]
    nll_before: float | None
    nll_swapped: float | None
    nll_after: float | None
    certificate_before: Certificate
    certificate_after: Certificate | None
    reasons: Mapping[str, str] = field(default_factory=dict)
    sample_error: SampleError | None = None
    dry_run: bool = False
    outliers: float = 0.0
    cut: float = 0.0
    hooked: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = ["dry run: the model was left as it is"] if self.dry_run else []
        if not self.replaced:
            lines.append("nothing to replace: no layer of this model can be made robust")
        lines += map(str, self.replaced)
        for name in self.kept:
            why = self.reasons.get(name)
            lines.append(f"{name}: kept" + (f", {why}" if why else ""))
        if self.hooked:
            lines.append(
                f"hooks are kept on {', '.join(self.hooked)}: what they change is not bounded, and"
                " no certificate covers it"
            )
        if self.sample_error is not None and self.replaced:
            median, q99, exploded = self.sample_error
            moved = f"samples moved by {median:.2g} in the median, 1 in 100 by more than {q99:.2g}"
            if exploded > 0:
                moved += f", but for {exploded:.2%} that exploded before"
            lines.append(moved)
        if self.outliers > 0:
            lines.append(
                f"{self.outliers:.2%} of the rows are outliers, far less likely than all others to"
                " the flow: they are left out of the calibration, and of the figures"
            )
        if self.cut > 0:
            lines.append(f"{self.cut:.2%} of the rows are cut: the new flow does not follow there")
        if self.nll_before is not None:
            nll = f"NLL {self.nll_before:.4f} nats before"
            if self.replaced:
                nll += f", {self.nll_swapped:.4f} with the new layers"
            if self.nll_after is not None:
                nll += f", {self.nll_after:.4f} after fine-tuning"
            lines.append(nll)
        lines.append(f"before: {_told(self.certificate_before)}")
        if self.certificate_after is not None:
            lines.append(f"after: {_told(self.certificate_after)}")
        return "\n".join(lines)


def _told(certificate: Certificate) -> str:
    if certificate.certified:
        return f"certified, |x| <= {certificate.bound(4.0):.4g} for noise up to 4"
    names = [step.name or step.kind for step in certificate.refused]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"not certified, because of {', '.join(names[:2])}{more}"
