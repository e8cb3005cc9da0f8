"""The measurement of every stage: its counting, its merging, and rehearsals in real processes."""

import functools
import json
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tqdm import tqdm

from launch import measure_performance, performance_sizes, performance_stages, performance_start, random_bundle
from launch.measure_performance import SIZES, STAGES, Child, Ended, completed, merged, planned
from launch.performance_table import ROWS, table
from launch.roofline import Ceilings, Floor, Work, floor, work_of
from osjax import random_weights
from osjax.models.mmdit import MMDiT
from osjax.models.rope import rope_table
from osjax.pipeline import Pipeline
from osjax.sampling.geometry import image_ids

A, B = jnp.zeros((3, 4)), jnp.zeros((4, 5))
DAY = "2026-01-02"
BALANCED, FAST = 26, 18  # passes in full, of 80
SOURCE = {"device": "card", "versions": {"jax": "1"}}


def operations(function, *arguments):
    return work_of(function, *arguments).operations


# --- counting


def test_products_and_convolutions_are_counted():
    assert work_of(jnp.matmul, A, B) == Work(2 * 3 * 4 * 5, 4 * (12 + 20 + 15))
    assert operations(lambda a: jnp.einsum("bij,bjk->bik", a, a), jnp.zeros((2, 6, 6))) == 2 * 2 * 6**3
    image, kernel = jnp.zeros((1, 8, 9, 6)), jnp.zeros((3, 3, 2, 12))  # three groups
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 3}
    convolve = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", **layout)
    assert operations(convolve, image, kernel) == 2 * (8 * 9 * 12) * (3 * 3 * 2)


def test_loops_count_as_often_as_they_turn_and_the_larger_of_two_ways_is_taken():
    product = 2 * 4 * 4 * 4
    square = jnp.zeros((4, 4))
    turn = lambda x, _: (x @ x, None)  # noqa: E731
    assert operations(lambda x: jax.lax.scan(turn, x, length=7)[0], square) == 7 * product
    assert (
        operations(lambda x: jax.lax.map(lambda y: jax.jit(jnp.matmul)(y, y), x), jnp.zeros((3, 4, 4))) == 3 * product
    )
    assert operations(lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x, x), square) == 2 * product


def test_what_cannot_be_counted_is_an_error():
    ever = lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x)  # noqa: E731
    with pytest.raises(ValueError, match="unknown length"):
        work_of(ever, jnp.zeros((4, 4)))
    kernel = lambda x: jax.pure_callback(np.negative, jax.ShapeDtypeStruct(x.shape, x.dtype), x)  # noqa: E731
    with pytest.raises(ValueError, match="pure_callback"):
        work_of(kernel, A)


def test_what_is_not_read_is_not_moved():
    assert work_of(lambda a, b: a.sum(), A, B).bytes == 4 * (12 + 1)


def test_the_mmdit_is_counted_as_by_hand():
    config = performance_sizes.models_of(True)["mmdit"][1]
    image = performance_sizes.grid_of("256px", tiny=True).tokens
    text = performance_sizes.TEXT_TOKENS
    size, joint = config.hidden_size, image + text
    blocks = 12 * size**2 * joint * (config.depth + config.depth_single_blocks)  # qkv, projection and MLP of a token
    modulation = (2 * 6 * config.depth + 3 * config.depth_single_blocks + 2) * size**2
    entering = image * (config.in_channels + config.cond_channels) * size + text * config.context_in_dim * size
    conditioning = (256 + config.vec_in_dim + 2 * size) * size
    linear = blocks + modulation + entering + conditioning + image * size * config.in_channels
    attended = 4 * joint**2 * size
    found = performance_stages.counts("256px", 1, tiny=True)
    assert found["attention"]["operations"] == attended
    assert found["forward"]["operations"] == 2 * linear + attended * (config.depth + config.depth_single_blocks)
    model = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    weights = 2 * sum(leaf.size for leaf in jax.tree.leaves(model))
    assert weights < found["forward"]["bytes"] < 1.5 * weights


def test_the_floor_is_that_of_the_slower_part():
    assert floor(Work(100, 10), Ceilings(operations=10, bytes=100)) == Floor(10.0, "operations")
    assert floor(Work(100, 10), Ceilings(operations=1000, bytes=2)) == Floor(5.0, "bytes")


# --- merging


def figure(value, device="card", **more):
    return {"value": value, "measured": True, "how": "so", "device": device, "versions": {}, "date": DAY, **more}


