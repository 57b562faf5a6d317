"""Weights that ship with the package: one safetensors file and one JSON model card per network.

``bayesnn.inference.amortized.weights`` reads them and ``bayesnn.inference.amortized.recipes`` makes them again.
"""
