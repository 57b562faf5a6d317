r"""Why a prior-data fitted network should look at near rows only: squared bias and variance as data grow.

    python benchmarks/localisation.py [--quick]

A network answers with the posterior predictive under its prior, whatever the truth. Here the truth lies outside:
functions with a kink, with a jump and with fast waves,
:math:`|\sin 3x|`, a step and :math:`\sin 12 x`, on inputs uniform over (-1.7, 1.7), noise of standard deviation 0.2. For
each number of rows n, many data sets are drawn; the prediction's mean at 64 queries is compared with the truth: its squared
bias (of the mean over data sets, corrected for its own variance) and its variance, both averaged over queries. ``all rows``
is a shipped "gp-small", beyond the 100 rows that it was trained on too; ``localised`` restricts it to the
:math:`k = 4 \sqrt n` rows nearest to each query, 100 at most.

Nagler, Statistical foundations of prior-data fitted networks (ICML 2023), shows that the variance vanishes for both, and the
bias for the localised one alone, unless the network itself looks at near rows only as n grows. There are two networks: the
neural process sums up all rows in one vector, which can't do that; the transformer's attention looks from far to near, and
does so in part.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from harness import write
from torch import Tensor

from bayesnn.inference.amortized import PFN
from bayesnn.inference.amortized.model import AmortizedModel
from bayesnn.processes.neural import ConditionalNeuralProcess

NOISE_STD, NUM_QUERIES, MOST = 0.2, 64, 100
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NETWORKS: dict[str, Callable[..., AmortizedModel]] = {"neural process": ConditionalNeuralProcess, "transformer": PFN}
TRUTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "kink": lambda x: (3 * x).sin().abs(),
    "jump": lambda x: (x > 0.4).to(x),
    "waves": lambda x: (12 * x).sin(),
}


def neighbours(n: int) -> int:
    """k."""
    return min(MOST, n, round(4 * math.sqrt(n)))


def predictions(make: Callable[[], AmortizedModel], truth: Callable[[Tensor], Tensor], n: int, repeats: int) -> Tensor:
    """Means (repeats, queries) over data sets that are the same for all models."""
    query = torch.linspace(-1.6, 1.6, NUM_QUERIES, dtype=torch.float64)[:, None]
    found = []
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        X = 3.4 * torch.rand(n, 1, generator=generator).double() - 1.7
        y = truth(X) + NOISE_STD * torch.randn(n, 1, generator=generator).double()
        found.append(make().fit(X, y).predict(query).mean.squeeze(-1))
    return torch.stack(found)


def measured(means: Tensor, truth: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Squared bias and variance, averaged over queries, and their standard errors, by 200 resamples of the data sets."""
    generator = torch.Generator().manual_seed(0)
    resampled = torch.randint(len(means), (200, len(means)), generator=generator)
    return _bias_and_variance(means, truth), _bias_and_variance(means[resampled], truth).std(0)


def _bias_and_variance(means: Tensor, truth: Callable[[Tensor], Tensor]) -> Tensor:
    """Of (…, repeats, queries): (…, 2)."""
    query = torch.linspace(-1.6, 1.6, NUM_QUERIES, dtype=torch.float64)
    variance = means.var(-2)
    bias = (means.mean(-2) - truth(query)).square() - variance / means.shape[-2]
    return torch.stack([bias.mean(-1), variance.mean(-1)], -1)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description="Bias and variance with all rows, and with the nearest.")
    parser.add_argument("--quick", action="store_true", help="4 data sets of at most 512 rows")
    quick = parser.parse_args().quick
    repeats, sizes = (4, [n for n in SIZES if n <= 512]) if quick else (40, SIZES)
    rows: list[dict[str, Any]] = []
    for (network, make), (name, truth) in product(NETWORKS.items(), TRUTHS.items()):
        for n in sizes:
            k = neighbours(n)
            localised = measured(predictions(partial(make, "gp-small", neighbours=k), truth, n, repeats), truth)
            whole = measured(predictions(partial(make, "gp-small", max_context=n), truth, n, repeats), truth)
            for index, metric in enumerate(("squared bias", "variance")):
                ours, ours_error, peer, peer_error = (float(part[index]) for part in (*localised, *whole))
                rows.append(
                    {
                        "case": f"{network}, {name}, n = {n}, k = {k}",
                        "metric": metric,
                        "unit": "squared units of y",
                        "ours": ours,
                        "peer": peer,
                        "peer_name": "all rows",
                        # Unbiased estimates of squares may be below 0.
                        "ratio": peer / ours if min(ours, peer) > 0 else None,
                        "better": "lower",
                        "stderr": ours_error,
                        "stderr_of_peer": peer_error,
                        "seeds": repeats,
                    }
                )
            print(
                f"{network} {name} n={n} k={k}: localised {localised[0].tolist()}, all rows {whole[0].tolist()}",
                flush=True,
            )
    write("localisation", rows, {}, noise_std=NOISE_STD, quick=quick)


if __name__ == "__main__":
    main()
