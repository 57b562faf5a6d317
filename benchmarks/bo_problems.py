"""What the front end is measured on: functions, engineering designs and tables of real experiments, as search spaces.

Everything is minimised. A table of scattered rows is the function whose value is that of the nearest row; a table over a grid
is a space of whole numbers (the grid's steps, in order) and categories. Repeated measurements of one configuration are
averaged. Tables are those of the folder ``hpo/``; which of a collection's tasks are here was settled by their inputs before
anything was run: of HPO-B the first task of seven search spaces from 2 to 18 inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from botorch.test_functions import DTLZ2, BraninCurrin, Penicillin, VehicleSafety, WeldedBeamSO
from botorch.utils.multi_objective.hypervolume import Hypervolume
from botorch.utils.multi_objective.pareto import is_non_dominated
from kernels_bo import PROBLEMS as CUBES
from searches import Problem, lcbench, of_table
from torch import Tensor

from bayesnn.bo import Space

Configuration = dict[str, Any]


class Outcome(NamedTuple):
    """Of one evaluation.

    Fields:
        objectives: each is to be small.
        excesses: how far beyond each constraint, which is kept where this is at most 0.
    """

    objectives: list[float]
    excesses: list[float]


class Task(NamedTuple):
    """A search space, and what its configurations bring.

    Fields:
        space: the search space.
        evaluate: a configuration's outcome.
        best: the least value; of several objectives, the largest hypervolume.
        worst: the value that counts while no constraint-keeping configuration has been found.
        reference_point: of several objectives, from which hypervolumes are measured.
    """

    space: Space
    evaluate: Callable[[Configuration], Outcome]
    best: float
    worst: float = float("inf")
    reference_point: tuple[float, ...] | None = None


def regrets(task: Task, outcomes: list[Outcome]) -> list[float]:
    """After each evaluation: the best value so far above the least one, or the share of the hypervolume not yet reached."""
    if task.reference_point is None:
        values = [each.objectives[0] if all(e <= 0 for e in each.excesses) else task.worst for each in outcomes]
        best = torch.tensor(values, dtype=torch.float64).clamp_max(task.worst).cummin(0).values
        return (best - task.best).tolist()
    merits = -torch.tensor([each.objectives for each in outcomes], dtype=torch.float64)
    hypervolume, found = Hypervolume(-torch.tensor(task.reference_point, dtype=torch.float64)), []
    for count in range(1, len(merits) + 1):
        front = merits[:count][is_non_dominated(merits[:count])]
        found.append(1 - hypervolume.compute(front) / task.best)
    return found


# Functions of the unit cube ---------------------------------------------------------------------------------------------


def _cube(num_features: int) -> Space:
    return Space({f"x{index}": (0.0, 1.0) for index in range(num_features)})


def _row(configuration: Configuration) -> Tensor:
    return torch.tensor([list(configuration.values())], dtype=torch.float64)


def of_cube(problem: Problem) -> Task:
    """A function of the unit cube, or a table of scattered rows."""
    return Task(_cube(problem.num_features), lambda x: Outcome([float(problem.function(_row(x)))], []), problem.minimum)


def of_several(function: Any) -> Task:
    """One of BoTorch's problems of several objectives."""
    low, high = function.bounds.double()

    def evaluate(configuration: Configuration) -> Outcome:
        return Outcome(function(low + (high - low) * _row(configuration))[0].tolist(), [])

    reference = tuple(function.ref_point.double().tolist())
    return Task(_cube(function.dim), evaluate, float(function.max_hv), reference_point=reference)


def of_constrained(function: Any) -> Task:
    """One of BoTorch's problems with constraints; the worst value is that of the feasible among 16,384 spread points."""
    low, high = function.bounds.double()

    def evaluate(configuration: Configuration) -> Outcome:
        X = low + (high - low) * _row(configuration)
        return Outcome(function(X).tolist(), (-function.evaluate_slack(X)[0]).tolist())

    X = low + (high - low) * torch.quasirandom.SobolEngine(function.dim, scramble=True, seed=0).draw(16_384).double()
    feasible = X[(function.evaluate_slack(X) >= 0).all(-1)]
    return Task(_cube(function.dim), evaluate, float(function.optimal_value), worst=float(function(feasible).max()))


# Tables -----------------------------------------------------------------------------------------------------------------


