"""Search spaces in TOML files: each form, and what is wrong with a bad file."""

from __future__ import annotations

from pathlib import Path

import pytest

from bayesnn.bo import Ordinal, Space, When
from bayesnn.bo.space_file import read_space


def read(tmp_path: Path, text: str) -> Space:
    path = tmp_path / "space.toml"
    path.write_text(text, encoding="utf-8")
    return read_space(path)


def test_every_form(tmp_path: Path) -> None:
    space = read(
        tmp_path,
        """
        lr = [1e-5, 1e-1, "log"]
        dropout = [0, 0.5]
        layers = [1, 6]
        optimizer = ["adam", "sgd"]
        nesterov = [true, false]
        batch_size = { choices = [32, 64, 128] }
        "weight decay" = { low = 0.0, high = 1.0 }

        [width]
        low = 16
        high = 512
        log = true
        """,
    )
    assert space == Space(
        {
            "lr": (1e-5, 1e-1, "log"),
            "dropout": (0.0, 0.5),
            "layers": (1, 6),
            "optimizer": ["adam", "sgd"],
            "nesterov": [True, False],
            "batch_size": [32, 64, 128],
            "weight decay": (0.0, 1.0),
            "width": (16, 512, "log"),
        }
    )
    assert space.names[0] == "lr" and space.parameters["layers"].num_values == 6


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty: a space needs at least one parameter"),
        ("x = [0, ", "is no TOML file"),
        ("x = [0, 1]\nx = [0, 2]", "is no TOML file"),
        ("x = 3", "x must be \\[low, high\\].*found 3"),
        ("x = [16, 32, 64]", "x begins with two numbers.*are written x = { choices = \\[16, 32, 64\\] }"),
        ('x = [1, 2, "logarithm"]', "x begins with two numbers"),
        ("x = [2, 1]", "space.toml: x must have low < high"),
        ('x = [0, 1, "log"]', "x is on the log scale, so low must be positive"),
        ("x = [0.0, inf]", "x must have finite ends"),
        ("x = ['a']", "x needs at least two choices"),
        ("x = ['a', 'a']", "the choices of x must differ"),
        ("x = [2026-01-01, 2026-02-01]", "the choices of x must be strings"),
        ("[x]\nlow = 1", "x must be .*; missing: high"),
        ("[x]\nlow = 1\nhigh = 2\nstep = 1", "x must be .*; unknown: step"),
        ("[x]\nlow = 1\nhigh = 2\nlog = 'yes'", "log of x must be true or false, found 'yes'"),
        ("[x]\nlow = '1'\nhigh = 2", "x must be"),
        ("[x]\nchoices = 'ab'", "the choices of x must be an array, found 'ab'"),
        ("[x]\nchoices = [1, 2]\nlow = 1", "x must be .*; unknown: low"),
    ],
)
def test_bad_files_name_the_parameter(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_orders_and_conditions(tmp_path: Path) -> None:
    text = """
    size = { choices = ["s", "m", "l"], ordered = true }
    momentum = { low = 0.0, high = 0.99, when = { size = ["m", "l"] } }
    """
    (tmp_path / "space.toml").write_text(text)
    wanted = Space({"size": Ordinal(["s", "m", "l"]), "momentum": When((0.0, 0.99), size=["m", "l"])})
    assert read_space(tmp_path / "space.toml") == wanted
    for wrong, message in [
        ("x = { low = 0.0, high = 1.0, when = 3 }", "when of x must be a table, as in when = .* found 3"),
        ("x = { low = 0.0, high = 1.0, when = {} }", "when of x makes no sense: When needs the values of one other"),
        (
            'x = { low = 0.0, high = 1.0, when = { y = ["a"] } }',
            "x depends on 'y', which must be a parameter defined before",
        ),
        ('x = { choices = ["a", "b"], ordered = 1 }', "ordered of x must be true or false, found 1"),
    ]:
        (tmp_path / "space.toml").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            read_space(tmp_path / "space.toml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_space(tmp_path / "space.toml")
