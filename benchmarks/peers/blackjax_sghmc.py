"""The peer's side of the SG-MCMC benchmark: blackjax's SGHMC in a compiled scan; started by ``benchmarks/sgmcmc.py``."""

import json
import sys
import time
from importlib.metadata import version

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

settings = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
CONV = settings["network"] == "conv"
if CONV:
    X = rng.standard_normal((settings["num_rows"], 1, 8, 8)).astype("float32")
    Y = rng.integers(0, 10, settings["num_rows"])
    SHAPES = [(8, 1, 3, 3), (8,), (16, 8, 3, 3), (16,), (10, 256), (10,)]
else:
    X = rng.standard_normal((settings["num_rows"], 8)).astype("float32")
    Y = np.sin(X[:, :1])
    SHAPES = [(50, 8), (50,), (50, 50), (50,), (1, 50), (1,)]
X, Y = jnp.asarray(X), jnp.asarray(Y)


def conv(x, weight, bias, stride):
    """As torch's conv2d with padding 1."""
    out = jax.lax.conv_general_dilated(x[None], weight, (stride, stride), [(1, 1), (1, 1)])
    return out[0] + bias[:, None, None]


def log_likelihood(position, row):
    """log p(y | x) of one row, as ours."""
    x, y = row
    w1, b1, w2, b2, w3, b3 = position
    if CONV:
        hidden = jax.nn.relu(conv(x, w1, b1, 1))
        hidden = jax.nn.relu(conv(hidden, w2, b2, 2)).reshape(-1)
        return jax.nn.log_softmax(w3 @ hidden + b3)[y]
    hidden = jax.nn.relu(w1 @ x + b1)
    hidden = jax.nn.relu(w2 @ hidden + b2)
    return -50.0 * jnp.sum((y - w3 @ hidden - b3) ** 2)


def log_prior(position):
    """Standard normal."""
    return -0.5 * sum(jnp.sum(values**2) for values in position)


gradient = blackjax.sgmcmc.gradients.grad_estimator(log_prior, log_likelihood, len(X))
# Ten gradient steps for each momentum, its default: the fewer momenta are drawn, the faster it is.
sghmc = blackjax.sghmc(gradient, num_integration_steps=10)
step_chains = jax.vmap(sghmc.step, in_axes=(0, 0, None, None))
key = jax.random.PRNGKey(0)
chains = settings["num_chains"]
positions = [jnp.asarray(rng.standard_normal((chains, *shape)).astype("float32") * 0.1) for shape in SHAPES]


@jax.jit
def sample(key, positions):
    """All steps of a run, compiled; ten gradients with each minibatch, which all chains share as ours do."""

    def body(positions, key):
        batch_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(batch_key, (settings["batch_size"],), 0, len(X))
        keys = jax.random.split(noise_key, chains)
        positions = step_chains(keys, positions, (X[rows], Y[rows]), settings["step_size"])
        return positions, None

    return jax.lax.scan(body, positions, jax.random.split(key, settings["num_steps"] // 10))[0]


jax.block_until_ready(sample(key, positions))
print(json.dumps({name: version(name) for name in ("blackjax", "jax", "jaxlib")}), flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    jax.block_until_ready(sample(key, positions))
    print(time.perf_counter() - start, flush=True)
