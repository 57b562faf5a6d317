"""The command line, as a user types it."""

import json
import os
import re
import signal
import sys
import types

import numpy as np
import optuna
import pandas as pd
import pytest
from typer.testing import CliRunner

from bayesnn import surrogates
from bayesnn.bo.space_file import read_space
from bayesnn.cli import app
from bayesnn.cli.search import stop_signals

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def table():
    generator = np.random.default_rng(0)
    X = generator.uniform(-1, 1, (40, 2))
    y = X[:, 0] + 0.05 * generator.normal(size=40)
    return pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "y": y, "kind": np.where(X[:, 0] > 0, "up", "down")})


@pytest.fixture
def csv(table, tmp_path):
    path = tmp_path / "data.csv"
    table.to_csv(path, index=False)
    return path


def test_models_names_all_of_them():
    result = invoke("models")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == surrogates()


def test_fit_then_predict(csv, table, tmp_path):
    model, out = tmp_path / "model.safetensors", tmp_path / "out.csv"
    fitted = invoke("fit", csv, "--target", "y", "--model", "nngp", "--ignore", "kind", "--output", model)
    assert fitted.exit_code == 0, fitted.output
    assert "coverage_90" in fitted.output and "32 rows, 2 inputs, 8 rows held out" in fitted.output
    assert json.loads(model.with_suffix(".json").read_text()) == {"inputs": ["a", "b"], "target": "y", "labels": None}
    # Columns are found by name, whatever their order.
    table[["b", "a"]].to_csv(tmp_path / "new.csv", index=False)
    predicted = invoke("predict", model, tmp_path / "new.csv", "--output", out, "--level", "0.8")
    assert predicted.exit_code == 0, predicted.output
    result = pd.read_csv(out)
    assert list(result) == ["mean", "std", "lower", "upper"]
    assert np.abs(result["mean"] - table["y"]).max() < 0.3
    assert np.allclose((result["upper"] - result["lower"]) / result["std"], 2 * 1.2815515655446004)


def test_classification_keeps_the_labels(csv, tmp_path):
    model, out = tmp_path / "model.safetensors", tmp_path / "out.csv"
    arguments = ("--target", "kind", "--task", "classification", "--model", "ensemble", "--ignore", "y")
    fitted = invoke("fit", csv, *arguments, "--output", model)
    assert fitted.exit_code == 0, fitted.output
    assert invoke("predict", model, csv, "--output", out).exit_code == 0
    result = pd.read_csv(out)
    assert list(result) == ["P(down)", "P(up)", "label"]
    assert np.allclose(result[["P(down)", "P(up)"]].sum(axis=1), 1)
    assert (result["label"] == pd.read_csv(csv)["kind"]).mean() > 0.9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--target", "z"), "is no column"),
        (("--target", "y"), "kind aren't numbers"),
        (("--target", "y", "--ignore", "q"), "no such column"),
        (("--target", "y", "--ignore", "kind", "--model", "oracle"), "no surrogate named 'oracle'"),
        (("--target", "kind", "--task", "classification", "--model", "nngp"), "for classification"),
        (("--target", "y", "--task", "guessing"), "--task must be one of"),
        (("--target", "y", "--ignore", "kind", "--output", "model.json"), "must end in .safetensors"),
    ],
)
def test_bad_arguments_take_one_line(csv, tmp_path, arguments, message):
    result = invoke("fit", csv, "--output", tmp_path / "model.safetensors", *arguments)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("a,y\n", "no rows"),
        ("a,y\n1,2\n3,\n", "missing values in y (1)"),
        ("a,y\n1,2\n2,3\n", "at least 5"),
        ("y\n" + "1\n2\n" * 4, "no input columns"),
    ],
)
def test_bad_files_take_one_line(tmp_path, text, message):
    path = tmp_path / "data.csv"
    path.write_text(text)
    result = invoke("fit", path, "--target", "y")
    assert result.exit_code == 2 and message in result.output


