"""How well a bundle draws shapes: prompts held out of training, read back from the pixels that it makes of them.

python -m osjax.training.evaluate [--ckpt_path BUNDLE] [--prompts 200] [--out scores.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from osjax.errors import OsjaxError
from osjax.files import replacing
from osjax.media import to_model, write_mp4, write_png
from osjax.pipeline import Pipeline
from osjax.request import Request
from osjax.sampling.condition import condition_kind
from osjax.training.captions import caption
from osjax.training.drawing import draw_clip
from osjax.training.reading import read
from osjax.training.scoring import Score, psnr, score, summarise
from osjax.training.shapes import Scene, scene

ASPECT_RATIOS = ("1:1", "16:9", "9:16")
COND_TYPES = ("i2v_head", "i2v_tail", "i2v_loop")
CLIP = {"resolution": "96px", "aspect_ratio": "1:1", "num_frames": 33, "fps": 24}
# Least figures that a trained bundle is expected to reach; the others are told for comparison.
GOALS = {
    "background": 97,
    "color": 97,
    "shape": 90,
    "motion": 93,
    "all_three": 85,
    "two_right": 60,
    "speed": 0.9,
    "given_frames_psnr": 27,
    "kept": 95,
    "psnr": 32,
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A scene that training never showed, and one thing to say about it."""

    scene: Scene
    caption: str


@dataclasses.dataclass(frozen=True)
class Artist:
    """What draws, and how. base: all that its requests have in common; batch_size: videos drawn at once; readers:
    threads that read clips while the next ones are drawn."""

    pipeline: Pipeline
    base: Request
    batch_size: int
    bar: tqdm
    mistakes: Path | None
    readers: Executor

    def draw(self, requests: Sequence[Request]) -> Iterator[np.ndarray]:
        """uint8 [T, H, W, 3] for each of some requests that differ in prompts, references and seeds only."""
        for start in range(0, len(requests), self.batch_size):
            for video in self.pipeline.run(requests[start : start + self.batch_size]):
                self.bar.update()
                yield video.frames

    def request(self, index: int, prompt: Prompt, **options: Any) -> Request:
        return request_for(self.base, index, prompt, **options)

    def truth(self, request: Request, made: Scene) -> np.ndarray:
        """The scene as the request's video ought to be, uint8 [T, H, W, 3]."""
        return draw_clip(made, *self.pipeline.shape(request).size, request.num_frames, request.fps)

    def check_all(self, prompts: Sequence[Prompt], videos: Iterable[np.ndarray], name: str) -> list[Score]:
        """What each video shows of its prompt, in their order."""
        names = (f"{name}-{number:03}" for number in itertools.count())
        return list(self.readers.map(self.check, prompts, videos, names))

    def check(self, prompt: Prompt, frames: np.ndarray, name: str) -> Score:
        """Reads a clip; one that does not show what was asked for is kept to look at, if there is a place for it."""
        seen = score(prompt.scene, read(frames, self.base.fps))
        if self.mistakes and not (seen.complete and seen.background and seen.count):
            write_mp4(self.mistakes / f"{name} {prompt.caption}.mp4", frames, self.base.fps)
        return seen


def held_out_prompts(n: int, seed: int) -> list[Prompt]:
    """The first `n` prompts of an endless list; training never put their colours, shapes and motions together."""
    scenes = [scene(seed, index, held_out=True) for index in range(n)]
    return [Prompt(made, caption(made, np.random.default_rng((seed, i, 1)))) for i, made in enumerate(scenes)]


def base_request(pipeline: Pipeline, options: Mapping[str, Any]) -> Request:
    """What all requests of an evaluation have in common: a short square clip at the bundle's settings, and `options`.

    Raises OsjaxError as `Request.of` does.
    """
    return Request.of({"prompt": "-"} | CLIP | dict(pipeline.bundle.settings) | dict(options))


def request_for(base: Request, index: int, prompt: Prompt, **options: Any) -> Request:
    """That of the prompt number `index`, with a seed of its own."""
    told = {"prompt": prompt.caption, "motion_score": str(prompt.scene.score), "seed": base.seed + index}
    return dataclasses.replace(base, **told, **options)


def text_scores(artist: Artist, prompts: Sequence[Prompt], aspect_ratio: str) -> dict[str, Any]:
    """`Scores` of text to video."""
    requests = [artist.request(i, prompt, aspect_ratio=aspect_ratio) for i, prompt in enumerate(prompts)]
    scores = artist.check_all(prompts, artist.draw(requests), f"t2v-{aspect_ratio.replace(':', 'x')}")
    return dataclasses.asdict(summarise([prompt.scene for prompt in prompts], scores))


