"""What to try next: the configurations that maximise a BoTorch acquisition function under any model's posterior."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.exceptions.warnings import BadInitialCandidatesWarning
from botorch.models.model import Model as BotorchModel
from botorch.optim import optimize_acqf, optimize_acqf_discrete
from botorch.optim.optimize_mixed import optimize_acqf_mixed_alternating
from botorch.posteriors import Posterior
from botorch.sampling.get_sampler import get_sampler
from botorch.utils.multi_objective.hypervolume import infer_reference_point
from botorch.utils.multi_objective.pareto import is_non_dominated
from botorch.utils.sampling import manual_seed
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor
from torch.distributions import Normal

from bayesnn.bo.closed_form import ClosedForm, log_expected_improvement
from bayesnn.bo.space import Configuration, Space
from bayesnn.histogram import Histogram
from bayesnn.posteriors import FunctionDraws

Direction = Literal["minimize", "maximize"]

# Spaces up to this size are searched completely.
ENUMERABLE = 10_000


class SpaceExhaustedError(ValueError):
    """Every configuration of a finite space has been tried or is being tried."""


class Proposal(NamedTuple):
    """What to try next.

    Fields:
        codes: (q, d).
        values: the acquisition value of each, given those before it.
        acquisition: the acquisition function's name.
    """

    codes: Tensor
    values: list[float]
    acquisition: str


def suggest(
    model: BotorchModel,
    space: Space | Mapping[str, Any],
    q: int = 1,
    *,
    pending: Iterable[Mapping[str, Any]] = (),
    direction: Direction | Sequence[Direction] = "minimize",
    reference_point: Sequence[float] | None = None,
    num_restarts: int = 8,
    raw_samples: int = 256,
    num_samples: int = 256,
    seed: int = 0,
) -> list[Configuration]:
    r"""The q configurations to try next.

    One objective: they maximise the noisy expected improvement
    :math:`\mathbb E[\max(0, \max_j f(x_j) - \max_i f(x_i^{obs}))]` (in logarithm, one configuration after the other) over
    the best of the training inputs and pending configurations. Several: the same with the hypervolume that the Pareto
    front dominates. The expectation is over joint draws of f, so it is right for every posterior of this library and for
    any BoTorch model; for one configuration of a model whose marginals are known in closed form (PFNs, neural processes) it
    is the expected improvement over the best mean, exactly. Changing the units of the objective changes nothing.

    Args:
        model: a model fitted to ``space.features(configurations)``, one row each, and the objective's values.
        space: the search space, or its definition.
        q: how many.
        pending: configurations that are being evaluated, or that failed: what is close to them gains nothing.
        direction: "minimize" or "maximize", one for all objectives or one for each.
        reference_point: for several objectives, the values that a configuration must beat to count, in their own units;
            by default a tenth of the Pareto front's range worse than its worst values.
        num_restarts: starting points of the acquisition function's optimisation.
        raw_samples: points among which these are chosen.
        num_samples: draws of f; where the posterior consists of fewer, it uses each of them once.
        seed: of every random draw; the same seed gives the same suggestion.

    Returns:
        The configurations, none of which has been tried before or is pending.

    Raises:
        TypeError, ValueError: for arguments that don't fit together.
        SpaceExhaustedError: if a finite space has fewer than q configurations left.

    Example:
        >>> space = Space({"x": (0.0, 1.0), "kind": ["a", "b"]})
        >>> model = NNGP().fit(space.features(tried), values)
        >>> suggest(model, space, q=2)

    Source: Ament et al. (2023), "Unexpected improvements to expected improvement"; Daulton et al. (2021), "Parallel
    Bayesian optimization of multiple noisy objectives".
    """
    if not isinstance(model, BotorchModel):
        raise TypeError(f"model must be a fitted BoTorch model, found {type(model).__name__}")
    space = space if isinstance(space, Space) else Space(space)
    proposal = propose(
        model,
        space,
        q,
        pending=space.codes(pending),
        directions=[direction] * model.num_outputs if isinstance(direction, str) else list(direction),
        reference_point=reference_point,
        num_restarts=num_restarts,
        raw_samples=raw_samples,
        num_samples=num_samples,
        seed=seed,
    )
    return space.configurations(proposal.codes)


def propose(
    model: BotorchModel,
    space: Space,
    q: int,
    *,
    pending: Tensor,
    directions: Sequence[str],
    reference_point: Sequence[float] | None = None,
    num_restarts: int = 8,
    raw_samples: int = 256,
    num_samples: int = 256,
    seed: int = 0,
) -> Proposal:
    """:func:`suggest` on codes, with the acquisition values."""
    counts = {"q": q, "num_restarts": num_restarts, "raw_samples": raw_samples, "num_samples": num_samples}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number, at least 1, found {count!r}")
    if len(directions) != model.num_outputs or any(d not in ("minimize", "maximize") for d in directions):
        raise ValueError(
            f'direction must be "minimize" or "maximize" for each of the {model.num_outputs} output(s), found {directions}'
        )
    if reference_point is not None and len(reference_point) != len(directions):
        raise ValueError(f"reference_point must have {len(directions)} values, found {len(reference_point)}")
    on_codes = _OnCodes(model, space)
    tried = space.decode(_training_features(model))
    with _local_randomness(seed):
        acquisition = (
            _closed_form(on_codes, tried, directions[0]) if q == len(directions) == 1 and not len(pending) else None
        )
        if acquisition is None:
            acquisition = _acquisition(on_codes, tried, directions, reference_point, num_samples, seed)
        codes, values = pending.new_empty(0, pending.shape[-1]), []
        for index in range(q):
            taken = torch.cat([pending, codes])
            if len(taken):
                acquisition.set_X_pending(taken)
            avoid = torch.cat([tried, taken])
            best, value = _maximise(acquisition, space, avoid, num_restarts, raw_samples, seed + index)
            codes = torch.cat([codes, best])
            values.append(value)
    return Proposal(codes, values, type(acquisition).__name__)


class _OnCodes(BotorchModel):
    """A model of features, asked at codes."""

    def __init__(self, model: BotorchModel, space: Space) -> None:
        super().__init__()
        self.model, self.space = model, space
        self.feature_dtype = _training_features(model).dtype
        # BoTorch then averages the acquisition function over the model's batch dimension.
        self._is_ensemble, self._is_fully_bayesian = model._is_ensemble, model._is_fully_bayesian

    @property
    def num_outputs(self) -> int:
        return self.model.num_outputs

    @property
    def batch_shape(self) -> torch.Size:
        return self.model.batch_shape

    def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> Posterior:
        return self.model.posterior(self.space.encode(X).to(self.feature_dtype), *args, **kwargs)


def _training_features(model: Any) -> Tensor:
    first = model.models[0] if hasattr(model, "models") else model
    inputs = getattr(first, "_original_train_inputs", None)  # a GP with input transforms in evaluation mode
    if inputs is None:
        if not hasattr(first, "train_inputs"):
            raise TypeError(f"{type(first).__name__} doesn't say what it was fitted to: it has no train_inputs")
        inputs = first.train_inputs[0]
    while inputs.dim() > 2:  # one copy for each output
        inputs = inputs[0]
    return inputs


def _closed_form(model: _OnCodes, tried: Tensor, direction: str) -> AcquisitionFunction | None:
    """The log expected improvement over the best mean at the tried codes, for posteriors that know it exactly.

    A PFN's joint posterior over all tried codes costs a hundred times more than these values.
    """
    with torch.no_grad():
        posterior: Any = model.posterior(tried.unsqueeze(-2))  # each by itself
    if not isinstance(getattr(posterior, "marginals", None), (Histogram, Normal)):
        return None
    maximize = direction == "maximize"
    best = float((posterior.mean if maximize else -posterior.mean).max())
    return ClosedForm(model, log_expected_improvement(best), maximize)


def _acquisition(
    model: _OnCodes,
    tried: Tensor,
    directions: Sequence[str],
    reference_point: Sequence[float] | None,
    num_samples: int,
    seed: int,
) -> AcquisitionFunction:
    """The log noisy expected (hypervolume) improvement over the tried codes."""
    with torch.no_grad():
        posterior: Any = model.posterior(tried)
        mean = posterior.mean.double()
        mean = mean.reshape(-1, *mean.shape[-2:]).mean(0)  # over the ensemble of a fully Bayesian model
    signs = torch.tensor([1.0 if d == "maximize" else -1.0 for d in directions], dtype=torch.float64)
    # BoTorch smooths improvements on an absolute scale, so that they must come in units of about one.
    loc, scale = mean.mean(0), mean.std(0, correction=0)
    scale = torch.where(scale > 1e-12 * mean.abs().amax(0), scale, torch.ones_like(scale))

    def standardise(values: Tensor) -> Tensor:
        return signs * (values.double() - loc) / scale

    sampler = get_sampler(posterior, torch.Size([_num_samples(posterior, num_samples)]), seed=seed)
    common: dict[str, Any] = {"model": model, "X_baseline": tried, "sampler": sampler, "prune_baseline": True}
    if len(directions) == 1:
        objective = GenericMCObjective(lambda Y, X: standardise(Y)[..., 0])
        return qLogNoisyExpectedImprovement(objective=objective, **common)
    if reference_point is None:
        front = standardise(mean)
        reference = infer_reference_point(front[is_non_dominated(front)])
    else:
        reference = standardise(torch.tensor(list(reference_point), dtype=torch.float64))
    several = GenericMCMultiOutputObjective(lambda Y, X: standardise(Y))
    return qLogNoisyExpectedHypervolumeImprovement(objective=several, ref_point=reference, **common)


def _num_samples(posterior: Posterior, wanted: int) -> int:
    """Function draws give no more than there are; beside them, the other models of a list must follow."""
    parts = getattr(posterior, "posteriors", [posterior])
    draws = [part.num_draws for part in parts if isinstance(part, FunctionDraws) and part.log_weights is None]
    return min([wanted, *draws])


def _maximise(
    acquisition: AcquisitionFunction, space: Space, avoid: Tensor, num_restarts: int, raw_samples: int, seed: int
) -> tuple[Tensor, float]:
    """The best code, (1, d), and its acquisition value."""
    if space.size <= ENUMERABLE:
        return _best(acquisition, _new(space.grid(), avoid, space))
    code: Tensor
    value: Any
    options: dict[str, Any] = {"bounds": space.bounds, "q": 1, "num_restarts": num_restarts, "raw_samples": raw_samples}
    options["post_processing_func"] = space.snap
    steps, categories = space.step_codes, space.category_codes
    if steps or categories:
        # Between the codes of a category there is nothing, so a search can't start from there.
        strategy = {"initialization_strategy": "random" if categories else "continuous_relaxation"}
        code, value = optimize_acqf_mixed_alternating(
            acquisition, discrete_dims=steps, cat_dims=categories, options=strategy, **options
        )
    else:
        code, value = optimize_acqf(acquisition, options={"seed": seed}, retry_on_optimization_warning=False, **options)
    code = space.snap(code)
    if _seen(code, avoid).any():  # where nothing promises an improvement, the search may end at a known point
        return _best(acquisition, _new(space.sobol(max(raw_samples, 2 * len(avoid)), seed), avoid, space))
    return code, float(value)


def _best(acquisition: AcquisitionFunction, choices: Tensor) -> tuple[Tensor, float]:
    code, value = optimize_acqf_discrete(acquisition, q=1, choices=choices)
    return code, float(value)


def _seen(codes: Tensor, avoid: Tensor) -> Tensor:
    """Which rows are among those to avoid."""
    return (codes.unsqueeze(1) - avoid.unsqueeze(0)).abs().amax(-1).lt(1e-9).any(-1)


def _new(codes: Tensor, avoid: Tensor, space: Space) -> Tensor:
    rest = torch.cat([block[~_seen(block, avoid)] for block in codes.split(1024)]) if len(avoid) else codes
    if not len(rest):
        raise SpaceExhaustedError(f"all of the space's {int(space.size)} configurations have been tried or are pending")
    return rest


@contextmanager
def _local_randomness(seed: int) -> Iterator[None]:
    """BoTorch's optimisers draw from global generators; seed these for a while and put them back."""
    state = random.getstate()
    random.seed(seed)
    try:
        with manual_seed(seed), warnings.catch_warnings():
            # A point next to a known one makes the joint covariance singular up to rounding: that is what jitter is for.
            warnings.simplefilter("ignore", NumericalWarning)
            # Where nothing promises an improvement, any starting point is as good as another.
            warnings.simplefilter("ignore", BadInitialCandidatesWarning)
            # A line search that can't improve any more ends "abnormally"; the best point found is what counts.
            warnings.filterwarnings("ignore", message="Optimization failed in `gen_candidates_scipy`")
            warnings.filterwarnings("ignore", message="Optimization failed on the second try")
            yield
    finally:
        random.setstate(state)
