"""The page about a study: whole, self-contained, escaped; for studies of every kind and with next to nothing in them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from bayesnn.bo import Space, SurrogateSampler
from bayesnn.bo.observations import observe
from bayesnn.bo.pictures import convergence, parallel_coordinates, trade_offs
from bayesnn.bo.report import load_study, study_page
from bayesnn.bo.surrogate_pictures import View, pairs, slices

DISTRIBUTIONS = {
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "layers": IntDistribution(1, 6),
    "kind": CategoricalDistribution(["<script>alert(1)</script>", "$\\frac{", "c"]),
}
IMPORTANCE = "Importance of the parameters: shares of the variance (fANOVA of Optuna)"
ALONG = "Surrogate of {} along each parameter: mean ± 2 standard deviations"
OVER = "Surrogate of {} over every two of the parameters: mean (below), standard deviation (above)"
PARALLEL = "Parallel coordinates of the finished trials"


class Page(HTMLParser):
    """What a page shows; fails on tags that don't match, and on what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "a")
        if tag == "img":
            found = dict(attributes)
            assert str(found["src"]).startswith("data:image/png;base64,")
            self.pictures.append(str(found["alt"]))
        elif tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(study: optuna.Study) -> Page:
    text = study_page(study)
    assert not re.search(r"https?:|url\(|@import", text)
    return Page(text)


def study_of(num_trials: int, directions: tuple[str, ...] = ("minimize",), **more: Any) -> optuna.Study:
    study = optuna.create_study(directions=directions, study_name="<b>study</b>", **more)
    space = Space.from_distributions(DISTRIBUTIONS)
    for x in space.configurations(space.sobol(10, seed=0)[:num_trials]):
        value = x["layers"] * 1.0 + (x["kind"] == "c")
        study.add_trial(
            optuna.create_trial(params=x, distributions=DISTRIBUTIONS, values=[value, -value][: len(directions)])
        )
    return study


def add(study: optuna.Study, state: TrialState, **more: Any) -> None:
    params = {"lr": 1e-3, "layers": 2, "kind": "c"}
    study.add_trial(optuna.create_trial(state=state, params=params, distributions=DISTRIBUTIONS, **more))


def test_a_whole_page() -> None:
    study = study_of(9)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(["loss <x>"])
    add(study, TrialState.FAIL, user_attrs={"failure": "exit code 1; <i>no data</i>"})
    add(study, TrialState.PRUNED)
    page = page_of(study)
    assert page.pictures == ["Convergence", PARALLEL, IMPORTANCE, ALONG.format("loss <x>"), OVER.format("loss <x>")]
    for text in ("Study <b>study</b>", "<script>alert(1)</script>", "exit code 1; <i>no data</i>", "minimize loss <x>"):
        assert text in page.words
    assert page.words.count("complete") == 10  # nine, and the best
    assert "pruned" in page.words and "fail" in page.words


def test_several_objectives() -> None:
    page = page_of(study_of(6, ("minimize", "maximize")))
    assert page.pictures == [
        "Convergence",
        "Pareto front of the objectives",
        PARALLEL,
        IMPORTANCE,
        *(form.format(name) for name in ("value 1", "value 2") for form in (ALONG, OVER)),
    ]
    assert "Pareto front" in page.words


@pytest.mark.parametrize(
    "num_finished, pictures, remark",
    [
        (0, [], "No trial has finished yet"),
        (1, ["Convergence", PARALLEL], "A surrogate needs at least 3 finished trials."),
        (2, ["Convergence", PARALLEL], "A surrogate needs"),
    ],
)
def test_few_trials(num_finished: int, pictures: list[str], remark: str) -> None:
    study = study_of(num_finished)
    page = page_of(study)
    assert [picture for picture in page.pictures if picture != IMPORTANCE] == pictures
    assert any(word.startswith(remark) for word in page.words)


def test_nothing_but_failures() -> None:
    study = study_of(0)
    for index in range(3):
        add(study, TrialState.FAIL, user_attrs={"failure": f"reason {index}"})
    page = page_of(study)
    assert page.pictures == [] and "reason 2" in page.words


