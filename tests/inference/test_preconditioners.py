import pytest
import torch

from bayesnn.inference import RMS, SGLD, FunctionTarget, run
from bayesnn.inference.sgmcmc.preconditioners import Metric


def gradients(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 1.0, 10.0]).double()


def test_running_mean_square_with_bias_correction():
    rms, second_moment = RMS(decay=0.9, floor=1e-3), torch.zeros(2, 3, dtype=torch.float64)
    slopes = gradients(5)
    for count, slope in enumerate(slopes, 1):
        second_moment = rms.update(second_moment, slope)
        weights = torch.tensor([0.9 ** (count - 1 - index) for index in range(count)], dtype=torch.float64)
        average = (weights[:, None, None] * slopes[:count].square()).sum(0) / weights.sum()
        root = average.sqrt()
        expected = (root + 1e-3 * root.mean(-1, keepdim=True)) ** -0.5
        torch.testing.assert_close(rms.scale(second_moment, count), expected)


def test_dead_units_are_bounded_by_the_floor():
    slope = torch.tensor([[0.0, 1.0, 3.0, 4.0]])
    scale = RMS(floor=0.01).scale(RMS().update(torch.zeros(1, 4), slope), 1)
    torch.testing.assert_close(scale.square()[0, 0], torch.tensor(1 / (0.01 * 2.0)))
    assert torch.isfinite(RMS().scale(torch.zeros(1, 4), 1)).all()


def test_the_metric_freezes():
    rms, metric = RMS(), Metric(RMS(), torch.zeros(2, 3, dtype=torch.float64), 0, 3)
    second_moment = torch.zeros(2, 3, dtype=torch.float64)
    scales = [metric.observe(slope) for slope in gradients(5)]
    for count, slope in enumerate(gradients(5)[:3], 1):
        second_moment = rms.update(second_moment, slope)
        torch.testing.assert_close(scales[count - 1], rms.scale(second_moment, count))
    assert torch.equal(scales[2], scales[3]) and torch.equal(scales[3], scales[4])
    resumed = Metric(RMS(), metric.second_moment, 50, 3)
    assert torch.equal(resumed.observe(gradients(1)[0]), scales[4])


def test_a_sampler_freezes_it_after_burn_in():
    scales = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)

    def log_density(parameters):
        return -0.5 * (parameters["x"] / scales).square().sum(-1)

    def initial(count, generator):
        return {"x": scales * torch.randn(count, 3, generator=generator, dtype=torch.float64)}

    target, moments = FunctionTarget(log_density, initial), []
    sampler = SGLD(num_chains=3, num_burn_in=395, num_draws=5, step_size=0.05, batch_size=None, preconditioner=RMS())
    run(sampler, target, callbacks=[lambda index, state, info: moments.append(state.second_moment)])
    assert not torch.equal(moments[38], moments[39])
    assert all(torch.equal(moments[39], moment) for moment in moments[40:])


def test_bad_settings():
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), found 1.0"):
        RMS(decay=1.0)
    with pytest.raises(ValueError, match="floor must be positive and finite, found 0"):
        RMS(floor=0)
    with pytest.raises(TypeError, match=r"decay must be a number in \[0, 1\), found '0.9'"):
        RMS(decay="0.9")
    with pytest.raises(TypeError, match="floor must be a positive number"):
        RMS(floor=None)
    with pytest.raises(ValueError, match="num_burn_in must be at least 1 with a preconditioner"):
        SGLD(num_burn_in=0, preconditioner=RMS())
