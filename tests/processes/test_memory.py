"""Memory is predicted before a fit: against what a system tells, and in the models."""

import pytest
import torch

from bayesnn import likelihoods
from bayesnn.processes import DirichletNNGP, NTKEnsemble, StudentTProcess, memory


def test_available_memory_is_what_the_system_tells():
    found = memory.available_memory()
    assert found is not None and 2**20 < found < 2**50
    assert memory.available_memory("meta") is None


def test_a_control_group_s_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    plain = memory.available_memory()
    for name, text in (
        ("memory.max", "3000\n"),
        ("memory.current", "1000\n"),
        ("memory.stat", "anon 1\ninactive_file 200\n"),
    ):
        (tmp_path / name).write_text(text)
    assert memory.available_memory() == 2200
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() > 0.5 * plain


def test_message_names_all_that_matters(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 2**30)
    memory.check_memory("A", 8192, 2, "B")  # 1 GiB exactly
    with pytest.raises(MemoryError, match=r"A: 8193 rows need about 1\.0 GiB .*1\.0 GiB are available; use B"):
        memory.check_memory("A", 8193, 2, "B")
    memory.check_memory("A", 8193, 2, "B", torch.float32)
    monkeypatch.setattr(memory, "available_memory", lambda device: None)
    memory.check_memory("A", 10**7, 2, "B")


@pytest.mark.parametrize(
    ("model", "instead"),
    [
        (StudentTProcess(), "SparseNNGP"),
        (NTKEnsemble(), "SparseNNGP"),
        (DirichletNNGP(likelihoods.Categorical(2)), r"VariationalNNGP\(Categorical\(num_classes=2\)\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exact_models_refuse_before_any_work(model, instead, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 2**15)
    X = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    Y = (X[:, 0] > 0).long() if isinstance(model, DirichletNNGP) else X[:, 0]
    with pytest.raises(
        MemoryError, match=f"{type(model).__name__}: 50 rows need .*32768 B are available; use {instead}"
    ):
        model.fit(X, Y)