def test_a_study_that_optuna_made_by_itself() -> None:
    """Conditional and constant parameters, a value that is infinite, another that is always the same."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        trial.suggest_categorical("constant", ["only"])
        if trial.number % 2:
            trial.suggest_int("sometimes", 1, 3)
        if trial.number == 3:
            raise ValueError("three")
        return float("-inf") if trial.number == 2 else x

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study.optimize(objective, n_trials=7, catch=(ValueError,))
    page = page_of(study)
    assert "Convergence" in page.pictures and ALONG.format("value") in page.pictures
    assert OVER.format("value") not in page.pictures  # one parameter
    assert any("constant, sometimes" in word for word in page.words)
    flat = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    flat.optimize(lambda trial: 0 * trial.suggest_float("x", 0, 1) * trial.suggest_float("y", 0, 1), n_trials=4)
    assert "Convergence" in page_of(flat).pictures


def test_the_surrogate_is_seen_from_the_best_configuration() -> None:
    study, space = study_of(8), Space.from_distributions(DISTRIBUTIONS)
    model, observations = SurrogateSampler("nngp", space=space).fit(study, space), observe(study, space)
    best = study.best_trial
    view = View(model, space, observations, 0, best.number)
    mean, std = view.along("layers", "kind")
    assert mean.shape == std.shape == (6, 3)
    posterior = model.posterior(space.features([best.params | {"layers": 5, "kind": "c"}]))
    assert mean[4, 2] == pytest.approx(posterior.mean.item()) and std[4, 2] ** 2 == pytest.approx(
        posterior.variance.item()
    )
    assert np.allclose(view.grid("layers"), np.linspace(0, 1, 6)) and len(view.grid("lr")) == 25
    # The trial itself is known better than what nobody tried.
    column = int(space.parameters["kind"].code(best.params["kind"]))
    assert std[best.params["layers"] - 1, column] == pytest.approx(std.min(), rel=0.5)


def test_every_panel_is_drawn() -> None:
    study, space = study_of(8), Space.from_distributions(DISTRIBUTIONS)
    observations = observe(study, space)
    view = View(SurrogateSampler("nngp", space=space).fit(study, space), space, observations, 0, 0)
    along, over = slices(view, space.names, "value").axes, pairs(view, space.names).axes
    assert [axes.get_xlabel() for axes in along] == space.names
    assert all(len(axes.get_lines()) >= 3 for axes in along)  # the mean, the trials, the best
    assert [len(axes.collections) > 0 for axes in over[:9]] == [
        row != column for row in range(3) for column in range(3)
    ]
    assert len(over) == 11  # and two scales
    parallel = parallel_coordinates(space, observations, ["value"]).axes[0]
    assert len(parallel.get_lines()) == 8
    (heights,) = [line.get_ydata() for line in parallel.get_lines()[:1]]
    assert heights[1] == pytest.approx((study.trials[0].params["layers"] - 1) / 5)
    progress = convergence(study).axes[0].get_lines()[1]
    values = [trial.value for trial in study.trials]
    assert np.array_equal(progress.get_ydata(), np.minimum.accumulate(np.array(values, dtype=float)))


def test_which_study(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with pytest.raises(ValueError, match="is no file"):
        load_study(str(path))
    assert not path.exists()
    for name in ("one", "two"):
        optuna.create_study(storage=f"sqlite:///{path}", study_name=name)
        if name == "one":
            assert load_study(str(path)).study_name == "one"
    assert load_study(str(path), "two").study_name == "two"
    for name, found in ((None, "found None"), ("three", "found 'three'")):
        with pytest.raises(ValueError, match=f"{found}; it has 'one', 'two'"):
            load_study(str(path), name)
    (tmp_path / "text.db").write_text("not a database\n" * 10)
    with pytest.raises(ValueError, match="isn't an SQLite database"):
        load_study(str(tmp_path / "text.db"))


def test_constraints_of_trials() -> None:
    """They are no objectives, and the best configuration keeps them."""
    space = Space({"x": (0.0, 1.0), "y": (0.0, 1.0)})
    study = optuna.create_study(sampler=SurrogateSampler("nngp", num_startup=9, seed=0, space=space))

    def limited(trial: optuna.Trial) -> float:
        x, y = trial.suggest_float("x", 0.0, 1.0), trial.suggest_float("y", 0.0, 1.0)
        trial.set_constraint("c", x - 0.5)
        return y - x

    study.optimize(limited, n_trials=6)
    observations = observe(study, space)
    assert observations.values.shape == (6, 2)
    axes = parallel_coordinates(space, observations, ["value"]).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["x", "y", "value"]
    assert page_of(study)


def test_what_breaks_a_constraint_is_seen_to_and_is_never_the_best() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    distributions = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}
    for x, y, excess in ((0.5, 0.5, -1.0), (0.1, 0.1, 0.2), (0.4, 0.9, 0.0), (0.9, 0.1, -0.5)):
        trial = study.ask(distributions)
        trial.set_constraint("size", excess)
        study.tell(trial, [x, y])
    finished, best, broken = convergence(study).axes[0].get_lines()
    assert finished.get_ydata().tolist() == [0.5, 0.4, 0.9] and best.get_ydata().tolist() == [0.5, 0.4, 0.4]
    assert broken.get_xydata().tolist() == [[1, 0.1]] and broken.get_label() == "breaks a constraint"
    others, front, broken = trade_offs(study).axes[0].get_lines()
    assert len(others.get_xydata()) == 0 and len(front.get_xydata()) == 3
    assert broken.get_xydata().tolist() == [[0.1, 0.1]]
    page = page_of(study)
    assert page.words.count("size ≤ 0") == 2 and page.words.count("-0.5") == 2  # of the front and of all trials
