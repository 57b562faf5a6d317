"""The peer's side of the speed of kernels: neural-tangents' kernels, each compiled before it is timed."""

import functools
import json
import sys
import time
from importlib.metadata import version

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

# The script's own folder comes first where Python looks for modules, and a script there is named as the package is.
sys.path = [path for path in sys.path if not path.endswith("peers")]

from neural_tangents import stax  # noqa: E402


def perceptron(weight_var, bias_var):
    """Three hidden ReLU layers."""
    dense = functools.partial(stax.Dense, 1, jnp.sqrt(weight_var), jnp.sqrt(bias_var))
    return stax.serial(*(layer() for _ in range(3) for layer in (dense, stax.Relu)), dense())[2]


def convolutions(weight_var, bias_var):
    """Three convolutions with ReLU, then a readout of all positions."""
    stds = jnp.sqrt(weight_var), jnp.sqrt(bias_var)
    layers = [layer for _ in range(3) for layer in (stax.Conv(1, (3, 3), (1, 1), "SAME", *stds), stax.Relu())]
    return stax.serial(*layers, stax.Flatten(), stax.Dense(1, *stds))[2]


def prepare(case):
    """What is timed, compiled: the kernel, or with it the gradient of its weighted sum; and values to compare."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((case["n"], *case["shape"]))
    x = jnp.asarray(np.moveaxis(x, 1, -1))
    weights = jnp.asarray(rng.standard_normal((case["n"], case["n"])))
    network = perceptron if len(case["shape"]) == 1 else convolutions
    variances = jnp.array([case["weight_var"], case["bias_var"]])

    def kernel(x, variances):
        return network(*variances)(x, None, case["kernel"])

    if case["gradient"]:

        def matrix_and_gradient(variances, x, weights):
            matrix, pull = jax.vjp(lambda variances: kernel(x, variances), variances)
            return matrix, pull(weights)[0]

        run = functools.partial(jax.jit(matrix_and_gradient), variances, x, weights)
        matrix, gradient = run()
        return run, [float((matrix * weights).sum()), *gradient.tolist()]
    # Variances that are numbers when it is compiled, as users have them.
    run = functools.partial(jax.jit(lambda x: kernel(x, (case["weight_var"], case["bias_var"]))), x)
    return run, [float((jax.block_until_ready(run()) * weights).sum())]


print(json.dumps({name: version(name) for name in ("neural-tangents", "jax", "jaxlib")}), flush=True)
run = None
for line in sys.stdin:
    if line.strip() == "run":
        start, start_cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        print(json.dumps([time.perf_counter() - start, time.process_time() - start_cpu]), flush=True)
    else:
        run, check = prepare(json.loads(line))
        print(json.dumps(check), flush=True)
