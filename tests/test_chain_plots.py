"""Plots of chains draw each chain's own numbers."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from bayesnn import BNN, networks, plots
from bayesnn.inference import HMC, WeightPosterior

mpl.use("Agg")
CHAINS, DRAWS = 3, 40


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def posterior(**statistics):
    generator = torch.Generator().manual_seed(0)
    draws = {
        "w": torch.randn(CHAINS * DRAWS, 2, 3, generator=generator),
        "scale": torch.randn(CHAINS * DRAWS, generator=generator),
    }
    return WeightPosterior(draws, CHAINS, statistics=statistics)


def test_trace_has_a_line_for_each_chain():
    draws = posterior()
    axes = plots.trace(draws, "w[1, 2]")
    assert axes.get_ylabel() == "w[1, 2]" and len(axes.lines) == CHAINS
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), draws.parameters["w"][DRAWS : 2 * DRAWS, 1, 2])
    scalar = plots.trace(draws, "scale")
    np.testing.assert_array_equal(scalar.lines[2].get_ydata(), draws.parameters["scale"][2 * DRAWS :])
    own = plots.trace(draws, draws.parameters["scale"].exp(), ax=scalar)
    assert own is scalar and len(own.lines) == 2 * CHAINS and own.get_legend_handles_labels()[1][0] == "chain 1"


def test_ranks_count_each_chain_s_draws():
    values = torch.arange(float(CHAINS * DRAWS))  # one chain above the other
    axes = plots.rank(posterior(), values, num_bins=CHAINS)
    counts = np.array([patch.get_data().values for patch in axes.patches])
    np.testing.assert_array_equal(counts, DRAWS * np.eye(CHAINS))
    assert axes.lines[0].get_ydata()[0] == pytest.approx(DRAWS / CHAINS)
    mixed = plots.rank(posterior(), values.reshape(DRAWS, CHAINS).T.flatten(), num_bins=10)
    assert all(set(patch.get_data().values) == {4} for patch in mixed.patches)


def test_energies_and_their_changes_are_densities():
    slow = torch.randn(DRAWS, CHAINS, generator=torch.Generator().manual_seed(1)).cumsum(0)
    axes = plots.energy(posterior(energy=slow))
    spread, changes = (patch.get_data() for patch in axes.patches)
    for density in (spread, changes):
        assert (density.values * np.diff(density.edges)).sum() == pytest.approx(1)
    deviation = [
        np.sqrt((d.values * np.diff(d.edges) * ((d.edges[1:] + d.edges[:-1]) / 2) ** 2).sum())
        for d in (spread, changes)
    ]
    assert deviation[0] == pytest.approx(float((slow - slow.mean(0)).square().mean().sqrt()), rel=0.05)
    assert deviation[1] == pytest.approx(float(slow.diff(dim=0).square().mean().sqrt()), rel=0.05)


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="one of w, scale, found 'b'"):
        plots.trace(posterior(), "b")
    with pytest.raises(ValueError, match=r"entry of w, of shape \(2, 3\), found 'w\[2, 0\]'"):
        plots.rank(posterior(), "w[2, 0]")
    with pytest.raises(ValueError, match=r"'w', of shape \(2, 3\)"):
        plots.trace(posterior(), "w")
    with pytest.raises(ValueError, match=r"\(120,\).*found \(7,\)"):
        plots.trace(posterior(), torch.zeros(7))
    with pytest.raises(ValueError, match=r"num_bins .* 120, found 121"):
        plots.rank(posterior(), "scale", num_bins=121)
    with pytest.raises(ValueError, match="found acceptance"):
        plots.energy(posterior(acceptance=torch.ones(DRAWS, CHAINS)))
    with pytest.raises(ValueError, match=r"found energies of shape \(1, 3\)"):
        plots.energy(posterior(energy=torch.ones(1, CHAINS)))


def test_a_fitted_network_is_drawn():
    X = torch.linspace(-1, 1, 10, dtype=torch.float64).unsqueeze(-1)
    model = BNN(networks.mlp(1, 1, hidden=(3,)), method=HMC(num_chains=2, num_warmup=30, num_draws=20, num_leapfrog=4))
    model.fit(X, X.sin())
    assert len(plots.trace(model, "likelihood.log_noise_std[0, 0]").lines) == 2
    assert len(plots.rank(model, "network.layers.0.bias[1]").patches) == 2
    assert len(plots.energy(model).patches) == 2
