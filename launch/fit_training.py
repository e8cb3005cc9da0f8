"""How many GPUs training needs: GB (1e9 bytes) on each device, read off abstract arrays; any CPU says it in seconds.

    python launch/fit_training.py                                   # a full fine-tune, and a LoRA of rank 32
    python launch/fit_training.py --size 768px --frames 33 --memory 141

Nothing is allocated: shapes, types and shardings are those that training makes, over an abstract mesh of `fsdp` devices
with one clip each. Columns:

state       what `osjax.training.state` keeps: float32 weights, their moving average, AdamW's two moments
gradients   in float32, at the end of the backward pass
copies      weights in the dtype of the computation, and gradients as the backward pass leaves them, before that
frozen      components that are not trained, text encoders and autoencoder among them
kept        of every block for the backward pass: what enters it
block       one block in its backward pass: its weights gathered over `fsdp`, their gradients, and all that its forward
            pass computes, as if the compiler fused nothing

The total is an upper bound: not all of it is there at the same time. Not counted is the encoding of clips and prompts,
which happens between steps, in the room that `kept`, `block` and `gradients` leave.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from osjax import leaves
from osjax.models import lora
from osjax.models.clip import CLIPText, CLIPTextConfig
from osjax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.rngs import ModuleRngs
from osjax.models.rope import Rope
from osjax.models.t5 import T5Config, T5Encoder
from osjax.parallel.mesh import TrainingMeshShape
from osjax.parallel.weights import weight_spec
from osjax.sampling.geometry import LatentGrid, image_size, latent_grid
from osjax.sampling.latents import Text
from osjax.training.flow import Clean, Draw, flow_loss
from osjax.training.options import LoRAOptions, OptimOptions
from osjax.training.parts import named
from osjax.training.state import abstract_start

TEXT_TOKENS = 512
ENCODERS = (("t5", T5Encoder, T5Config), ("clip", CLIPText, CLIPTextConfig), ("vae", HunyuanVAE, HunyuanVAEConfig))
Abstract = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Need:
    """GB on each device; fields as in the module's text."""

    state: float
    gradients: float
    copies: float
    frozen: float
    kept: float
    block: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    def verdict(self, memory: float) -> str:
        """Whether it fits into `memory` GB, and if not, why."""
        if self.total <= memory:
            return f"yes, {memory - self.total:.1f} to spare"
        largest, size = max(dataclasses.asdict(self).items(), key=lambda item: item[1])
        return f"no: {self.total - memory:.1f} too much; {largest} takes {size:.1f}"


def gigabytes(tree: Any) -> float:
    """Of the parts that one device holds; arrays without a sharding are whole."""

    def part(leaf: Abstract) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(part, jax.tree.leaves(tree))) / 1e9


def abstract_model(make: Callable[..., nnx.Module], config: Any, dtype: jnp.dtype) -> nnx.Module:
    return nnx.eval_shape(lambda: make(config, rngs=ModuleRngs(0), dtype=dtype))


def placed(component: str, arrays: dict[str, Any], mesh: AbstractMesh) -> dict[str, Abstract]:
    """The component's arrays as they lie over the mesh, under the names that they have in training."""

    def place(name: str, leaf: Abstract) -> Abstract:
        return Abstract(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, weight_spec(name, leaf.shape, mesh)))

    return {name: place(name, array) for name, array in named(component, arrays).items()}


def fused(q_bmhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
    """Stands in for a fused attention: it, too, keeps queries, keys, values and one array of the output's size."""
    return q_bmhd * k_bmhd * v_bmhd


def handed_on(function: Callable[..., Any], *arguments: Any, tokens: int) -> float:
    """GB of arrays of tokens that the forward pass of `function` hands to its backward pass."""
    backward = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1], *arguments)
    counts = {tokens, TEXT_TOKENS, tokens + TEXT_TOKENS}
    return gigabytes([leaf for leaf in jax.tree.leaves(backward) if counts & set(leaf.shape)])


def kept_gb(model: MMDiT, grid: LatentGrid) -> float:
    """Of a whole forward pass on one clip, its blocks being computed again."""
    config, batch = model.config, functools.partial(Abstract, dtype=jnp.float32)
    z = batch(grid.noise_shape(config.latent_channels))
    clean = Clean(z, batch((*z.shape[:-1], 1)), z)
    text = Text(batch((1, TEXT_TOKENS, config.context_in_dim)), batch((1, config.vec_in_dim)))
    drawn = Draw(batch((1,)), batch((1, grid.tokens, config.in_channels)))

    def loss(model: MMDiT, inputs: tuple[Clean, Text, Draw]) -> jax.Array:
        return flow_loss(model, *inputs, fused, remat=True)[0]

    return handed_on(loss, model, (clean, text, drawn), tokens=grid.tokens)


