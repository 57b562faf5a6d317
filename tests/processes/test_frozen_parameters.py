"""What a kernel has frozen stays as it is, in every process."""

import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel

from bayesnn import NNGP, StudentTProcess, likelihoods, load
from bayesnn.processes import (
    CollapsedBound,
    DirichletNNGP,
    MaximumEvidence,
    SparseNNGP,
    VariationalNNGP,
    VariationalStudentTProcess,
)
from bayesnn.processes.kernels import FourierKernel, NNGPKernel
from bayesnn.processes.variational_gaussian import SparseVariational
from bayesnn.processes.variational_student_t import SparseStudentT

CLASSES = likelihoods.Categorical(2)
MODELS = {
    "nngp": lambda kernel: NNGP(kernel=kernel),
    "student-t": lambda kernel: StudentTProcess(kernel=kernel),
    "sparse": lambda kernel: SparseNNGP(kernel=kernel, method=CollapsedBound(num_inducing=6)),
    "variational": lambda kernel: VariationalNNGP(kernel=kernel, method=SparseVariational(num_inducing=6, num_steps=3)),
    "dirichlet": lambda kernel: DirichletNNGP(CLASSES, kernel=kernel, method=MaximumEvidence(num_steps=3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_frozen_variances(name):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 2, generator=generator).double()
    y = X[:, 0].sin() + 0.1 * torch.randn(30, generator=generator).double()
    model = MODELS[name](FourierKernel()).fit(X, (y > 0).long() if name == "dirichlet" else y)
    parts = (model._gp if name == "nngp" else model._prior).modules()
    found, start = next(part for part in parts if isinstance(part, NNGPKernel)), FourierKernel()(2, torch.Size([]))
    assert torch.allclose(found.weight_var, start.weight_var.double(), rtol=1e-6)
    assert torch.allclose(found.bias_var, start.bias_var.double(), rtol=1e-6)
    assert not torch.allclose(found.lengthscale, start.lengthscale.double(), rtol=1e-3)


def test_frozen_parameters_of_a_shared_scale(tmp_path):
    """They are the file's, whatever a factory would give then."""
    X = torch.linspace(-1, 1, 20).double().reshape(10, 2)
    method = SparseStudentT(num_inducing=6, num_steps=3)
    generator = torch.Generator().manual_seed(0)

    def kernel(num_features, batch_shape):
        made = ScaleKernel(RBFKernel(batch_shape=batch_shape), batch_shape=batch_shape)
        made.base_kernel.lengthscale = torch.rand(1, generator=generator).item()
        made.base_kernel.raw_lengthscale.requires_grad_(False)
        return made

    model = VariationalStudentTProcess(CLASSES, kernel=kernel, method=method).fit(X, (X[:, 0] > 0).long())
    start = torch.rand(1, generator=torch.Generator().manual_seed(0))
    found = model._covariances.kernel.base_kernel.lengthscale
    assert float(found) == pytest.approx(float(start), rel=1e-5)
    model.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", kernel=kernel)
    assert torch.equal(again.posterior(X).mean, model.posterior(X).mean)
