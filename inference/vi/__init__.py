"""Variational inference: the closest member of a family, in Kullback–Leibler divergence."""

from bayesnn.inference.vi.mean_field import MeanField

__all__ = ["MeanField"]
