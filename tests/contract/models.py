"""The models under contract, each fitted once, and the data they are fitted to."""

import functools
import warnings

import pytest
import torch
from botorch.sampling.get_sampler import get_sampler

import bayesnn
from bayesnn import BayesnnWarning, networks
from bayesnn.inference import HMC, DeepEnsemble, MeanField
from bayesnn.posteriors import FunctionDraws

NAMES = bayesnn.surrogates()
# Enough to be a model, little enough to be quick. A name without an entry is built without options.
SMALL = {"network": lambda d, p: networks.mlp(d, p, hidden=(16,))}
OPTIONS = {
    "hmc": SMALL | {"method": HMC(num_chains=2, num_warmup=60, num_draws=32, num_leapfrog=8)},
    "mean-field": SMALL | {"method": MeanField(num_steps=200, num_draws=48)},
    "ensemble": SMALL | {"method": DeepEnsemble(num_members=6, num_steps=100)},
    "pfn": {"bounds": None},
    "gp": {"bounds": None},
    "dkl": {"bounds": None, "widths": (8, 2), "num_steps": 50},
    "stack": {
        "models": [
            bayesnn.GaussianProcess(),
            bayesnn.StudentTProcess(optimise=False),
            bayesnn.BNN(method=DeepEnsemble(num_members=6, num_steps=60)),
        ],
    },
}
SPREAD = 10.0  # of the outcomes, in the user's units

each_model = pytest.mark.parametrize("name", NAMES, ids=[f"<{name}>" for name in NAMES])
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])


class EqualStack(bayesnn.Stack):
    """All members have a say here: of these data the best one would have all of it. (How weights are found: test_stacking.)"""

    def _found_weights(self, data, options):
        return torch.full((len(self._models),), 1 / len(self._models), dtype=torch.float64)


def unfitted(name):
    if name == "stack":
        return EqualStack(**OPTIONS[name])
    return bayesnn.surrogate(name, **OPTIONS.get(name, {}))


def data(num_outputs=1, dtype=torch.float64, num_rows=14):
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(num_rows, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 30.0]) - 5.0
    U = X + 5.0
    first = (4 * U[:, :1]).sin() + U[:, 1:] / 30
    noise = 0.1 * torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    Y = 50 + SPREAD * (torch.cat([first, (0.1 * U[:, 1:]).cos() - U[:, :1]], 1) + noise)
    return X.to(dtype), Y[:, :num_outputs].to(dtype)


@functools.cache
def fitted(name, num_outputs=1, dtype=torch.float64, seed=0):
    """One fit for all checks, which must leave it as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        return unfitted(name).fit(*data(num_outputs, dtype), seed=seed)


def new_points(*shape, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 30.0]) - 5.0).to(dtype)


def is_exact(name):
    """Whether its posterior is made of draws: otherwise two equal points differ by a Cholesky factor's jitter."""
    return isinstance(fitted(name).posterior(new_points(2)), FunctionDraws)


def samples(model, X, count=64, **options):
    posterior = model.posterior(X, **options)
    return get_sampler(posterior, torch.Size([count]), seed=3)(posterior).detach()


def close(found, expected, rtol=1e-8, atol=1e-6 * SPREAD):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def predictions(model, dtype=torch.float64):
    X = new_points(5, dtype=dtype)
    p, posterior = model.predict(X), model.posterior(X)
    return [p.mean, p.variance, p.quantile(0.2), posterior.mean, posterior.variance, samples(model, X)]
