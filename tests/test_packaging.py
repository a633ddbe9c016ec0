"""The archives: the wheel holds code, configuration and templates, and runs outside the checkout."""

import importlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive; built without a network, by the build backend that is installed where there is one."""
    pytest.importorskip("hatchling", reason="hatchling is not installed, and tests fetch nothing")
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source archive."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sdist)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_source_archive_holds_what_tests_and_documentation_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "mkdocs.yml",
        "tests/conftest.py",
        "scripts/run.sh",
    ):
        assert name in names
    for path in (*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*"), *ROOT.glob("conf/weights/*")):
        if path.is_file():
            assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith(("outputs", ".venv", "site"))]


def test_the_wheel_holds_packages_configuration_and_templates(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    templates = list(ROOT.glob("search/output/templates/*"))
    assert templates
    for path in (
        *ROOT.glob("conf/**/*.yaml"),
        *ROOT.glob("conf/strategies/*.json"),
        *ROOT.glob("conf/weights/*"),
        *templates,
    ):
        assert str(path.relative_to(ROOT)) in names
    for package in ("amc_env", "amc_env/pruning", "agents", "search", "conf"):
        assert f"{package}/__init__.py" in names
    assert not [name for name in names if name.startswith(("tests", "scripts"))]


def test_every_command_has_its_function_and_its_configuration() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"amc-search", "amc-apply", "amc-sensitivity", "amc-latency"} <= set(scripts)
    for name, entry in scripts.items():
        module, function = entry.split(":")
        assert callable(getattr(importlib.import_module(module), function))
        if name != "amc-report":  # it reads runs and has no configuration
            assert (ROOT / "conf" / f"{name.removeprefix('amc-')}.yaml").exists()


def test_the_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked, with this environment's libraries behind it: the command finds its configuration."""
    place = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(place)
    # site-packages as a plain path: its .pth files, which may point at the checkout, are not read.
    libraries = sysconfig.get_paths()["purelib"]
    environment = os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{libraries}"}
    command = [sys.executable, "-S", "-m", "search.run_search", "--cfg", "job", "model=resnet20"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "depth: 20" in done.stdout
    where = "import search, conf; print(search.__file__, conf.__file__)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", where], cwd=tmp_path, env=environment, capture_output=True
    )
    assert found.stdout.decode().count(str(place)) == 2, found.stderr.decode()


def test_without_the_package_datasets_its_data_alone_are_refused(tmp_path: Path) -> None:
    code = "import sys; sys.modules['datasets'] = None; from search.run_search import main; main()"
    command = [sys.executable, "-c", code, "data=cifar10", "model=resnet20", "model.weights=random"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install "amc-netadapt[data]"' in done.stderr
