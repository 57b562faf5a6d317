"""Networks, ready-made. Any ``nn.Module`` without batch statistics will do as well."""

from bayesnn.networks.mlp import MLP, mlp

__all__ = ["MLP", "mlp"]