def block_gb(model: MMDiT, grid: LatentGrid) -> float:
    """Of the larger kind of block on one clip, with its weights and as many gradients."""
    config, dtype = model.config, model.img_in.kernel.dtype

    def inputs(*streams: int) -> list[Any]:
        x = [Abstract((1, tokens, config.hidden_size), dtype) for tokens in streams]
        angles = Abstract((1, streams[0], config.head_dim // 2), jnp.float32)
        return [*x, Abstract((1, config.hidden_size), dtype), Rope(angles, angles)]

    def run(block: nnx.Module, *inputs: Any) -> Any:
        return block(*inputs, fused)

    def working(stack: nnx.Module, *streams: int) -> float:
        block = jax.tree.map(lambda leaf: Abstract(leaf.shape[1:], leaf.dtype), stack)
        return 2 * gigabytes(block) + handed_on(run, block, *inputs(*streams), tokens=grid.tokens)

    double = working(model.double_blocks, grid.tokens, TEXT_TOKENS)
    return max(double, working(model.single_blocks, grid.tokens + TEXT_TOKENS))


@functools.cache
def activations(config: MMDiTConfig, grid: LatentGrid, dtype: jnp.dtype) -> tuple[float, float]:
    """(kept, block): the same on any number of devices."""
    model = abstract_model(MMDiT, config, dtype)
    return kept_gb(model, grid), block_gb(model, grid)


def needs(config: MMDiTConfig, grid: LatentGrid, fsdp: int, rank: int, dtype: jnp.dtype = jnp.bfloat16) -> Need:
    """Of training the MMDiT on `fsdp` devices with a clip of that grid each, or an adapter of it if `rank` is not 0."""
    axes = dataclasses.asdict(TrainingMeshShape(fsdp=fsdp))
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    model = abstract_model(MMDiT, config, dtype)
    frozen = [placed(name, leaves.flatten(abstract_model(make, kind(), dtype)), mesh) for name, make, kind in ENCODERS]
    weights, copies = placed("mmdit", leaves.flatten(model), mesh), 0.0
    if rank:
        frozen.append(weights)
        targets, key = LoRAOptions().targets, jax.random.key(0)
        adapter = jax.eval_shape(lambda: lora.init(model, rank, LoRAOptions().alpha, targets, key).arrays)
        weights = placed("lora", adapter, mesh)
    elif dtype != jnp.float32:
        copies = 2 * gigabytes(weights)
    masters = {name: Abstract(leaf.shape, jnp.float32) for name, leaf in weights.items()}
    state = abstract_start(masters, OptimOptions(), 1000, mesh)
    kept, block = activations(config, grid, dtype)
    return Need(gigabytes(state), gigabytes(state.weights), copies, gigabytes(frozen), kept, block)


def table(config: MMDiTConfig, grid: LatentGrid, devices: Sequence[int], rank: int, memory: float) -> str:
    """Needs on so many devices, as Markdown."""
    columns = [field.name for field in dataclasses.fields(Need)]
    lines = [f"| fsdp | {' | '.join(columns)} | total | fits {memory:g} GB |", "|---" * (len(columns) + 3) + "|"]
    for fsdp in devices:
        need = needs(config, grid, fsdp, rank)
        cells = " | ".join(f"{value:.1f}" for value in (*dataclasses.astuple(need), need.total))
        lines.append(f"| {fsdp} | {cells} | {need.verdict(memory)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256px", help="resolution of the clip, 16:9")
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--memory", type=float, default=80, help="GB of a device that a program can have")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    args = parser.parse_args()
    config, grid = MMDiTConfig(), latent_grid(*image_size(args.size, "16:9"), args.frames)
    for title, rank in (("full fine-tune", 0), ("LoRA of rank 32", 32)):
        print(f"\n{title}, {args.size} × {args.frames} frames, {grid.tokens + TEXT_TOKENS} tokens, a clip a device\n")
        print(table(config, grid, args.devices, rank, args.memory), flush=True)


if __name__ == "__main__":
    main()
