import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

import arviz
import pyro
import pytest
import torch
from torch import Tensor

from bayesnn import likelihoods, networks, priors
from bayesnn.bnn import BNN
from bayesnn.configured import Configured
from bayesnn.data import Data
from bayesnn.inference import HMC, SMC, DeepEnsemble, FunctionTarget, MeanField, NetworkTarget, run
from bayesnn.inference.flat import ravel
from bayesnn.inference.pyro_models import PyroTarget
from bayesnn.inference.warm_start import StartingAt

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


def normal_target(dimension=3, dtype=torch.float64, variance=1.0, shift=0.0, with_prior=True):
    def sample(count, generator):
        return {"x": torch.zeros(count, dimension, dtype=dtype)}

    def log_likelihood(p):
        return -0.5 * (p["x"] - shift).square().sum(-1) / variance

    prior = {"log_prior": lambda p: -0.5 * p["x"].square().sum(-1), "sample_prior": sample} if with_prior else {}
    return FunctionTarget(log_likelihood, sample, **prior)


def powered(power):
    class Power(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.power = torch.nn.Linear(2, 1), power

        def forward(self, X):
            return self.linear(X) ** self.power

    return target(network=Power())


def pyro_target(scale):
    return PyroTarget(lambda: pyro.sample("x", pyro.distributions.Normal(torch.zeros(3).double(), scale).to_event(1)))


OTHER_TARGETS = {
    "dimension": (normal_target(), normal_target(dimension=2), "parameters"),
    "dtype": (normal_target(), normal_target(dtype=torch.float32), "parameters"),
    "variance": (normal_target(), normal_target(variance=1.01), "log density at two points"),
    "shift": (normal_target(), normal_target(shift=0.01), "log density at two points"),
    "prior": (normal_target(), normal_target(with_prior=False), "log density at two points"),
    "attribute of a module": (powered(1), powered(2), "log density at two points"),
    "pyro": (pyro_target(1.0), pyro_target(1.1), "log density at two points"),
    "starting points": (
        *(StartingAt(normal_target(), {"x": torch.full((2, 3), x).double()}) for x in (0.0, 1.0)),
        "target",
    ),
}


@pytest.mark.parametrize("name", OTHER_TARGETS)
def test_a_checkpoint_of_another_density_is_refused(name, tmp_path):
    own, other, what = OTHER_TARGETS[name]
    run(METHODS["hmc"], own, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=f"belongs to another run: its {what} is"):
        run(METHODS["hmc"], other, checkpoint=tmp_path)
    run(METHODS["hmc"], own, checkpoint=tmp_path)


def test_another_order_of_rounding_is_no_other_target(tmp_path, monkeypatch):
    own = target(dtype=torch.float32)
    run(METHODS["hmc"], own, checkpoint=tmp_path)
    exact = own.log_likelihood
    monkeypatch.setattr(own, "log_likelihood", lambda *arguments: exact(*arguments) * (1 + 1e-6))
    run(METHODS["hmc"], own, checkpoint=tmp_path)


class FourFunctions:
    """A method by its functions alone."""

    num_steps = 10

    def __init__(self, scale):
        self.scale = scale

    init, step, keep, result = Count.init, Count.step, Count.keep, Count.result


def test_a_method_is_four_functions(tmp_path):
    state, draws, _ = run(FourFunctions(lambda x: x), None)
    assert torch.equal(state.total, run(Count(), None)[0].total) and len(draws["total"]) == 5
    with pytest.raises(TypeError, match=r"derive FourFunctions from bayesnn.configured.Configured"):
        run(FourFunctions(lambda x: x), None, checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


def test_missing_draws_are_found_before_the_run_goes_on(tmp_path):
    with pytest.raises(Stop):
        run(Count(), None, checkpoint=tmp_path, checkpoint_every=2, callbacks=[stop_after(9)])
    (tmp_path / "draws-000001.safetensors").unlink()
    steps = []
    with pytest.raises(ValueError, match=r"lacks 1 of its 4 files of draws \(draws-000001.safetensors\)"):
        run(Count(), None, checkpoint=tmp_path, callbacks=[lambda index, state, info: steps.append(index)])
    assert steps == []


def test_a_folder_that_cannot_be_written_is_found_before_the_run(tmp_path):
    (tmp_path / "file").touch()
    steps = []
    with pytest.raises(OSError, match="can't write to the checkpoint's folder"):
        run(Count(), None, checkpoint=tmp_path / "file/run", callbacks=[lambda *step: steps.append(step)])
    assert steps == []


def test_a_full_disk_at_the_first_checkpoint(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bayesnn.inference.checkpoint.write_tensors", full)
    with pytest.raises(OSError, match=r"No space left on device\. It was the first: nothing is saved"):
        run(Count(), None, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("value", [0, -1])
def test_steps_between_checkpoints(value, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1"):
        run(Count(), None, checkpoint=tmp_path / "run", checkpoint_every=value)


@pytest.mark.parametrize("method", [HMC, "hmc", None])
def test_what_is_no_method(method):
    with pytest.raises(TypeError, match=r"method must be an object such as HMC\(\), found"):
        run(method, target())


def test_draws_are_in_memory_once(tmp_path):
    """Chain by chain they are a view of what was read, a file at a time."""

    @dataclass(frozen=True)
    class Large(Count):
        def keep(self, state, index):
            return {"position": torch.full((4, 100), float(index)), "scalar": torch.tensor(index)}

    for folder in (None, tmp_path / "run"):
        _, draws, _ = run(Large(num_steps=20), None, checkpoint=folder, checkpoint_every=3)
        assert draws["position"].shape == (20, 4, 100) and draws["scalar"].tolist() == list(range(20))
        assert torch.equal(draws["position"][:, 2, 7], torch.arange(20.0))
        by_chain = draws["position"].transpose(0, 1).flatten(0, 1)
        assert by_chain.data_ptr() == draws["position"].data_ptr()


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


def test_a_method_that_is_not_finished_in_time_has_no_result(tmp_path):
    smc = SMC(num_particles=64, ess_fraction=0.9)
    with pytest.raises(
        TimeoutError, match=r"time_budget of 1e-09 s was over at step 1 .* before the end.*another run goes on"
    ):
        run(smc, target(), time_budget=1e-9, checkpoint=tmp_path)
    assert torch.equal(*(run(smc, target(), **o).statistics["log_evidence"] for o in ({}, {"checkpoint": tmp_path})))
    # One that can stop anywhere gives what it has.
    assert len(run(METHODS["ensemble"], target(), time_budget=1e-9)) == 3


@pytest.mark.parametrize("method", [METHODS["ensemble"], METHODS["mean-field"], SMC()])
def test_an_effective_sample_size_of_no_draws(method):
    with pytest.raises(
        ValueError, match=f"target_ess needs a method that keeps draws .*{type(method).__name__} keeps none"
    ):
        run(method, target(), target_ess=10)


def test_networks_are_watched_at_their_function_values():
    own = target()
    parameters = own.initial(3, torch.Generator())
    expected = own.functions(parameters, own.data.X[[0, 2, 5, 8, 10, 13, 16, 19]]).squeeze(-1)
    position = ravel(parameters, own.shapes())
    torch.testing.assert_close(own.watched(position), expected)
    # What is watched decides when the run ends.
    generator = torch.Generator().manual_seed(0)
    own.watched = lambda position: torch.randn(len(position), 2, generator=generator, dtype=torch.float64)
    posterior = run(HMC(num_chains=2, num_warmup=5, num_draws=100, num_leapfrog=1), own, target_ess=20)
    assert 20 <= len(posterior) // 2 < 60


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
