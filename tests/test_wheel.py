"""The wheel, built and installed for real: the suite runs from an empty folder, on a backend that only it can see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="the extra dev builds the wheel")

ROOT = Path(__file__).parents[1]
SHIPPED = {
    "lyra/py.typed",
    "lyra/spec/SPEC.md",
    "lyra/spec/schema.json",
    "lyra/spec/presets/gemma-3-270m.toml",
    "lyra/conformance/conftest.py",
    "lyra/conformance/properties/test_static.py",
    "lyra/conformance/faults/static.toml",
    "lyra/conformance/report/page.css",
    "lyra/conformance/report/schema.json",
}
SOURCES = ("api", "spec", "backends", "conformance", "studies", "choosing", "bench/speed")


def call(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command without the paths of the process that tests."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "PYTEST_ADDOPTS"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy of the sources: a build leaves files beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source)
    done = call(*pip, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel, and behind it the packages that these tests run with."""
    folder = tmp_path_factory.mktemp("environment")
    assert call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder).returncode == 0
    python = folder / "bin" / "python"
    site = site_of(python)
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    done = call(*install, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (site / "behind.pth").write_text("\n".join(dict.fromkeys(sysconfig.get_path(k) for k in ("purelib", "platlib"))))
    return python


def site_of(python: Path) -> Path:
    """Where the packages of an environment are."""
    asked = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=python.parent)
    return Path(asked.stdout.strip())


def package(folder: Path) -> Path:
    """mypkg, which holds the backend of the examples."""
    target = folder / "mypkg"
    target.mkdir()
    source = (ROOT / "examples" / "numpy_backend.py").read_text(encoding="utf-8")
    (target / "__init__.py").write_text(source.replace("class NumpyBackend", "class Backend"), encoding="utf-8")
    return target


def test_the_wheel_holds_what_it_needs_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= SHIPPED
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"lyra"}
    assert not [name for name in names if name.startswith(("lyra/tests", "lyra/docs"))]
    modules = {path.relative_to(ROOT / "conformance").as_posix() for path in (ROOT / "conformance").rglob("*.py")}
    assert {f"lyra/conformance/{name}" for name in modules} <= names


def test_the_suite_runs_from_an_empty_folder(python: Path, tmp_path: Path) -> None:
    package(tmp_path)
    where = call(python, "-c", "import lyra, lyra.spec; print(lyra.__file__, lyra.spec.__file__)", cwd=tmp_path).stdout
    assert all(Path(path).is_relative_to(python.parents[1]) for path in where.split())
    suite = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "lyra.conformance")
    done = call(*suite, "--lyra-backend", "mypkg:Backend", "-k", "layer_equals_oracle or peaked", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "lyra: 144 compared cases" in done.stdout


def test_an_installed_backend_is_found_by_its_entry_point(python: Path, tmp_path: Path) -> None:
    site = site_of(python)
    package(site)
    about = site / "mypkg-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mypkg\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[lyra.backends]\nmine = mypkg:Backend\n")
    lyra = (python, "-c", "from lyra.cli import main; main()", "conform", "--backend", "mine")
    done = call(*lyra, "--only", "layer_equals_oracle", "--json", "report.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": conforms. 1 passed" in done.stdout
    unknown = call(python, "-c", "from lyra.cli import main; main()", "conform", "--backend", "other", cwd=tmp_path)
    assert "known: jax, mine, torch" in unknown.stderr