def test_figures_come_with_their_source_and_others_stay():
    child = Child("decode", "256px", 3, False)
    found = {**SOURCE, "figures": {"vae_decode_s": {"value": 0.4, "measured": True, "how": "median"}}}
    before = {"device": "old", "256px": {"forward_s": figure(0.3, "old")}}
    after = merged(before, child, Ended(found), DAY)
    assert after["device"] == "card"
    assert after["256px"]["forward_s"] == figure(0.3, "old")
    assert after["256px"]["vae_decode_s"] == {
        "value": 0.4, "measured": True, "how": "median", **SOURCE, "date": DAY,
        "command": "python -m launch.performance_stages decode 256px --runs 3",
    }  # fmt: skip


def test_a_failure_is_told_where_there_is_nothing_else():
    child = Child("t2v", "256px", 3, False)
    after = merged({"256px": {"peak_gb": figure(20)}}, child, Ended(failed="out of memory"), DAY)["256px"]
    assert after["peak_gb"]["value"] == 20
    assert after["t2v_exact_s"] == {"value": None, "measured": False, "how": f"failed on {DAY}: out of memory"}


def test_what_follows_from_the_figures():
    work = {"operations": 2 * 10**12, "bytes": 10}
    size = {
        "forward_s": figure(0.3), "forward_kept_s": figure(0.4), "forward_cut_s": figure(0.1),
        "t2v_rest_s": figure(2.0, passes=80), "attention_tflops": figure(0.5), "forward_fp8_s": figure(0.2),
        "counts": {"forward": work, "attention": work, "decode": work, "text": work}, "text_s": figure(0.4),
    }  # fmt: skip
    ceilings = {"matmul_tflops": figure(10.0), "copy_gb_per_s": figure(1.0)}
    done = completed({"256px": size, "ceilings": ceilings})["256px"]
    assert done["t2v_balanced_s"]["value"] == pytest.approx(BALANCED * 0.4 + (80 - BALANCED) * 0.1 + 2)
    assert done["t2v_fast_s"]["value"] == pytest.approx(FAST * 0.4 + (80 - FAST) * 0.1 + 2)
    assert not done["t2v_fast_s"]["measured"]
    assert done["t2v_fast_fp8_s"]["value"] == pytest.approx(FAST * (0.2 + 0.4 - 0.3) + (80 - FAST) * 0.1 + 2)
    assert f"{FAST} x (forward_fp8_s + forward_kept_s - forward_s)" in done["t2v_fast_fp8_s"]["how"]
    assert done["roofline"]["forward"] == work | {
        "floor_s": pytest.approx(0.2), "bound": "operations", "seconds": 0.3, "gap": pytest.approx(1.5)
    }  # fmt: skip
    assert done["roofline"]["attention"]["seconds"] == pytest.approx(4)
    assert done["roofline"]["text"]["gap"] == pytest.approx(2)
    assert done["roofline"]["decode"] == work
    assert done["i2v_exact_s"] == {"value": None, "measured": False, "how": "not run"}
    assert set(measure_performance.KEYS) <= set(done)
    assert set(completed({})["768px"]) == {*measure_performance.KEYS, "roofline"}


def test_nothing_is_computed_of_two_devices():
    size = {"forward_kept_s": figure(0.4), "forward_cut_s": figure(0.1), "t2v_rest_s": figure(2.0, "other", passes=80)}
    fast = completed({"256px": size})["256px"]["t2v_fast_s"]
    assert fast["value"] is None
    assert "card and other" in fast["how"]


def test_the_table_has_figures_goals_and_what_is_published():
    size = {"forward_s": figure(0.25), "i2v_exact_s": figure(40) | {"measured": False}, "attention_tflops": figure(650)}
    lines = table(completed({"256px": size, "768px": {"forward_s": figure(8.4)}}), SIZES).splitlines()
    assert "| forward, one pass, s | **0.25** | ≤ 0.265 |  | 8.4 | ≤ 7.6 |  |" in lines
    assert "| image to video, exact, s | ~40 | ≤ 32 |  | – | ≤ 850 |  |" in lines
    assert "| attention, TFLOP/s | **650** | ≥ 600 |  | – | ≥ 660 |  |" in lines
    assert "| text to video, exact, s | – | ≤ 23 | 60 | – | ≤ 620 | 1656 |" in lines
    assert {row.key for row in ROWS} == set(measure_performance.KEYS)


# --- running


