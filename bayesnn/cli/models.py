"""The commands about models: ``bayesnn demo | models | fit | pretrain | predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

import bayesnn
from bayesnn import likelihoods, metrics
from bayesnn.bnn import BNN
from bayesnn.cli.errors import one_line_errors
from bayesnn.demo import run_demo
from bayesnn.inference.amortized.pretraining import (
    export as write_network,
    from_checkpoint,
    launched_fabric,
    load_start,
    note_hardware,
    noted_hardware,
    train,
)
from bayesnn.inference.amortized.recipes import read_recipe
from bayesnn.model import Model
from bayesnn.predictive import ClassPredictive
from bayesnn.registry import named_model, surrogates
from bayesnn.report import text_table

CLASSIFIERS = ("ensemble", "hmc", "mean-field")
TASKS = ("regression", "classification")


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the report and the study.")] = Path("demo-output"),
) -> None:
    """Every family on real data, a real tuning run, and a report with pictures."""
    # The demo's tensors are small: a second thread costs more than it brings.
    torch.set_num_threads(1)
    with one_line_errors():
        run_demo(output, log=typer.echo)


def models() -> None:
    """The names of the models."""
    for name in surrogates():
        model = named_model(name)
        # A Bayesian neural network is known by its method, any other model by itself.
        described = getattr(model, "method", model)
        typer.echo(f"{name:12} {(described.__doc__ or '').strip().splitlines()[0]}")


def fit(
    data: Annotated[Path, typer.Argument(help="CSV file with a header.")],
    target: Annotated[str, typer.Option(help="Column to predict; all others are inputs.")],
    model: Annotated[str, typer.Option(help="A name from `bayesnn models`.")] = "nngp",
    task: Annotated[str, typer.Option(help="regression or classification")] = "regression",
    output: Annotated[Path, typer.Option(help="File for the fitted model.")] = Path("model.safetensors"),
    ignore: Annotated[list[str] | None, typer.Option(help="Column to leave out; can be given more than once.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the fit.")] = 0,
) -> None:
    """Fit a model to a CSV file: scores on a held-out fifth, then a fit to all rows, saved."""
    with one_line_errors():
        if task not in TASKS:
            raise ValueError(f"--task must be one of {', '.join(TASKS)}, found {task!r}")
        if output.suffix != ".safetensors":  # else the file of the columns could take the model's place
            raise ValueError(f"--output must end in .safetensors, found {str(output)!r}")
        if task == "classification" and model not in CLASSIFIERS:
            raise ValueError(f"--model must be one of {', '.join(CLASSIFIERS)} for classification, found {model!r}")
        table = _read(data, ignore or [])
        _require_complete(table, data, "drop those rows or --ignore the columns")
        if target not in table:
            raise ValueError(f"--target {target!r} is no column of {data}; there are {', '.join(table.columns)}")
        inputs = [column for column in table.columns if column != target]
        if not inputs:
            raise ValueError(f"{data} has no input columns besides {target!r}")
        X, labels = _numbers(table, inputs), None
        if task == "classification":
            labels = sorted(table[target].unique().tolist())
            Y = torch.tensor([labels.index(label) for label in table[target].tolist()])
        else:
            Y = _numbers(table, [target])
        if len(X) < 5:
            raise ValueError(f"{data} has {len(X)} rows; at least 5 are needed to hold a fifth out")

        def unfitted() -> Model:
            chosen: Model = named_model(model)
            if labels is None:
                return chosen
            assert isinstance(chosen, BNN)
            return BNN(likelihood=likelihoods.Categorical(len(labels)), method=chosen.method)

        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
        held_out, rest = order[: len(X) // 5], order[len(X) // 5 :]
        typer.echo(f"{model}: {len(rest)} rows, {len(inputs)} inputs, {len(held_out)} rows held out")
        judged = unfitted().fit(X[rest], Y[rest], seed=seed, progress=True)
        scores = metrics.summary(judged.predict(X[held_out]), Y[held_out])
        typer.echo(text_table([scores]))
        unfitted().fit(X, Y, seed=seed, progress=True).save(output)
        columns = {"inputs": inputs, "target": target, "labels": labels}
        output.with_suffix(".json").write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"fitted to all rows and saved: {output} (columns in {output.with_suffix('.json')})")


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of one that ships with the package.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights and the model card.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to keep the state in, and to go on from.")] = None,
    start: Annotated[Path | None, typer.Option(help="Weights of the recipe before, in place of training it.")] = None,
    export: Annotated[bool, typer.Option("--export", help="Write the checkpoint's network without training.")] = False,
    accelerator: Annotated[str, typer.Option(help="Lightning Fabric's: cpu, cuda, auto …")] = "cpu",
    devices: Annotated[int, typer.Option(help="How many.")] = 1,
    precision: Annotated[str, typer.Option(help="Lightning Fabric's: 32-true, bf16-mixed …")] = "32-true",
) -> None:
    """Train a network that answers by one forward pass, by a recipe; interrupted, it goes on from its checkpoint."""
    with one_line_errors():
        chosen = read_recipe(recipe)
        begin, earlier = (None, "") if start is None else load_start(chosen, start)
        out.mkdir(parents=True, exist_ok=True)
        if export:
            if checkpoint is None:
                raise ValueError("--export needs --checkpoint")
            network, num_steps = from_checkpoint(chosen, checkpoint, begin)
            hardware = noted_hardware(checkpoint)
        else:
            fabric, hardware = None, f"{devices} x {accelerator}, {precision}"
            if (accelerator, devices, precision) != ("cpu", 1, "32-true"):
                fabric = launched_fabric(accelerator, devices, precision)
            if checkpoint is not None:
                hardware = note_hardware(checkpoint, hardware)
            try:
                network = train(chosen, checkpoint, fabric, log=typer.echo, start=begin)
                num_steps = chosen.training.num_steps
            except KeyboardInterrupt:
                kept = (
                    f"the same command goes on from {checkpoint}"
                    if checkpoint
                    else "nothing is kept without --checkpoint"
                )
                typer.echo(f"interrupted: {kept}", err=True)
                raise typer.Exit(130) from None
            if fabric is not None and not fabric.is_global_zero:
                return
        hardware = f"{earlier}; then {hardware}" if earlier else hardware
        card = write_network(chosen, network, num_steps, out, hardware)
        typer.echo(f"{out / chosen.name}.safetensors: {card['num_parameters']} parameters, {num_steps} steps")


def predict(
    model: Annotated[Path, typer.Argument(help="File that `bayesnn fit` wrote.")],
    data: Annotated[Path, typer.Argument(help="CSV file with the same input columns.")],
    output: Annotated[Path, typer.Option(help="CSV file for the predictions.")] = Path("predictions.csv"),
    level: Annotated[float, typer.Option(help="Probability of the interval.")] = 0.9,
) -> None:
    """Predict the rows of a CSV file: mean, standard deviation and interval, or class probabilities."""
    with one_line_errors():
        if not 0 < level < 1:
            raise ValueError(f"--level must lie strictly between 0 and 1, found {level}")
        fitted = bayesnn.load(model)
        columns = _columns(model)
        table = _read(data, [])
        missing = [column for column in columns["inputs"] if column not in table]
        if missing:
            raise ValueError(f"{data} lacks the input column(s) {', '.join(missing)}")
        _require_complete(table[columns["inputs"]], data, "or drop those rows")
        p = fitted.predict(_numbers(table, columns["inputs"]))
        if isinstance(p, ClassPredictive):
            names = [f"P({label})" for label in columns["labels"]]
            result = pd.DataFrame(p.probabilities.numpy(), columns=names)
            result["label"] = [columns["labels"][index] for index in p.labels.tolist()]
        else:
            lower, upper = p.interval(level)
            parts = {"mean": p.mean, "std": p.stddev, "lower": lower, "upper": upper}
            result = pd.DataFrame({name: values[:, 0].numpy() for name, values in parts.items()})
        result.to_csv(output, index=False)
        typer.echo(f"{len(result)} predictions of {columns['target']}: {output}")


def _read(path: Path, ignore: list[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None
    unknown = [column for column in ignore if column not in table]
    if unknown:
        raise ValueError(f"--ignore {', '.join(unknown)}: no such column in {path}")
    table = table.drop(columns=ignore)
    if not len(table):
        raise ValueError(f"{path} has a header but no rows")
    return table


def _require_complete(table: pd.DataFrame, path: Path, advice: str) -> None:
    holes = table.isna().sum()
    if holes.any():
        found = ", ".join(f"{column} ({count})" for column, count in holes[holes > 0].items())
        raise ValueError(f"{path} has missing values in {found}; fill them in, {advice}")


def _numbers(table: pd.DataFrame, columns: list[str]) -> torch.Tensor:
    words = [column for column in columns if not pd.api.types.is_numeric_dtype(table[column])]
    if words:
        raise ValueError(f"column(s) {', '.join(words)} aren't numbers; encode them or --ignore them")
    return torch.tensor(table[columns].to_numpy(dtype=float))


def _columns(model: Path) -> dict[str, Any]:
    path = model.with_suffix(".json")
    try:
        columns = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(columns, dict) or not {"inputs", "target", "labels"} <= columns.keys():
        raise ValueError(f"{path} doesn't name the model's columns: it isn't what `bayesnn fit` wrote")
    return columns
