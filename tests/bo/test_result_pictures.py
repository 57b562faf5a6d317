"""Pictures of results: what they show, taken from Matplotlib's own objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bayesnn.bo import minimize


def f(x: dict[str, Any]) -> dict[str, float]:
    return {"loss": (x["a"] - 2) ** 2 + x["b"], "size": x["a"], "heat": x["b"]}


SPACE = {"a": (1, 5), "b": [0, 1]}
GOALS: dict[str, Any] = {"constraints": {"heat": ("<=", 0.5)}, "num_trials": 8, "num_startup": 8, "surrogate": "gp"}


def test_one_objective_under_a_constraint() -> None:
    def without_size(x: dict[str, Any]) -> dict[str, float]:
        return {name: value for name, value in f(x).items() if name != "size"}

    result = minimize(without_size, SPACE, objectives={"loss": "minimize"}, **GOALS)
    (axes,) = result.plot_convergence().axes
    assert axes.get_ylabel() == "loss"
    kept, best, broken = axes.get_lines()
    assert list(kept.get_ydata()) == [e.value for e in result.history if e.feasible]
    assert list(broken.get_ydata()) == [e.value for e in result.history if not e.feasible]
    assert list(best.get_ydata()) == result.best_so_far[[e.feasible for e in result.history]].tolist()

    slices = result.plot_slices()
    assert [axes.get_xlabel() for axes in slices.axes if axes.axison] == ["a", "b"]
    line = slices.axes[0].get_lines()[0]
    # The surrogate's mean along a, with b as in the best evaluation.
    configurations = [{"a": a, "b": result.x["b"]} for a in range(1, 6)]
    mean = result.model.posterior(result.space.features(configurations)).mean[:, 0]
    assert np.allclose(line.get_ydata(), mean.detach().numpy())
    assert len(result.plot_pairs().axes) >= 4
    with pytest.raises(ValueError, match="plot_front needs two objectives at least, found one: see plot_convergence"):
        result.plot_front()
    alone = minimize(lambda x: x["a"], {"a": (1, 5)}, num_trials=4, num_startup=4)
    with pytest.raises(ValueError, match="plot_pairs needs two parameters at least, found one"):
        alone.plot_pairs()


def test_two_objectives() -> None:
    result = minimize(f, SPACE, objectives={"loss": "minimize", "size": "minimize"}, **GOALS)
    (axes,) = result.plot_front().axes
    others, front, broken = axes.get_lines()
    assert sorted(zip(*front.get_data(), strict=True)) == sorted(
        (e.outcomes["loss"], e.outcomes["size"]) for e in result.front
    )
    assert len(broken.get_xdata()) == sum(not e.feasible for e in result.history)
    assert len(others.get_xdata()) == 8 - len(result.front) - len(broken.get_xdata())
    assert [axes.get_ylabel() for axes in result.plot_convergence().axes] == ["loss", "size"]
    assert result.plot_slices(objective=1).axes[0].get_ylabel() == "size"


def test_which_objective() -> None:
    """By its name or its number."""
    goals = {"loss": "minimize", "size": "maximize"}
    result = minimize(lambda x: {"loss": x["a"], "size": x["b"]}, SPACE, objectives=goals, num_trials=6, num_startup=6)
    for objective in (1, "size", np.int64(1)):
        figure = result.plot_slices(objective)
        assert figure.axes[0].get_ylabel() == "size"
    for wrong in (2, "sise"):
        for plot in (result.plot_slices, result.plot_pairs):
            with pytest.raises(ValueError, match="objective must be one of loss, size, or its number from 0, found"):
                plot(wrong)
    with pytest.raises(TypeError, match=r"objective must be an integer, found 0\.5"):
        result.plot_slices(0.5)  # type: ignore[arg-type]
