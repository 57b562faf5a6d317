"""Amortised inference: networks trained once on tasks from a prior, which then answer in one forward pass."""
