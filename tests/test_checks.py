import math
from dataclasses import dataclass

import numpy as np
import pytest

from bayesnn.checks import INTERVALS, check_fields, count, flag, fraction, number, positive


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8])
def test_counts(kind):
    assert count("n", kind(3)) == 3 and type(count("n", kind(3))) is int
    assert count("n", kind(0), least=0) == 0
    with pytest.raises(ValueError, match="n must be at least 2, found 1"):
        count("n", kind(1), least=2)


@pytest.mark.parametrize("value", [2.5, 2.0, "2", None, True, math.nan, np.float64(2)])
def test_what_is_no_count(value):
    with pytest.raises(TypeError, match="n must be an integer, found"):
        count("n", value)


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.float16])
def test_numbers(kind):
    for check in (number, positive, fraction):
        assert check("x", kind(0.5)) == 0.5 and type(check("x", kind(0.5))) is float
        for value in (kind("nan"), kind("inf")):
            with pytest.raises(ValueError, match=r"x must .* found"):
                check("x", value)
        for value in ("0.5", None, True, 0.5j):
            with pytest.raises(TypeError, match=r"x must be a .*number"):
                check("x", value)
    assert number("x", kind(-1)) == -1
    for value in (0, -1):
        with pytest.raises(ValueError, match="x must be positive and finite"):
            positive("x", kind(value))


def test_fractions():
    for interval in INTERVALS:
        for value, bracket, place in ((0, "[", 0), (1, "]", -1)):
            if interval[place] == bracket:
                assert fraction("x", value, interval) == value
            else:
                with pytest.raises(ValueError, match=r"x must lie in .*, found"):
                    fraction("x", value, interval)
        for value in (-0.1, 1.1):
            with pytest.raises(ValueError, match="x must lie in"):
                fraction("x", value, interval)


def test_flags():
    assert flag("f", True) is True and flag("f", False) is False
    for value in ("no", 0, None):
        with pytest.raises(TypeError, match="f must be True or False, found"):
            flag("f", value)


def test_fields_become_plain_numbers():
    @dataclass(frozen=True)
    class Settings:
        steps: int
        more: int

    settings = Settings(np.uint8(3), 0)
    check_fields(settings, count, "steps", "more", least=0)
    assert type(settings.steps) is int and settings == Settings(3, 0)
    with pytest.raises(ValueError, match="more must be at least 1, found 0"):
        check_fields(settings, count, "steps", "more")
