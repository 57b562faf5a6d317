r"""Convolutions of infinitely many channels (Novak et al. 2019; Garriga-Alonso et al. 2019; Arora et al. 2019).

.. math:: f_c(x)_i = \sum_{c', \delta} \sqrt{\frac{\sigma_w^2}{C k^2}}\, W_{c c' \delta}\, h_{c'}(x)_{i + \delta}
    + \sigma_b\, \beta_c

has covariances between positions i and i'

.. math:: K'_{i i'} = \frac{\sigma_w^2}{k^2} \sum_\delta K_{i + \delta,\, i' + \delta} + \sigma_b^2,

so that those of equal positions depend on those of equal positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from bayesnn.checks import check_fields
from bayesnn.processes.architectures.covariance import Covariance
from bayesnn.processes.architectures.layers import Variances, Weighted, check_variances, with_weights
from bayesnn.processes.architectures.windows import Padding, check_padding, checked_sides, window_sums, windows


@dataclass(frozen=True)
class Convolution(Weighted):
    """A convolution along all dimensions of positions: one for sequences, two for images.

    Args:
        kernel_size: its width, or one for each dimension.
        weight_var: over the fan-in, the channels times the kernel's positions.
        bias_var: of the biases, one for each channel.
        stride: from one position of the output to the next, in the input; or one for each dimension.
        padding: "same": zeros around, for ceil(n / stride) outputs of n positions (where an odd number is needed, the end
            gets one more, as in TensorFlow and JAX; PyTorch's ``padding=1`` with ``stride=2`` starts one earlier);
            "valid": none; "circular": as "same", with the positions from the other end in place of zeros.

    Raises:
        TypeError: if sizes or strides aren't integers.
        ValueError: if they aren't positive, a variance is negative, or the padding is unknown.
    """

    kernel_size: int | Sequence[int] = 3
    weight_var: float = 1.0
    bias_var: float = 0.0
    stride: int | Sequence[int] = 1
    padding: Padding = "same"

    def __post_init__(self) -> None:
        check_fields(self, checked_sides, "kernel_size", "stride")
        check_variances(self.weight_var, self.bias_var)
        check_padding(self.padding)

    def variances(self) -> list[tuple[float, float]]:
        """Its own."""
        return [(self.weight_var, self.bias_var)]

    def mixes_positions(self) -> bool:
        """No: weights of different offsets are independent."""
        return False

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """Means over the kernel, along diagonals, times the weight variance.

        Raises:
            ValueError: if inputs have no positions, or the kernel is larger than the input.
        """
        num = covariance.num_positions
        sides = windows(self.kernel_size, self.stride, self.padding, num)

        def sums(values: Tensor) -> Tensor:
            for index, side in enumerate(sides):
                start = (index - num) * (2 if covariance.pairs else 1)
                values = window_sums(values, (start, start + 1) if covariance.pairs else (start,), side)
            return values

        weight_var, bias_var = variances[0]
        return with_weights(covariance.map(sums), weight_var / prod(side.size for side in sides), bias_var)
