import arviz
import pytest
import torch

from bayesnn.inference.ess import effective_sample_size


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.6, 0.97])
@pytest.mark.parametrize("num_draws", [50, 401])
def test_equals_arviz(correlation, num_draws):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, num_draws, 5, generator=generator, dtype=torch.float64)
    for index in range(1, num_draws):
        values[:, index] = correlation * values[:, index - 1] + (1 - correlation**2) ** 0.5 * values[:, index]
    values[..., 4] += torch.arange(4).unsqueeze(-1)  # chains that disagree
    expected = [float(arviz.ess(values[..., column].numpy(), method="mean")) for column in range(5)]
    torch.testing.assert_close(effective_sample_size(values), torch.tensor(expected).double(), rtol=0.03, atol=0.5)


def test_what_has_no_effective_size():
    assert effective_sample_size(torch.zeros(2, 7, 3)).isnan().all()
    assert effective_sample_size(torch.ones(2, 20, 3)).isnan().all()
    with pytest.raises(ValueError, match="chains, draws, k"):
        effective_sample_size(torch.zeros(2, 20))
