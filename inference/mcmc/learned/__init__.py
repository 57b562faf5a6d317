"""Metropolis–Hastings with proposals that were learned beforehand on a distribution of models."""
