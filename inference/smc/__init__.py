"""Sequential Monte Carlo: particles that move from the prior to the posterior, and the evidence on the way."""

from bayesnn.inference.smc.tempering import SMC

__all__ = ["SMC"]
