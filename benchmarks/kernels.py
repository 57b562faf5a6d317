"""Speed and memory of infinite-width kernels, against neural-tangents and BoTorch's ``InfiniteWidthBNNKernel``.

    python benchmarks/kernels.py [--quick]

float64, standard normal inputs, on as many threads as each library takes by default. Perceptrons have 20 inputs and three
hidden ReLU layers; convolutional networks three 3x3 convolutions with ReLU and a readout of all positions, without pooling.
Kernels are of n inputs with themselves. neural-tangents runs in an environment of its own, with a JAX that it still supports,
in a process that stays up; its functions are compiled before they are timed, in turn with ours. Both sides' values are
compared before that, and have to agree.

Times are given twice: seconds on the clock, and processor seconds, the sum over threads, which other work on the machine
disturbs less. Gradients are of a weighted sum of all entries with respect to the weight and bias variances (and for ours the
lengthscale); the matrix is computed with them, as a fit needs it. Memory is the growth of a fresh process's resident memory at
its peak, the result included, in units of one n x n matrix; it is read from where Linux says it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from botorch.models.kernels import InfiniteWidthBNNKernel
from harness import peer_python, row, write
from peer import Peer
from torch import Tensor

from bayesnn.processes.architectures import Activation, Convolution, Dense, Flatten, Layer, Repeated, serial
from bayesnn.processes.kernels import NNGPKernel, NTKKernel
from bayesnn.processes.kernels.infinite_width import InfiniteWidthKernel

REQUIREMENTS = ["neural-tangents==0.6.5", "jax==0.4.30", "jaxlib==0.4.30", "numpy<2"]
WEIGHT_VAR, BIAS_VAR = 2.0, 0.1
NUM_INPUTS, DEPTH = 20, 3
KERNELS = {"nngp": NNGPKernel, "ntk": NTKKernel}
METRICS = (("time", "s"), ("processor time", "s"))

Measured = tuple[float, float]
"""Seconds on the clock, and of the processor."""


def convolutions() -> Layer:
    """Three convolutions with ReLU, then a readout of all positions."""
    block = serial(Convolution(3, WEIGHT_VAR, BIAS_VAR), Activation("relu"))
    return serial(Repeated(block, DEPTH), Flatten(), Dense(WEIGHT_VAR, BIAS_VAR))


def kernel_of(case: dict[str, Any]) -> InfiniteWidthKernel:
    """Our kernel of a case."""
    if len(case["shape"]) == 1:
        kernel = KERNELS[case["kernel"]](depth=DEPTH, activation="relu").double()
    else:
        kernel = KERNELS[case["kernel"]](architecture=convolutions(), input_shape=case["shape"]).double()
    kernel.weight_var, kernel.bias_var = WEIGHT_VAR, BIAS_VAR
    return kernel


def prepare(case: dict[str, Any]) -> tuple[Callable[[], Any], list[float]]:
    """What is timed, and values to compare: the weighted sum of all entries, and its gradients."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((case["n"], *case["shape"]))).flatten(1)
    weights = torch.from_numpy(rng.standard_normal((case["n"], case["n"])))
    kernel = kernel_of(case)
    if not case["gradient"]:
        forward = functools.partial(_forward, kernel, x)
        return forward, [float((forward() * weights).sum())]
    parameters = list(kernel.parameters())

    def value_and_gradient() -> tuple[Tensor, tuple[Tensor, ...]]:
        matrix = kernel(x).to_dense()
        return matrix, torch.autograd.grad(matrix, parameters, weights)

    matrix, gradients = value_and_gradient()
    found = {id(parameter): gradient for parameter, gradient in zip(parameters, gradients, strict=True)}
    values = [float((matrix.detach() * weights).sum())]
    for name in ("weight_var", "bias_var"):
        raw = getattr(kernel, f"raw_{name}")
        (slope,) = torch.autograd.grad(getattr(kernel, name), raw)
        values.append(float(found[id(raw)] / slope))
    return value_and_gradient, values


