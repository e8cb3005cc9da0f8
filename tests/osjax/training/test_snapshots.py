"""Checkpoints: bit for bit onto any mesh, the newest few, never a half-written one, and only for the same run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from osjax.errors import OsjaxError
from osjax.training.snapshots import Snapshots, differences, exists

WHOLE = P()
CONFIG = {"run": {"steps": 10, "save_every": 5, "mesh": "data=1"}, "optim": {"lr": 1e-5, "schedule": "constant"}}


class Moments(NamedTuple):
    """A class of the state's own, as optimizers have them."""

    count: jax.Array
    mean: dict[str, jax.Array]


def mesh_of(devices, axis_type=AxisType.Auto):
    return jax.make_mesh((devices,), ("x",), (axis_type,), devices=jax.devices()[:devices])


def make_state(seed=0):
    """Every kind of leaf that a run has, and more than ten of one list, so that 10 sorts before 2."""
    draw = np.random.default_rng(seed)
    return {
        "weights": {"mmdit.proj.kernel": jnp.asarray(draw.standard_normal((16, 8)), jnp.float32)},
        "half": jnp.asarray(draw.standard_normal((8, 3)), jnp.bfloat16),
        "moments": (Moments(jnp.asarray(seed, jnp.int32), {"mmdit.proj.kernel": jnp.full((16, 8), -0.0)}), None, ()),
        "list": [jnp.asarray(float(number)) for number in range(12)],
        "strange": jnp.asarray([np.nan, np.inf, -np.inf, 1e-45], jnp.float32),
        "flag": jnp.asarray(True),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
    }


def abstract(state, mesh, spec=WHOLE):
    """Leaves whose first axis divides go by `spec`, the others everywhere whole."""

    def place(leaf):
        divides = leaf.ndim and leaf.shape[0] % mesh.size == 0
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec if divides else P()))

    return jax.tree.map(place, state)


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)).tobytes()
    return leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [bits(leaf) for leaf in jax.tree.leaves(found)] == [bits(leaf) for leaf in jax.tree.leaves(expected)]


@pytest.fixture
def snapshots(tmp_path):
    opened = Snapshots(tmp_path, 2, CONFIG)
    yield opened
    opened.close()


def refusal(call, *arguments):
    with pytest.raises(OsjaxError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("before", "after", "axis_type"), [(1, 8, AxisType.Auto), (8, 2, AxisType.Explicit), (4, 1, AxisType.Auto)]
)
def test_bit_for_bit_onto_another_mesh(snapshots, before, after, axis_type):
    state = make_state()
    placed = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract(state, mesh_of(before), P("x"))))
    snapshots.save(3, placed, {"loader": {"step": 7}, "names": ["a", "ü"]})
    snapshots.wait()
    target = abstract(state, mesh_of(after, axis_type), P("x"))
    found, extra = snapshots.restore(3, target)
    assert_same(found, state)
    assert extra == {"loader": {"step": 7}, "names": ["a", "ü"]}
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_the_state_may_be_donated_while_it_is_saved(snapshots):
    """On a CPU a host copy may share the device's memory, which the next step then overwrites."""
    overwrite = jax.jit(lambda state: {"w": state["w"] * 0 + 7}, donate_argnums=0)
    state = {"w": jnp.arange(1 << 22, dtype=jnp.float32)}
    overwrite({"w": jnp.ones(1 << 22)})  # compiled, so that it comes at once after the save
    snapshots.save(1, state)
    jax.block_until_ready(overwrite(state))
    snapshots.wait()
    found, _ = snapshots.restore(1, {"w": jax.ShapeDtypeStruct((1 << 22,), jnp.float32)})
    np.testing.assert_array_equal(np.asarray(found["w"]), np.arange(1 << 22, dtype=np.float32))


def test_the_newest_are_kept(snapshots, tmp_path):
    assert snapshots.latest() is None
    assert not exists(tmp_path), "a folder without a checkpoint"
    for step in (1, 5, 9):
        snapshots.save(step, make_state(step))
    snapshots.save(9, make_state(0))
    snapshots.close()
    assert exists(tmp_path)
    again = Snapshots(tmp_path, 2, CONFIG)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["5", "9"]
    assert again.latest() == 9
    for step in (5, 9):
        assert_same(again.restore(step, abstract(make_state(), mesh_of(1)))[0], make_state(step))
    assert "there are 5, 9" in refusal(again.restore, 1, {})
    again.close()


def test_another_model_is_an_error_that_names_the_arrays(snapshots):
    state = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    snapshots.save(1, state)
    snapshots.wait()
    target = abstract(state, mesh_of(1))
    for changed, message in [
        ({"w": jax.ShapeDtypeStruct((3, 5), jnp.float32)}, "w float32[3, 4], wanted float32[3, 5]"),
        ({"w": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)}, "w float32[3, 4], wanted bfloat16[3, 4]"),
        ({"c": jax.ShapeDtypeStruct((), jnp.float32)}, "c missing, wanted float32[]"),
    ]:
        assert message in refusal(snapshots.restore, 1, target | changed)
    assert "b float32[4], wanted missing" in refusal(snapshots.restore, 1, {"w": target["w"]})


