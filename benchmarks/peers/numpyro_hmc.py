"""The peer's side of the HMC benchmark; runs in an environment with numpyro, started by ``benchmarks/hmc.py``."""

import json
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import HMC, MCMC

numpyro.enable_x64()
settings = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
X = rng.standard_normal((settings["num_rows"], 6))
Y = np.sin(X[:, :1]) + 0.5 * X[:, 1:2] * X[:, 2:3] + 0.1 * rng.standard_normal((settings["num_rows"], 1))


def model(X, Y):
    hidden = X
    for index, (fan_in, fan_out) in enumerate([(6, 50), (50, 50), (50, 1)]):
        weight = numpyro.sample(f"w{index}", dist.Normal(0, 1).expand([fan_in, fan_out]).to_event(2))
        bias = numpyro.sample(f"b{index}", dist.Normal(0, 1).expand([fan_out]).to_event(1))
        hidden = hidden @ weight + bias
        hidden = jnp.tanh(hidden) if index < 2 else hidden
    numpyro.sample("y", dist.Normal(hidden, 0.1).to_event(2), obs=Y)


kernel = HMC(
    model,
    step_size=settings["step_size"],
    trajectory_length=settings["step_size"] * settings["num_leapfrog"],
    adapt_step_size=False,
    adapt_mass_matrix=False,
)
mcmc = MCMC(
    kernel,
    num_warmup=0,
    num_samples=settings["num_draws"],
    num_chains=settings["num_chains"],
    chain_method="vectorized",
    progress_bar=False,
)


def run(seed):
    mcmc.run(jax.random.PRNGKey(seed), X, Y, extra_fields=("num_steps",))
    jax.block_until_ready(mcmc.get_samples())


run(0)
steps = np.unique(np.asarray(mcmc.get_extra_fields()["num_steps"]))
assert list(steps) == [settings["num_leapfrog"]], steps
run(1)
print(json.dumps({name: version(name) for name in ("numpyro", "jax", "jaxlib")}), flush=True)
for index, _ in enumerate(sys.stdin):
    start = time.perf_counter()
    run(2 + index)
    print(time.perf_counter() - start, flush=True)
