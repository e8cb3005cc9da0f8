"""`osjax compile`: what a video compiles is compiled and kept, so that the first one need not wait for it.

Every part is done once, on random weights of the model's sizes: compiled programs are kept by JAX, and found again by
whoever draws with the same options, versions and devices.
"""

from __future__ import annotations

from collections.abc import Sequence

from osjax.cli.parser import Parser
from osjax.cli.trial import add_random_weights, asked, drawn
from osjax.errors import OsjaxError
from osjax.files import make_folder


def main(argv: Sequence[str]) -> int:
    """Compile what the command line `argv` asks for and return the exit status. Raises OsjaxError."""
    parser = Parser(
        "osjax compile",
        usage="osjax compile [CONFIG] [--key value ...]",
        description="Compile what a video needs, for the first one not to wait. Takes the options of `osjax generate`.",
    )
    add_random_weights(parser, "without --ckpt_path, compile for the published sizes, not for the embedded model")
    own, rest = parser.parse_known_args(argv)
    model, requests = asked(rest, "compile")

    import jax  # not above: mistakes in the options should be told at once

    from osjax import benchmark

    place = jax.config.jax_compilation_cache_dir
    if not place:
        raise OsjaxError("there is no place to keep what is compiled: set JAX_COMPILATION_CACHE_DIR to a folder")
    if "://" not in place:
        make_folder(place)
    pipeline = drawn(model, published=own.random_weights)
    for name, seconds in benchmark.compile_all(pipeline, requests).items():
        print(f"{name}: {seconds:.1f} s")
    print(f"kept in {place}")
    return 0
