"""Where evaluations fail, by classification; what that does to acquisition functions."""

from __future__ import annotations

import pytest
import torch
from botorch.acquisition import AcquisitionFunction
from botorch.models import SingleTaskGP
from torch import Tensor
from torch.distributions import Normal

from bayesnn.bo import Space, suggest
from bayesnn.bo.feasibility import IfItSucceeds, SuccessModel

SPACE = Space({"x": (0.0, 1.0), "kind": ["a", "b"]})


def success() -> SuccessModel:
    codes = SPACE.sobol(24, seed=0)
    fails = (codes[:, 0] > 0.6) & (codes[:, 1] == 0)
    found = SuccessModel.of(SPACE, codes[~fails], codes[fails])
    assert found is not None
    return found


def test_probability_of_success_follows_what_failed() -> None:
    model = success()
    at = SPACE.codes([{"x": 0.9, "kind": "a"}, {"x": 0.9, "kind": "b"}, {"x": 0.1, "kind": "a"}])
    probability = model.log_probability(at).exp()
    assert probability[0] < 0.3 and probability[1] > 0.7 and probability[2] > 0.7
    assert torch.equal(model.log_probability(at.expand(4, 3, 2))[2], model.log_probability(at))
    # MacKay's approximation against quadrature.
    posterior = model.model.posterior(SPACE.encode(at).unsqueeze(-2))
    mean = (posterior.mean[..., 0, 1] - posterior.mean[..., 0, 0]).detach()
    std = posterior.variance[..., 0, :].sum(-1).sqrt().detach()
    levels = Normal(0.0, 1.0).icdf((torch.arange(2000).double() + 0.5) / 2000)
    exact = (mean[:, None] + std[:, None] * levels).sigmoid().mean(-1)
    torch.testing.assert_close(probability.detach(), exact, atol=0.02, rtol=0)


def test_too_few_of_either_kind_say_nothing() -> None:
    codes = SPACE.sobol(9, seed=0)
    assert SuccessModel.of(SPACE, codes[:7], codes[7:]) is None
    assert SuccessModel.of(SPACE, codes[:2], codes[2:]) is None


class Flat(AcquisitionFunction):
    def forward(self, X: Tensor) -> Tensor:
        return 0.5 * X[..., 0, 0]


def test_logarithms_are_added_and_products_taken() -> None:
    model, codes = success(), SPACE.sobol(5, seed=1)
    flat, log_probability = Flat(model.model), model.log_probability(codes)
    added = IfItSucceeds(flat, model, "lognei")(codes.unsqueeze(-2))
    torch.testing.assert_close(added, 0.5 * codes[:, 0] + log_probability)
    product = IfItSucceeds(flat, model, "kg")(codes.unsqueeze(-2))
    torch.testing.assert_close(product, 0.5 * codes[:, 0] * log_probability.exp())


@pytest.mark.parametrize("acquisition", ["lognei", "thompson"])
def test_suggestions_keep_away_from_failures(acquisition: str) -> None:
    """The objective rises towards where everything fails."""
    space = Space({"x": (0.0, 1.0)})
    codes = space.sobol(32, seed=0)
    tried, failed = codes[codes[:, 0] <= 0.6], codes[codes[:, 0] > 0.6]
    model = SingleTaskGP(tried, tried**2)
    model.covar_module.lengthscale = 1.0
    model.likelihood.noise = 1e-4
    model.eval()
    options = {"direction": "maximize", "num_restarts": 2, "raw_samples": 32, "acquisition": acquisition}
    (careless,) = suggest(model, space, **options)  # type: ignore[arg-type]
    (careful,) = suggest(model, space, failed=space.configurations(failed), **options)  # type: ignore[arg-type]
    assert careless["x"] > 0.8 and careful["x"] < 0.7
