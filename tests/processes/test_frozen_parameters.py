"""What a kernel has frozen stays as it is, in every process."""

import pytest
import torch

from bayesnn import NNGP, StudentTProcess, likelihoods
from bayesnn.processes import (
    CollapsedBound,
    DirichletNNGP,
    MaximumEvidence,
    SparseNNGP,
    VariationalNNGP,
    VariationalStudentTProcess,
)
from bayesnn.processes.kernels import FourierKernel
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
    made = []

    def kernel(num_features, batch_shape):
        made.append(FourierKernel()(num_features, batch_shape))
        return made[-1]

    MODELS[name](kernel).fit(X, (y > 0).long() if name == "dirichlet" else y)
    found, start = made[-1], FourierKernel()(2, torch.Size([]))
    assert torch.allclose(found.weight_var, start.weight_var.double(), rtol=1e-6)
    assert torch.allclose(found.bias_var, start.bias_var.double(), rtol=1e-6)
    assert not torch.allclose(found.lengthscale, start.lengthscale.double(), rtol=1e-3)


def test_frozen_variances_of_a_shared_scale():
    X = torch.linspace(-1, 1, 20).double().reshape(10, 2)
    method = SparseStudentT(num_inducing=6, num_steps=3)
    model = VariationalStudentTProcess(CLASSES, kernel=FourierKernel(), method=method).fit(X, (X[:, 0] > 0).long())
    learned = {name.split(".")[-1] for name in model._variational}
    assert "raw_lengthscale" in learned
    assert not learned & {"raw_weight_var", "raw_bias_var"}
