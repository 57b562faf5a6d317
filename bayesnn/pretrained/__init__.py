"""Weights that ship with the package: one safetensors file and one JSON model card per network, and the recipes of all.

``bayesnn.inference.amortized.weights`` reads them and ``bayesnn.inference.amortized.pretraining`` makes them again.
"""
