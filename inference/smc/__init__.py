"""Sequential Monte Carlo: particles that move from the prior to the posterior, and the evidence on the way."""
