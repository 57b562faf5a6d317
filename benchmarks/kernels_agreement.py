"""Infinite-width kernels of every layer against neural-tangents', in float64: the largest relative difference.

    python benchmarks/kernels_agreement.py

The peer runs in an environment of its own, with a JAX that it still supports. Both sides get the same random inputs and the
same description of an architecture; differences are relative to the root of the two variances (of the two tangent kernels of
an input with itself), so that entries near zero count as the others do.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from harness import peer_python
from peer import Peer
from torch import Tensor

from bayesnn.processes.architectures import (
    Activation,
    Aggregate,
    AveragePooling,
    Concatenation,
    Convolution,
    Covariance,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePooling,
    GlobalSumPooling,
    Layer,
    LayerNorm,
    PositionalEncoding,
    Repeated,
    SelfAttention,
    SumPooling,
    needs_pairs,
    of_each_with_itself,
    of_inputs,
    residual,
    serial,
    with_adjacency,
)
from bayesnn.processes.dual_activations import RBF, Cos, Gaussian, LeakyReLU, Sin, dual_activation

REQUIREMENTS = ["neural-tangents==0.6.5", "jax==0.4.30", "jaxlib==0.4.30", "numpy<2"]
WANTED = 1e-10
VECTOR, SEQUENCE, IMAGE, GRAPH = (5,), (3, 7), (2, 6, 5), (3, 5)
RELU = Activation("relu")
DENSE, READOUT, CONVOLUTION = Dense(1.7, 0.2), Dense(1.3, 0.1), Convolution(3, 1.6, 0.1)


def cases() -> dict[str, tuple[tuple[int, ...], Layer]]:
    """Shapes of inputs, and architectures."""
    found: dict[str, tuple[tuple[int, ...], Layer]] = {"dense": (VECTOR, DENSE)}
    activations = [
        "relu",
        LeakyReLU(0.3),
        "abs",
        "erf",
        "gelu",
        Sin(1.2, 0.7, 0.4),
        Cos(0.8, 1.1, 0.2),
        "exp",
        RBF(0.6),
    ]
    for function in [*activations, Gaussian(-0.7)]:
        dual = dual_activation(function)
        found[f"dense, {dual.name}"] = (VECTOR, serial(DENSE, Activation(dual), READOUT))
    found |= {
        "3 hidden layers, relu": (VECTOR, serial(Repeated(serial(DENSE, RELU), 3), READOUT)),
        "100 hidden layers, erf": (VECTOR, serial(Repeated(serial(DENSE, Activation("erf")), 100), READOUT)),
        "layer norm": (VECTOR, serial(DENSE, LayerNorm(), RELU, READOUT)),
        "dropout": (VECTOR, serial(DENSE, RELU, Dropout(0.7), DENSE, RELU, READOUT)),
        "residual": (VECTOR, serial(DENSE, Repeated(residual(RELU, DENSE), 4), RELU, READOUT)),
        "concatenation": (
            VECTOR,
            serial(DENSE, Concatenation((serial(RELU, DENSE), serial(RELU, READOUT))), DENSE, RELU, READOUT),
        ),
    }
    for padding in ("same", "valid", "circular"):
        for name, shape in (("1-D", SEQUENCE), ("2-D", IMAGE)):
            for stride in (1, 2):
                strided = Convolution(3, 1.6, 0.1, stride, padding)  # type: ignore[arg-type]
                end = serial(RELU, Convolution(2, 1.2, 0.2), RELU)
                key = f"{name} convolution, {padding}, stride {stride}"
                found[f"{key}, flatten"] = (shape, serial(strided, end, Flatten(), READOUT))
                found[f"{key}, global average"] = (shape, serial(strided, end, GlobalAveragePooling(), READOUT))
        for pooling in (AveragePooling(2, 1, padding), SumPooling(3, 2, padding)):  # type: ignore[arg-type]
            if padding != "circular":  # the peer's pooling has none
                key = f"{type(pooling).__name__}, {padding}"
                found[key] = (IMAGE, serial(CONVOLUTION, RELU, pooling, CONVOLUTION, RELU, Flatten(), READOUT))
    attention = SelfAttention(1.4, 0.1, 1.2)
    found |= {
        "sizes that differ": (
            IMAGE,
            serial(Convolution((3, 2), 1.6, 0.1, (2, 1)), RELU, AveragePooling((3, 1)), Flatten()),
        ),
        "global sum": (IMAGE, serial(CONVOLUTION, RELU, GlobalSumPooling(), READOUT)),
        "attention, 1-D": (SEQUENCE, serial(DENSE, attention, RELU, Flatten(), READOUT)),
        "attention, 2-D": (IMAGE, serial(CONVOLUTION, RELU, attention, RELU, GlobalAveragePooling(), READOUT)),
        "attention, positions": (
            SEQUENCE,
            serial(DENSE, PositionalEncoding(0.6), attention, RELU, GlobalAveragePooling(), READOUT),
        ),
        "attention, correlated positions": (
            IMAGE,
            serial(DENSE, PositionalEncoding(0.6, 1.5), attention, RELU, Flatten(), READOUT),
        ),
        "graphs": (
            GRAPH,
            serial(Repeated(serial(Aggregate(), DENSE, RELU), 2), Aggregate(), GlobalAveragePooling(), READOUT),
        ),
        "ResNet": (
            IMAGE,
            serial(
                CONVOLUTION,
                Repeated(residual(RELU, CONVOLUTION, LayerNorm(), RELU, CONVOLUTION), 2),
                AveragePooling(2),
                residual(LayerNorm(), attention),
                residual(LayerNorm(), RELU, Dropout(0.8), DENSE),
                Concatenation((serial(RELU, CONVOLUTION), serial(RELU, Convolution(1, 0.7, 0.3)))),
                DENSE,
                RELU,
                GlobalAveragePooling(),
                READOUT,
            ),
        ),
    }
    return found


def described(layer: Any) -> Any:
    """A layer as JSON, all fields included."""
    if isinstance(layer, Activation):
        dual = dual_activation(layer.function)
        return {"layer": "Activation", "function": dual.name, "options": dataclasses.asdict(dual)}  # type: ignore[call-overload]
    if isinstance(layer, Layer):
        fields = {field.name: described(getattr(layer, field.name)) for field in dataclasses.fields(layer)}  # type: ignore[arg-type]
        if "layer" in fields:
            fields["layer_"] = fields.pop("layer")
        return {"layer": type(layer).__name__, **fields}
    return [described(each) for each in layer] if isinstance(layer, tuple) else layer


def kernels(
    architecture: Layer, x: list[Tensor], adjacency: list[Tensor] | None
) -> tuple[Covariance, list[Covariance]]:
    """Of both sets of inputs, and of each set with itself."""
    num_positions, pairs = x[0].dim() - 2, needs_pairs(architecture)
    between = of_inputs(x[0], x[1], num_positions, pairs, tangent=True)
    own = [of_each_with_itself(each, num_positions=num_positions, pairs=pairs, tangent=True) for each in x]
    if adjacency is not None:
        between = with_adjacency(between, *adjacency)
        own = [with_adjacency(each, matrices) for each, matrices in zip(own, adjacency, strict=True)]
    values = torch.tensor(architecture.variances(), dtype=torch.float64)
    variances = [(weight_var, bias_var) for weight_var, bias_var in values]
    return architecture.propagate(between, variances), [architecture.propagate(each, variances) for each in own]


def main() -> None:
    """Run the comparison."""
    generator = torch.Generator().manual_seed(0)
    peer = Peer(peer_python("neural_tangents", REQUIREMENTS), "neural_tangents.py", {})
    rows = []
    print(f"{'case':52} {'NNGP':>9} {'itself':>9} {'NTK':>9}")
    for name, (shape, architecture) in cases().items():
        x = [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for n in (3, 4)]
        adjacency = None
        if shape == GRAPH:
            adjacency = [torch.rand(n, shape[1], shape[1], generator=generator, dtype=torch.float64) for n in (3, 4)]
        question = {"architecture": described(architecture), "x1": x[0].tolist(), "x2": x[1].tolist()}
        if adjacency is not None:
            question |= {"adjacency1": adjacency[0].tolist(), "adjacency2": adjacency[1].tolist()}
        theirs = {key: torch.tensor(v, dtype=torch.float64) for key, v in peer.ask(json.dumps(question)).items()}
        ours, (first, second) = kernels(architecture, x, adjacency)
        assert ours.tangent is not None and first.tangent is not None and second.tangent is not None
        scale = (first.first * second.first.mT).sqrt()
        tangent_scale = (first.tangent * second.tangent.mT).sqrt()
        row = {
            "case": name,
            "nngp": _largest((ours.between - theirs["nngp"]) / scale),
            "nngp_itself": _largest(first.first.squeeze(-1) / theirs["nngp of one input"] - 1),
            "ntk": _largest((ours.tangent - theirs["ntk"]) / tangent_scale),
        }
        rows.append(row)
        print(f"{name:52} {row['nngp']:9.1e} {row['nngp_itself']:9.1e} {row['ntk']:9.1e}")
    peer.close()
    errors = [float(row[key]) for row in rows for key in ("nngp", "nngp_itself", "ntk")]
    print(f"largest: {max(errors):.1e}, wanted: {WANTED:.0e}")
    result = {
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, **peer.versions},
        "largest_relative_difference": max(errors),
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "kernels_agreement.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not max(errors) < WANTED:
        raise SystemExit("the kernels differ")


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


if __name__ == "__main__":
    main()