def test_a_damaged_checkpoint_is_an_error(snapshots, tmp_path):
    snapshots.save(1, {"w": jnp.ones((64, 64))})
    snapshots.wait()
    data = max((tmp_path / "checkpoints/1").rglob("*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    message = refusal(snapshots.restore, 1, {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)})
    assert "cannot read the checkpoint" in message
    assert "delete it" in message


KILLED = """
import os, signal, sys, threading, time
import jax.numpy as jnp
from pathlib import Path
from osjax.training.snapshots import Snapshots

folder = Path(sys.argv[1])
snapshots = Snapshots(folder, 1, {})
snapshots.save(1, {"w": jnp.full((1 << 24,), 1.0)}, {"step": 1})
snapshots.wait()

def kill_while_saving():
    while not any("2." in path.name for path in (folder / "checkpoints").iterdir()):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill_while_saving).start()
snapshots.save(2, {"w": jnp.full((1 << 24,), 2.0)}, {"step": 2})
time.sleep(60)
"""

FULL = """
import resource, sys
import jax.numpy as jnp
from pathlib import Path
from osjax.errors import OsjaxError
from osjax.training.snapshots import Snapshots

snapshots = Snapshots(Path(sys.argv[1]), 1, {})
snapshots.save(1, {"w": jnp.full((1 << 20,), 1.0)}, {"step": 1})
snapshots.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
snapshots.save(2, {"w": jnp.full((1 << 20,), 2.0)}, {"step": 2})
try:
    snapshots.wait()
except OsjaxError as error:
    print(error)
print(snapshots.latest())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
snapshots.close()
"""


def run_python(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )


def assert_the_first_is_left(folder, elements):
    again = Snapshots(folder, 1, {})
    assert again.latest() == 1
    found, extra = again.restore(1, {"w": jax.ShapeDtypeStruct((elements,), jnp.float32)})
    assert (found["w"] == 1).all()
    assert extra == {"step": 1}
    again.save(2, {"w": jnp.ones(3)})
    again.close()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"], "what was half written is still there"


def test_killed_while_saving_the_one_before_loads(tmp_path):
    done = run_python(KILLED, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left[0] == "1"
    assert re.fullmatch(r"2\..*tmp.*", left[1]), "it was killed too late: this test tests nothing"
    assert_the_first_is_left(tmp_path, 1 << 24)


def test_disk_full_while_saving_the_one_before_stays(tmp_path):
    done = run_python(FULL, tmp_path)
    message, latest = done.stdout.splitlines()
    assert "(file too large); that of step 1 is whole: make room" in message
    assert latest == "1"
    assert "absl" not in done.stderr, "Orbax's own tracebacks"
    assert_the_first_is_left(tmp_path, 1 << 20)


TOGETHER = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from osjax.errors import OsjaxError
from osjax.training.snapshots import Snapshots

folder, process, address = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, process)
mesh = jax.make_mesh((4,), ("x",))
expected = np.arange(64, dtype=np.float32).reshape(8, 8)
state = {
    "w": jax.make_array_from_callback((8, 8), NamedSharding(mesh, P("x")), lambda index: expected[index]),
    "key": jax.jit(lambda: jax.random.key(3), out_shardings=NamedSharding(mesh, P()))(),
}
snapshots = Snapshots(folder, 1, {"a": 1})
for step in (1, 2):
    snapshots.save(step, state, {"step": step})
snapshots.close()
snapshots = Snapshots(folder, 1, {"a": 1})
whole = NamedSharding(mesh, P())
target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), state)
found, extra = snapshots.restore(snapshots.latest(), target)
assert extra == {"step": 2}
np.testing.assert_array_equal(found["w"], expected)
snapshots.close()
try:
    Snapshots(folder, 1, {"a": 2})
except OsjaxError:
    print("refused")
"""


def test_two_processes_save_and_load_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), str(process), address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **devices},
        )
        for process in range(2)
    ]
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert out.splitlines()[-1:] == ["refused"], errors
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_what_the_run_was_told_stands_beside(snapshots, tmp_path):
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_another_config_is_an_error_unless_forced(snapshots, tmp_path):
    other = {**CONFIG, "optim": {"lr": 1e-4, "schedule": "constant"}, "data": {"path": "ä.csv"}}
    Snapshots(tmp_path, 2, other).close()  # nothing to go on from yet
    snapshots.save(1, {"w": jnp.ones(3)})
    snapshots.close()
    message = refusal(Snapshots, tmp_path, 2, CONFIG)
    assert '(data.path: "ä.csv" -> nothing; optim.lr: 0.0001 -> 1e-05)' in message
    assert "--force True" in message
    Snapshots(tmp_path, 2, CONFIG, force=True).close()
    Snapshots(tmp_path, 2, CONFIG).close()


def test_a_lost_config_is_an_error_unless_forced(snapshots, tmp_path):
    snapshots.save(1, {"w": jnp.ones(3)})
    snapshots.close()
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(Snapshots, tmp_path, 2, CONFIG)
    Snapshots(tmp_path, 2, CONFIG, force=True).close()


def test_more_steps_are_the_same_run_unless_the_schedule_ends_with_it():
    def told(steps, schedule):
        return {"run": {"steps": steps}, "optim": {"schedule": schedule}}

    assert differences(told(10, "constant"), told(20, "constant")) == []
    assert differences(told(10, "cosine"), told(20, "cosine")) == ["run.steps: 10 -> 20"]
    assert len(differences(told(10, "cosine"), told(20, "constant"))) == 1


values = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
configs = st.dictionaries(st.text("abc", min_size=1, max_size=2), values | st.dictionaries(st.just("x"), values))


@given(old=configs, new=configs)
def test_differences_are_those_of_json(old, new):
    def leaves(config):
        pairs = [(key, value) for key, value in config.items() if not isinstance(value, dict)]
        pairs += [
            (f"{key}.{name}", inner)
            for key, value in config.items()
            if isinstance(value, dict)
            for name, inner in value.items()
        ]
        return {key: json.dumps(value) for key, value in pairs}

    changed = {line.split(":")[0] for line in differences(old, new)}
    assert changed == {key for key, _ in leaves(old).items() ^ leaves(new).items()}
