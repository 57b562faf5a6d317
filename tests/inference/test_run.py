import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

import arviz
import pytest
import torch
from torch import Tensor

from bayesnn import likelihoods, networks, priors
from bayesnn.bnn import BNN
from bayesnn.configured import Configured
from bayesnn.data import Data
from bayesnn.inference import HMC, DeepEnsemble, FunctionTarget, MeanField, NetworkTarget, run

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
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    other = {"method": METHODS["hmc"], "target": target(), "seed": 5} | changes
    with pytest.raises(ValueError, match=f"belongs to another run: its {what} is"):
        run(other["method"], other["target"], seed=other["seed"], checkpoint=path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_damaged_checkpoint_is_refused(tmp_path):
    for name in ("state", "draws-000000"):
        path = tmp_path / name
        run(Count(), None, checkpoint=path)
        file = path / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(ValueError, match="not a complete bayesnn file"):
            run(Count(), None, checkpoint=path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder, found a file"):
        run(Count(), None, checkpoint=tmp_path / "file")


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
method = WarmStarted(HMC(num_chains=2, num_warmup=30, num_draws=150, num_leapfrog=3), DeepEnsemble(num_steps=30, held_out=0.0))
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


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    from bayesnn.inference import checkpoint as module

    real, calls = module.write_tensors, []

    def full(path, *arguments):
        calls.append(path)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        real(path, *arguments)

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(OSError, match=r"can't write the checkpoint after step .*No space left.*one before is intact"):
        run(METHODS["hmc"], target(), seed=1, checkpoint=tmp_path / "run", checkpoint_every=5)
    monkeypatch.undo()
    steps = []
    follow = [lambda index, state, info: steps.append(index)]
    resumed = run(METHODS["hmc"], target(), seed=1, checkpoint=tmp_path / "run", callbacks=follow)
    assert steps[0] >= 20
    assert_equal(resumed, run(METHODS["hmc"], target(), seed=1))


def test_written_draws_leave_the_memory(tmp_path):
    from bayesnn.inference.checkpoint import Kept

    held = []
    original = Kept.add

    def add(self, draw):
        original(self, draw)
        held.append(len(self.new))

    Kept.add = add
    try:
        run(METHODS["hmc"], target(), checkpoint=tmp_path / "run", checkpoint_every=4)
    finally:
        Kept.add = original
    assert len(held) == 20 and max(held) <= 4


def test_time_budget(tmp_path):
    method = HMC(num_chains=2, num_warmup=5, num_draws=100000, num_leapfrog=2)
    posterior = run(method, target(), seed=3, time_budget=0.5, checkpoint=tmp_path / "run")
    count = len(posterior) // 2
    assert 1 <= count < 100000 and all(len(values) == count for values in posterior.statistics.values())
    with pytest.raises(TimeoutError, match="before the first draw"):
        run(HMC(num_warmup=100000), target(), time_budget=0.1)
    with pytest.raises(ValueError, match="time_budget must be positive"):
        run(method, target(), time_budget=0.0)


def test_target_ess(tmp_path):
    def initial(count, generator):
        return {"x": torch.randn(count, 12, generator=generator, dtype=torch.float64)}

    normal = FunctionTarget(lambda p: -0.5 * p["x"].square().sum(-1), initial)
    method = HMC(num_chains=4, num_warmup=50, num_draws=100000, num_leapfrog=2)
    posterior = run(method, normal, seed=3, target_ess=200)
    x = posterior.by_chain(posterior.parameters["x"]).numpy()
    sizes = [float(arviz.ess(x[..., column], method="mean")) for column in (0, 1, 3, 4, 6, 7, 9, 11)]
    assert 190 < min(sizes) < 400
    watched = run(method, normal, seed=3, target_ess=200, watch=lambda draw: draw["position"][:, :1])
    assert 20 <= len(watched) // 4 < len(posterior) // 4
    # Interrupted on the way, it ends at the same draw.
    options = {"seed": 3, "target_ess": 200, "checkpoint": tmp_path / "run", "checkpoint_every": 7}
    with pytest.raises(Stop):
        run(method, normal, callbacks=[stop_after(80)], **options)
    assert_equal(run(method, normal, **options), posterior)
    assert_equal(run(method, normal, **options), posterior)  # and stays there
