"""Distributions over functions."""
