r"""Classification of MNIST with infinitely wide networks: a convolutional NNGP beside a perceptron's.

    python benchmarks/kernels_mnist.py --data DIR [--quick] [--images N] [--test N]

Regression on one-hot labels less 1/10, with the exact kernel of the training images: the class is the largest mean. The noise
is chosen from a grid by the leave-one-out squared error, which the training images' inverse gives, and no label of a test
image is seen. All 10,000 images of either part by default. That is 1.2 GB for each network on the disk, and may be
interrupted: finished rows are kept under ``benchmarks/results/kernels_mnist`` (delete them when the kernels change).
Networks have no pooling: a strided convolution quarters the positions and keeps them independent.

Published, with the 60,000 images less 10,000 for validation and a residual network of 32 layers: 0.84 % errors
(Garriga-Alonso, Rasmussen and Aitchison 2019). It isn't comparable: here images are fewer and networks smaller.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import FOLDER, write
from torch import Tensor
from tqdm import tqdm

from bayesnn.processes.architectures import Activation, Convolution, Dense, Flatten, Layer, Repeated, mlp, serial
from bayesnn.processes.kernels import NNGPKernel

NUM_CLASSES = 10
BLOCK = 250  # rows of a kernel that are computed and written at once
NOISES = tuple(10.0**exponent for exponent in range(-5, 1))
"""Variances, in units of the kernel's mean diagonal."""


class Images(NamedTuple):
    """Rows of pixels in [-1, 1], float64, and labels."""

    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor


def load(folder: Path, num_images: int, num_test: int) -> Images:
    """The first images of both parts."""
    with np.load(folder / "classification_images" / "mnist_10k_10k.npz", allow_pickle=False) as file:
        X, X_test = (torch.as_tensor(file[f"{part}_x"]).double().flatten(1) / 127.5 - 1 for part in ("train", "test"))
        y, y_test = (torch.as_tensor(file[f"{part}_y"].astype(np.int64)) for part in ("train", "test"))
    return Images(X[:num_images], y[:num_images], X_test[:num_test], y_test[:num_test])


def convolutions(depth: int = 4) -> Layer:
    """A strided convolution, ``depth`` more, and a readout of all positions; ReLU, at the edge of chaos."""
    first = serial(Convolution(3, 2.0, 0.1, 2), Activation("relu"))
    block = serial(Convolution(3, 2.0, 0.1), Activation("relu"))
    return serial(first, Repeated(block, depth), Flatten(), Dense(1.0, 0.0))


def networks() -> dict[str, NNGPKernel]:
    """The kernels that are compared."""
    return {
        "NNGP, perceptron of 3 hidden layers": NNGPKernel(architecture=mlp(3, "relu")).double(),
        "NNGP, 5 convolutions": NNGPKernel(architecture=convolutions(), input_shape=(1, 28, 28)).double(),
    }


class Blocks:
    """Rows of a kernel's matrices, block by block, each written to a file once it is computed: an interrupted run goes on.

    Args:
        kernel: what is evaluated.
        name: of the files, under ``benchmarks/results/kernels_mnist``.
    """

    def __init__(self, kernel: NNGPKernel, name: str) -> None:
        self.kernel, self.seconds = kernel, 0.0
        self.folder = FOLDER / "results" / "kernels_mnist" / name
        self.folder.mkdir(parents=True, exist_ok=True)

    def rows(self, part: str, first: Tensor, second: Tensor) -> Tensor:
        """k(first, second), both at most a few hundred rows by all."""
        path = self.folder / f"{part}_{len(first)}_{len(second)}.npz"
        if not path.exists():
            start = time.perf_counter()
            with torch.no_grad():
                found = self.kernel(first, second).to_dense()
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, rows=found.numpy(), seconds=time.perf_counter() - start)
            partial.rename(path)
        with np.load(path, allow_pickle=False) as file:
            self.seconds += float(file["seconds"])
            return torch.as_tensor(file["rows"])

    def train(self, X: Tensor) -> Tensor:
        """k(X, X): its lower triangle is computed, mirrored."""
        matrix = X.new_zeros(len(X), len(X))
        for start in tqdm(range(0, len(X), BLOCK), desc="training images"):
            stop = min(start + BLOCK, len(X))
            rows = self.rows(f"train_{start}", X[start:stop], X[:stop])
            matrix[start:stop, :stop] = rows
            matrix[:stop, start:stop] = rows.T
        return matrix

    def test(self, X_test: Tensor, X: Tensor, coefficients: Tensor) -> Tensor:
        """k(X_test, X) times the coefficients."""
        parts = enumerate(tqdm(X_test.split(BLOCK), desc="test images"))
        return torch.cat([self.rows(f"test_{index}", part, X) @ coefficients for index, part in parts])


