"""Acquisition functions by name, for any model of codes: what each is right for, and how it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from botorch.acquisition import AcquisitionFunction, qUpperConfidenceBound
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.acquisition.max_value_entropy_search import qLowerBoundMaxValueEntropy
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.models.model import Model as BotorchModel
from botorch.posteriors import Posterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import get_sampler
from botorch.utils.multi_objective.hypervolume import infer_reference_point
from botorch.utils.multi_objective.pareto import is_non_dominated
from torch import Tensor

from bayesnn.bo.closed_form import Marginals
from bayesnn.bo.gaussian_model import GaussianModel
from bayesnn.bo.improvement import MarginalImprovement
from bayesnn.bo.knowledge_gradient import KnowledgeGradient
from bayesnn.bo.limited import LogNoisyExpectedHypervolumeImprovement, LogNoisyExpectedImprovement, LogNParEGO
from bayesnn.bo.optimise import ENUMERABLE, new_codes
from bayesnn.bo.outcomes import Outcomes, Scales
from bayesnn.bo.space import Space
from bayesnn.bo.thompson import ThompsonAtPlaces, ThompsonDraw
from bayesnn.posteriors import FunctionDraws

Name = Literal["auto", "logei", "lognei", "ucb", "thompson", "mes", "kg", "lognehvi", "lognparego"]
NAMES: tuple[str, ...] = get_args(Name)

FOR_SEVERAL = ("lognehvi", "lognparego")
WITH_LIMITS = ("lognei", "lognehvi", "lognparego")
CLOSED_FORM = "closed-form logei"
"""What "auto" is for one objective of a model whose marginals are known in closed form."""
FROM_TRIED = (*WITH_LIMITS, CLOSED_FORM)
"""They measure improvements from the tried configurations and the pending ones."""
OF_ANY_DRAWS = ("logei", "lognei", "ucb", "lognparego")
"""Right for posteriors whose draws depend on all the points asked for: they compare values of one call only."""
ANEW = ("thompson", "lognparego")
"""Drawn anew for each suggestion of a batch."""
OF_INFORMATION = ("mes", "kg")
"""They ask what observations tell, of pending points where they are made; all others compare values, at one resource."""
PLACES = 256  # at which maxima are looked for where a function isn't known as a whole


class Setting(NamedTuple):
    """What acquisition functions are built from.

    Fields:
        model: of codes.
        space: that is searched.
        tried: codes (n, d).
        avoid: codes that aren't suggested, the tried ones and others, (k, d).
        outcomes: what the outputs mean.
        reference_point: of several objectives, in their own units.
        num_samples: draws of f.
        beta: of the upper confidence bound.
        seed: of all draws.
    """

    model: BotorchModel
    space: Space
    tried: Tensor
    avoid: Tensor
    outcomes: Outcomes
    reference_point: tuple[float, ...] | None
    num_samples: int
    beta: float
    seed: int


def check_acquisition(name: str, outcomes: Outcomes, model: BotorchModel | None = None) -> None:
    """Whether an acquisition function is right for these outcomes and, if there is one, this model.

    Raises:
        ValueError: if there is none of that name, or it isn't.
    """
    if name not in NAMES:
        raise ValueError(f"acquisition must be one of {', '.join(NAMES)}, found {name!r}")
    if name == "auto":
        return
    several = len(outcomes.objectives) > 1
    if several != (name in FOR_SEVERAL):
        fitting = FOR_SEVERAL if several else [each for each in NAMES[1:] if each not in FOR_SEVERAL]
        number = len(outcomes.objectives)
        raise ValueError(f"acquisition must be one of {', '.join(fitting)} for {number} objective(s), found {name!r}")
    if outcomes.limits and name not in WITH_LIMITS:
        raise ValueError(f"acquisition must be one of {', '.join(WITH_LIMITS)} under constraints, found {name!r}")
    if model is not None and not draws_are_functions(model) and name not in OF_ANY_DRAWS:
        raise ValueError(
            f"acquisition must be one of {', '.join(OF_ANY_DRAWS)} for a model whose draws depend on the points asked for, "
            f"found {name!r}"
        )


def draws_are_functions(model: BotorchModel) -> bool:
    """Whether a draw's value at a point is the same whatever other points are asked for."""
    parts = getattr(model, "models", None)
    own = bool(getattr(model, "draws_are_functions", True))
    return own and all(draws_are_functions(part) for part in (parts if isinstance(parts, Iterable) else ()))


