"""The peer's side of the comparison of kernels: neural-tangents' kernels of the architecture that each line describes."""

import json
import math
import sys
from importlib.metadata import version

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

# The script's own folder comes first where Python looks for modules, and the script is named as the package is.
sys.path = [path for path in sys.path if not path.endswith("peers")]

from neural_tangents import stax  # noqa: E402

ACTIVATIONS = {
    "relu": stax.Relu,
    "leaky_relu": lambda slope=0.01: stax.LeakyRelu(slope),
    "abs": stax.Abs,
    "erf": stax.Erf,
    "gelu": stax.Gelu,
    "sin": lambda amplitude=1.0, frequency=1.0, phase=0.0: stax.Sin(amplitude, frequency, phase),
    "cos": lambda amplitude=1.0, frequency=1.0, phase=0.0: stax.Cos(amplitude, frequency, phase),
    "exp": stax.Exp,
    "gaussian": lambda exponent=-1.0: stax.Gaussian(1.0, exponent),
    "rbf": lambda gamma=1.0: stax.Rbf(gamma),
}


def translate(layer, num_positions, encoding=None):
    """stax's layer, and the number of dimensions of positions after it."""
    kind, options = layer["layer"], dict(layer)
    name = f"_{kind.lower()}"
    if name in globals():
        return globals()[name](options, num_positions)
    if kind == "SelfAttention":
        return attention(options, encoding), num_positions
    raise ValueError(f"no translation of {kind}")


def stds(layer):
    """Standard deviations of weights and biases."""
    return math.sqrt(layer["weight_var"]), math.sqrt(layer["bias_var"]) or None


def sides(value, num_positions):
    """One number for each dimension."""
    return (value,) * num_positions if isinstance(value, int) else tuple(value)


def in_turn(layers, num_positions):
    """One after the other; encodings of positions are part of the attention that follows them."""
    made, encoding = [], None
    for layer in layers:
        if layer["layer"] == "PositionalEncoding":
            encoding = layer
            continue
        translated, num_positions = translate(layer, num_positions, encoding)
        made.append(translated)
        encoding = None
    return stax.serial(*made), num_positions


def _sequential(layer, num_positions):
    return in_turn(layer["layers"], num_positions)


def _repeated(layer, num_positions):
    return in_turn([layer["layer_"]] * layer["times"], num_positions)


def branches(layer, num_positions, combined):
    """Side by side."""
    made = [translate(branch, num_positions) for branch in layer["layers"]]
    both = stax.parallel(*(branch for branch, _ in made))
    return stax.serial(stax.FanOut(len(made)), both, combined), made[0][1]


def _sum(layer, num_positions):
    return branches(layer, num_positions, stax.FanInSum())


def _concatenation(layer, num_positions):
    return branches(layer, num_positions, stax.FanInConcat(-1))


def _identity(layer, num_positions):
    return stax.Identity(), num_positions


def _dense(layer, num_positions):
    W_std, b_std = stds(layer)
    return stax.Dense(1, W_std, b_std), num_positions


def _activation(layer, num_positions):
    return ACTIVATIONS[layer["function"]](**layer["options"]), num_positions


def _layernorm(layer, num_positions):
    return stax.LayerNorm(axis=-1, eps=layer["epsilon"]), num_positions


def _dropout(layer, num_positions):
    return stax.Dropout(layer["keep"], mode="train"), num_positions


def _flatten(layer, num_positions):
    return stax.Flatten(), 0


def _convolution(layer, num_positions):
    W_std, b_std = stds(layer)
    places = "HW"[:num_positions]
    made = stax.Conv(
        1,
        sides(layer["kernel_size"], num_positions),
        sides(layer["stride"], num_positions),
        layer["padding"].upper(),
        W_std,
        b_std,
        (f"N{places}C", f"{places}IO", f"N{places}C"),
    )
    return made, num_positions


def pooling(layer, num_positions, pool):
    """Over windows, in strides of their size by default."""
    stride = layer["size"] if layer["stride"] is None else layer["stride"]
    return pool(
        sides(layer["size"], num_positions), sides(stride, num_positions), layer["padding"].upper()
    ), num_positions


def _averagepooling(layer, num_positions):
    return pooling(layer, num_positions, stax.AvgPool)


def _sumpooling(layer, num_positions):
    return pooling(layer, num_positions, stax.SumPool)


def _globalaveragepooling(layer, num_positions):
    return stax.GlobalAvgPool(), 0


def _globalsumpooling(layer, num_positions):
    return stax.GlobalSumPool(), 0


def _aggregate(layer, num_positions):
    return stax.Aggregate(aggregate_axis=1), num_positions


def attention(layer, encoding):
    """With equal weights for keys and queries, and encodings of positions added to its inputs."""
    W_std, b_std = stds(layer)
    key_std = math.sqrt(layer["key_var"])
    positions = {}
    if encoding is not None:
        lengthscale = encoding["lengthscale"]
        decay = None if lengthscale is None else lambda distance: jnp.exp(-distance / (2 * lengthscale**2))
        positions = {
            "pos_emb_type": "SUM",
            "pos_emb_decay_fn": decay,
            "W_pos_emb_std": math.sqrt(encoding["variance"]),
            "val_pos_emb": True,
        }
    return stax.GlobalSelfAttention(
        1,
        n_chan_key=1,
        n_chan_val=1,
        n_heads=1,
        linear_scaling=True,
        W_key_std=key_std,
        W_query_std=key_std,
        W_out_std=W_std,
        b_std=b_std,
        **positions,
    )


def kernels(case):
    """NNGP and NTK of all pairs of two sets of inputs, and the NNGP of one with itself."""
    x1, x2 = (jnp.moveaxis(jnp.array(case[name]), 1, -1) for name in ("x1", "x2"))
    (_, _, kernel), _ = translate(case["architecture"], x1.ndim - 2)
    patterns = {}
    if "adjacency1" in case:  # edges go from the first index to the second
        patterns = {"pattern": tuple(jnp.swapaxes(jnp.array(case[f"adjacency{i}"]), 1, 2) for i in (1, 2))}
    nngp, ntk = kernel(x1, x2, ("nngp", "ntk"), **patterns)
    if patterns:
        patterns = {"pattern": (patterns["pattern"][0], patterns["pattern"][0])}
    own = jnp.diagonal(kernel(x1, None, "nngp", **patterns))
    return {name: np.asarray(v).tolist() for name, v in (("nngp", nngp), ("ntk", ntk), ("nngp of one input", own))}


print(json.dumps({name: version(name) for name in ("neural-tangents", "jax", "jaxlib")}), flush=True)
for line in sys.stdin:
    print(json.dumps(kernels(json.loads(line))), flush=True)
