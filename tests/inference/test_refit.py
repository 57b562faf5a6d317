"""Fits that go on from earlier ones on fewer data, against exact answers for all of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from oracles import LinearGaussian, effective_sizes, with_intercept, z_score
from torch import Tensor

from bayesnn import BNN, NotFittedError, likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import HMC, NUTS, SGLD, DeepEnsemble, MeanField, NetworkTarget, run
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.target import Parameters

NOISE, NEW = 0.5, 25


def data() -> tuple[Tensor, Tensor]:
    """Of 40 rows the first 25 are of another line than the others: an earlier answer is far from right."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.7
    y[NEW:] += 1.0
    return X, (y + NOISE * torch.randn(40, generator=generator, dtype=torch.float64)).unsqueeze(-1)


def target(num_rows: int) -> NetworkTarget:
    """Of a linear network, on the first rows."""
    X, Y = data()
    return NetworkTarget(
        networks.mlp(2, 1, hidden=()),
        likelihoods.Gaussian(noise_std=NOISE),
        priors.Normal(scale=2.0, bias_scale=1.5),
        Data(X[:num_rows], Y[:num_rows]),
        torch.ones(1, 1, dtype=torch.float64),
    )


def continued(method: Any, seed: int) -> tuple[WeightPosterior, WeightPosterior]:
    """Fits to the first rows, and from there to all."""
    first = run(method, target(NEW), seed=seed)
    shorter, start = method.continued(target(40), first, (NEW,))
    return first, run(shorter, start, seed=seed)


def oracle(num_rows: int) -> LinearGaussian:
    X, Y = data()
    prior_std = torch.tensor([2.0 / math.sqrt(2)] * 2 + [1.5], dtype=torch.float64)
    return LinearGaussian(with_intercept(X[:num_rows]), Y[:num_rows, 0], NOISE, prior_std)


def draws(parameters: Parameters) -> Tensor:
    """(S, 3)."""
    return torch.cat([parameters[f"network.layers.0.{name}"].flatten(1) for name in ("weight", "bias")], 1)


HAMILTONIAN = {mass: HMC(8, 150, 750, mass=mass, num_leapfrog=8) for mass in ("diagonal", "low-rank", "identity")}


@pytest.mark.parametrize("name", [*HAMILTONIAN, "nuts"])
def test_chains_have_the_new_posterior(name: str) -> None:
    first, second = continued(HAMILTONIAN.get(name, NUTS(8, 100, 500)), seed=1)
    found, exact = draws(second.parameters), oracle(40)
    assert len(found) == len(first) // 5 >= 800
    assert float((oracle(NEW).mean - exact.mean).abs().max()) > 3 * float(exact.covariance[0, 0].sqrt())
    squares = (found - exact.mean).square()
    for values, truth in ((found, exact.mean), (squares, exact.covariance.diagonal())):
        sizes = effective_sizes(second, values)
        assert float(sizes.min()) > 200
        assert float(z_score(values, truth, sizes).abs().max()) < 4


def test_anchored_members_reach_the_mode_of_the_new_posterior_around_the_same_anchors() -> None:
    """In a linear network that is one point for each member (Pearce et al. 2020, equation 9), wherever it begins."""
    first, second = continued(DeepEnsemble(5, 3000, 0.05, held_out=0.0, anchored=True), seed=3)
    anchors = draws(target(40).initial(5, torch.Generator().manual_seed(3)))
    exact = oracle(40)
    pull = anchors / torch.as_tensor(exact.prior_std).square()
    modes = (exact.covariance @ ((exact.X.mT @ exact.y) / NOISE**2 + pull).mT).mT
    torch.testing.assert_close(draws(second.parameters), modes, atol=2e-3, rtol=0)
    assert float((draws(first.parameters) - modes).abs().min()) > 0.01


