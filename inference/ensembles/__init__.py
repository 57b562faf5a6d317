"""Ensembles of networks trained side by side."""

from bayesnn.inference.ensembles.deep import DeepEnsemble

__all__ = ["DeepEnsemble"]
