import pytest
import torch

from bayesnn.inference.optimizer import adam_init, adam_step, clip_by_norm, muon_init, muon_step, warmup_cosine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_equals_torch(dtype, weight_decay):
    generator = torch.Generator().manual_seed(0)
    params = {
        "a": torch.randn(3, 4, generator=generator, dtype=dtype),
        "b": torch.randn(5, generator=generator, dtype=dtype),
    }
    reference = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimizer = torch.optim.AdamW(reference.values(), lr=0.02, weight_decay=weight_decay)
    state = adam_init(params)
    for _ in range(20):
        grads = {name: torch.randn(value.shape, generator=generator, dtype=dtype) for name, value in params.items()}
        params, state = adam_step(params, grads, state, 0.02, weight_decay)
        for name, value in reference.items():
            value.grad = grads[name]
        optimizer.step()
    for name, value in params.items():
        torch.testing.assert_close(value, reference[name].detach())
    assert int(state.step) == 20


def test_muon_equals_torch():
    """Up to the precision of bfloat16, in which torch orthogonalises."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (6, 20), "tall": (20, 6), "another": (6, 20)}
    params = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    reference = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimizer = torch.optim.Muon(reference.values(), lr=0.02, weight_decay=0.1, momentum=0.95)
    momentum = muon_init(params)
    for _ in range(10):
        grads = {name: torch.randn(value.shape, generator=generator) for name, value in params.items()}
        params, momentum = muon_step(params, grads, momentum, 0.02, 0.1)
        for name, value in reference.items():
            value.grad = grads[name]
        optimizer.step()
    for name, value in params.items():
        torch.testing.assert_close(value, reference[name].detach(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_muon_moves_all_directions_alike(shape):
    """Singular values over two orders of magnitude; the step's are between 0.6 and 1.3."""
    generator = torch.Generator().manual_seed(1)
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    gradient = U @ torch.logspace(0, -2, 5, dtype=torch.float64).diag() @ V
    before = {"w": torch.zeros(shape, dtype=torch.float64)}
    after, _ = muon_step(before, {"w": gradient}, muon_init(before), 1.0)
    moved = -after["w"] / max(1, shape[0] / shape[1]) ** 0.5
    values = torch.linalg.svdvals(moved)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert torch.allclose(U.T @ moved @ V.T, torch.diag(torch.diagonal(U.T @ moved @ V.T)), atol=1e-9)


def test_stacked_members_are_updated_as_each_alone():
    generator = torch.Generator().manual_seed(1)
    params = {"w": torch.randn(3, 2, generator=generator)}
    lr = torch.tensor([0.1, 0.2, 0.3])[:, None]
    state, stacked = adam_init(params), params
    alone = [({"w": params["w"][i]}, adam_init({"w": params["w"][i]})) for i in range(3)]
    for _ in range(5):
        grads = torch.randn(3, 2, generator=generator)
        stacked, state = adam_step(stacked, {"w": grads}, state, lr)
        alone = [adam_step(p, {"w": grads[i]}, s, float(lr[i])) for i, (p, s) in enumerate(alone)]
    torch.testing.assert_close(stacked["w"], torch.stack([p["w"] for p, _ in alone]))


def test_inputs_are_left_alone():
    params, grads = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    state = adam_init(params)
    adam_step(params, grads, state, 0.1, 0.1)
    assert params["w"].tolist() == [1, 1] and state.first["w"].tolist() == [0, 0] and int(state.step) == 0


def test_clip_by_norm():
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    clipped, norm = clip_by_norm(grads, 1.0)
    assert norm == 5
    torch.testing.assert_close(clipped, {"a": torch.tensor([0.6]), "b": torch.tensor([0.8])})
    same, _ = clip_by_norm(grads, 10.0)
    torch.testing.assert_close(same, grads)


def test_schedule():
    factors = [warmup_cosine(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] < 1 and factors[10] == 1
    assert warmup_cosine(55, 100, 10) == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-2 and warmup_cosine(100, 100, 10) == 0
    assert warmup_cosine(0, 5, 0) == 1
