import numpy as np
import pytest
import torch

from bayesnn import networks
from bayesnn.inference import WeightPosterior


def weights(count=12, **options):
    network = networks.mlp(2, 3, hidden=(4,)).double()
    generator = torch.Generator().manual_seed(0)
    parameters = {
        "network." + name: torch.randn(count, *p.shape, generator=generator, dtype=torch.float64)
        for name, p in network.named_parameters()
    }
    parameters["likelihood.log_noise_std"] = torch.randn(count, 1, 3, generator=generator, dtype=torch.float64)
    return network, WeightPosterior(parameters, **options)


def test_draws_are_functions_whatever_the_batch():
    network, posterior = weights()
    X = torch.randn(5, 4, 2, dtype=torch.float64)
    found = posterior.posterior(network, X)
    assert found.values.shape == (5, 12, 4, 3)
    for s in range(12):
        own = {name.removeprefix("network."): v[s] for name, v in posterior.parameters.items() if "network" in name}
        torch.testing.assert_close(found.values[:, s], torch.func.functional_call(network, own, (X,)))
    assert posterior.posterior(network, X[0]).values.shape == (12, 4, 3)


def test_thinning_is_even():
    _, posterior = weights(12, num_chains=3)
    thinned = posterior.draws(3)
    name = "likelihood.log_noise_std"
    # The middle of each chain.
    assert torch.equal(thinned.parameters[name], posterior.parameters[name][[2, 6, 10]])
    assert posterior.draws(12) is posterior and posterior.draws(50) is posterior


def test_weighted_draws_are_resampled_in_proportion():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    own = WeightPosterior(
        {"x": torch.arange(4.0)[:, None].repeat_interleave(25, 0)}, log_weights=(p / 25).repeat_interleave(25).log() + 5
    )
    thinned = own.draws(50)
    assert thinned.log_weights is None
    counts = torch.bincount(thinned.parameters["x"].flatten().long(), minlength=4)
    assert ((counts - 50 * p).abs() <= 1).all()
    two = WeightPosterior({"x": torch.arange(4.0)[:, None]}, log_weights=torch.tensor([0.5, 0.0, 0.5, 0.0]).log())
    assert two.draws(2).parameters["x"].flatten().tolist() == [0, 2]


def test_diagnostics_tell_good_chains_from_bad():
    generator = torch.Generator().manual_seed(0)
    good = torch.randn(4 * 500, 3, generator=generator)
    _, posterior = weights(2000, num_chains=4, statistics={"acceptance": torch.tensor([0.5, 0.7])})
    found = posterior.diagnostics(good)
    assert found["r_hat"] < 1.01 and 1500 < found["ess_bulk"] < 2600 and found["acceptance"] == pytest.approx(0.6)
    apart = good + torch.arange(4.0).repeat_interleave(500)[:, None] * torch.tensor([0.0, 0.0, 1.0])
    assert posterior.diagnostics(apart)["r_hat"] > 1.5  # the worst place counts


def test_arviz_gets_chains_and_draws():
    _, posterior = weights(12, num_chains=3, statistics={"energy": torch.arange(12.0).reshape(4, 3)})
    inference_data = posterior.to_arviz()
    name = "likelihood.log_noise_std"
    np.testing.assert_array_equal(inference_data.posterior[name].values[1], posterior.parameters[name][4:8])
    np.testing.assert_array_equal(inference_data.sample_stats["energy"].values[1], [1, 4, 7, 10])


def test_energies_and_divergences():
    energy = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    diverging = torch.zeros(30, 2)
    diverging[3:5, 1] = 0.5  # of the steps since the draw before
    _, posterior = weights(60, num_chains=2, statistics={"energy": energy, "diverging": diverging})
    found = posterior.diagnostics(torch.randn(60, 1, generator=torch.Generator().manual_seed(1)))
    fractions = energy.diff(dim=0).square().sum(0) / (energy - energy.mean(0)).square().sum(0)  # Betancourt 2016, eq. 5
    assert found["e_bfmi"] == pytest.approx(float(fractions.min()), rel=0.05)
    assert found["num_diverging"] == 2
    flags = posterior.to_arviz().sample_stats["diverging"]
    assert flags.dtype == bool and flags.values[1].sum() == 2 and flags.values[0].sum() == 0


def test_summaries_of_named_parameters():
    _, posterior = weights(400, num_chains=4)
    table = posterior.summary("likelihood.*")
    assert list(table.index) == [f"likelihood.log_noise_std[0, {i}]" for i in range(3)]
    values = posterior.parameters["likelihood.log_noise_std"]
    np.testing.assert_allclose(table["mean"], values.mean(0).flatten(), atol=6e-4)  # three digits are shown
    assert len(posterior.summary()) == sum(v[0].numel() for v in posterior.parameters.values())
    with pytest.raises(ValueError, match="patterns must match one of network"):
        posterior.summary(["nothing"])


def test_weighted_draws_in_diagnostics():
    # Independent draws, each with weight 4 or 0: a quarter of them is left.
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(2000, generator=generator, dtype=torch.float64)
    log_weights = torch.where(torch.arange(2000) % 4 == 0, 0.0, -torch.inf)
    posterior = WeightPosterior({"x": values}, num_chains=2, log_weights=log_weights)
    own = posterior.to_arviz().posterior["x"].values
    assert set(own[1].tolist()) == set(values[1000:][::4].tolist())
    assert 350 < posterior.diagnostics(values[:, None])["ess_bulk"] < 650
    skewed = WeightPosterior({"x": values}, num_chains=2, log_weights=torch.arange(2000.0))
    with pytest.raises(ValueError, match="different total weights"):
        skewed.to_arviz()


def test_fixed_parameters_are_kept_once():
    _, posterior = weights(12, num_chains=3)
    sampled = {"likelihood.log_noise_std": posterior.parameters["likelihood.log_noise_std"]}
    fixed = {name: values[0] for name, values in posterior.parameters.items() if name not in sampled}
    own = WeightPosterior(sampled, num_chains=3).completed(fixed)
    assert set(own.parameters) == set(posterior.parameters) and set(own.sampled) == set(sampled)
    assert own.parameters["network.layers.0.weight"].stride(0) == 0
    assert set(own.draws(3).fixed) == set(fixed) and own.num_chains == 3
    assert set(own.to_arviz().constant_data) == set(fixed)
