import shutil

import pytest
import torch

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import Compiled, NetworkTarget, run
from bayesnn.inference.sgmcmc import RMS, SGHMC
from bayesnn.inference.sgmcmc.inner_loop import MAX_NUMBERS, chunk_size
from bayesnn.inference.sgmcmc.noise import NoiseAhead, draw_noise, start_stream


def target():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    data = Data(X, X.sum(-1, keepdim=True))
    return NetworkTarget(
        networks.mlp(3, 1, hidden=(5,)), likelihoods.Gaussian(), priors.Normal(), data, torch.ones(1, 1)
    )


def test_noise_ahead_of_time_is_the_same_noise():
    stream = ahead_stream = start_stream(torch.Generator().manual_seed(3))
    ahead = NoiseAhead()
    asked = [[True, True], [True, False], [True, False], [False, False], [True, True]]
    for index, noisy in enumerate(asked):
        expected = [True, True] if index == 2 else asked[min(index + 1, 4)]  # a wrong guess once
        noise, stream = draw_noise(stream, (1, 3, 5), noisy, torch.float64)
        found, ahead_stream = ahead.draw(ahead_stream, (1, 3, 5), noisy, torch.float64, expected)
        assert torch.equal(found, noise) and torch.equal(ahead_stream, stream)
        assert [bool(step.any()) for step in noise] == noisy
    # Another run's stream in between costs time only.
    other, _ = ahead.draw(start_stream(torch.Generator().manual_seed(4)), (2,), [True], torch.float32, [True])
    assert other.shape == (1, 2)
    found, _ = ahead.draw(ahead_stream, (1, 3, 5), [True], torch.float64, [True])
    assert torch.equal(found, draw_noise(stream, (1, 3, 5), [True], torch.float64)[0])


@pytest.mark.parametrize(
    ("num_steps", "numbers", "expected"), [(20, 1, 5), (16, 1, 8), (7, 1, 7), (11, 1, 1), (1, 1, 1)]
)
def test_chunks_divide_the_steps(num_steps, numbers, expected):
    assert chunk_size(num_steps, numbers) == expected
    assert chunk_size(num_steps, MAX_NUMBERS) == 1 and chunk_size(num_steps, 10 * MAX_NUMBERS) == 1


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
def test_the_compiled_loop_gives_the_same_draws_to_rounding():
    method = SGHMC(
        num_chains=3, num_burn_in=6, num_draws=4, thinning=3, step_size=1e-3, batch_size=7, preconditioner=RMS()
    )
    plain = run(method, target(), seed=1)
    compiled = run(method, Compiled(target()), seed=1)
    for name, values in plain.parameters.items():
        torch.testing.assert_close(compiled.parameters[name], values, rtol=1e-9, atol=1e-9)
