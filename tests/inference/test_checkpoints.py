"""Checkpoints: resumed runs equal uninterrupted ones, and what isn't the same run is refused."""

from dataclasses import dataclass

import pyro
import pytest
import torch
from loops import METHODS, Count, Stop, assert_equal, stop_after, target

from bayesnn import networks, priors
from bayesnn.inference import HMC, FunctionTarget, run
from bayesnn.inference.pyro_models import PyroTarget
from bayesnn.inference.warm_start import StartingAt


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
