"""A model so small that training it for some steps takes seconds: for the tests of this folder."""

import dataclasses
import json
from pathlib import Path

from osjax.training.options import DataOptions, FlowOptions, OptimOptions, RunOptions, TrainConfig

VAE = {
    "kind": "hunyuan_vae",
    "block_out_channels": (4, 4, 4),
    "spatial_compression_ratio": 4,
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "mid_block_add_attention": False,
    "latent_channels": 4,
    "scale_factor": 1.0,
    "use_spatial_tiling": False,
}
MMDIT = {
    "kind": "mmdit",
    "in_channels": 16,
    "vec_in_dim": 16,
    "context_in_dim": 16,
    "hidden_size": 16,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": (2, 4, 2),
}
T5 = {
    "kind": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_heads": 2,
    "num_layers": 1,
    "vocab_size": 300,
    "max_length": 48,
}
CLIP = {
    "kind": "clip",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 48,
    "max_length": 48,
}
DATA = DataOptions(resolution=("16px",), aspect_ratios=("1:1",), num_frames=(5,))
RUN = RunOptions(steps=4, batch_size=8, dtype="fp32", log_every=1, save_every=2, remat="elementwise")
OPTIM = OptimOptions(lr=3e-3, betas=(0.9, 0.99), eps=1e-8, ema_decay=0.9)


def vae(**run: object) -> TrainConfig:
    """The autoencoder alone, from random numbers."""
    return TrainConfig("vae", None, {"vae": VAE}, ("vae",), dataclasses.replace(RUN, **run), OPTIM, data=DATA)


def text(**run: object) -> TrainConfig:
    """The text encoders alone, from random numbers, on a few scenes."""
    return TrainConfig(
        "text",
        None,
        {"t5": T5, "clip": CLIP},
        ("t5", "clip"),
        dataclasses.replace(RUN, **run),
        OPTIM,
        data=dataclasses.replace(DATA, clips=16),
    )


def flow(**run: object) -> TrainConfig:
    """All parts from random numbers; the autoencoder stays as it is drawn."""
    return TrainConfig(
        "flow",
        None,
        {"mmdit": MMDIT, "t5": T5, "clip": CLIP, "vae": VAE},
        ("mmdit", "t5", "clip"),
        dataclasses.replace(RUN, **run),
        OPTIM,
        FlowOptions(t5_dropout=0.1, clip_dropout=0.1, conditions={"t2v": 1.0, "i2v_head": 1.0, "i2v_loop": 1.0}),
        data=dataclasses.replace(DATA, clips=16),
    )


def losses(folder: Path) -> list[float]:
    """The loss of every step of a run."""
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