def acquisition(name: str, setting: Setting, q: int, num_pending: int) -> tuple[str, AcquisitionFunction]:
    """The acquisition function of a name, and the name that "auto" stands for.

    Args:
        name: checked by :func:`check_acquisition`.
        setting: what it is built from.
        q: suggestions that are wanted.
        num_pending: configurations being evaluated.
    """
    if name == "auto":
        if len(setting.outcomes.objectives) > 1:
            name = "lognehvi" if draws_are_functions(setting.model) else "lognparego"
        else:
            exact = _closed_form(setting, num_pending + q - 1)
            if exact is not None:
                return CLOSED_FORM, exact
            name = "lognei"
    return name, BUILDERS[name](setting)


def _closed_form(setting: Setting, num_more: int) -> AcquisitionFunction | None:
    """The log expected improvement over the best mean, where it is known exactly and the model can take in more observations.

    A PFN's joint posterior over all tried codes costs a hundred times more than these values.
    """
    model, some, num_fantasies = setting.model, setting.tried[:1], None
    with torch.no_grad():
        posterior: Any = model.posterior(some)
        if not isinstance(getattr(posterior, "marginals", None), Marginals):
            return None
        if num_more:
            try:
                mean = posterior.mean
                given = model.condition_on_observations(some.expand(num_more, -1), mean.expand(num_more, -1))
            except (NotImplementedError, TypeError, ValueError):  # such as a network's context that is full
                return None
            num_fantasies = 1 if getattr(given, "answers_locally", False) else None
    return MarginalImprovement(model, setting.tried, setting.outcomes, num_fantasies, setting.seed)


class _AtTried(NamedTuple):
    """The posterior at the tried codes.

    Fields:
        means: (n, m).
        scales: units by these.
        sampler: of draws of f.
        functions: whether its draws are the same functions whatever is asked.
    """

    means: Tensor
    scales: Scales
    sampler: MCSampler
    functions: bool


def _at_tried(setting: Setting) -> _AtTried:
    with torch.no_grad():
        posterior: Any = setting.model.posterior(setting.tried)
        means = posterior.mean.double()
    means = means.reshape(-1, *means.shape[-2:]).mean(0)  # over the ensemble of a fully Bayesian model
    sampler = get_sampler(posterior, torch.Size([_num_samples(posterior, setting.num_samples)]), seed=setting.seed)
    functions = isinstance(posterior, FunctionDraws) and not posterior.batch_shape
    return _AtTried(means, Scales.of(setting.outcomes, means), sampler, functions)


def _num_samples(posterior: Posterior, wanted: int) -> int:
    """Function draws give no more than there are; beside them, the other models of a list must follow."""
    parts = getattr(posterior, "posteriors", [posterior])
    draws = [part.num_draws for part in parts if isinstance(part, FunctionDraws) and part.log_weights is None]
    return min([wanted, *draws])


def _one_objective(setting: Setting, at: _AtTried) -> GenericMCObjective:
    standardise = at.scales.standardise(setting.outcomes)
    return GenericMCObjective(lambda Y, X: standardise(Y)[..., 0])


def _log_ei(setting: Setting) -> AcquisitionFunction:
    at = _at_tried(setting)
    best = at.scales.standardise(setting.outcomes)(at.means).max()
    return qLogExpectedImprovement(setting.model, best, at.sampler, _one_objective(setting, at))


