"""The configuration of a space at which an acquisition function is largest."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.exceptions.warnings import BadInitialCandidatesWarning
from botorch.optim import optimize_acqf, optimize_acqf_discrete
from botorch.optim.optimize_mixed import optimize_acqf_mixed_alternating
from botorch.utils.sampling import manual_seed
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from bayesnn.bo.space import Space

# Of a process's threads, one at a time fits and searches: global generators and warnings' filters belong to all of them.
ONE_AT_A_TIME = threading.RLock()

ENUMERABLE = 10_000  # spaces up to this size are searched completely


class SpaceExhaustedError(ValueError):
    """Every configuration of a finite space has been tried or is being tried."""


class Effort(NamedTuple):
    """Of one search.

    Fields:
        num_restarts: starting points.
        raw_samples: points among which these are chosen.
        seconds: after which a search of numbers ends with the best so far; None: no limit.
    """

    num_restarts: int
    raw_samples: int
    seconds: float | None = None


def maximise(
    acquisition: AcquisitionFunction, space: Space, avoid: Tensor, effort: Effort, seed: int
) -> tuple[Tensor, float]:
    """The best code that isn't among those to avoid, (1, d), and its acquisition value.

    An acquisition function that has ``choices`` knows these codes alone.
    """
    choices = getattr(acquisition, "choices", None)
    if choices is not None:
        return _best(acquisition, new_codes(choices, avoid, space))
    if space.size <= ENUMERABLE:
        return _best(acquisition, new_codes(space.grid(), avoid, space))
    code: Tensor
    value: Any
    options: dict[str, Any] = {"bounds": space.bounds, "q": 1, "post_processing_func": space.snap}
    options |= {"num_restarts": effort.num_restarts, "raw_samples": effort.raw_samples}
    steps, categories = space.step_codes, space.category_codes
    if steps or categories:
        # Between the codes of a category there is nothing, so a search can't start from there.
        strategy: dict[str, Any] = {"initialization_strategy": "random" if categories else "continuous_relaxation"}
        code, value = optimize_acqf_mixed_alternating(
            acquisition, discrete_dims=steps, cat_dims=categories, options=strategy, **options
        )
    else:
        code, value = optimize_acqf(
            acquisition,
            options={"seed": seed},
            retry_on_optimization_warning=False,
            timeout_sec=effort.seconds,
            **options,
        )
    code = space.snap(code)
    if seen(code, avoid).any():  # where nothing promises an improvement, the search may end at a known point
        return _best(acquisition, new_codes(space.sobol(max(effort.raw_samples, 2 * len(avoid)), seed), avoid, space))
    return code, float(value)


def _best(acquisition: AcquisitionFunction, choices: Tensor) -> tuple[Tensor, float]:
    code, value = optimize_acqf_discrete(acquisition, q=1, choices=choices)
    return code, float(value)


def seen(codes: Tensor, avoid: Tensor) -> Tensor:
    """Which rows (n, d) are among those to avoid."""
    return (codes.unsqueeze(1) - avoid.unsqueeze(0)).abs().amax(-1).lt(1e-9).any(-1)


def new_codes(codes: Tensor, avoid: Tensor, space: Space) -> Tensor:
    """The rows (n, d) that aren't among those to avoid.

    Raises:
        SpaceExhaustedError: if all are.
    """
    rest = torch.cat([block[~seen(block, avoid)] for block in codes.split(1024)]) if len(avoid) else codes
    if not len(rest):
        raise SpaceExhaustedError(f"all of the space's {int(space.size)} configurations have been tried or are pending")
    return rest


@contextmanager
def local_randomness(seed: int) -> Iterator[None]:
    """BoTorch's optimisers draw from global generators; seed these for a while and put them back."""
    with ONE_AT_A_TIME, _python_seed(seed), manual_seed(seed), warnings.catch_warnings():
        # A point next to a known one makes the joint covariance singular up to rounding: that is what jitter is for.
        warnings.simplefilter("ignore", NumericalWarning)
        # Where nothing promises an improvement, any starting point is as good as another.
        warnings.simplefilter("ignore", BadInitialCandidatesWarning)
        # A line search that can't improve any more ends "abnormally"; the best point found is what counts.
        warnings.filterwarnings("ignore", message="Optimization failed in `gen_candidates_scipy`")
        warnings.filterwarnings("ignore", message="Optimization failed on the second try")
        # Acquisition functions of ours keep the tried points elsewhere than BoTorch looks for them.
        warnings.filterwarnings("ignore", message="Failed to extract X_baseline")
        yield


@contextmanager
def _python_seed(seed: int) -> Iterator[None]:
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