def leave_one_out(eigenvalues: Tensor, eigenvectors: Tensor, Y: Tensor, noise: float) -> float:
    r"""Mean squared error of the means without each row, :math:`(\Sigma^{-1} Y)_i / \Sigma^{-1}_{ii}`."""
    weighted = eigenvectors / (eigenvalues + noise)
    return float((weighted @ (eigenvectors.T @ Y) / (weighted * eigenvectors).sum(-1, keepdim=True)).square().mean())


def classify(kernel: NNGPKernel, images: Images, name: str) -> dict[str, Any]:
    """Fit and predict; accuracy, its standard error over test images, the noise, and seconds on the clock."""
    blocks = Blocks(kernel, name)
    matrix = blocks.train(images.X)
    of_blocks, start = blocks.seconds, time.perf_counter()
    unit = float(matrix.diagonal().mean())
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    Y = torch.nn.functional.one_hot(images.y, NUM_CLASSES).double() - 1 / NUM_CLASSES
    errors = {noise: leave_one_out(eigenvalues, eigenvectors, Y, noise * unit) for noise in NOISES}
    noise = min(errors, key=errors.__getitem__)
    coefficients = eigenvectors @ ((eigenvectors.T @ Y) / (eigenvalues + noise * unit).unsqueeze(-1))
    fit_seconds = of_blocks + time.perf_counter() - start
    mean = blocks.test(images.X_test, images.X, coefficients)
    accuracy = float((mean.argmax(-1) == images.y_test).double().mean())
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / len(images.y_test)),
        "noise": noise,
        "fit_seconds": fit_seconds,
        "predict_seconds": blocks.seconds - of_blocks,
    }


def main() -> None:
    """Run the benchmark; the peer of a convolutional network is the perceptron."""
    parser = argparse.ArgumentParser(description="MNIST with infinitely wide networks.")
    parser.add_argument("--data", type=Path, required=True, help="folder with classification_images/")
    parser.add_argument("--quick", action="store_true", help="500 training and 500 test images")
    parser.add_argument("--images", type=int, default=10_000, help="training images, at most 10,000")
    parser.add_argument("--test", type=int, default=10_000, help="test images, at most 10,000")
    options = parser.parse_args()
    num_images, num_test = (500, 500) if options.quick else (options.images, options.test)
    images = load(options.data, num_images, num_test)
    found = {}
    for name, kernel in networks().items():
        found[name] = classify(kernel, images, "".join(c for c in name if c.isalnum()))
        print(name, found[name], flush=True)
    reference = next(iter(found))
    rows = [
        {
            "case": f"{num_images} of MNIST's images, {name}",
            "metric": "accuracy",
            "unit": "share of test images",
            "ours": values["accuracy"],
            "peer": found[reference]["accuracy"],
            "peer_name": f"ours, {reference}",
            "ratio": (1 - found[reference]["accuracy"]) / (1 - values["accuracy"]),
            "better": "higher",
            "num_test": num_test,
            **values,
        }
        for name, values in found.items()
    ]
    write("kernels_mnist", rows, {}, ratio="of error rates: above 1 means fewer errors than the peer")


if __name__ == "__main__":
    main()