def test_a_mean_field_fit_reaches_the_closest_gaussian() -> None:
    _, second = continued(MeanField(num_steps=2500, num_draws=4000, num_samples=8), seed=0)
    found, exact = draws(second.parameters), oracle(40)
    torch.testing.assert_close(found.mean(0), exact.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(found.var(0), exact.mean_field_var, atol=0, rtol=0.12)


def test_members_keep_their_held_out_rows() -> None:
    """None has been trained on before, so that they still say how well it predicts."""
    X, Y = data()
    masks: list[Tensor] = []

    def remember(index: int, state: Any, info: Any) -> None:
        masks.append(state.held_out)

    model = BNN(method=DeepEnsemble(4, 10)).fit(X[:NEW], Y[:NEW], seed=2, callbacks=[remember])
    between = model.refit(X[:36], Y[:36], callbacks=[remember])
    kept = masks[-1]
    assert torch.equal(masks[0], kept[:, :NEW]) and kept.shape == (4, 36)
    assert masks[0].sum(-1).tolist() == [5] * 4 and kept.sum(-1).tolist() == [5 + 2] * 4
    between.refit(X, Y, callbacks=[remember])
    assert torch.equal(masks[-1][:, :36], kept) and not masks[-1][:, 36:].any()  # too few to hold out of


def test_methods_that_cannot_go_on_begin_anew() -> None:
    X, Y = data()
    method = SGLD(num_chains=2, num_burn_in=20, num_draws=20)
    again = BNN(method=method).fit(X[:NEW], Y[:NEW], seed=4).refit(X, Y)
    assert torch.equal(again.predict(X).mean, BNN(method=method).fit(X, Y, seed=4).predict(X).mean)


def test_saved_models_go_on_the_same(tmp_path: Path) -> None:
    X, Y = data()
    first = BNN(method=DeepEnsemble(3, 20, anchored=True)).fit(X[:NEW], Y[:NEW], seed=7)
    first.save(tmp_path / "model.safetensors")
    second, other = first.refit(X, Y), BNN.load(tmp_path / "model.safetensors").refit(X, Y)
    assert torch.equal(second.predict(X).mean, other.predict(X).mean)
    assert len(second.train_targets) == 40 and len(first.train_targets) == NEW


def test_what_is_refused() -> None:
    X, Y = data()
    model = BNN(method=DeepEnsemble(2, 5))
    with pytest.raises(NotFittedError):
        model.refit(X, Y)
    model.fit(X, Y)
    for fewer in (X[:NEW], X[:, :1]):
        with pytest.raises(ValueError, match="X must have 40 rows or more, and 2 columns, as before; found"):
            model.refit(fewer, Y[: len(fewer)])
    with pytest.raises(ValueError, match="X must begin with the rows that this model was fitted to, in the same order"):
        model.refit(X.flip(0), Y.flip(0))
    with pytest.raises(ValueError, match=r"Y must have 1 column\(s\), as before; found 2"):
        model.refit(X, torch.cat([Y, Y], -1))
    with pytest.raises(TypeError, match="X must hold numbers"):
        model.refit("none", Y)


def test_units_are_those_of_the_first_fit() -> None:
    """So that it goes on from the function that it was, though a far row has come; whatever holds the data, in any dtype."""
    X, Y = data()
    model = BNN(method=DeepEnsemble(2, 40)).fit(X, Y)
    far = torch.cat([X, X.new_full((1, 2), 50.0)]), torch.cat([Y, Y.new_full((1, 1), 300.0)])
    found = model.refit(*far)
    assert torch.equal(found._inputs.loc, model._inputs.loc) and torch.equal(
        found._outcomes.scale, model._outcomes.scale
    )
    for given in ([each.float() for each in far], [pd.DataFrame(each.numpy()) for each in far]):
        assert model.refit(*given).predict(X).mean.isfinite().all()


@pytest.mark.parametrize(
    "method", [HMC(2, 30, 1), HMC(2, 30, 5), MeanField(num_steps=30, num_draws=1)], ids=["one", "five", "mean-field"]
)
def test_few_draws_say_nothing_of_variances(method: Any) -> None:
    X, Y = data()
    model = BNN(method=method).fit(X[:20], Y[:20])
    assert model.refit(X[:30], Y[:30]).refit(X, Y).predict(X).mean.isfinite().all()
