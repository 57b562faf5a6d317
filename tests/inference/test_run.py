import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bayesnn import likelihoods, networks, priors
from bayesnn.bnn import BNN
from bayesnn.configured import Configured
from bayesnn.data import Data
from bayesnn.inference import HMC, DeepEnsemble, MeanField, NetworkTarget, run

METHODS = {
    "hmc": HMC(num_chains=2, num_warmup=20, num_draws=20, num_leapfrog=4),
    "mean-field": MeanField(num_steps=40, num_draws=8, batch_size=7),
    "ensemble": DeepEnsemble(num_members=3, num_steps=40, batch_size=7, check_every=3),
}


def target(seed=0, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(20, 2, generator=generator, dtype=torch.float64).to(dtype)
    data = Data(X, X.sum(-1, keepdim=True).tanh())
    settings = {"network": networks.mlp(2, 1, hidden=(5,)), "prior": priors.Normal()} | options
    return NetworkTarget(settings["network"], likelihoods.Gaussian(), settings["prior"], data, torch.ones(1, 1))


class CountState(NamedTuple):
    total: Tensor
    nested: dict[str, Tensor]


class CountInfo(NamedTuple):
    draw: Tensor


@dataclass(frozen=True)
class Count(Configured):
    """Adds up random numbers."""

    num_steps: int = 10
    stop_at: int = -1

    def init(self, target, generator):
        return CountState(torch.zeros(2), {"last": torch.zeros(())})

    def step(self, target, state, generator):
        draw = torch.rand((), generator=generator)
        return CountState(state.total + draw, {"last": draw}), CountInfo(draw)

    def keep(self, state, index):
        return {"total": state.total} if index % 2 else None

    def result(self, target, state, draws, infos):
        return state, draws, infos


def assert_equal(first, second):
    assert first.parameters.keys() == second.parameters.keys()
    for group in ("parameters", "statistics"):
        for name, value in getattr(first, group).items():
            assert torch.equal(value, getattr(second, group)[name]), name


class Stop(Exception):
    pass


def stop_after(steps):
    def callback(index, state, info):
        if index + 1 == steps:
            raise Stop

    return callback


def test_what_the_loop_hands_over():
    seen = []
    state, draws, infos = run(Count(), None, seed=3, callbacks=[lambda index, state, info: seen.append((index, info))])
    assert [index for index, _ in seen] == list(range(10))
    each = torch.stack([info.draw for _, info in seen])
    torch.testing.assert_close(infos["draw"], torch.cat([each[1:2], each[2:].reshape(4, 2).mean(1)]))
    torch.testing.assert_close(state.total, each.sum().expand(2))
    torch.testing.assert_close(draws["total"][:, 0], each.cumsum(0)[1::2])
    same, _, _ = run(Count(), None, seed=3, progress=True)
    other, _, _ = run(Count(), None, seed=4)
    assert torch.equal(state.total, same.total) and not torch.equal(state.total, other.total)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("interrupted_at", [7, 31])
def test_resumed_equals_uninterrupted_bit_for_bit(name, dtype, interrupted_at, tmp_path):
    whole = run(METHODS[name], target(dtype=dtype), seed=5)
    path = tmp_path / "run.ckpt"
    with pytest.raises(Stop):
        run(
            METHODS[name],
            target(dtype=dtype),
            seed=5,
            checkpoint=path,
            checkpoint_every=5,
            callbacks=[stop_after(interrupted_at)],
        )
    steps = []
    resumed = run(
        METHODS[name],
        target(dtype=dtype),
        seed=5,
        checkpoint=path,
        checkpoint_every=5,
        callbacks=[lambda index, state, info: steps.append(index)],
    )
    assert steps[0] == interrupted_at // 5 * 5  # it did go on from the file
    assert_equal(resumed, whole)
    # A finished run's file gives the result without another step.
    steps.clear()
    assert_equal(run(METHODS[name], target(dtype=dtype), seed=5, checkpoint=path), whole)
    assert steps == []


@pytest.mark.parametrize("name", METHODS)
def test_writing_checkpoints_changes_nothing(name, tmp_path):
    assert_equal(run(METHODS[name], target(), seed=1), run(METHODS[name], target(), seed=1, checkpoint=tmp_path / "a"))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 6}, "seed"),
        ({"method": HMC(num_chains=2, num_warmup=20, num_draws=21, num_leapfrog=4)}, "method"),
        ({"method": METHODS["mean-field"]}, "method"),
        ({"target": target(seed=1)}, "target"),
        ({"target": target(dtype=torch.float32)}, "target"),
        ({"target": target(prior=priors.Normal(scale=3.0))}, "target"),
        ({"target": target(network=networks.mlp(2, 1, hidden=(5,), activation="relu"))}, "target"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changes, what, tmp_path):
    path = tmp_path / "run.ckpt"
    run(METHODS["hmc"], target(), seed=5, checkpoint=path)
    before = path.read_bytes()
    other = {"method": METHODS["hmc"], "target": target(), "seed": 5} | changes
    with pytest.raises(ValueError, match=f"belongs to another run: its {what} is"):
        run(other["method"], other["target"], seed=other["seed"], checkpoint=path)
    assert path.read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    run(Count(), None, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a complete bayesnn file"):
        run(Count(), None, checkpoint=path)


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupt_lets_the_step_finish_and_writes_the_checkpoint(name, tmp_path):
    def interrupt(index, state, info):
        if index == 13:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt, match="stopped after step 14 of 40"):
        run(METHODS[name], target(), checkpoint=path, checkpoint_every=1000, callbacks=[interrupt])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_equal(run(METHODS[name], target(), checkpoint=path), run(METHODS[name], target()))


def test_runs_in_threads():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(Count(), None)))
    thread.start()
    thread.join()
    assert torch.equal(results[0][0].total, run(Count(), None)[0].total)


SCRIPT = """
import sys
import torch
from bayesnn.bnn import BNN
from bayesnn.inference import HMC
torch.set_num_threads(1)
X = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(20, 2)
model = BNN(method=HMC(num_chains=2, num_warmup=100, num_draws=2000, num_leapfrog=8))
say = lambda index, state, info: print("started", flush=True) if index == 20 else None
model.fit(X, X.sum(-1).sin(), seed=2, checkpoint=sys.argv[1], callbacks=[say])
"""


def test_an_interrupted_process_leaves_what_another_goes_on_from(tmp_path):
    path = tmp_path / "fit.ckpt"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "started"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt: stopped after step" in errors
    reached = int(errors.split("stopped after step ")[-1].split()[0])
    X = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(20, 2)
    method, steps = HMC(num_chains=2, num_warmup=100, num_draws=2000, num_leapfrog=8), []

    def fit(checkpoint=None):
        def follow(index, state, info):
            steps.append((index, state.point.position.clone()))
            if index == reached + 20:
                raise Stop

        steps.clear()
        with pytest.raises(Stop):
            BNN(method=method).fit(X, X.sum(-1).sin(), seed=2, checkpoint=checkpoint, callbacks=[follow])
        return list(steps)

    resumed, whole = fit(path), fit()
    assert resumed[0][0] == reached and len(whole) == reached + 21
    for (i, first), (j, second) in zip(resumed, whole[reached:], strict=True):
        assert i == j and torch.equal(first, second)