@pytest.mark.parametrize(("stage", "fraction"), [("t2v", None), ("t2v_24gb", 0.257), ("t2v_40gb", 0.4285)])
def test_smaller_cards_are_parts_of_this_one(monkeypatch, tmp_path, stage, fraction):
    """On a stand-in for a tool of GPUs, which is not here."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81920\n")
    tool.chmod(0o755)
    child = Child(stage, "256px", 3, tiny=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    limits = {name: float(value) for name, value in measure_performance.limit_memory(child).items()}
    assert limits == ({} if fraction is None else {"XLA_PYTHON_CLIENT_MEM_FRACTION": pytest.approx(fraction, abs=1e-3)})
    monkeypatch.setenv("PATH", "")
    assert measure_performance.limit_memory(child) == {}


def test_every_stage_has_its_process():
    assert performance_stages.STAGES.keys() | {"torch"} == STAGES.keys()
    names = [child.name for child in planned(["whole", "ceilings", "t2v"], SIZES, 3, tiny=False)]
    assert names == ["ceilings", "t2v 256px", "t2v 768px", "whole 256px", "whole 768px"]
    options = planned(["t2v", "forward"], ["256px"], 3, tiny=False, options="--offload True")
    assert ["--options=--offload True" in child.words for child in options] == [False, True]


def test_published_sizes():
    grids = [performance_sizes.grid_of(size, tiny=False) for size in SIZES]
    assert [(grid.t, 8 * grid.h, 8 * grid.w) for grid in grids] == [(33, 192, 336), (33, 576, 1024)]
    assert [grid.tokens + performance_sizes.TEXT_TOKENS for grid in grids] == [8828, 76544]
    found = [performance_stages.counts(size, 1, tiny=False)["forward"]["operations"] for size in SIZES]
    # 6.45e9 weights in the blocks that a token meets, and 57 attentions.
    joint = [8828, 76544]
    assert found == pytest.approx([2 * 6.4553e9 * m + 57 * 4 * m**2 * 3072 for m in joint], rel=2e-3)


@pytest.mark.parametrize(
    "stage", ["forward", "forward_fp8", "decode", "decode_check", "t2v", "i2v", "t2v_24gb", "whole", "load", "start"]
)
def test_each_stage_finds_its_figures(stage):
    found = performance_stages.STAGES[stage]("256px", 1, tiny=True)
    assert set(STAGES[stage]) <= found.keys()
    assert all(each["value"] > 0 for key, each in found.items() if key.endswith("_s"))
    assert all(each["value"] is None and not each["measured"] for key, each in found.items() if key.endswith("_gb"))
    passes = {each["passes"] for key, each in found.items() if key.endswith("exact_s")}
    assert passes == {"t2v": {80}, "whole": {80}, "i2v": {110}}.get(stage, set())
    if passes:
        assert ("text_s" in found) == (stage != "whole")
        assert ("reference_s" in found) == (stage == "i2v")
        assert found[f"{'i2v' if stage == 'i2v' else 't2v'}_exact_s"]["measured"] == (stage == "whole")


def test_what_is_seen_of_a_command():
    shown = {"unit": "B", "unit_scale": True, "ncols": 80}
    bars = [tqdm.format_meter(done * 1e9, 24e9, 8, prefix="load mmdit", **shown) for done in (6, 24, 24)]
    bars += [tqdm.format_meter(9.5e9, 9.5e9, 3.8, prefix="load t5", **shown)]
    bars += [tqdm.format_meter(done, 50, 9, prefix="denoise", unit="step", ncols=80) for done in (0, 1, 12)]
    told = "\r".join(bars)
    assert performance_start.loading(told) == pytest.approx(8 + 3.8, rel=1e-2)
    assert performance_start.STEP.findall(told) == ["0", "1", "12"]
    first, again = (
        performance_start.Watched((20 + t, 21 + t, 23 + t), 4.0, whole) for t, whole in [(9, None), (0, 60)]
    )
    found = performance_start.figures(first, again)
    assert {key: each["value"] for key, each in found.items()} == {
        "first_start_s": 29 - 2 - 4, "second_start_s": 20 - 2 - 4, "command_s": 60
    }  # fmt: skip


def test_a_command_that_ends_early_tells_why(tmp_path):
    with pytest.raises(RuntimeError, match="num_steps"):
        performance_start.watch(["--prompt", "a", "--num_steps", "0"], tmp_path, to_the_end=True)


def test_a_random_bundle_is_read_as_one_that_was_converted(tmp_path, monkeypatch, capsys):
    models = performance_sizes.models_of(True)
    random_bundle.write_bundle(tmp_path / "bundle", models)
    pipeline = Pipeline.load(tmp_path / "bundle", progress=False)
    mesh = pipeline.where.mesh
    for name in models:
        component = pipeline.bundle.component(name)
        assert (component.tokenizer is not None) == (name in ("t5", "clip"))
        with pipeline.residency.on_device(name) as module:
            wanted = jax.tree.leaves(random_weights.draw(component, mesh, jnp.bfloat16))
            for leaf, drawn in zip(jax.tree.leaves(module), wanted, strict=True):
                np.testing.assert_array_equal(np.asarray(leaf), np.asarray(drawn))
    monkeypatch.setattr(sys, "argv", ["random_bundle", str(tmp_path / "bundle")])
    assert random_bundle.main() == 2
    assert "exists: remove it" in capsys.readouterr().err


def run(*words):
    return measure_performance.main(list(map(str, words)))


def test_a_rehearsal_in_processes_and_one_that_fails(tmp_path, capsys):
    out, logs = tmp_path / "results.json", tmp_path / "logs"
    common = ("--tiny", "--out", out, "--sizes", "768px", "--runs", 1, "--logs", logs)
    assert run(*common, "--stages", "counts", "ceilings", "attention") == 0
    before = json.loads(out.read_text())
    assert before["tiny"] is True
    assert before["ceilings"]["matmul_tflops"]["value"] > 0
    assert before["768px"]["attention_tflops"]["how"] == "this kernel does not run on cpu"
    assert before["768px"]["xla_tflops"]["value"] > 0
    assert before["768px"]["roofline"]["decode"]["operations"] > 0
    assert run(*common, "--stages", "forward", "--limit", 0.1) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: forward 768px: ran past 0.1 s: other figures stand")
    after = json.loads(out.read_text())
    assert after["768px"]["forward_s"]["how"].endswith("ran past 0.1 s")
    assert after["768px"]["xla_tflops"] == before["768px"]["xla_tflops"]
    assert run("--table", "--out", out) == 0
    assert "| forward, one pass, s | – | ≤ 0.265 |  | – | ≤ 7.6 |  |" in capsys.readouterr().out.splitlines()
    assert run("--out", out) == 2
    assert "do not mix" in capsys.readouterr().err


def test_a_stage_that_takes_too_long_is_ended_with_all_that_it_has_started(tmp_path):
    """On a real process that has started another."""
    code = "import subprocess as s; p = s.Popen(['sleep', '100']); print(p.pid, flush=True); p.wait()"
    child = types.SimpleNamespace(stage="start", size="256px", words=["-c", code])
    with tqdm(disable=True) as bar:
        ended = measure_performance.run(child, 2, tmp_path, bar)
    assert ended.failed == "ran past 2 s"
    started = int((tmp_path / "start-256px.log").read_text())
    status = Path(f"/proc/{started}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rsplit(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_ends_badly_tells_its_last_line(tmp_path, capsys):
    out = tmp_path / "results.json"
    words = ("--out", out, "--sizes", "256px", "--stages", "t2v", "--options", "--num_steps 0", "--logs", tmp_path)
    assert run(*words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "error: t2v 256px: " in line
    assert "num_steps" in line
    assert json.loads(out.read_text())["256px"]["t2v_exact_s"]["value"] is None


def test_a_file_of_something_else_is_left_alone(tmp_path, capsys):
    out = tmp_path / "results.json"
    out.write_text("no JSON")
    assert run("--out", out, "--stages", "counts") == 2
    assert "holds no results" in capsys.readouterr().err
    assert out.read_text() == "no JSON"


# --- PyTorch


def test_the_baseline_computes_what_the_model_does():
    torch = pytest.importorskip("torch")
    from launch import torch_baseline

    config, length = performance_sizes.models_of(True)["mmdit"][1], 3
    grid = performance_sizes.grid_of("256px", tiny=True)
    model = MMDiT(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    other = torch_baseline.MMDiT(config)
    weights = {name: tensor_of(torch, name, leaves) for name in other.state_dict()}
    other.load_state_dict(weights)
    assert sum(array.size for array in leaves.values()) == sum(tensor.numel() for tensor in weights.values())
    shapes = ((grid.tokens, config.in_channels), (length, config.context_in_dim), (config.vec_in_dim,), ())
    shapes += ((grid.tokens, config.cond_channels),)
    inputs = [np.random.default_rng(i).random((2, *shape), np.float32) for i, shape in enumerate(shapes)]
    rope = rope_table(image_ids(grid)[None], config.axes_dim, config.theta)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    want = model(*inputs[:4], rope, attend, inputs[4])
    with torch.inference_mode():
        got = other(*map(torch.tensor, inputs), *(torch.tensor(np.asarray(table)[0]) for table in rope))
    np.testing.assert_allclose(got.numpy(), want, atol=2e-5)


def tensor_of(torch, name, leaves):
    """The baseline's weight of that name: rows are outputs, layers are modules of their own."""
    room, *rest = name.split(".")
    layer = int(rest.pop(0)) if room.endswith("_blocks") else None
    *path, kind = (room, *rest)
    kind = {"weight": "scale" if path[-1].endswith("_norm") else "kernel"}.get(kind, kind)
    array = np.asarray(leaves[".".join((*path, kind))])
    array = array if layer is None else array[layer]
    return torch.tensor(array.reshape(len(array), -1).T.copy() if kind == "kernel" else array.reshape(-1))


def test_the_document_shows_what_was_measured():
    """Between the marks is what `--table` prints."""
    text = (measure_performance.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- table -->")[2].partition("<!-- /table -->")[0]
    assert shown.strip() == table(measure_performance.read(measure_performance.OUT), SIZES).strip()
