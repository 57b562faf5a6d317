"""Held-out scores against explicit refits and the closed form, and choices made by them."""

import math

import pytest
import torch
from torch.distributions import Normal

from bayesnn import GaussianProcess, Model, likelihoods
from bayesnn.evidence import Scores, choose, folds, log_scores
from bayesnn.inference.amortized import PFN


class NeverFitted(Model):
    """Fails at every fit."""

    def _fit(self, data, outcome_scale, **options):
        raise ArithmeticError("not today")


def data(num_rows=18, num_outputs=1):
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(num_rows, 2, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(num_rows, num_outputs, generator=generator, dtype=torch.float64)
    return X, 5 + 3 * ((4 * X[:, :1]).sin() + torch.arange(num_outputs) * X[:, 1:] + noise)


def fixed(**options):
    return GaussianProcess(likelihoods.Gaussian(noise_std=0.5), bounds=(0.0, 1.0), optimise=False, **options)


def test_folds_are_a_partition():
    for num_rows, num_folds, sizes in ((10, 3, [4, 3, 3]), (4, 10, [1, 1, 1, 1]), (7, 2, [4, 3])):
        found = folds(num_rows, num_folds, seed=1)
        assert [len(rows) for rows in found] == sizes
        assert torch.cat(found).sort().values.tolist() == list(range(num_rows))
    assert not torch.equal(torch.cat(folds(30, 3, 0)), torch.cat(folds(30, 3, 1)))
    with pytest.raises(ValueError, match="num_folds must be"):
        folds(10, 1, 0)


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_scores_equal_explicit_refits(num_outputs):
    X, Y = data(num_outputs=num_outputs)
    scores = log_scores({"gp": GaussianProcess(), "fixed": fixed()}, X, Y, num_folds=3, seed=4)
    for rows in folds(len(X), 3, seed=4):
        kept = [row for row in range(len(X)) if row not in rows.tolist()]
        for name, model in (("gp", GaussianProcess()), ("fixed", fixed())):
            expected = model.fit(X[kept], Y[kept], seed=4).predict(X[rows]).log_prob(Y[rows])
            assert torch.equal(scores.by_row[name][rows], expected)
    by_row = scores.by_row["gp"]
    assert scores.mean("gp") == pytest.approx(float(by_row.sum() / 18))
    assert scores.standard_error("gp") == pytest.approx(float((by_row - by_row.mean()).square().sum() / 17 / 18) ** 0.5)
    assert scores.failures == {}


def test_leave_one_out_equals_the_closed_form():
    """Rasmussen and Williams (2006), equations 5.10 to 5.12; outcomes as they are, so that no fold scales by its own."""
    X, _ = data()
    y = torch.randn(18, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    class Unscaled(GaussianProcess):
        def fit(self, X, Y, **options):
            """The rows' own mean and deviation would be those of the fold."""
            super().fit(X, Y, **options)
            self._outcomes = type(self._outcomes)(torch.zeros(1, 1).double(), torch.ones(1, 1).double())
            data = type(self._data)(self._data.X, Y)
            self._fixed = {"log_noise_std": torch.full((1, 1), math.log(0.5)).double()}
            self._gp, self._data = self._build(data, self._fixed).eval().requires_grad_(False), data
            return self

    model = Unscaled(likelihoods.Gaussian(noise_std=0.5), bounds=(0.0, 1.0), optimise=False)
    found = log_scores({"gp": model}, X, y, num_folds=100).by_row["gp"]
    kernel = model.fit(X, y)._gp.covar_module(X).to_dense()
    inverse = torch.linalg.inv(kernel + 0.25 * torch.eye(18, dtype=torch.float64))
    precision = inverse.diagonal()
    mean = y.squeeze(1) - (inverse @ y).squeeze(1) / precision
    expected = Normal(mean, precision.rsqrt()).log_prob(y.squeeze(1))
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_model_that_fails_is_minus_infinity_and_says_why():
    X, Y = data()
    scores = log_scores({"never": NeverFitted(), "gp": fixed()}, X, Y, num_folds=3)
    assert scores.failures == {"never": "ArithmeticError: not today"}
    assert scores.mean("never") == -math.inf and math.isfinite(scores.mean("gp"))
    assert choose(scores) == choose(scores, "never") == choose(scores, "gp") == "gp"
    with pytest.raises(RuntimeError, match=r"no model could predict .*: never: ArithmeticError: not today"):
        choose(log_scores({"never": NeverFitted()}, X, Y))


def test_settings_and_data_are_checked():
    X, Y = data()
    with pytest.raises(ValueError, match="at least two rows"):
        log_scores({"gp": fixed()}, X[:1], Y[:1])
    with pytest.raises(ValueError, match="X has 5, Y has 18"):
        log_scores({"gp": fixed()}, X[:5], Y)
    with pytest.raises(ValueError, match=r"prefer must be one of gp, found 'pfn'"):
        choose(log_scores({"gp": fixed()}, X, Y, num_folds=2), "pfn")


def test_the_preferred_is_kept_unless_another_is_clearly_better():
    base = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    clearly = base + torch.tensor([0.5, 0.6, 0.5, 0.6])  # 0.55 +- 0.03
    unclearly = base + torch.tensor([6.0, -2.0, -1.0, -0.8])  # 0.55 +- 1.8
    scores = Scores({"gp": base, "b": unclearly}, {})
    assert choose(scores, "gp") == "gp" and choose(scores) == "b"
    assert scores.difference("b", "gp") == pytest.approx((0.55, 1.8355), abs=1e-4)
    assert choose(Scores({"gp": base, "b": unclearly, "c": clearly}, {}), "gp") == "c"


def test_the_model_that_made_the_data_is_chosen():
    """A smooth function and a rough one, for lengthscales that are known."""
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(60, 2, generator=generator, dtype=torch.float64)
    kernel = fixed().fit(*data())._gp.covar_module(X).to_dense() + 0.01 * torch.eye(60, dtype=torch.float64)
    Y = torch.linalg.cholesky(kernel) @ torch.randn(60, 1, generator=generator, dtype=torch.float64)
    noise = likelihoods.Gaussian(noise_std=0.1)
    truth, rough = (GaussianProcess(noise, bounds=(0.0, high), optimise=False) for high in (1.0, 0.1))
    scores = log_scores({"rough": rough, "truth": truth}, X, Y, num_folds=5)
    assert choose(scores, "rough") == choose(scores, "truth") == choose(scores) == "truth"


def test_any_family_can_be_scored():
    X, Y = data()
    scores = log_scores({"pfn": PFN("gp-small"), "gp": GaussianProcess()}, X, Y, num_folds=2)
    assert not scores.failures and all(torch.isfinite(found).all() for found in scores.by_row.values())
