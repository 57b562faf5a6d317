"""Bayesian deep learning on PyTorch: one likelihood interface, one posterior interface."""
