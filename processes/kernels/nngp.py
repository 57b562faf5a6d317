"""The neural network Gaussian process kernel of a fully connected network."""

from __future__ import annotations

import math
from typing import Any

import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.kernels import Kernel
from gpytorch.priors import Prior
from torch import Tensor

from bayesnn.processes.kernels.dual_activations import dual_activation

_DEFAULT_BIAS_VAR = 0.1


class NNGPKernel(Kernel):
    r"""The covariance of an infinitely wide multilayer perceptron's outputs under its prior.

    .. math::
        K^0(x, x') = \sigma_w^2 \frac{1}{d} \sum_i \frac{x_i x'_i}{\ell_i^2} + \sigma_b^2, \qquad
        K^{l+1} = \sigma_w^2\, \kappa(K^l) + \sigma_b^2, \qquad l = 0, \ldots, \text{depth} - 1,

    where :math:`\kappa(K^l)(x, x') = E[\phi(u) \phi(v)]` for :math:`(u, v)` Gaussian with zero mean and the covariance
    :math:`K^l` of the pair (Neal 1996; Lee et al. 2018, eq. 4-6; Matthews et al. 2018). The network has weights of
    variance :math:`\sigma_w^2` over the fan-in and biases of variance :math:`\sigma_b^2` in every layer: one pair is
    shared by all layers. The lengthscales (:math:`\ell_i = \ell` unless ``ard_num_dims`` is given) give the first layer
    its own weight variance, :math:`\sigma_w^2 / \ell_i^2`, as GPyTorch's ``lengthscale``.

    The diagonal is exact, and gradients with respect to inputs and parameters are finite at coincident points as
    elsewhere. Gradients are of first order only. Inputs of about zero mean and unit variance suit the defaults.
    Correlations tend to 1 with the depth, and the matrix towards singular: float64 is advised.

    Args:
        depth: the number of hidden layers, at least 1.
        activation: ``"relu"`` or ``"erf"``.
        weight_var_prior: a prior over :math:`\sigma_w^2`.
        weight_var_constraint: default positive, and starting at the edge of chaos (Poole et al. 2016): 2 for ReLU,
            1.552 for erf. A constraint of your own starts at its ``initial_value``, as everywhere in GPyTorch.
        bias_var_prior: a prior over :math:`\sigma_b^2`.
        bias_var_constraint: likewise for the bias variance; the default starts at 0.1.
        lengthscale_constraint: likewise for the lengthscale; the default starts at 1.
        **kwargs: ``ard_num_dims``, ``batch_shape``, ``active_dims``, ``lengthscale_prior``, as for every GPyTorch
            kernel.

    Attributes:
        weight_var: :math:`\sigma_w^2`, of shape ``(*batch_shape, 1)``; can be set.
        bias_var: :math:`\sigma_b^2`, of shape ``(*batch_shape, 1)``; can be set.

    Raises:
        ValueError: if ``depth`` is not a positive integer, or the activation has no closed form here.
        TypeError: if a prior is not a GPyTorch prior.
    """

    has_lengthscale = True

    def __init__(
        self,
        depth: int = 3,
        activation: str = "relu",
        weight_var_prior: Prior | None = None,
        weight_var_constraint: Interval | None = None,
        bias_var_prior: Prior | None = None,
        bias_var_constraint: Interval | None = None,
        lengthscale_constraint: Interval | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise ValueError(f"depth: found {depth!r}, want a number of hidden layers, at least 1.")
        dual = dual_activation(activation)
        super().__init__(lengthscale_constraint=lengthscale_constraint or Positive(initial_value=1.0), **kwargs)
        self.depth = depth
        self.activation = activation
        self._add_variance("weight_var", dual.critical_weight_var, weight_var_prior, weight_var_constraint)
        self._add_variance("bias_var", _DEFAULT_BIAS_VAR, bias_var_prior, bias_var_constraint)

    def _add_variance(self, name: str, default: float, prior: Prior | None, constraint: Interval | None) -> None:
        self.register_parameter(f"raw_{name}", torch.nn.Parameter(torch.zeros(*self.batch_shape, 1)))
        self.register_constraint(f"raw_{name}", constraint or Positive(initial_value=default))
        if prior is not None:
            if not isinstance(prior, Prior):
                raise TypeError(f"{name}_prior: found {type(prior).__name__}, want a gpytorch.priors.Prior.")
            self.register_prior(f"{name}_prior", prior, name)

    @property
    def is_stationary(self) -> bool:
        """False: the kernel depends on where the inputs are, not on their difference alone."""
        return False

    @property
    def weight_var(self) -> Tensor:
        """The variance of the weights, times the fan-in."""
        return self.raw_weight_var_constraint.transform(self.raw_weight_var)

    @weight_var.setter
    def weight_var(self, value: Tensor | float) -> None:
        value = torch.as_tensor(value, dtype=self.dtype, device=self.device)
        self.initialize(raw_weight_var=self.raw_weight_var_constraint.inverse_transform(value))

    @property
    def bias_var(self) -> Tensor:
        """The variance of the biases."""
        return self.raw_bias_var_constraint.transform(self.raw_bias_var)

    @bias_var.setter
    def bias_var(self, value: Tensor | float) -> None:
        value = torch.as_tensor(value, dtype=self.dtype, device=self.device)
        self.initialize(raw_bias_var=self.raw_bias_var_constraint.inverse_transform(value))

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor:
        """The kernel of x1 (*batch, n, d) and x2 (*batch, m, d): (*batch, n, m); with ``diag`` of pairs, (*batch, n).

        Raises:
            ValueError: if ``last_dim_is_batch`` is set; GPyTorch has deprecated it.
        """
        if last_dim_is_batch:
            raise ValueError("last_dim_is_batch: found True; GPyTorch deprecates it, add kernels with active_dims.")
        equal = x1.shape == x2.shape and torch.equal(x1, x2)
        weight_var, bias_var = self.weight_var, self.bias_var
        scale = weight_var.sqrt().unsqueeze(-1) / (self.lengthscale * math.sqrt(x1.size(-1)))
        x1, x2 = x1 * scale, x2 * scale
        if diag:
            cov = (x1 * x2).sum(-1) + bias_var
            if equal:
                return self._propagate_diagonal(cov, weight_var, bias_var)
            var1, var2 = x1.square().sum(-1) + bias_var, x2.square().sum(-1) + bias_var
            return self._propagate(var1, var2, cov, weight_var, bias_var)
        weight_var, bias_var = weight_var.unsqueeze(-1), bias_var.unsqueeze(-1)
        var1 = x1.square().sum(-1, keepdim=True) + bias_var
        var2 = x2.square().sum(-1).unsqueeze(-2) + bias_var
        cov = self._propagate(var1, var2, (x1 @ x2.mT).add_(bias_var), weight_var, bias_var)
        if equal:
            # x1 * x2, not x1 * x1: the gradient has to split evenly should x1 and x2 be separate inputs of equal value.
            exact = self._propagate_diagonal((x1 * x2).sum(-1, keepdim=True) + bias_var, weight_var, bias_var)
            cov.diagonal(dim1=-2, dim2=-1).copy_(exact.squeeze(-1))
        return cov

    def _propagate(self, var1: Tensor, var2: Tensor, cov: Tensor, weight_var: Tensor, bias_var: Tensor) -> Tensor:
        dual = dual_activation(self.activation)
        for _ in range(self.depth):
            kappa = dual.moments(var1, var2, cov).kappa
            var1 = torch.addcmul(bias_var, weight_var, dual.diagonal(var1))
            var2 = torch.addcmul(bias_var, weight_var, dual.diagonal(var2))
            cov = torch.addcmul(bias_var, weight_var, kappa)
        return cov

    def _propagate_diagonal(self, var: Tensor, weight_var: Tensor, bias_var: Tensor) -> Tensor:
        dual = dual_activation(self.activation)
        for _ in range(self.depth):
            var = torch.addcmul(bias_var, weight_var, dual.diagonal(var))
        return var