def image_scores(artist: Artist, prompts: Sequence[Prompt], cond_type: str) -> dict[str, float]:
    """Of videos that are given their first frame, last frame or both: the mean PSNR in dB of the given frames, and the
    percentage of videos whose things have the right colours and shapes."""
    kind = condition_kind(cond_type)
    given = [0] * kind.head + [-1] * kind.tail
    truths = [artist.truth(artist.base, prompt.scene)[given] for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        requests = []
        for i, (prompt, truth) in enumerate(zip(prompts, truths, strict=True)):
            paths = tuple(f"{folder}/{i}-{place}.png" for place in range(len(given)))
            for path, frame in zip(paths, truth, strict=True):
                write_png(path, frame)
            requests.append(artist.request(i, prompt, cond_type=cond_type, refs=paths))
        videos = list(artist.draw(requests))
    closeness = [psnr(frames[given], truth) for frames, truth in zip(videos, truths, strict=True)]
    kept = [each.color and each.shape for each in artist.check_all(prompts, videos, cond_type)]
    return {
        "prompts": len(prompts),
        "given_frames_psnr": round(float(np.mean(closeness)), 2),
        "kept": round(100 * float(np.mean(kept)), 1),
    }


def autoencoder_scores(artist: Artist, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Mean PSNR in dB of the prompts' own scenes, encoded and decoded."""
    closeness = []
    for prompt in prompts:
        truth = artist.truth(artist.base, prompt.scene)
        (z_thwc,) = artist.pipeline.encode_references(artist.base, [to_model(truth)])
        closeness.append(psnr(artist.pipeline.decode(z_thwc[None])[0, : len(truth)], truth))
        artist.bar.update()
    return {"prompts": len(prompts), "psnr": round(float(np.mean(closeness)), 2)}


def evaluate(
    pipeline: Pipeline,
    base: Request,
    prompts: Sequence[Prompt],
    *,
    aspect_ratios: Sequence[str] = ASPECT_RATIOS,
    cond_types: Sequence[str] = COND_TYPES,
    batch_size: int = 20,
    mistakes: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Every figure, as JSON has it: `t2v` by aspect ratio, `i2v` by condition kind in `base`'s size, `vae`, and `how`.

    base: what the requests have in common; the seed counts up from its own. mistakes: folder for clips that do not show
    what they should. Raises OsjaxError for what cannot be drawn.
    """
    for ratio in aspect_ratios:  # what cannot be drawn is told before anything is
        pipeline.shape(dataclasses.replace(base, aspect_ratio=ratio))
    for kind in cond_types:
        condition_kind(kind)
    start = time.perf_counter()
    total = len(prompts) * (len(aspect_ratios) + len(cond_types) + 1)
    bar = tqdm(total=total, desc="evaluate", unit="clip", disable=not progress)
    with bar, ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="readers") as readers:
        artist = Artist(pipeline, base, batch_size, bar, mistakes, readers)
        figures = {
            "t2v": {ratio: text_scores(artist, prompts, ratio) for ratio in aspect_ratios},
            "i2v": {kind: image_scores(artist, prompts, kind) for kind in cond_types},
            "vae": autoencoder_scores(artist, prompts),
        }
    common = {name: value for name, value in dataclasses.asdict(base).items() if name not in ("prompt", "refs")}
    how = {
        "bundle_sha256": pipeline.bundle.digest,
        "dtype": pipeline.dtype,
        "device": pipeline.where.mesh.devices.flat[0].device_kind,
        "batch_size": batch_size,
        "request": common,
        "seconds": round(time.perf_counter() - start),
    }
    return figures | {"how": how}


def table(columns: Mapping[str, Mapping[str, float | None]]) -> str:
    """Figures by column as lines of text, with the goals beside them."""
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    lines = [["", "goal", *columns]]
    for name in names:
        cells = [figures.get(name) for figures in columns.values()]
        lines.append([name, str(GOALS.get(name, "")), *("-" if cell is None else f"{cell:g}" for cell in cells)])
    return "\n".join(f"{line[0]:<18}" + "".join(f"{cell:>10}" for cell in line[1:]) for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates what the command line names, prints tables, writes the figures; returns the exit status."""
    args = _arguments(argv)
    try:
        pipeline = Pipeline.load(args.ckpt_path, dtype=args.dtype, progress=False)
        figures = evaluate(
            pipeline,
            base_request(pipeline, args.request | {"seed": args.seed}),
            held_out_prompts(args.prompts, args.seed),
            aspect_ratios=args.aspect_ratios,
            cond_types=args.cond_types,
            batch_size=args.batch_size,
            mistakes=args.mistakes,
        )
        for columns in (figures["t2v"], figures["i2v"], {"vae": figures["vae"]}):
            print(table(columns), end="\n\n", flush=True)
        with replacing(args.out) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OsjaxError as error:
        print("osjax: error:", error, file=sys.stderr)
        return 2
    print(args.out)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m osjax.training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_path", help="a bundle; without it, the embedded one")
    parser.add_argument(
        "--prompts", type=_positive, default=200, help="how many (200: minutes on a GPU, hours on a CPU)"
    )
    parser.add_argument("--out", type=Path, default=Path("scores.json"))
    parser.add_argument("--seed", type=int, default=42, help="of the prompts, and of the first prompt's noise")
    parser.add_argument("--batch_size", type=_positive, default=20, help="videos drawn at once")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument(
        "--aspect_ratios", type=_listed, default=ASPECT_RATIOS, help="of text to video, parted by commas"
    )
    parser.add_argument("--cond_types", type=_listed, default=COND_TYPES, help="of image to video, parted by commas")
    parser.add_argument("--request", type=json.loads, default={}, help='options to change, as {"num_steps": 30}')
    parser.add_argument("--mistakes", type=Path, help="folder for the videos that do not show what they should")
    return parser.parse_args(argv)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("give a number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
