"""The stationary law of every affine update against its documented closed form, without simulation."""

import inspect
import math

import pytest
import torch
from oracles import affine_map, stationary_law

from bayesnn.inference import BAOAB, SGHMC, SGLD, SGNHT, Structured

PRECISION = torch.tensor([[2.0, 1.2, 0.0], [1.2, 3.0, -0.7], [0.0, -0.7, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
PLAIN = torch.ones(1, 1, dtype=torch.float64)
SCALE = torch.tensor([[0.5, 0.8, 1.7]], dtype=torch.float64)


def law(sampler, step_size, scale=PLAIN, precision=PRECISION, mean=MEAN, gradient_noise=0.0):
    """Mean and covariance of all variables, one after the other; gradient noise has this standard deviation in S g."""
    size = len(mean)
    names = list(sampler.initial_variables(torch.zeros(1, size, dtype=torch.float64), torch.Generator()))

    def step(x, z):
        variables = dict(zip(names, x.split(size, 1), strict=True))
        gradient = -(variables["position"] - mean) @ precision + gradient_noise * z[:, size:] / scale
        new = sampler.update(
            variables, gradient, torch.tensor(step_size, dtype=torch.float64), scale, z[None, :, :size]
        )
        return torch.cat([new[name] for name in names], 1)

    num_variables, num_noises = size * len(names), 2 * size
    A, b, B = affine_map(step, num_variables, num_noises)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, num_variables, generator=generator, dtype=torch.float64)
    z = torch.randn(5, num_noises, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(step(x, z), x @ A.mT + b + z @ B.mT)  # it is affine
    return stationary_law(A, b, B @ B.mT)


def assert_position(found, mean, covariance):
    size = len(mean)
    torch.testing.assert_close(found[0][:size], mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1][:size, :size], covariance, rtol=1e-10, atol=1e-10)


def widened(factor, scale):
    return torch.linalg.inv(PRECISION - factor * PRECISION @ torch.diag(scale.expand(1, 3)[0] ** 2) @ PRECISION)


@pytest.mark.parametrize("scale", [PLAIN, SCALE], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("step_size", [0.01, 0.3])
def test_sgld(step_size, scale):
    assert_position(law(SGLD(), step_size, scale), MEAN, widened(step_size / 2, scale))


@pytest.mark.parametrize("scale", [PLAIN, SCALE], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("friction,mass", [(0.5, 1.0), (2.0, 1.0), (1.5, 2.5)])
@pytest.mark.parametrize("step_size", [0.05, 0.4])
def test_sghmc(step_size, friction, mass, scale):
    h2, f = step_size**2 / mass, step_size * friction / mass
    sampler = SGHMC(step_size=step_size, friction=friction, mass=mass)
    assert_position(law(sampler, step_size, scale), MEAN, widened(h2 / (4 - 2 * f), scale))


@pytest.mark.parametrize("friction", [0.5, 2.0])
def test_sghmc_euler(friction):
    h, f = 0.1, 0.1 * friction
    found = law(SGHMC(step_size=h, friction=friction, symplectic=False), h)
    eigenvalues, vectors = torch.linalg.eigh(PRECISION)
    kicks = h**2 * eigenvalues
    momentum = 2 * f / (f * (2 - f) - kicks * (2 - 1.5 * f + kicks / 2))
    position = momentum * (1 - f / 2 + kicks / 2) / eigenvalues
    assert_position(found, MEAN, vectors @ torch.diag(position) @ vectors.mT)


@pytest.mark.parametrize("scale", [PLAIN, SCALE], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("friction", [0.5, 10.0])
@pytest.mark.parametrize("step_size", [0.05, 0.5, 0.9])
def test_baoab_is_exact_at_any_stable_step_size(step_size, friction, scale):
    found = law(BAOAB(friction=friction), step_size, scale)
    assert_position(found, MEAN, torch.linalg.inv(PRECISION))
    momentum = found[1][3:, 3:]
    torch.testing.assert_close(momentum.diagonal(), torch.ones(3, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "sampler,step_size,variance",
    [
        (SGLD(), 0.1, 1.0526),
        (SGHMC(step_size=0.1, friction=1.0), 0.1, 1.0026),
        (SGHMC(step_size=0.05, friction=1.0), 0.05, 1.0006),
        (SGHMC(step_size=0.01, friction=1.0), 0.01, 1.00003),
        (SGHMC(step_size=0.1, friction=1.0, symplectic=False), 0.1, 1.1140),
        (SGHMC(step_size=0.05, friction=1.0, symplectic=False), 0.05, 1.0533),
        (SGHMC(step_size=0.01, friction=1.0, symplectic=False), 0.01, 1.0101),
        (BAOAB(friction=1.0), 1.9, 1.0),
    ],
)
def test_standard_normal_by_numbers(sampler, step_size, variance):
    one = torch.ones(1, 1, dtype=torch.float64)
    _, covariance = law(sampler, step_size, precision=one, mean=one[0])
    assert float(covariance[0, 0]) == pytest.approx(variance, abs=5e-5)


def test_known_gradient_noise_is_taken_off_the_injected():
    for scale in (PLAIN, SCALE):
        exact = law(SGHMC(step_size=0.2, friction=2.0), 0.2, scale)
        knowing = law(SGHMC(step_size=0.2, friction=2.0, gradient_variance=9.0), 0.2, scale, gradient_noise=3.0)
        torch.testing.assert_close(knowing, exact, rtol=1e-10, atol=1e-10)
    unknowing = law(SGHMC(step_size=0.2, friction=2.0), 0.2, gradient_noise=3.0)
    heat = 1 + 0.2 * 9.0 / (2 * 2.0)  # h V / (2 C)
    torch.testing.assert_close(unknowing[1], heat * law(SGHMC(step_size=0.2, friction=2.0), 0.2)[1])


def test_gradient_noise_widens_sgld_to_first_order():
    for step_size in (1e-3, 1e-4):
        noisy, exact = law(SGLD(), step_size, SCALE, gradient_noise=2.0)[1], law(SGLD(), step_size, SCALE)[1]
        torch.testing.assert_close((noisy / exact - 1) / step_size, torch.full((3, 3), 2.0).double(), rtol=1e-2, atol=0)


def test_gradient_noise_heats_baoab_by_the_documented_factor():
    for step_size in (1e-2, 1e-3):
        noisy, exact = (law(BAOAB(friction=2.0), step_size, SCALE, gradient_noise=std)[1][:3, :3] for std in (3.0, 0.0))
        excess = (noisy.diagonal() / exact.diagonal() - 1) / step_size
        torch.testing.assert_close(excess, torch.full((3,), 9.0 / (2 * 2.0)).double(), rtol=3 * step_size, atol=0)


@pytest.mark.parametrize("sampler", [SGLD, SGHMC, BAOAB, SGNHT, Structured])
def test_help_states_the_law(sampler):
    assert "stationary law" in inspect.getdoc(sampler).partition("Args:")[0]


@pytest.mark.parametrize(
    "sampler",
    [SGLD(), SGHMC(gradient_variance=0.3), SGHMC(symplectic=False), BAOAB(), SGNHT()],
    ids=lambda s: type(s).__name__,
)
def test_single_precision_agrees(sampler):
    generator = torch.Generator().manual_seed(1)
    variables = sampler.initial_variables(torch.randn(4, 3, generator=generator, dtype=torch.float64), generator)
    gradient, scale, noise = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    arguments = (gradient, torch.tensor(1e-3, dtype=torch.float64), scale.exp(), noise[None])
    double = sampler.update(variables, *arguments)
    single = sampler.update({name: v.float() for name, v in variables.items()}, *(v.float() for v in arguments))
    for name, values in double.items():
        assert single[name].dtype == torch.float32
        torch.testing.assert_close(single[name].double(), values, rtol=3e-7, atol=3e-7)
        # The noise is small beside the rest; its scale must be right, too.
        quiet = sampler.update(variables, *arguments[:3], torch.zeros_like(noise[None]))
        quiet_single = sampler.update(
            {name: v.float() for name, v in variables.items()},
            *(v.float() for v in arguments[:3]),
            torch.zeros(1, 4, 3),
        )
        noise_single, noise_double = single[name] - quiet_single[name], values - quiet[name]
        torch.testing.assert_close(noise_single.double(), noise_double, rtol=1e-4, atol=1e-6)


def test_updates_leave_their_arguments_alone():
    for sampler in (SGLD(), SGHMC(), BAOAB(), SGNHT()):
        variables = sampler.initial_variables(torch.ones(2, 3), torch.Generator().manual_seed(0))
        before = {name: values.clone() for name, values in variables.items()}
        sampler.update(variables, torch.ones(2, 3), torch.tensor(0.1), torch.ones(1, 1), torch.ones(1, 2, 3))
        for name, values in before.items():
            assert torch.equal(values, variables[name])


def test_momenta_start_at_their_law():
    position, generator = torch.zeros(200, 500, dtype=torch.float64), torch.Generator().manual_seed(2)
    for sampler, variance in [(SGHMC(mass=4.0), 4.0), (BAOAB(), 1.0), (SGNHT(friction=3.0), 1.0)]:
        momentum = sampler.initial_variables(position, generator)["momentum"]
        error = variance * math.sqrt(2 / momentum.numel())
        assert abs(float(momentum.square().mean()) - variance) < 4 * error
        assert (
            abs(
                float(
                    sampler.statistics({"momentum": momentum, "thermostat": position[:, :1]})[
                        "kinetic_temperature"
                    ].mean()
                )
                - 1
            )
            < 0.02
        )
    thermostat = sampler.initial_variables(position, generator)["thermostat"]
    assert thermostat.shape == (200, 1)
    assert abs(float(thermostat.mean()) - 3.0) < 4 / math.sqrt(200 * 500)
    assert float(thermostat.var()) == pytest.approx(1 / 500, rel=0.4)


def test_a_thermostat_at_zero_neither_divides_by_it_nor_damps():
    sampler = SGNHT(friction=2.0)
    variables = {"position": torch.zeros(1, 2), "momentum": torch.ones(1, 2), "thermostat": torch.zeros(1, 1)}
    arguments = (torch.zeros(1, 2), torch.tensor(0.1), torch.ones(1, 1))
    still = sampler.update(variables, *arguments, torch.zeros(1, 1, 2))
    assert torch.equal(still["momentum"], torch.ones(1, 2))  # r^T r / P = 1 leaves the thermostat at zero
    kicked = sampler.update(variables, *arguments, torch.ones(1, 1, 2))
    torch.testing.assert_close(kicked["momentum"] - 1, torch.full((1, 2), math.sqrt(2 * 2.0 * 0.1)))
