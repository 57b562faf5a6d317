"""One search by any method, in an Optuna study: the library's surrogates, BoTorch by itself, Optuna's own samplers, Sobol.

All methods begin with the same configurations, which are queued in the study. The library's surrogates are asked as users ask
them, by ``SurrogateSampler``. BoTorch's Gaussian process stands for what one writes with BoTorch alone: one ``SingleTaskGP``
for each outcome, qLogNEI or qLogNEHVI, the same number of starting points and draws, in the unit cube of features; whole
numbers and categories are rounded afterwards.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import optuna
import torch
from bo_problems import Configuration, Outcome, Task, regrets
from botorch.acquisition import AcquisitionFunction, GenericMCObjective, qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.models import ModelListGP
from botorch.optim import optimize_acqf
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.sampling import manual_seed
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from searches import fitted_gp
from torch import Tensor

import bayesnn
from bayesnn.bo import SurrogateSampler

PEERS = ("botorch", "tpe", "gpsampler", "sobol")
SURROGATES = ("auto", *bayesnn.surrogates())


def sampler(method: str, task: Task, seed: int, num_initial: int) -> BaseSampler:
    """What chooses after the first configurations; "name acquisition" is a surrogate with another acquisition function."""
    if method == "tpe":
        return TPESampler(n_startup_trials=num_initial, seed=seed)
    if method == "gpsampler":
        return GPSampler(n_startup_trials=num_initial, seed=seed)
    name, _, acquisition = method.partition(" ")
    options: dict[str, Any] = {"acquisition": acquisition} if acquisition else {}
    if method in PEERS:  # everything is queued
        name, num_initial = "gp", 10**9
    return SurrogateSampler(
        name,
        num_startup=num_initial,
        seed=seed,
        space=task.space,
        reference_point=task.reference_point,
        **options,
    )


def search(task: Task, method: str, seed: int, num_initial: int, num_steps: int) -> dict[str, Any]:
    """One search: the regret after the first design and after each further evaluation, and what it cost.

    ``cpu_seconds`` is the time for all choices after the first design, ``fallbacks`` how many of them a surrogate didn't make.
    """
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    num_objectives = 1 if task.reference_point is None else len(task.reference_point)
    study = optuna.create_study(
        directions=["minimize"] * num_objectives, sampler=sampler(method, task, seed, num_initial)
    )
    design = task.space.configurations(task.space.sobol(num_initial + num_steps, seed))
    outcomes: list[Outcome] = []
    tried: list[Configuration] = []
    spent, fallbacks = 0.0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(num_initial + num_steps):
            start = time.process_time()
            if number < num_initial or method == "sobol":
                study.enqueue_trial(design[number])
            elif method == "botorch":
                study.enqueue_trial(by_botorch(task, tried, outcomes, 1000 * seed + number))
            trial = study.ask(task.space.distributions())
            spent += time.process_time() - start if number >= num_initial else 0.0
            fallbacks += "fallback" in trial.user_attrs
            tried.append(dict(trial.params))
            outcomes.append(task.evaluate(tried[-1]))
            for index, excess in enumerate(outcomes[-1].excesses):
                trial.set_constraint(f"c{index}", excess)
            study.tell(trial, outcomes[-1].objectives)
    curve = [float(f"{regret:.4g}") for regret in regrets(task, outcomes)[num_initial - 1 :]]
    return {"regrets": curve, "fallbacks": fallbacks, "cpu_seconds": round(spent, 2)}


def by_botorch(task: Task, tried: list[Configuration], outcomes: list[Outcome], seed: int) -> Configuration:
    """The next configuration by BoTorch alone."""
    X = task.space.features(tried)
    Y = torch.tensor([[*each.objectives, *each.excesses] for each in outcomes], dtype=torch.float64)
    Y[:, : len(outcomes[0].objectives)] *= -1
    with manual_seed(seed):
        acquisition = botorch_acquisition(task.reference_point, X, Y, len(outcomes[0].objectives), seed)
        bounds = torch.stack([torch.zeros_like(X[0]), torch.ones_like(X[0])])
        found, _ = optimize_acqf(acquisition, bounds, q=1, num_restarts=8, raw_samples=256)
    return task.space.configurations(task.space.decode(found))[0]


def botorch_acquisition(
    reference_point: tuple[float, ...] | None, X: Tensor, Y: Tensor, num_objectives: int, seed: int
) -> AcquisitionFunction:
    """qLogNEI or qLogNEHVI of Gaussian processes.

    Args:
        reference_point: of the objectives, before they were negated.
        X: (n, d) in the unit cube.
        Y: objectives, of which more is better, and then excesses, (n, m + c).
        num_objectives: m.
        seed: of the draws.
    """
    gps = [fitted_gp(X, Y[:, [column]]) for column in range(Y.shape[1])]
    draws = SobolQMCNormalSampler(torch.Size([256]), seed=seed)
    spread = Y.std(0)
    constraints = [
        lambda values, column=column: values[..., column] / spread[column]
        for column in range(num_objectives, Y.shape[1])
    ]
    common: dict[str, Any] = {"X_baseline": X, "sampler": draws, "prune_baseline": True}
    if constraints:
        common["constraints"] = constraints
    model = gps[0] if len(gps) == 1 else ModelListGP(*gps)
    if reference_point is None:
        objective = GenericMCObjective(lambda values, X=None: values[..., 0])
        return qLogNoisyExpectedImprovement(model, objective=objective, **common)
    several = GenericMCMultiOutputObjective(lambda values, X=None: values[..., :num_objectives])
    reference = [-value for value in reference_point]
    return qLogNoisyExpectedHypervolumeImprovement(model, reference, objective=several, **common)