def _log_nei(setting: Setting) -> AcquisitionFunction:
    at = _at_tried(setting)
    return LogNoisyExpectedImprovement(
        at.functions,
        places=_spread_out(setting, PLACES // 4),
        model=setting.model,
        X_baseline=setting.tried,
        sampler=at.sampler,
        objective=_one_objective(setting, at),
        constraints=at.scales.constraints(setting.outcomes),
        prune_baseline=True,
    )


def _ucb(setting: Setting) -> AcquisitionFunction:
    at = _at_tried(setting)
    return qUpperConfidenceBound(setting.model, setting.beta, at.sampler, _one_objective(setting, at))


def _thompson(setting: Setting) -> AcquisitionFunction:
    at = _at_tried(setting)
    merit = at.scales.standardise(setting.outcomes)
    with torch.no_grad():
        if isinstance(setting.model.posterior(setting.tried[:1]), FunctionDraws):
            return ThompsonDraw(setting.model, merit, setting.seed)
    best = setting.tried[merit(at.means)[:, 0].argmax()]
    if setting.space.size <= ENUMERABLE:
        rest = new_codes(setting.space.grid(), setting.avoid, setting.space)
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(setting.seed))
        places = rest[order[: 2 * PLACES]]
    else:
        places = torch.cat([_spread_out(setting, PLACES), _near(setting, best, PLACES)]).unique(dim=0)
    return ThompsonAtPlaces(setting.model, merit, places, setting.seed)


def _mes(setting: Setting) -> AcquisitionFunction:
    places = torch.cat([setting.tried, _spread_out(setting, PLACES)])
    return qLowerBoundMaxValueEntropy(_gaussian(setting), places, num_mv_samples=32)


def _kg(setting: Setting) -> AcquisitionFunction:
    # The mean can end up best at known points and at some that nobody has tried; few, since all are predicted together.
    places = torch.cat([setting.tried, _spread_out(setting, PLACES // 4)])
    return KnowledgeGradient(_gaussian(setting), places)


def _gaussian(setting: Setting) -> GaussianModel:
    return GaussianModel(setting.model, setting.outcomes.signs[0], _at_tried(setting).scales)


def _spread_out(setting: Setting, num_places: int) -> Tensor:
    if setting.space.size <= num_places:
        return setting.space.grid()
    return setting.space.sobol(num_places, setting.seed)


def _near(setting: Setting, code: Tensor, num_places: int) -> Tensor:
    """Codes whose numbers are within a tenth of the code's; each category is another one in a tenth of them."""
    spread = setting.space.sobol(num_places, setting.seed + 1)
    columns = list(setting.space.category_codes)
    near = (code + 0.2 * (spread - 0.5)).clamp(0, 1)
    other = torch.rand(spread.shape, generator=torch.Generator().manual_seed(setting.seed)) < 0.1
    near[:, columns] = torch.where(other, spread, code)[:, columns]
    return setting.space.snap(near)


def _several(setting: Setting, at: _AtTried) -> dict[str, Any]:
    standardise = at.scales.standardise(setting.outcomes)
    objective = GenericMCMultiOutputObjective(lambda Y, X: standardise(Y))
    common = {"model": setting.model, "X_baseline": setting.tried, "sampler": at.sampler, "objective": objective}
    return common | {"constraints": at.scales.constraints(setting.outcomes), "prune_baseline": True}


def _log_nehvi(setting: Setting) -> AcquisitionFunction:
    at = _at_tried(setting)
    if setting.reference_point is None:
        merits = at.scales.standardise(setting.outcomes)(at.means)
        kept = (setting.outcomes.excesses(at.means) <= 0).all(-1)
        merits = merits[kept] if bool(kept.any()) else merits
        reference = infer_reference_point(merits[is_non_dominated(merits)])
    else:
        wanted = setting.outcomes.signs * torch.tensor(setting.reference_point, dtype=torch.float64)
        reference = (wanted - at.scales.loc) / at.scales.scale
    return LogNoisyExpectedHypervolumeImprovement(ref_point=reference, **_several(setting, at))


def _log_nparego(setting: Setting) -> AcquisitionFunction:
    return LogNParEGO(places=_spread_out(setting, PLACES // 4), **_several(setting, _at_tried(setting)))


BUILDERS: dict[str, Callable[[Setting], AcquisitionFunction]] = {
    "logei": _log_ei,
    "lognei": _log_nei,
    "ucb": _ucb,
    "thompson": _thompson,
    "mes": _mes,
    "kg": _kg,
    "lognehvi": _log_nehvi,
    "lognparego": _log_nparego,
}
