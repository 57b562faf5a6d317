"""The three source folders install as one package, complete, and put nothing else on the path."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import bayesnn

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIRS = {"bayesnn": "bayesnn", "inference": "bayesnn/inference", "processes": "bayesnn/processes"}


def installed_path(source: Path) -> str:
    """Where a source file lands in an installation: ``inference/run.py`` -> ``bayesnn/inference/run.py``."""
    top, *rest = source.relative_to(ROOT).parts
    return "/".join([PACKAGE_DIRS[top], *rest])


def source_files(pattern: str) -> set[str]:
    return {installed_path(path) for top in PACKAGE_DIRS for path in (ROOT / top).rglob(pattern)}


def run_pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, because setuptools leaves a build folder in the tree that it builds."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGE_DIRS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", PYPROJECT["project"].get("readme")):
        if name is not None:
            shutil.copy(ROOT / name, source)
    run_pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(output), str(source))
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installation")
    run_pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def run_installed(installation: Path, cwd: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code against the installation from another folder, with nothing but the installation added to the path."""
    environment = os.environ | {"PYTHONPATH": str(installation)}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_every_package_folder_is_listed() -> None:
    folders = {path.removesuffix("/__init__.py").replace("/", ".") for path in source_files("__init__.py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


def test_wheel_holds_every_module_and_only_bayesnn(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"bayesnn"}
    assert {name for name in names if name.endswith(".py")} == source_files("*.py")


def test_wheel_holds_type_marker_licence_and_pretrained_weights(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "bayesnn/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    pretrained = ROOT / "bayesnn" / "pretrained"
    data = {path.name for path in pretrained.glob("*") if path.suffix in {".safetensors", ".json"}}
    assert {f"bayesnn/pretrained/{name}" for name in data} <= names


def test_installed_packages_import_from_another_folder(installation: Path, tmp_path: Path) -> None:
    code = (
        "import bayesnn, bayesnn.inference, bayesnn.processes\n"
        "print(bayesnn.__file__, bayesnn.inference.__file__, bayesnn.processes.__file__)"
    )
    finished = run_installed(installation, tmp_path, code)
    assert finished.returncode == 0, finished.stderr
    folders = ("bayesnn", "bayesnn/inference", "bayesnn/processes")
    assert finished.stdout.split() == [str(installation / folder / "__init__.py") for folder in folders]


@pytest.mark.parametrize("name", ["inference", "processes"])
def test_no_folder_becomes_a_top_level_module(installation: Path, tmp_path: Path, name: str) -> None:
    finished = run_installed(installation, tmp_path, f"import {name}")
    assert f"No module named '{name}'" in finished.stderr


def test_versions_agree() -> None:
    version = PYPROJECT["project"]["version"]
    assert importlib.metadata.version("bayesnn") == version
    assert getattr(bayesnn, "__version__", version) == version
