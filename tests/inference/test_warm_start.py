import pickle

import pytest
import torch

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import HMC, DeepEnsemble, FunctionTarget, MeanField, NetworkTarget, WarmStarted, run
from bayesnn.inference.sgmcmc import SGHMC
from bayesnn.inference.warm_start import StartingAt

ENSEMBLE = DeepEnsemble(num_steps=60, held_out=0.0)
SAMPLERS = {
    "hmc": HMC(num_chains=3, num_warmup=20, num_draws=20, num_leapfrog=4),
    "sghmc": SGHMC(num_chains=3, num_burn_in=20, num_draws=10, thinning=2, step_size=1e-3, batch_size=8),
}


def target():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    data = Data(X, (2 * X.sum(-1, keepdim=True)).sin())
    return NetworkTarget(
        networks.mlp(2, 1, hidden=(8,)), likelihoods.Gaussian(), priors.Normal(), data, torch.ones(1, 1)
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_chains_begin_at_the_members(name):
    seen = []
    method = WarmStarted(SAMPLERS[name], ENSEMBLE)
    posterior = run(method, target(), seed=2, callbacks=[lambda index, state, info: seen.append(state)])
    assert len(seen) == method.num_steps and len(posterior) == 3 * SAMPLERS[name].num_draws
    trained = seen[59]
    position = trained.sampler.point.position if name == "hmc" else trained.sampler.variables["position"]
    members = torch.cat([values.flatten(1) for values in trained.ensemble.best.values()], 1)
    assert torch.equal(position, members)
    assert posterior.num_chains == 3 and all(
        len(values) == SAMPLERS[name].num_draws for values in posterior.statistics.values()
    )


def test_a_warm_start_fits_from_the_first_draw():
    cold = HMC(num_chains=3, num_warmup=0, num_draws=5, num_leapfrog=4, initial_step_size=1e-3)
    found = {}
    for name, method in (("cold", cold), ("warm", WarmStarted(cold, DeepEnsemble(num_steps=300, held_out=0.0)))):
        posterior = run(method, target(), seed=1)
        found[name] = float(target().log_likelihood(posterior.parameters).mean())
    assert found["warm"] > found["cold"] + 10


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_resumed_equals_uninterrupted(name, share, tmp_path):
    method = WarmStarted(SAMPLERS[name], ENSEMBLE)
    whole = run(method, target(), seed=5)

    def stop(index, state, info):
        if index + 1 == int(share * method.num_steps):
            raise Stop

    options = {"seed": 5, "checkpoint": tmp_path / "run", "checkpoint_every": 3}
    with pytest.raises(Stop):
        run(method, target(), callbacks=[stop], **options)
    resumed = run(method, target(), **options)
    for part in ("parameters", "statistics"):
        for key, value in getattr(whole, part).items():
            assert torch.equal(value, getattr(resumed, part)[key]), key


def test_wrong_use():
    with pytest.raises(TypeError, match="method with chains"):
        WarmStarted(MeanField())
    for sampler in (HMC, "hmc"):
        with pytest.raises(TypeError, match=r"sampler must be a method with chains .*found"):
            WarmStarted(sampler)
    with pytest.raises(TypeError, match=r"ensemble must be a DeepEnsemble\(\), found"):
        WarmStarted(HMC(), MeanField())
    plain = FunctionTarget(lambda x: -x.square().sum(-1), lambda count, generator: torch.zeros(count, 2))
    with pytest.raises(TypeError, match="needs a NetworkTarget, found FunctionTarget"):
        run(WarmStarted(HMC()), plain)
    points = target().initial(2, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="given for 2 chains, but 3"):
        StartingAt(target(), points).initial(3, torch.Generator())


def test_given_points_go_by_their_names():
    points = target().initial(3, torch.Generator().manual_seed(0))
    straight, reverse = (StartingAt(target(), own) for own in (points, dict(reversed(points.items()))))
    first, second = (SAMPLERS["hmc"].init(own, torch.Generator()).point.position for own in (straight, reverse))
    assert torch.equal(first, second) and straight.fingerprint == reverse.fingerprint
    name = "network.layers.0.bias"
    with pytest.raises(ValueError, match=rf"{name} missing; extra unknown"):
        StartingAt(target(), {"extra": points[name]} | {own: points[own] for own in points if own != name})
    with pytest.raises(ValueError, match=rf"{name} of 3 points must have shape \(3, 8\), found \(3, 2, 4\)"):
        StartingAt(target(), points | {name: points[name].reshape(3, 2, 4)})
    with pytest.raises(ValueError, match=r"must have shape \(3, 8\), found \(2, 8\)"):
        StartingAt(target(), points | {name: points[name][:2]})
    travelled = pickle.loads(pickle.dumps(straight))
    assert torch.equal(travelled.initial(3, torch.Generator())[name], points[name])
