"""The text encoders of a tiny model, on captions of shapes: a stage between `tiny_vae` and `tiny_flow`.

Source: ours. As the full model's do, they come to the transformer trained already. The embedded model was trained
without this stage: after 12,000 steps more than it has, 55 to 65 % of held-out pairs of things were drawn rightly,
and without CLIP's vector 14 to 19 %, so T5 told little.
No gain has been seen yet: with these encoders and the embedded transformer, its text inputs new, 6500 steps of
`tiny_flow` gave 43 % of pairs in 16:9 where encoders went on learning, 28 % where they were frozen.
Expected result: runs/tiny_text/bundle, whose encoders both tell every fact of nearly every caption (`t5_right`,
`clip_right` 1): two minutes on one H200, starting and compiling included. 1200 steps of 128 captions of 20,000 scenes
suffice too, in ten to fifteen minutes on two CPU cores.

    osjax train tiny_text --ckpt_path runs/tiny_vae/bundle
"""

from ml_collections import ConfigDict

from configs.train import base


def get_config() -> ConfigDict:
    """Return the options of this stage."""
    config = base.get_config()
    config.stage = "text"
    config.trained = ("t5", "clip")
    config.new = ConfigDict(
        {
            "t5": {
                "kind": "t5",
                "d_model": 160,
                "d_kv": 32,
                "d_ff": 320,
                "num_heads": 5,
                "num_layers": 2,
                "vocab_size": 512,
                "max_length": 48,
            },
            "clip": {
                "kind": "clip",
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "vocab_size": 512,
                "max_position_embeddings": 48,
                "max_length": 48,
            },
        }
    )
    config.run.update(steps=2000, batch_size=256, log_every=50, save_every=1000)
    config.optim.update(
        lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, warmup_steps=200, schedule="cosine", ema_decay=0.0
    )
    config.data.update(clips=60_000, two_things=0.6)
    return config
