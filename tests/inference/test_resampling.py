import pytest
import torch
from oracles import z_score

from bayesnn.inference.smc.resampling import SCHEMES, effective_sample_size, normalised


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("num", [7, 40])
def test_counts_are_proportional_to_the_weights(name, num):
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(10, generator=generator) * 1.5
    log_weights[3] = -torch.inf
    counts = torch.stack(
        [torch.bincount(SCHEMES[name](log_weights, generator, num), minlength=10) for _ in range(3000)]
    ).double()
    expected = num * normalised(log_weights)
    assert (counts.sum(-1) == num).all() and (counts[:, 3] == 0).all()
    varying = counts.std(0) > 0
    assert z_score(counts[:, varying], expected[varying]).abs().max() < 4
    if name == "systematic":
        assert (counts - expected).abs().max() < 1
    if name == "stratified":
        assert (counts - expected).abs().max() < 2
    if name == "multinomial":
        variance = expected * (1 - expected / num)
        assert z_score((counts - expected).square()[:, varying], variance[varying]).abs().max() < 4


@pytest.mark.parametrize("name", SCHEMES)
def test_extreme_weights(name):
    generator = torch.Generator().manual_seed(0)
    alone = torch.full((5,), -1e30)
    alone[2] = 1e30
    assert SCHEMES[name](alone, generator, 50).unique().tolist() == [2]
    last_is_dead = torch.tensor([0.0, 0.0, -torch.inf])
    assert SCHEMES[name](last_is_dead, generator, 10000).max() == 1
    many = SCHEMES[name](torch.zeros(200001), generator, 200001)
    assert many.max() < 200001 and many.dtype == torch.int64


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_mean_nothing(bad):
    with pytest.raises(ValueError, match="no particle has a weight"):
        SCHEMES["systematic"](torch.tensor([0.0, bad]), torch.Generator(), 3)
    with pytest.raises(ValueError, match="no particle has a weight"):
        normalised(torch.full((3,), -torch.inf))


def test_effective_sample_size():
    assert float(effective_sample_size(torch.full((8,), -700.0))) == pytest.approx(8)
    assert float(effective_sample_size(torch.tensor([0.0, -1e4]))) == pytest.approx(1)
    weights = torch.tensor([0.5, 0.3, 0.2])
    assert float(effective_sample_size(weights.log() + 1e3)) == pytest.approx(
        1 / float(weights.square().sum()), rel=1e-4
    )
