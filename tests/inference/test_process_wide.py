"""Settings of the whole process: kept while any thread needs them, put back when none does."""

from contextlib import contextmanager

import pytest
import torch

from bayesnn.inference.flat import without_validation
from bayesnn.inference.members import plain_attention
from bayesnn.inference.process_wide import ProcessWide


def fast_path():
    return torch.backends.mha.get_fastpath_enabled()


def validation():
    return torch.distributions.Distribution._validate_args


@pytest.mark.parametrize(("context", "setting"), [(without_validation, validation), (plain_attention, fast_path)])
def test_a_setting_is_put_back_by_the_last_to_leave(context, setting, monkeypatch):
    """As two threads do, the first of which is done before the second."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    assert setting()
    context.__enter__()
    context.__enter__()
    context.__exit__(None, None, None)
    assert not setting()
    context.__exit__(None, None, None)
    assert setting()


def test_a_context_that_cannot_be_entered_leaves_nothing_behind():
    attempts = []

    @contextmanager
    def fails_once():
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("not now")
        yield

    context = ProcessWide(fails_once)
    with pytest.raises(RuntimeError, match="not now"):
        context.__enter__()
    with context:
        assert len(attempts) == 2


def test_a_setting_is_put_back_after_an_error():
    before = validation()
    with pytest.raises(ZeroDivisionError), without_validation:
        1 / 0  # noqa: B018
    assert validation() == before