def test_predict_refuses_what_fit_did_not_write(csv, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    result = invoke("predict", tmp_path / "model.safetensors", csv)
    assert result.exit_code == 2 and "not a complete bayesnn file" in result.output
    assert invoke("predict", tmp_path / "nothing.safetensors", csv).exit_code == 2


def test_predict_minds_the_models_columns_only(csv, table, tmp_path):
    model, path = tmp_path / "model.safetensors", tmp_path / "new.csv"
    assert invoke("fit", csv, "--target", "y", "--model", "pfn", "--ignore", "kind", "--output", model).exit_code == 0
    table.assign(kind=None, y=np.nan).to_csv(path, index=False)
    assert invoke("predict", model, path, "--output", tmp_path / "out.csv").exit_code == 0
    for new, message in [
        (table.drop(columns="b"), "lacks the input column(s) b"),
        (table.assign(b="much"), "b aren't numbers"),
        (table.assign(b=table["b"].where(table.index > 2)), "missing values in b (3)"),
    ]:
        new.to_csv(path, index=False)
        result = invoke("predict", model, path, "--output", tmp_path / "out.csv")
        assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize(
    "space, command, message",
    [
        ("x = [16, 32, 64]", "python {x}", "x begins with two numbers"),
        ("x = [0.0, 1.0]", "python {y}", "places for y, which the space doesn't have"),
        (None, "python {x}", "No such file"),
    ],
)
def test_optimize_refuses_before_any_work(tmp_path, space, command, message):
    if space is not None:
        (tmp_path / "space.toml").write_text(space)
    arguments = ("--command", command, "--metric", "loss", "--storage", tmp_path / "study.db")
    result = invoke("optimize", "--space", tmp_path / "space.toml", *arguments)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "study.db").exists()


def test_optimize_says_when_nothing_succeeds(tmp_path):
    (tmp_path / "space.toml").write_text("x = [0.0, 1.0]")
    command = f"'{sys.executable}' -S -I -c pass {{x}}"
    arguments = ("--command", command, "--metric", "loss", "--storage", tmp_path / "study.db", "--trials", 1)
    result = invoke("optimize", "--space", tmp_path / "space.toml", *arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert "no evaluation succeeded, 1 failed; the last one: it printed no line of JSON" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_scheduler_stops_optimize_as_ctrl_c_does():
    with stop_signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_example_of_optimize_is_a_space(tmp_path):
    """What --help shows can be copied."""
    lines = invoke("optimize", "--help").output.splitlines()
    start = next(index for index, line in enumerate(lines) if line.strip() == "space.toml:")
    (tmp_path / "space.toml").write_text("\n".join(lines[start + 1 : lines.index("", start)]))
    space = read_space(tmp_path / "space.toml")
    assert space.names == ["lr", "layers", "optimizer", "batch_size", "width"]
    command = next(line for line in lines if "--command" in line and "python" in line)
    assert re.findall(r"\{(\w+)\}", command) == space.names


def test_report(tmp_path):
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="mine")
    study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    result = invoke("report", tmp_path / "study.db", "--output", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "<h1>Study mine</h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    result = invoke("report", tmp_path / "study.db", "--study-name", "yours", "--output", tmp_path / "page.html")
    assert result.exit_code == 2 and "it has 'mine'" in result.output


def test_dashboard(tmp_path, monkeypatch):
    calls = []
    module = types.ModuleType("optuna_dashboard")
    module.run_server = lambda storage, **settings: calls.append((storage, settings))
    monkeypatch.setitem(sys.modules, "optuna_dashboard", module)
    assert invoke("dashboard", tmp_path / "study.db").exit_code == 2
    optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="mine")
    assert invoke("dashboard", tmp_path / "study.db", "--port", 9000).exit_code == 0
    ((storage, settings),) = calls
    assert optuna.get_all_study_names(storage) == ["mine"] and settings == {"host": "127.0.0.1", "port": 9000}
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    missing = invoke("dashboard", tmp_path / "study.db")
    assert missing.exit_code == 2 and 'pip install "bayesnn[dashboard]"' in missing.output
