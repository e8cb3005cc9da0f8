"""The one-way rule of CONTRIBUTING.md, read off the source, and that importing does nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each room of osjax may import itself, rooms before it in the chain, and `errors`.
CHAIN = (
    "kernels",
    "parallel",
    "models",
    "diagnose",
    "sampling",
    "adapters",
    "residency",
    "random_weights",
    "roles",
    "sizes",
    "preflight",
    "room",
    "record",
    "pixels",
    "pipeline",
    "embedding",
    "benchmark",
    "training",
    "cli",
)
# Leaves import only each other and `errors`; of the chain only these import them. convert may too.
LEAVES = frozenset(
    {"batch", "bundle", "checkpoint", "files", "hub", "leaves", "liveness"}
    | {"media", "naming", "provenance", "refine", "request", "text", "video"}
)
MAY_USE_LEAVES = frozenset(
    {"adapters", "residency", "random_weights", "roles", "sizes", "preflight", "room", "record", "pixels", "pipeline"}
    | {"embedding", "benchmark", "training", "cli"}
)

# Where else a package may be imported from; the tests are free.
HOMES = {
    "torch": ("convert/sources.py", "launch/torch_baseline.py"),
    "orbax": ("osjax/checkpoint.py", "osjax/training/snapshots.py"),
    "ml_collections": ("osjax/cli/", "configs/"),
    "transformers": ("osjax/text/",),
    "huggingface_hub": ("osjax/hub/",),
    "modelscope_hub": ("osjax/hub/",),
    "openai": ("osjax/refine/",),
    "convert": ("convert/", "osjax/cli/main.py"),
    "configs": ("configs/", "osjax/cli/"),
}

SOURCES = sorted(path for room in ("osjax", "convert", "configs") for path in (ROOT / room).rglob("*.py"))
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))  # may use all of osjax, but packages only where these have their homes


def imported(path):
    """Full names of what the file at `path` imports, anywhere in it, as (name, line)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the full name of what is imported"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(name):
    """`osjax.models.mmdit` → `models`; of `osjax/__init__.py`'s own names, None."""
    parts = name.split(".")
    return parts[1] if parts[0] == "osjax" and len(parts) > 1 else None


def allowed(room):
    """The rooms that `room` may import."""
    if room in CHAIN:
        below = set(CHAIN[: CHAIN.index(room) + 1])
        return below | {"errors"} | (LEAVES if room in MAY_USE_LEAVES else set())
    return LEAVES | {"errors"}


def test_every_room_has_its_place():
    rooms = {path.relative_to(ROOT / "osjax").parts[0].removesuffix(".py") for path in (ROOT / "osjax").rglob("*.py")}
    strangers = rooms - {*CHAIN, *LEAVES, "errors", "__init__"}
    assert not strangers, f"say in tests/test_imports.py and CONTRIBUTING.md where these stand: {sorted(strangers)}"


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    where = path.relative_to(ROOT).as_posix()
    room = where.split("/")[1].removesuffix(".py")
    for name, line in imported(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or where.startswith(homes), f"{where}:{line} imports {name}, which belongs in {homes}"
        if where.startswith("osjax/") and room != "__init__" and room_of(name):
            assert room_of(name) in allowed(room), f"{where}:{line} ({room}) imports {name}, against the one way"


def run_python(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), **environment},
        check=False,
    )


def test_importing_everything_touches_no_device_file_or_variable(tmp_path):
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if not path.is_relative_to(ROOT / "configs")
    ]
    code = (
        "import importlib, os\n"
        "before = dict(os.environ)\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "assert {k: v for k, v in os.environ.items() if k.startswith(('XLA', 'JAX'))} == "
        "{k: v for k, v in before.items() if k.startswith(('XLA', 'JAX'))}\n"
        "print('imported')\n"
        "import jax; jax.devices()\n"
    )
    # JAX refuses a platform that does not exist as soon as anything asks for a device.
    done = run_python(code, tmp_path, JAX_PLATFORMS="no_such_platform")
    assert done.stdout.strip() == "imported", done.stderr
    assert done.returncode != 0
    assert "no_such_platform" in done.stderr
    assert not list(tmp_path.iterdir())


def test_importing_osjax_imports_no_jax(tmp_path):
    code = "import sys, osjax; print([name for name in ('jax', 'torch', 'orbax') if name in sys.modules])"
    assert run_python(code, tmp_path).stdout.strip() == "[]"