def botorch_forward(case: dict[str, Any]) -> Callable[[], Tensor]:
    """BoTorch's kernel of the same case."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((case["n"], *case["shape"])))
    kernel = InfiniteWidthBNNKernel(DEPTH).double()
    kernel.weight_var, kernel.bias_var = WEIGHT_VAR, BIAS_VAR
    return functools.partial(_forward, kernel, x)


def _forward(kernel: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = kernel(x).to_dense()
    return result


def measure(function: Callable[[], Any]) -> Measured:
    """How long one call takes."""
    start, start_cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - start_cpu


def in_turn(sides: dict[str, Callable[[], Measured]], repeats: int) -> dict[str, list[Measured]]:
    """All sides one after the other, ``repeats`` times."""
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            found[name].append(side())
    return found


def compare(case: dict[str, Any], peer: Peer, repeats: int) -> list[dict[str, Any]]:
    """Forward, and for perceptrons value and gradient too; then how many times the one the other costs."""
    rows: list[dict[str, Any]] = []
    costs: dict[tuple[bool, str], dict[str, list[float]]] = {}
    for gradient in (False, True) if len(case["shape"]) == 1 else (False,):
        task = case | {"gradient": gradient}
        label = f"{name_of(case)}{', value and gradient' if gradient else ''}"
        ours, values = prepare(task)
        theirs = peer.ask(json.dumps(task))
        # The peer loses half of the digits on the diagonal, where the angle of an input with itself is rounded.
        if not np.allclose(values, theirs, rtol=1e-5):
            raise SystemExit(f"{label}: our values {values} aren't the peer's {theirs}")
        sides: dict[str, Callable[[], Measured]] = {"ours": functools.partial(measure, ours)}
        sides["neural-tangents"] = lambda: tuple(peer.ask("run"))
        if case["kernel"] == "nngp" and not gradient and len(case["shape"]) == 1:
            sides["BoTorch"] = functools.partial(measure, botorch_forward(case))
        in_turn(sides, 1)
        found = in_turn(sides, repeats)
        for index, (metric, unit) in enumerate(METRICS):
            columns = {name: [each[index] for each in times] for name, times in found.items()}
            costs[gradient, metric] = columns
            rows += [
                row(label, metric, unit, columns["ours"], columns[name], name, "lower")
                | {"ratio_of_fastest": min(columns[name]) / min(columns["ours"])}
                for name in columns
                if name != "ours"
            ]
    for metric, _ in METRICS:
        if (True, metric) in costs:
            both, forward = costs[True, metric], costs[False, metric]
            own, other = ([min(both[name]) / min(forward[name])] for name in ("ours", "neural-tangents"))
            name = f"value and gradient, {metric}"
            rows.append(row(name_of(case), name, "forward evaluations", own, other, "neural-tangents", "lower"))
    return rows


def name_of(case: dict[str, Any]) -> str:
    """A case in words."""
    kind = "NTK" if case["kernel"] == "ntk" else "NNGP"
    if len(case["shape"]) == 1:
        return f"{kind}, n = {case['n']}"
    return f"convolutional {kind}, {'x'.join(map(str, case['shape'][1:]))}, n = {case['n']}"


def peak_matrices(case: dict[str, Any]) -> float:
    """The growth of this process's resident memory at its peak during one call, in n x n matrices."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((case["n"], *case["shape"]))).flatten(1)
    kernel = kernel_of(case)
    weights = torch.from_numpy(rng.standard_normal((case["n"], case["n"]))) if case["gradient"] else None
    _forward(kernel, x[:50])
    (kernel(x[:50]).to_dense().sum()).backward()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _resident("VmRSS")
    if weights is None:
        _forward(kernel, x)
    else:
        kernel(x).to_dense().backward(weights)
    return (_resident("VmHWM") - before) / (8 * case["n"] ** 2)


def _resident(name: str) -> int:
    """Bytes: VmRSS, now, or VmHWM, at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def memory_rows(n: int) -> list[dict[str, Any]]:
    """Each in a process of its own; what is compared with is the goal of four matrices."""
    rows = []
    for kernel in KERNELS:
        for gradient in (False, True):
            case = {"n": n, "shape": [NUM_INPUTS], "kernel": kernel, "gradient": gradient}
            command = [sys.executable, "-W", "ignore", __file__, "--memory", json.dumps(case)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            label = f"{name_of(case)}{', gradient' if gradient else ''}"
            rows.append(row(label, "peak memory", "n x n matrices", [float(answer)], [4.0], "goal", "lower"))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller matrices and fewer repeats")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(peak_matrices(json.loads(options.memory)))
        return
    sizes, repeats = ((500, 1000), 3) if options.quick else ((2000, 4000), 7)
    images = [((3, 8, 8), 60), ((1, 28, 28), 20)] if options.quick else [((3, 8, 8), 200), ((1, 28, 28), 100)]
    variances = {"weight_var": WEIGHT_VAR, "bias_var": BIAS_VAR}
    cases = [
        {"n": n, "shape": shape, "kernel": kernel} | variances
        for shape, n in [*(((NUM_INPUTS,), n) for n in sizes), *images]
        for kernel in (KERNELS if math.prod(shape) == NUM_INPUTS else ("nngp",))
    ]
    peer = Peer(peer_python("neural_tangents", REQUIREMENTS), "neural_tangents_speed.py", {})
    rows = [line for case in cases for line in compare(case, peer, repeats)]
    peer.close()
    rows += memory_rows(sizes[-1])
    write("kernels", rows, peer.versions, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
