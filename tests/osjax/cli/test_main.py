"""The command itself: exit statuses, one line for each mistake, a quick help. Each test runs the real program."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from osjax.cli import main

OSJAX = [sys.executable, "-m", "osjax.cli.main"]


def run(*words, **options):
    return subprocess.run([*OSJAX, *words], capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["draw"],
        ["--nonsense"],
        ["generate"],
        ["generate", "--prompt", " "],
        ["generate", "128px", "--prompt", "x"],
        ["generate", "--promt", "x"],
        ["generate", "--prompt", "x", "--num_frames", "16"],
        ["generate", "--prompt", "x", "--num_frames", "133"],
        ["generate", "--prompt", "x", "--guidance", "nan"],
        ["generate", "--prompt", "x", "--seed", "-1"],
        ["generate", "--prompt", "x", "--cond_type", "i2v_head", "--ref", "missing.png"],
        ["generate", "--prompt", "x", "--cond_type", "i2v_head"],
        ["generate", "--prompt", "x", "--cond_type", "i2v_middle"],
        ["generate", "256px", "--prompt", "x", "--aspect_ratio", "7:5"],
        ["generate", "--prompt", "x", "--height", "0", "--width", "16"],
        ["generate", "--prompt", "x", "--mesh", "data=64"],
        ["generate", "--prompt", "x", "--mesh", "rows=2"],
        ["generate", "--prompt", "x", "--dtype", "int8"],
        ["generate", "--prompt", "x", "--attention", "none"],
        ["generate", "--prompt", "x", "--ckpt_path", "missing"],
        ["generate", "--dataset.data_path", "missing.csv"],
        ["generate", "--from", "missing.mp4"],
        ["download"],  # the suite is offline
        ["download", "open-sora"],
        ["download", "--source", "elsewhere"],
        ["convert", "missing", "bundle"],
        ["info", "missing.mp4"],
        ["info", "--nonsense"],
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("osjax: error: ")
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "something was written"


def test_help_is_quick_and_imports_no_jax():
    before = psutil.Process().children(recursive=True)
    code = (
        "import sys, time, contextlib, osjax.cli.main as m\n"
        "with contextlib.suppress(SystemExit): m.main(['--help'])\n"
        "print(time.process_time(), [name for name in ('jax', 'ml_collections', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    seconds, imported = done.stdout.splitlines()[-1].split(" ", 1)
    assert "generate" in done.stdout
    assert float(seconds) < 1.0
    assert imported == "[]"
    assert psutil.Process().children(recursive=True) == before


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "osjax")


def test_info_names_versions_devices_and_kernels():
    done = run("info")
    assert done.returncode == 0
    assert "\njax " in done.stdout
    for line in ("optax ", "platform cpu", "device 0: cpu (cpu), memory not known", "attention xla, fp32: runs"):
        assert f"\n{line}" in done.stdout
    assert "attention cudnn, bf16: needs an NVIDIA GPU and bf16 or fp16, not cpu" in done.stdout


def test_a_reader_that_leaves_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([*OSJAX, "--version"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr


SWALLOWED = """
import os, signal, sys, time, weakref
from osjax.cli.interrupt import insistent_interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background

class Thing: pass

def swallow(_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)  # the exception is raised here, and dropped by whoever calls back

try:
    with insistent_interrupt():
        thing = Thing()
        reference = weakref.ref(thing, swallow)
        del thing
        print("went on", flush=True)
        time.sleep(30)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_inside_a_callback_is_not_lost():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=20)
    assert done.stdout == "went on\n", "the callback did not swallow it: this test tests nothing"
    assert (done.returncode, done.stderr) == (130, "")


def test_interrupt_is_one_line_and_status_130(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children would ignore it
    try:
        words = ["generate", "--prompt", "x", "--num_steps", "10000", "--save_dir", str(tmp_path)]
        process = subprocess.Popen([*OSJAX, *words], stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    lines = []
    while not (lines and lines[-1].startswith("osjax: 1 of 1")):
        lines.append(process.stderr.readline())
        assert lines[-1], f"it ended by itself: {lines}"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.rstrip().splitlines()[-1] == "osjax: interrupted"
    assert "Traceback" not in errors
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "a file was left"


def test_what_is_compiled_is_kept_for_the_next_run(tmp_path):
    """The second run finds what the first compiled, and writes nothing new."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "caches")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # how long anything takes must not decide
    words = ["generate", "--prompt", "x", "--num_frames", "1", "--num_steps", "1"]
    kept = []
    for folder in ("first", "second"):
        assert run(*words, "--save_dir", str(tmp_path / folder), env=environment).returncode == 0
        kept.append({path.name for path in (tmp_path / "caches" / "osjax").glob("*-cache")})
    assert kept[0]
    assert kept[0] == kept[1]


def test_a_home_that_cannot_be_written_to_is_no_mistake(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    main._prepare_libraries()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_cache_of_the_users_keeps_its_place_and_its_size(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    main._prepare_libraries()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "theirs")
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ
    assert not (tmp_path / "caches").exists()
