"""numpyro's NUTS on a regression set: each line is a file to write function values to; the answer is the seconds it took."""

import json
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

numpyro.enable_x64()
settings = json.loads(sys.argv[1])
data = np.load(settings["data"], allow_pickle=False)
X, Y, points = data["X"], data["Y"], data["points"]
WIDTHS = [X.shape[1], 50, 1]


def network(weights, X):
    """One hidden layer of tanh."""
    hidden = jnp.tanh(X @ weights["w0"] + weights["b0"])
    return hidden @ weights["w1"] + weights["b1"]


def model(X, Y):
    """The same target as ours."""
    weights = {}
    for index in range(2):
        fan_in, fan_out = WIDTHS[index : index + 2]
        scale = np.sqrt(2 / fan_in)
        weights[f"w{index}"] = numpyro.sample(f"w{index}", dist.Normal(0, scale).expand([fan_in, fan_out]).to_event(2))
        weights[f"b{index}"] = numpyro.sample(f"b{index}", dist.Normal(0, 1).expand([fan_out]).to_event(1))
    log_std = numpyro.sample("noise_log_std", dist.Normal(np.log(0.3), 1.5))
    numpyro.sample("y", dist.Normal(network(weights, X), jnp.exp(log_std)).to_event(2), obs=Y)


mcmc = MCMC(
    NUTS(model, max_tree_depth=settings["max_depth"]),
    num_warmup=settings["num_warmup"],
    num_samples=settings["num_draws"],
    num_chains=settings["num_chains"],
    chain_method="vectorized",
    progress_bar=False,
)
predict = jax.jit(jax.vmap(jax.vmap(network, in_axes=(0, None)), in_axes=(0, None)))
# With as many steps, so that what is compiled here is what runs below.
mcmc.run(jax.random.PRNGKey(0), X, Y)
print(json.dumps({name: version(name) for name in ("numpyro", "jax", "jaxlib")}), flush=True)
for seed, line in enumerate(sys.stdin):
    start = time.perf_counter()
    mcmc.run(jax.random.PRNGKey(seed + 1), X, Y)
    weights = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    elapsed = time.perf_counter() - start
    np.save(line.strip(), np.asarray(predict(weights, points))[..., 0])
    print(elapsed, flush=True)
