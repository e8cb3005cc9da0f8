"""Measures text to image to video with --offload True on one GPU: memory and time as FLUX hands over to the MMDiT.

    python launch/measure_handover.py --out results.json      # random full-size weights, bf16, 256px
    python launch/measure_handover.py --tiny                  # rehearsal with tiny sizes on any device

All models wait in page-locked host memory, 58 GB. The text encoders work, FLUX draws a picture and leaves, the text
encoders work again, and the video is drawn from the picture: the pipeline itself, with few steps, which change its
time but not its memory. `peak_gb` is the most that the process ever had on the device up to the end of that part,
activations included; `in_use_gb` what it has then. `moves` are copies of each model by themselves, both ways.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from osjax import random_weights, room
from osjax.bundle import Bundle
from osjax.models.autoencoder_2d import Autoencoder2DConfig
from osjax.models.clip import CLIPTextConfig
from osjax.models.hunyuan_vae import HunyuanVAEConfig
from osjax.models.mmdit import MMDiTConfig
from osjax.models.t5 import T5Config
from osjax.parallel.host_memory import to_devices, to_host
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.parallel.specs import SPECS
from osjax.pipeline import Pipeline, Texts
from osjax.request import Request
from osjax.residency import Residency
from osjax.sampling.latents import Text

MEMORY = {"in_use_gb": "bytes_in_use", "peak_gb": "peak_bytes_in_use"}
GUIDANCE = 4.0  # told to FLUX; as in configs/t2i2v_256px.py
FULL = random_weights.PUBLISHED | {
    "image_mmdit": ("flux", MMDiTConfig(cond_embed=False, guidance_embed=True), None),
    "image_vae": ("autoencoder_2d", Autoencoder2DConfig(), None),
}
_SMALL = {"vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 64, "num_heads": 2, "depth": 2}
_SMALL |= {"depth_single_blocks": 2, "axes_dim": (8, 12, 12)}
TINY = {
    "t5": ("t5", T5Config(vocab_size=64, d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2), 16),
    "clip": (
        "clip",
        CLIPTextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16,
        ),
        16,
    ),
    "image_mmdit": ("flux", MMDiTConfig(cond_embed=False, guidance_embed=True, **_SMALL), None),
    "image_vae": ("autoencoder_2d", Autoencoder2DConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1), None),
    "mmdit": ("mmdit", MMDiTConfig(**_SMALL), None),
    "vae": ("hunyuan_vae", HunyuanVAEConfig(block_out_channels=(32, 32, 32, 32)), None),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is drawn, as options of `Request`: the picture and the video."""

    picture: dict[str, Any]
    video: dict[str, Any]


SIZES = {
    "256px": Sizes({"resolution": "768px"}, {"resolution": "256px", "num_frames": 129}),
    "768px": Sizes({"resolution": "768px"}, {"resolution": "768px", "num_frames": 129}),
}
SMALL = Sizes(
    {"resolution": None, "height": 32, "width": 32}, {"resolution": None, "height": 32, "width": 32, "num_frames": 5}
)


def random_in_host_memory(bundle: Bundle, mesh: Mesh) -> Iterator[tuple[str, Any, dict]]:
    """(name, module that waits, seconds of its ways) of each model, made on the device one after the other."""
    sharding = NamedSharding(mesh, SPECS.everywhere)
    for name, component in bundle.components.items():
        module = random_weights.draw(component, mesh, jnp.bfloat16)
        waits, first = timed(to_host, module)
        del waits  # its memory stays locked, and is taken again
        waits, again = timed(to_host, module)
        for array in jax.tree.leaves(module):
            array.delete()
        back, there = timed(lambda tree: jax.block_until_ready(to_devices(tree, sharding)), waits)
        gigabytes = sum(array.nbytes for array in jax.tree.leaves(back)) / 1e9
        del module, back
        moves = {"gb": gigabytes, "leaves_first_s": first, "leaves_s": again, "comes_s": there}
        yield name, waits, {key: round(value, 3) for key, value in moves.items()}


def timed(run: Callable[[Any], Any], argument: Any) -> tuple[Any, float]:
    """(result, seconds)."""
    start = time.perf_counter()
    return run(argument), time.perf_counter() - start


def memory() -> dict[str, float]:
    stats = jax.devices()[0].memory_stats() or {}
    return {name: round(stats.get(key, 0) / 1e9, 2) for name, key in MEMORY.items()}


def encode(pipeline: Pipeline) -> Texts:
    """Some prompt through both encoders, which are on the device together as in `osjax.embedding.encode_all`."""
    start = time.perf_counter()
    components = pipeline.bundle.components
    ids = {name: jnp.full((1, components[name].max_length), 7, jnp.int32) for name in ("t5", "clip")}
    with pipeline.residency.on_device("t5") as t5, pipeline.residency.on_device("clip") as clip:
        call = jax.jit(lambda encoder, ids_bl: encoder(ids_bl))
        text = Text(call(t5, ids["t5"]), call(clip, ids["clip"])[1])
        text = jax.tree.map(np.asarray, text)
    return Texts(text, text, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--size", choices=SIZES, default="256px")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--tiny", action="store_true", help="tiny weights and sizes, to rehearse the script")
    args = parser.parse_args()
    models, sizes = (TINY, SMALL) if args.tiny else (FULL, SIZES[args.size])
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "size": args.size, "tiny": args.tiny,
    }  # fmt: skip

    def record(part: str, **figures: Any) -> None:
        results[part] = figures | memory()
        print(part, json.dumps(results[part]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=2) + "\n")

    waiting, mesh, bundle = {}, make_mesh(MeshShape()), random_weights.bundle_of(models)
    for name, module, moves in random_in_host_memory(bundle, mesh):
        waiting[name] = module
        record(f"moves {name}", **moves)
    residency = Residency(bundle, mesh, jnp.bfloat16, offload=True, modules=waiting)
    video = Pipeline.over(residency, mesh, "bf16", args.attention, "random weights", progress=False)
    image = video.of_images()
    common = {"num_steps": args.steps, "seed": 1}
    drawn = Request("-", num_frames=1, guidance=GUIDANCE, **common, **sizes.picture)
    with tempfile.TemporaryDirectory() as folder:
        texts = encode(image)
        record("texts of the picture", seconds=round(texts.seconds, 2))
        (picture,) = image.run([drawn], texts)
        path, *_ = picture.save(Path(folder) / "picture")
        record("picture", seconds=picture.provenance.seconds)
        texts = encode(video)
        record("texts of the video", seconds=round(texts.seconds, 2))
        asked = Request("-", cond_type="i2v_head", refs=(str(path),), **common, **sizes.video)
        told = room.describe(video.bundle, video.estimate([asked]), None, 1).splitlines()
        (made,) = video.run([asked], texts)
        record("video", seconds=made.provenance.seconds, estimate=told[-6:])


if __name__ == "__main__":
    main()
