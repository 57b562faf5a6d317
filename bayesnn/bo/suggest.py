"""What to try next: the configurations that maximise an acquisition function under any model's posterior."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.models.model import Model as BotorchModel
from torch import Tensor

from bayesnn.bo.acquisition import (
    ANEW,
    FROM_TRIED,
    NAMES,
    OF_INFORMATION,
    Name,
    Setting,
    acquisition as build_acquisition,
    check_acquisition,
)
from bayesnn.bo.feasibility import IfItSucceeds, SuccessModel
from bayesnn.bo.on_codes import OnCodes
from bayesnn.bo.optimise import Effort, SpaceExhaustedError, local_randomness, maximise, seen
from bayesnn.bo.outcomes import Direction, Limit, Outcomes, outcomes_of
from bayesnn.bo.space import Configuration, Space
from bayesnn.bo.training_features import training_features
from bayesnn.checks import count, nonnegative, number as finite_number, positive

__all__ = ["Proposal", "SpaceExhaustedError", "propose", "suggest"]


SEEDS_PER_SUGGESTION = 2  # that one acquisition function draws from


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
    acquisition: Name = "auto",
    pending: Iterable[Mapping[str, Any]] = (),
    failed: Iterable[Mapping[str, Any]] = (),
    direction: Direction | Sequence[Direction] = "minimize",
    constraints: Mapping[int, Limit] | None = None,
    reference_point: Sequence[float] | None = None,
    beta: float = 4.0,
    num_restarts: int = 8,
    raw_samples: int = 256,
    num_samples: int = 256,
    seconds: float | None = None,
    seed: int = 0,
) -> list[Configuration]:
    r"""The q configurations to try next.

    They maximise an acquisition function, one after the other, each given those before it. For one objective:

    * "lognei": the logarithm of the noisy expected improvement :math:`\mathbb E[\max(0, \max_j f(x_j) - \max_i f(x_i^{obs}))]`
      over the best of the training inputs and pending configurations, none of which need be known exactly;
    * "logei": the same over the best predicted mean, as if that were known;
    * "ucb": :math:`\mu + \sqrt\beta\, \sigma`, as an average over draws, so that it has the posterior's shape;
    * "thompson": the best point of a draw of f;
    * "mes": the information about f's maximum (GIBBON's bound), of the posterior's Gaussian view;
    * "kg": the knowledge gradient over the tried configurations and some others, of the Gaussian view.

    For several: "lognehvi", the hypervolume that the Pareto front gains, and "lognparego", "lognei" of the objectives'
    augmented Chebyshev mixtures, with other weights for each suggestion. "auto" is "lognei" or "lognehvi"; for one
    objective of a model whose marginals are known in closed form (PFNs, neural processes) it is the expected improvement over
    the best mean, exactly. Beside pending configurations and in batches that is averaged over fantasies of what they will
    give (8 at most), as long as the model can take in so many more observations. All other expectations are over joint draws
    of f, so they are right for every posterior of this library and for any BoTorch model. Changing the units of the objective
    changes nothing.

    Args:
        model: a model fitted to ``space.features(configurations)``, one row each, and the outcomes.
        space: the search space, or its definition.
        q: how many.
        acquisition: one of the names above.
        pending: configurations that are being evaluated: what is close to them gains little.
        failed: configurations that gave no value. They aren't suggested again, and where they and the training inputs tell
            what fails (three of each at least), each acquisition value is weighed by the probability of success.
        direction: "minimize" or "maximize", one for all objectives or one for each.
        constraints: outputs of the model that aren't objectives but must keep a limit, ``{1: ("<=", 0.5)}``, in their own
            units. An improvement counts where all limits are kept.
        reference_point: for several objectives, the values that a configuration must beat to count, in their own units;
            by default a tenth of the Pareto front's range worse than its worst values.
        beta: of "ucb"; 4 is two standard deviations.
        num_restarts: starting points of the acquisition function's optimisation.
        raw_samples: points among which these are chosen.
        num_samples: draws of f; where the posterior consists of fewer, it uses each of them once.
        seconds: after which no search of numbers goes on; None: no limit. What is suggested then depends on the machine.
        seed: of every random draw; the same seed gives the same suggestion.

    Returns:
        The configurations, none of which has been tried before or is pending.

    Raises:
        TypeError, ValueError: for arguments that don't fit together, among them an acquisition function that isn't right for
            the outcomes or for a model whose draws depend on the points asked for.
        SpaceExhaustedError: if a finite space has fewer than q configurations left.

    Example:
        >>> space = Space({"x": (0.0, 1.0), "kind": ["a", "b"]})
        >>> model = NNGP().fit(space.features(tried), values)
        >>> suggest(model, space, q=2)

    Source: Ament et al. (2023), "Unexpected improvements to expected improvement"; Daulton et al. (2021), "Parallel
    Bayesian optimization of multiple noisy objectives"; Moss et al. (2021), "GIBBON"; Frazier et al. (2009), "The
    knowledge-gradient policy for correlated normal beliefs"; Knowles (2006), "ParEGO"; Snoek, Larochelle
    and Adams (2012), "Practical Bayesian optimization of machine learning algorithms".
    """
    if not isinstance(model, BotorchModel):
        raise TypeError(f"model must be a fitted BoTorch model, found {type(model).__name__}")
    space = space if isinstance(space, Space) else Space(space)
    proposal = propose(
        model,
        space,
        q,
        acquisition=acquisition,
        pending=space.codes(pending),
        failed=space.codes(failed),
        outcomes=outcomes_of(model.num_outputs, direction, constraints),
        reference_point=reference_point,
        beta=beta,
        num_restarts=num_restarts,
        raw_samples=raw_samples,
        num_samples=num_samples,
        seconds=seconds,
        seed=seed,
    )
    return space.configurations(proposal.codes)


def propose(
    model: BotorchModel,
    space: Space,
    q: int,
    *,
    outcomes: Outcomes,
    pending: Tensor,
    failed: Tensor | None = None,
    others: Tensor | None = None,
    acquisition: str = "auto",
    reference_point: Sequence[float] | None = None,
    beta: float = 4.0,
    num_restarts: int = 8,
    raw_samples: int = 256,
    num_samples: int = 256,
    seconds: float | None = None,
    seed: int = 0,
) -> Proposal:
    """:func:`suggest` on codes, with the acquisition values.

    Args:
        others: codes that aren't suggested either, besides those that the model was fitted to, the pending and the failed.
        All else is as in :func:`suggest`. In an ``AtResource``, pending codes have resources of their own.
    """
    count("q", q)
    count("seed", seed, least=0)
    check_search(acquisition, reference_point, beta, num_restarts, raw_samples, num_samples, seconds)
    deadline = None if seconds is None else time.monotonic() + seconds
    check_acquisition(acquisition, outcomes, model)
    check_reference_point(reference_point, outcomes)
    on_codes = OnCodes(model, space)
    tried = space.compared(space.decode(training_features(model)))
    failed, others = (pending[:0] if given is None else space.compared(given) for given in (failed, others))
    reference = None if reference_point is None else tuple(float(value) for value in reference_point)
    with local_randomness(seed):
        success = SuccessModel.of(space, tried, failed)
        codes, values = pending.new_empty(0, pending.shape[-1]), []
        function: AcquisitionFunction | None = None
        for index in range(q):
            taken = torch.cat([pending, space.begun(codes)])
            avoid = torch.cat([tried, failed, others, space.compared(taken)])
            if function is None or acquisition in ANEW:
                own_seed = seed + index * SEEDS_PER_SUGGESTION
                setting = Setting(on_codes, space, tried, avoid, outcomes, reference, num_samples, beta, own_seed)
                acquisition, function = build_acquisition(acquisition, setting, q, len(pending))
            if acquisition not in OF_INFORMATION:
                taken = space.compared(taken)
            if acquisition in FROM_TRIED:  # among which are running trials with values
                taken = taken[~seen(taken, tried)]
            if len(taken):
                function.set_X_pending(taken)
            weighed = function if success is None else IfItSucceeds(function, success, acquisition)
            left = None if deadline is None else max(0.1, (deadline - time.monotonic()) / (q - index))
            effort = Effort(num_restarts, raw_samples, left)
            best, value = maximise(weighed, space, avoid, effort, seed + index)
            codes = torch.cat([codes, best])
            values.append(value)
    return Proposal(codes, values, acquisition)


def check_search(
    acquisition: Any,
    reference_point: Any,
    beta: Any,
    num_restarts: Any,
    raw_samples: Any,
    num_samples: Any,
    seconds: Any,
) -> None:
    """What can be said of a search's settings before there is a model.

    Raises:
        TypeError, ValueError: for settings that make no sense.
    """
    if acquisition not in NAMES:
        raise ValueError(f"acquisition must be one of {', '.join(NAMES)}, found {acquisition!r}")
    for name, number in {"num_restarts": num_restarts, "raw_samples": raw_samples, "num_samples": num_samples}.items():
        count(name, number)
    nonnegative("beta", beta)
    if seconds is not None:
        positive("seconds", seconds)
    if reference_point is not None:
        if not isinstance(reference_point, Sequence) or isinstance(reference_point, str):
            raise TypeError(
                f"reference_point must be a list of values, one for each objective, found {reference_point!r}"
            )
        for value in reference_point:
            finite_number("reference_point", value)


def check_reference_point(reference_point: Sequence[float] | None, outcomes: Outcomes) -> None:
    """Whether there is one value for each of several objectives.

    Raises:
        ValueError: if not.
    """
    number = len(outcomes.objectives)
    if reference_point is None:
        return
    if number == 1:
        raise ValueError(f"reference_point must be None for one objective, found {list(reference_point)}")
    if len(reference_point) != number:
        raise ValueError(f"reference_point must have {number} values, found {len(reference_point)}")
