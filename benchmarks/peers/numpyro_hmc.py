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
    """The same target as ours."""
    hidden = X
    for index, (fan_in, fan_out) in enumerate([(6, 50), (50, 50), (50, 1)]):
        weight = numpyro.sample(f"w{index}", dist.Normal(0, 1).expand([fan_in, fan_out]).to_event(2))
        bias = numpyro.sample(f"b{index}", dist.Normal(0, 1).expand([fan_out]).to_event(1))
        hidden = hidden @ weight + bias
        hidden = jnp.tanh(hidden) if index < 2 else hidden
    numpyro.sample("y", dist.Normal(hidden, 0.1).to_event(2), obs=Y)


def make_kernel():
    """HMC with a fixed step size and path, without adaptation."""
    return HMC(
        model,
        step_size=settings["step_size"],
        trajectory_length=settings["step_size"] * settings["num_leapfrog"],
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )


kernel = make_kernel()
# The kernel's own steps inside one compiled loop, as MCMC(chain_method="vectorized") runs them. MCMC.run itself would
# trace and compile again at every call, for seconds, which is not what is compared.
keys = jax.random.split(jax.random.PRNGKey(0), settings["num_chains"])
state = kernel.init(keys, 0, None, model_args=(X, Y), model_kwargs={})


@jax.jit
def draws(state):
    """All steps of one run, compiled."""

    def step(state, _):
        state = kernel.sample(state, (X, Y), {})
        return state, (state.z, state.num_steps)

    return jax.lax.scan(step, state, None, length=settings["num_draws"])


def run():
    """One run, going on from the last; the numbers of leapfrog steps."""
    global state
    state, (_, num_steps) = jax.block_until_ready(draws(state))
    return num_steps


def call():
    """What a user types; it traces and compiles again at every call."""
    mcmc = MCMC(
        make_kernel(),
        num_warmup=0,
        num_samples=settings["num_draws"],
        num_chains=settings["num_chains"],
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(1), X, Y)
    jax.block_until_ready(mcmc.get_samples())


steps = np.unique(np.asarray(run()))
assert list(steps) == [settings["num_leapfrog"]], steps
print(json.dumps({name: version(name) for name in ("numpyro", "jax", "jaxlib")}), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    {"loop": run, "call": call}[line.strip()]()
    print(time.perf_counter() - start, flush=True)