def hpob(folder: Path, name: str) -> Task:
    """Classification error of measured configurations, of one of HPO-B's test tasks (search space _ data set)."""
    with np.load(folder / "hpo" / "hpob_92tasks_300configs.npz", allow_pickle=False) as file:
        X, accuracy = torch.as_tensor(file[f"{name}/X"]).double(), torch.as_tensor(file[f"{name}/y"]).double()
    return of_cube(of_table(X, 100 * (1 - accuracy)))


def materials(folder: Path, name: str) -> Task:
    """The result of a laboratory experiment, negated where more is better; repetitions are averaged."""
    with np.load(folder / "hpo" / "materials_experiments.npz", allow_pickle=False) as file:
        X, y, goal = file[f"{name}/X"], file[f"{name}/y"], str(file[f"{name}/goal"])
    rows, which = np.unique(X, axis=0, return_inverse=True)
    means = np.bincount(which.ravel(), weights=y) / np.bincount(which.ravel())
    return of_cube(of_table(torch.as_tensor(rows), torch.as_tensor(means if goal == "min" else -means)))


def _grid(axes: dict[str, list[Any]], table: np.ndarray) -> Task:
    """A table over a grid: ordered axes as whole numbers, the others as categories."""
    forms = {name: values if isinstance(values[0], str) else (0, len(values) - 1) for name, values in axes.items()}

    def evaluate(configuration: Configuration) -> Outcome:
        place = tuple(
            axes[name].index(value) if isinstance(value, str) else value for name, value in configuration.items()
        )
        return Outcome([float(table[place])], [])

    return Task(Space(forms), evaluate, float(table.min()))


def fcnet(folder: Path) -> Task:
    """FC-Net on naval propulsion: the decimal logarithm of the validation loss, by 9 hyperparameters, 4 of them categories."""
    with np.load(folder / "hpo" / "fcnet_naval_propulsion.npz", allow_pickle=False) as file:
        axes, loss = json.loads(str(file["space"])), file["val_loss"].astype(float).mean(-1)
    return _grid(axes, np.log10(loss))


def hpobench(folder: Path, name: str) -> Task:
    """HPOBench's neural network on one of its data sets: validation error (percent), by 5 hyperparameters."""
    with np.load(folder / "hpo" / "hpobench_mlp_5datasets.npz", allow_pickle=False) as file:
        axes, which = json.loads(str(file["space"])), file["datasets"].tolist().index(name)
        error = 100 * (1 - file["val_acc"][which].astype(float).mean(-1))
    return _grid(axes, error)


# All of them ------------------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[], Task]] = {
    **{name: lambda problem=problem: of_cube(problem) for name, problem in CUBES.items()},  # type: ignore[misc]
    "welded beam": lambda: of_constrained(WeldedBeamSO()),
    "branin-currin": lambda: of_several(BraninCurrin()),
    "dtlz2": lambda: of_several(DTLZ2(6, num_objectives=2)),
    "vehicle safety": lambda: of_several(VehicleSafety()),
    "penicillin": lambda: of_several(Penicillin()),
}
HPOB = ("5970_14951", "4796_23", "5636_10101", "7607_145976", "5965_10101", "5971_10093", "6767_145804")
MATERIALS = ("agnp", "autoam", "crossed_barrel", "p3ht", "perovskite")
TABLES: dict[str, Callable[[Path], Task]] = {
    **{f"hpob {name}": lambda folder, name=name: hpob(folder, name) for name in HPOB},  # type: ignore[misc]
    "lcbench adult": lambda folder: of_cube(lcbench(folder, "adult")),
    "lcbench vehicle": lambda folder: of_cube(lcbench(folder, "vehicle")),
    "fcnet naval": fcnet,
    "hpobench australian": lambda folder: hpobench(folder, "australian"),
    "hpobench vehicle": lambda folder: hpobench(folder, "vehicle"),
    **{name: lambda folder, name=name: materials(folder, name) for name in MATERIALS},  # type: ignore[misc]
}
NAMES = (*FUNCTIONS, *TABLES)
HARD = ("ackley-10", "levy-20", "michalewicz-5", "hartmann-6 in 40", *(f"hpob {name}" for name in HPOB[-3:]))
"""Ten inputs or more, or a function that isn't equally wild everywhere."""


def task(name: str, folder: Path | None) -> Task:
    """A problem by name; tables are read from ``folder/hpo``.

    Raises:
        ValueError: for a table without a folder.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]()
    if folder is None:
        raise ValueError(f"{name!r} is a table: give --data, or set BAYESNN_DATA")
    return TABLES[name](folder)
