r"""The guard in front of a conditional flow."""

__all__ = ["GuardedConditionalFlow"]

from typing import Any

import torch.nn as nn
from normflows import ConditionalNormalizingFlow
from torch import Tensor

from flowguard.ood import OODConditioner, OODReport


class GuardedConditionalFlow(ConditionalNormalizingFlow):
    r"""Creates a flow that tells when its context is out of distribution, and may act on it.

    Every method runs the conditioner on the context, which acts by its policy, and hands the
    embedding to the flow: with the policy ``"shrink"``, pulled back to ground that the flow knows.
    Conditioner and flow train together.

    Arguments:
        flow: The flow, such as :class:`normflows.ConditionalNormalizingFlow` or
            :class:`ConditionalMultiscaleFlow`. Its context is what the conditioner's encoder
            returns.
        conditioner: The conditioner; see :class:`flowguard.OODConditioner`.

    Raises:
        TypeError: If the flow is none, or the conditioner another module.

    Example:
        >>> import normflows
        >>> from . import RobustSplineCoupling
        >>> base = normflows.distributions.DiagGaussian(3, trainable=False)
        >>> layers = [RobustSplineCoupling(3, 1, 16, num_context_channels=4)]
        >>> conditioner = flowguard.OODConditioner(nn.Linear(5, 4), policy="report", alpha=0.01)
        >>> flow = normflows.ConditionalNormalizingFlow(base, layers)
        >>> guarded = GuardedConditionalFlow(flow, conditioner)
        >>> y = torch.randn(2048, 5)
        >>> guarded.log_prob(torch.randn(2048, 3), y).shape
        torch.Size([2048])
        >>> _ = guarded.conditioner.fit(y[:1024], progress=False)
        >>> _ = guarded.conditioner.calibrate(y[1024:], progress=False)
        >>> x, log_q = guarded.sample(2, 1000 * y[:2])
        >>> guarded.report.flagged
        tensor([True, True])
    """

    def __init__(self, flow: nn.Module, conditioner: OODConditioner) -> None:
        nn.Module.__init__(self)  # base and layers are those of the flow
        if not isinstance(flow, nn.Module) or not callable(getattr(flow, "log_prob", None)):
            raise TypeError(
                "flow must be a flow that takes a context, such as"
                f" normflows.ConditionalNormalizingFlow(...); got {type(flow).__name__}"
            )
        if not isinstance(conditioner, OODConditioner):
            raise TypeError(
                "conditioner must be a flowguard.OODConditioner;"
                f" got {type(conditioner).__name__}, perhaps an encoder that needs wrapping:"
                " OODConditioner(encoder)"
            )
        self.conditioner = conditioner
        self.flow = flow

    @property
    def q0(self) -> nn.Module:
        r"""The base of the flow."""
        return self.flow.q0  # type: ignore[return-value]

    @property
    def flows(self) -> nn.ModuleList:
        r"""The layers of the flow."""
        return self.flow.flows  # type: ignore[return-value]

    @property
    def p(self) -> Any:
        r"""The target distribution of the flow."""
        return self.flow.p

    @property
    def report(self) -> OODReport | None:
        r"""The report on the contexts of the last call, :py:`None` before any; see
        :attr:`flowguard.OODConditioner.report`."""
        return self.conditioner.report

    def _run(self, method: str, *args: Any, context: Any, **kwargs: Any) -> Any:
        call = self.flow if method == "forward" else getattr(self.flow, method)
        return call(*args, context=self.conditioner(context), **kwargs)

    def forward(self, z: Any, context: Any = None) -> Any:
        r"""Returns what the flow's `forward` returns.

        Arguments:
            z: What the flow takes: noise, or images for a multiscale flow.
            context: The context before its encoder.
        """
        return self._run("forward", z, context=context)

    def forward_and_log_det(self, z: Any, context: Any = None) -> Any:
        r"""Takes noise to data, and returns the log-determinant.

        Arguments:
            z: The noise.
            context: The context before its encoder.
        """
        return self._run("forward_and_log_det", z, context=context)

    def inverse(self, x: Tensor, context: Any = None) -> Any:
        r"""Takes data to noise.

        Arguments:
            x: The data.
            context: The context before its encoder.

        Returns:
            The noise, with the shape that the flow gives.
        """
        return self._run("inverse", x, context=context)

    def inverse_and_log_det(self, x: Tensor, context: Any = None) -> Any:
        r"""Takes data to noise, and returns the log-determinant.

        Arguments:
            x: The data.
            context: The context before its encoder.

        Returns:
            The noise, and the log-determinant, with shape :math:`(N)`.
        """
        return self._run("inverse_and_log_det", x, context=context)

    def sample(
        self, num_samples: int = 1, context: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        r"""Returns samples and their log-density.

        Arguments:
            num_samples: The number of samples. Sample :math:`i` belongs to context
                :math:`i \bmod B`; see :class:`RobustSplineCoupling`.
            context: The context before its encoder.
            kwargs: Keyword arguments passed to the flow, such as the temperature.

        Returns:
            The samples, with the shape that the flow gives, and their log-density in nats, with shape
            :math:`(num\_samples)`.
        """
        return self._run("sample", num_samples, context=context, **kwargs)

    def log_prob(self, x: Tensor, context: Any = None) -> Tensor:
        r"""Returns the log-density of data.

        Arguments:
            x: The data.
            context: The context before its encoder.

        Returns:
            The log-density in nats, with shape :math:`(N)`.
        """
        return self._run("log_prob", x, context=context)

    def forward_kld(self, x: Tensor, context: Any = None) -> Tensor:
        r"""Returns the mean negative log-density, the loss of maximum likelihood.

        Arguments:
            x: The data.
            context: The context before its encoder.

        Returns:
            The loss in nats, with shape :math:`()`.
        """
        return self._run("forward_kld", x, context=context)

    def reverse_kld(
        self,
        num_samples: int = 1,
        context: Any = None,
        beta: float = 1.0,
        score_fn: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        r"""Estimates the reverse Kullback-Leibler divergence to the flow's target, which is given
        the embedding, as the flow is.

        Arguments:
            num_samples: The number of samples; see :meth:`sample`.
            context: The context before its encoder.
            beta: The weight of the target's log-density.
            score_fn: Whether the gradient includes the score function.
            kwargs: Keyword arguments passed to the flow.

        Returns:
            The loss in nats, with shape :math:`()`.
        """
        return self._run(
            "reverse_kld", num_samples, context=context, beta=beta, score_fn=score_fn, **kwargs
        )
