"""Models so small that drawing and compiling them takes a moment: component → kind, config, tokens."""

from launch.measure_handover import TINY

SMALL = {name: TINY[name] for name in ("t5", "clip", "mmdit", "vae")}
