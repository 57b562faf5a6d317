"""Settings that make every test give the same answer wherever and in whatever order it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import numpy as np
import pytest
import torch

# Sums depend on how they are split between threads.
torch.set_num_threads(1)

hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def fixed_global_state() -> Iterator[None]:
    """Seed the global generators, which third parties draw from, and put the default dtype back."""
    torch.manual_seed(0)
    np.random.seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
