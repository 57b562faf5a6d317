"""Runs that are interrupted or killed lose nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from loops import METHODS, Count, Stop, assert_equal, target

from bayesnn.bnn import BNN
from bayesnn.inference import HMC, run


@pytest.fixture(autouse=True)
def python_s_own_handler():
    """Jobs that a script starts in the background inherit that interrupts are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


KILLED = """
import sys
import torch
from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import NetworkTarget, WarmStarted, DeepEnsemble, HMC, run
torch.set_num_threads(1)
X = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(20, 2)
data = Data(X, X.sum(-1, keepdim=True).sin())
target = NetworkTarget(networks.mlp(2, 1, hidden=(5,)), likelihoods.Gaussian(), priors.Normal(), data, torch.ones(1, 1))
method = WarmStarted(HMC(num_chains=2, num_warmup=30, num_draws=250, num_leapfrog=3), DeepEnsemble(num_steps=30, held_out=0.0))
say = lambda index, state, info: print(index, flush=True)
if __name__ == "__main__":
    run(method, target, seed=2, checkpoint=sys.argv[1], checkpoint_every=3, callbacks=[say])
"""


def test_a_killed_process_loses_nothing_but_time(tmp_path):
    """kill -9 again and again, at steps of any phase; the draws equal the uninterrupted run's."""
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    kills, reached = [17, 61, 120, 180], -1
    for kill_at in kills:
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        first = None
        for line in process.stdout:
            first = int(line) if first is None else first
            if int(line) >= kill_at:
                process.kill()
                break
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
        assert first <= reached + 1 and (first > 0 or reached == -1)  # it went on from the folder
        reached = kill_at
    scope = {"__name__": "script"}
    num_threads = torch.get_num_threads()
    try:
        exec(KILLED, scope)
        resumed = run(scope["method"], scope["target"], seed=2, checkpoint=tmp_path / "run")
        assert_equal(resumed, run(scope["method"], scope["target"], seed=2))
    finally:
        torch.set_num_threads(num_threads)


def test_a_second_interrupt_does_not_wait():
    def interrupt(index, state, info):
        if index == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            pytest.fail("the step went on")

    with pytest.raises(KeyboardInterrupt):
        run(Count(), None, callbacks=[interrupt])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("index", [5, 9])
def test_an_interrupt_without_a_checkpoint(index):
    def interrupt(now, state, info):
        if now == index:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    if index == 9:  # the last step: here is the result
        assert len(run(Count(), None, callbacks=[interrupt])[1]["total"]) == 5
        return
    with pytest.raises(
        KeyboardInterrupt, match=r"after step 6 of 10; without a checkpoint, so that its 3 draws are lost"
    ):
        run(Count(), None, callbacks=[interrupt])


def test_where_interrupts_are_ignored_they_stay_so():
    def interrupt(index, state, info):
        if index == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert run(Count(), None, callbacks=[interrupt])[1]["total"].numel() > 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
