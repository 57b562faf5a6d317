"""The surrogate chosen by held-out scores: which one, when anew, what is written down."""

import optuna
import pytest
import torch

import bayesnn
from bayesnn.bo import AutoSurrogate, SurrogateSampler, minimize
from bayesnn.bo.auto import num_scored
from bayesnn.bo.study import quiet_optuna
from bayesnn.evidence import choose, log_scores
from bayesnn.registry import _ENTRIES, register


class FailingCandidate(bayesnn.Model):
    def _fit(self, data, outcome_scale, **options):
        raise ArithmeticError("not today")


@pytest.fixture
def failing():
    register("failing", FailingCandidate)
    yield "failing"
    del _ENTRIES["failing"]


def data(num_rows):
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(num_rows, 2, generator=generator, dtype=torch.float64)
    return X, (6 * X[:, :1]).sin() + 0.1 * torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)


def test_when_scores_are_refreshed():
    sizes = [num_scored(n) for n in range(1, 120)]
    assert sorted(set(sizes)) == [0, 10, 15, 22, 33, 50, 75, 113]
    assert all(size <= n for n, size in enumerate(sizes, 1))
    assert [num_scored(n) for n in (9, 10, 14, 15, 49, 50)] == [0, 10, 10, 15, 33, 50]


def test_the_choice_is_that_of_the_first_rows():
    X, Y = data(14)
    auto = AutoSurrogate(["pfn", "gp"], num_folds=2)
    selection = auto.select(X, Y)
    models = {name: bayesnn.surrogate(name) for name in ("pfn", "gp")}
    scores = log_scores(models, X[:10], Y[:10], num_folds=2)
    assert selection.num_rows == 10 and selection.name == choose(scores, "gp")
    assert all(torch.equal(selection.scores.by_row[name], scores.by_row[name]) for name in models)
    # Nothing but the first rows counts: not what follows, not what came before, not the seed.
    assert auto.select(X[:10], Y[:10]) is selection
    assert auto.select(X[:13], torch.cat([Y[:10], 100 + Y[10:13]])) is selection
    again = AutoSurrogate(["pfn", "gp"], num_folds=2)
    again.select(*(values + 1e-3 for values in data(12)))
    found = again.select(X, Y)
    assert found.name == selection.name and torch.equal(found.scores.by_row["gp"], scores.by_row["gp"])
    # The chosen one is fitted to all rows.
    assert len(auto(X, Y).train_targets) == 14
    few = auto.select(X[:9], Y[:9])
    assert few == ("gp", 0, None) and auto.record(X[:9], Y[:9])["surrogate_scores"] == {}


def test_the_model_that_made_the_data_is_chosen():
    """A smooth function, and noise: a lengthscale that is known to be tiny is the truth there, an estimated one isn't."""
    register("white", lambda: bayesnn.GaussianProcess(bounds=(0.0, 1e-6), optimise=False))
    try:
        generator = torch.Generator().manual_seed(1)
        X = torch.rand(50, 2, generator=generator, dtype=torch.float64)
        smooth = (6 * X[:, :1]).sin() + X[:, 1:]
        noise = torch.randn(50, 1, generator=generator, dtype=torch.float64)
        for prefer in ("gp", "white"):
            auto = AutoSurrogate(["white", "gp"], prefer=prefer, num_folds=3)
            assert auto.select(X, smooth).name == "gp" and auto.select(X, noise).name == "white"
    finally:
        del _ENTRIES["white"]


def test_a_failing_candidate_is_left_out_and_recorded(failing):
    X, Y = data(10)
    auto = AutoSurrogate([failing, "gp"], prefer=failing, num_folds=2)
    record = auto.record(X, Y)
    assert record["surrogate"] == "gp" and record["surrogate_scored_on"] == 10
    assert record["surrogate_scores"]["failing"] == {"failure": "ArithmeticError: not today"}
    assert record["surrogate_scores"]["gp"].keys() == {"mean", "standard_error"}
    assert isinstance(auto(X, Y), bayesnn.GaussianProcess)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"candidates must be among .*gp.*, found nonsense"):
        AutoSurrogate(["gp", "nonsense"])
    with pytest.raises(ValueError, match="prefer must be one of the candidates pfn, found 'gp'"):
        AutoSurrogate(["pfn"])


def objective(x):
    return (x["u"] - 0.3) ** 2 + x["v"]


def test_in_a_search_and_after_a_restart(tmp_path):
    space = {"u": (0.0, 1.0), "v": (0.0, 1.0)}
    options = {"space": space, "num_startup": 9, "num_restarts": 1, "raw_samples": 16, "num_samples": 16}

    def run(num_trials, storage):
        with quiet_optuna():
            sampler = SurrogateSampler(AutoSurrogate(["pfn", "gp"], num_folds=2), **options)
            study = optuna.create_study(
                storage=storage, study_name="s", sampler=sampler, load_if_exists=storage is not None
            )
            study.optimize(lambda trial: objective({n: trial.suggest_float(n, 0, 1) for n in space}), num_trials)
        return study.trials

    whole = run(12, None)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    run(11, storage)
    resumed = run(1, storage)
    assert [trial.params for trial in whole] == [trial.params for trial in resumed]
    first, *_, last = whole[9:]
    assert first.user_attrs["surrogate"] == "gp" and first.user_attrs["surrogate_scored_on"] == 0
    for trial in (last, resumed[-1]):
        assert trial.user_attrs["surrogate"] in ("pfn", "gp") and trial.user_attrs["surrogate_scored_on"] == 10
        assert set(trial.user_attrs["surrogate_scores"]) == {"pfn", "gp"}


def test_by_name():
    assert SurrogateSampler("auto").surrogate_name == "auto"
    result = minimize(objective, {"u": (0.0, 1.0), "v": (0.0, 1.0)}, surrogate="auto", num_trials=4, num_startup=3)
    assert len(result.history) == 4
