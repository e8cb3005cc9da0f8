"""The repository's own rules: style, sizes, scripts, and papers that agree with the code."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from osjax.cli import options, train_options

ROOT = Path(__file__).parents[1]
ROOMS = ("osjax", "convert", "configs", "launch", "tests", "notebooks")
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
LONGEST = 500


def tool(name):
    """A program of the test extra: beside this Python, or anywhere else on the path."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    assert found, f"{name} is missing: pip install -e '.[test]'"
    return found


def run(*words):
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(words):
    done = run(tool("ruff"), *words, "osjax", "convert", "configs", "tests")
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert not {str(path): length for path, length in lengths.items() if length > LONGEST}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert script.stat().st_mode & 0o111, "not executable"
    for words in (["bash", "-n"], [tool("shellcheck")]):
        done = run(*words, str(script))
        assert done.returncode == 0, done.stdout + done.stderr


def test_launch_scripts_leave_multicast_alone():
    for script in SCRIPTS:
        assert not re.search(r"NCCL_NVLS_ENABLE=", script.read_text()), script


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2, "one runs the main job, one passes the tests"
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("module", [options, train_options], ids=lambda module: module.__name__)
def test_the_options_page_is_current(module):
    assert module.markdown() in (ROOT / "docs" / "cli.md").read_text(), f"paste in: python -m {module.__name__}"


def test_the_version_has_its_changes():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_lock_file_names_a_registry():
    names = {"poetry.lock", "uv.lock", "Pipfile.lock", "requirements.txt", "package-lock.json"}
    assert not names & {path.name for path in ROOT.iterdir()}
