import dataclasses
import os
import signal
import warnings
from pathlib import Path

import joblib
import pytest
import torch

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import (
    HMC,
    SMC,
    DeepEnsemble,
    FunctionTarget,
    MeanField,
    NetworkTarget,
    WarmStarted,
    WeightPosterior,
    run,
    run_chains,
)
from bayesnn.inference.parallel import concatenate, with_num_chains
from bayesnn.inference.sgmcmc import SGHMC, Structured

METHOD = HMC(num_chains=4, num_warmup=10, num_draws=40, num_leapfrog=2)


def normal_target(die_once_at=None, marker=None):
    """A normal density; once, when there are files enough of a checkpoint, its process is killed."""

    def log_density(p):
        folder = None if marker is None else Path(marker)
        alive = folder is not None and not (folder / "died").exists()
        if alive and len(list(folder.glob("run/group-*/draws-*"))) >= die_once_at:
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return -0.5 * p["x"].square().sum(-1)

    def initial(count, generator):
        return {"x": torch.randn(count, 3, generator=generator, dtype=torch.float64)}

    return FunctionTarget(log_density, initial)


def assert_equal(first, second):
    assert first.num_chains == second.num_chains
    for part in ("parameters", "statistics"):
        for name, values in getattr(first, part).items():
            assert torch.equal(values, getattr(second, part)[name]), name


def sequential(num_groups):
    with joblib.parallel_config(backend="sequential"):
        return run_chains(METHOD, normal_target(), num_groups=num_groups, seed=1)


def test_workers_give_the_draws_of_this_process():
    posterior = run_chains(METHOD, normal_target(), num_groups=2, seed=1)
    assert posterior.num_chains == 4 and len(posterior) == 160
    assert posterior.statistics["acceptance"].shape == (40, 4)
    assert_equal(posterior, sequential(2))
    assert not torch.equal(
        posterior.by_chain(posterior.parameters["x"])[0], posterior.by_chain(posterior.parameters["x"])[2]
    )


def test_networks_travel_to_workers():
    X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(10, 2)
    data = Data(X, X.sum(-1, keepdim=True))
    target = NetworkTarget(
        networks.mlp(2, 1, hidden=(3,)), likelihoods.Gaussian(), priors.Normal(), data, torch.ones(1, 1)
    )
    method = WarmStarted(HMC(num_chains=3, num_warmup=5, num_draws=4, num_leapfrog=2), DeepEnsemble(num_steps=5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = run_chains(method, target, num_groups=2)
        with joblib.parallel_config(backend="sequential"):
            assert_equal(posterior, run_chains(method, target, num_groups=2))
    assert posterior.num_chains == 3


def test_a_killed_worker_costs_only_time(tmp_path):
    target = normal_target(4, tmp_path)
    with pytest.warns(UserWarning, match="a worker died"):
        posterior = run_chains(METHOD, target, num_groups=2, seed=1, checkpoint=tmp_path / "run", checkpoint_every=5)
    assert (tmp_path / "died").exists()
    assert_equal(posterior, sequential(2))


def test_a_killed_dask_worker_costs_only_time(tmp_path):
    distributed = pytest.importorskip("distributed")
    target = normal_target(4, tmp_path)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        posterior = run_chains(METHOD, target, num_groups=2, seed=1, checkpoint=tmp_path / "run", checkpoint_every=5)
    assert (tmp_path / "died").exists()
    assert_equal(posterior, sequential(2))


def test_chains_of_methods_that_wrap_a_sampler():
    method = WarmStarted(Structured(SGHMC(num_chains=8)))
    assert with_num_chains(method, 3).num_chains == 3 and method.num_chains == 8
    assert with_num_chains(method, 8) == method


@pytest.mark.parametrize("num_groups", [0, 5])
def test_more_groups_than_chains(num_groups):
    with pytest.raises(ValueError, match="num_groups must lie between 1 and the method's 4 chains"):
        run_chains(METHOD, normal_target(), num_groups=num_groups)


@pytest.mark.parametrize("method", [SMC(), DeepEnsemble(), MeanField()])
def test_methods_without_chains(method):
    with pytest.raises(TypeError, match=f"run_chains needs a method with chains .*found {type(method).__name__}"):
        run_chains(method, normal_target(), num_groups=2)
    with pytest.raises(TypeError, match="found the class HMC"):
        run_chains(HMC, normal_target(), num_groups=2)
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1"):
        run_chains(METHOD, normal_target(), num_groups=2, checkpoint_every=0)


def test_time_budget_and_progress(capfd):
    method = dataclasses.replace(METHOD, num_chains=3, num_draws=10**6)
    with joblib.parallel_config(backend="sequential"):
        posterior = run_chains(method, normal_target(), num_groups=2, seed=1, time_budget=0.3, progress=True)
    length = len(posterior) // 3
    assert posterior.num_chains == 3 and 1 <= length < 10**6
    assert posterior.statistics["acceptance"].shape == (length, 3)
    assert capfd.readouterr().err.count("\n") == 1  # one bar
    # A chain's draws are those that it has without a limit.
    with joblib.parallel_config(backend="sequential"):
        whole = run_chains(dataclasses.replace(method, num_draws=length), normal_target(), num_groups=2, seed=1)
    assert_equal(posterior, whole)


def test_chains_of_different_lengths():
    def chain(num_chains, num_draws):
        x = torch.arange(float(num_draws)).repeat(num_chains)
        return WeightPosterior({"x": x}, num_chains, x, {"energy": x.reshape(num_chains, -1).T})

    posterior = concatenate([chain(2, 5), chain(1, 3)])
    assert posterior.num_chains == 3 and posterior.log_weights.tolist() == [0, 1, 2] * 3
    assert posterior.parameters["x"].tolist() == [0, 1, 2] * 3
    assert posterior.statistics["energy"].T.flatten().tolist() == [0, 1, 2] * 3


def test_one_group_is_a_run():
    with joblib.parallel_config(backend="sequential"):
        whole = run_chains(METHOD, normal_target(), num_groups=1, seed=5)
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(5)))
    assert_equal(whole, run(METHOD, normal_target(), seed=seed))
