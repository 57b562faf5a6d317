"""The shipped network "bo", whose Gaussian processes see outcomes that were standardised by their own rows."""

import pytest
import torch

from bayesnn import PFN
from bayesnn.inference.amortized import model as amortized_model


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bowl(X):
    return (X - 0.3).square().sum(-1, keepdim=True)


def clustered():
    """A few rows everywhere and most near the optimum, as a search leaves them."""
    near = 0.3 + 0.03 * torch.randn(40, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.cat([uniform(10, 2), near.clamp(0, 1)])


def fitted(X, Y):
    return PFN("bo", bounds=(0.0, 1.0)).fit(X, Y)


def test_rows_that_lie_together(monkeypatch):
    """The rows' mean is far from the function's, and the processes know that it may be: no optimum is seen in the corners."""
    X, queries = clustered(), uniform(300, 2, seed=50)
    assert float(fitted(X, bowl(X)).posterior(queries).mean.min()) > -0.02
    monkeypatch.setattr(amortized_model, "OFFSET", 0.0)
    assert float(fitted(X, bowl(X)).posterior(queries).mean.min()) < -0.1


def test_precise_where_rows_are_many():
    """A smooth function without noise, to a fiftieth of its standard deviation."""
    X, queries = uniform(80, 2, seed=1), uniform(200, 2, seed=2)
    mean = fitted(X, (8 * X[:, :1]).sin()).posterior(queries).mean
    truth = (8 * queries[:, :1]).sin()
    assert float((mean - truth).square().mean().sqrt()) < 0.02 * float(truth.std())


def test_points_near_each_other_go_together():
    """Their draws' correlation goes to one, also where next to nothing is left to be known; repeated points are one."""
    X, queries = uniform(60, 1, seed=1), uniform(8, 1, seed=3)
    model = fitted(X, (6 * X).sin())
    pairs = torch.stack([queries, (queries + 1e-5).clamp_max(1)], -2)
    found = model._correlations(model._scaled(pairs))
    assert found.shape == (8, 1, 2, 2) and float(found.min()) > 0.99
    repeated = model.posterior(queries[[0, 1, 0]]).rsample(torch.Size([16]))
    assert torch.equal(repeated[:, 0], repeated[:, 2])


def test_rows_one_by_one_or_at_once():
    """Few more rows leave the hyperparameters; from few rows all are read anew: either way it doesn't matter how they come."""
    for n, k in ((6, 4), (40, 4), (40, 12)):
        X, more, queries = uniform(n, 2), uniform(k, 2, seed=1), uniform(5, 2, seed=2)
        at_once = fitted(X, bowl(X)).condition_on_observations(more, bowl(more))
        one_by_one = fitted(X, bowl(X))
        for row in more.split(1):
            one_by_one = one_by_one.condition_on_observations(row, bowl(row))
        assert (at_once._context.num_read == n) == (n == 40 and k == 4)
        if k == 12:  # beyond a fifth more they were read anew at the ninth
            assert one_by_one._context.num_read == 49
            continue
        p, q = at_once.posterior(queries), one_by_one.posterior(queries)
        torch.testing.assert_close(p.mean, q.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p.variance, q.variance, rtol=1e-4, atol=1e-8)


def test_queries_with_rows_of_their_own_share_hyperparameters():
    """From 30 rows on; one process for all is read off a part of the rows."""
    X, queries = uniform(80, 2), uniform(6, 2, seed=2)
    model = PFN("bo", bounds=(0.0, 1.0), neighbours=40).fit(X, bowl(X))
    error = (model.posterior(queries).mean - bowl(queries)).abs()
    assert model._context.common.num_read == 40 and float(error.max()) < 0.05
    conditioned = model.condition_on_observations(uniform(3, 2, seed=4), bowl(uniform(3, 2, seed=4)))
    assert conditioned._context.cache is None and bool(conditioned.posterior(queries).mean.isfinite().all())


class Foreign(torch.nn.Module):
    """A network of someone else's, with what ``AmortizedModel`` asks for and no more: normals around the context's mean."""

    max_features, largest = 3, None

    def encode(self, X, y, num_features=None):
        return y.mean(-2, keepdim=True)

    def query(self, cache, X):
        return (cache + 0 * X[..., :1]).expand(*torch.broadcast_shapes(cache.shape[:-2], X.shape[:-2]), X.shape[-2], 1)

    def distributions(self, output):
        mean = output[..., 0]
        return (
            torch.distributions.Normal(mean, torch.ones_like(mean)),
            torch.distributions.Normal(mean, 2 * torch.ones_like(mean)),
        )


def test_a_network_of_someone_else():
    X, y = torch.rand(6, 3, dtype=torch.float64), torch.arange(6.0, dtype=torch.float64)[:, None]
    model = PFN(Foreign()).fit(X, y)
    torch.testing.assert_close(model.predict(X[:2]).mean, y.mean().expand(2, 1))
    found = model.posterior(X[:2])
    torch.testing.assert_close(found.variance, y.var().expand(2, 1), rtol=0.3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_queries_too_far_for_numbers(dtype):
    """Where squared distances would overflow, an error in place of NaN."""
    X = torch.rand(6, 2, dtype=dtype)
    model = PFN("bo").fit(X, X.sum(-1, keepdim=True))
    with pytest.raises(ValueError, match="X must be within"):
        model.predict(torch.full((1, 2), 1e30 if dtype == torch.float32 else 1e200, dtype=dtype))
