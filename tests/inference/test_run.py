"""The loop: what it hands over, when it stops, and what it refuses."""

import threading

import arviz
import pytest
import torch
from loops import METHODS, Count, Stop, assert_equal, stop_after, target

from bayesnn.inference import HMC, SMC, FunctionTarget, run
from bayesnn.inference.flat import ravel


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


def test_runs_in_threads():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(Count(), None)))
    thread.start()
    thread.join()
    assert torch.equal(results[0][0].total, run(Count(), None)[0].total)


@pytest.mark.parametrize("method", [HMC, "hmc", None])
def test_what_is_no_method(method):
    with pytest.raises(TypeError, match=r"method must be an object such as HMC\(\), found"):
        run(method, target())


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
