"""`osjax generate`: options → jobs (a request and a place for its files) → videos.

The configuration ends here: what goes on are frozen dataclasses.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from osjax import batch, provenance
from osjax.cli import dry_run, options
from osjax.cli.refining import DYNAMIC, Refinement, read_refinement, refine
from osjax.errors import OsjaxError
from osjax.files import make_folder
from osjax.request import Request

if TYPE_CHECKING:
    from osjax.pipeline import Pipeline

# With --from everything else is as it was; these say where things lie, not what is drawn.
_FREE_TO_REPEAT = frozenset({"save_dir", "ckpt_path", "lora", "offload", "dry_run"})


@dataclasses.dataclass(frozen=True)
class Model:
    """What draws: the arguments of `Pipeline.load`. path: of a bundle, or None for the embedded one; lora: folders
    and weights."""

    path: str | None
    lora: tuple[tuple[str, float], ...]
    mesh: str
    dtype: str
    offload: bool
    attention: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to make. stem: the path of its files without their endings."""

    request: Request
    stem: Path


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole command. origin: the provenance that `--from` repeats; refinement: what a language model is asked."""

    model: Model
    jobs: Sequence[Job]
    batch_size: int
    origin: provenance.Provenance | None = None
    refinement: Refinement | None = None

    def missing(self, group: Sequence[Job], pipeline: Pipeline) -> list[int]:
        """Which of a group's videos are to be made. Of copies for `--from`, the one at the old place."""
        if self.origin:
            return [self.origin.batch_index]
        return [place for place, job in enumerate(group) if not is_made(job, pipeline)]


def main(argv: Sequence[str]) -> int:
    """Make what the command line `argv` asks for and return the exit status. Raises OsjaxError."""
    read = options.read(argv)
    made = plan_repeat(read) if read.repeat else plan(read.config)
    (tell if read.config.dry_run else run)(made)
    return 0


def plan(config: ConfigDict) -> Plan:
    """The jobs of a prompt or a CSV, all checked before the first is made. Raises OsjaxError."""
    if config.batch_size < 1 or config.num_sample < 1:
        raise OsjaxError("batch_size and num_sample count videos: give numbers above 0")
    rows, name = _rows(config)
    rows = batch.select(rows, config.start_index, config.end_index)
    outputs = batch.plan_outputs(rows, fallback=name, samples=config.num_sample)
    folder = Path(config.save_dir) / _folder(config.sampling_option)
    jobs = [Job(_request(config, output), folder / output.name) for output in outputs]
    lora = parse_lora(config.lora or "")
    model = Model(config.ckpt_path, lora, config.mesh, config.dtype, config.offload, config.attention)
    return Plan(model, jobs, config.batch_size, refinement=read_refinement(config))


def plan_repeat(read: options.Options) -> Plan:
    """The one job that draws the file of `--from` again, as `<name>_again` under save_dir. Raises OsjaxError."""
    foreign = sorted(read.given - _FREE_TO_REPEAT)
    if foreign:
        raise OsjaxError(f"--from repeats a video as it was made: leave out {', '.join(f'--{key}' for key in foreign)}")
    origin = provenance.read(read.repeat)
    try:
        request = Request(**{**origin.request, "refs": tuple(origin.request["refs"])})
    except (TypeError, KeyError) as error:
        version = origin.osjax_version
        raise OsjaxError(f"{read.repeat} was made with other options: repeat it with osjax {version}") from error
    for path, ref in zip(request.refs, origin.refs, strict=True):
        if provenance.Reference.of(path).sha256 != ref.sha256:
            raise OsjaxError(f"the reference {path} has changed since {read.repeat} was made: put the old one back")
    config = read.config
    mesh = ",".join(f"{axis}={size}" for axis, size in origin.mesh.items())
    source = Path(read.repeat).resolve()
    stem = Path(config.save_dir) / source.parent.name / f"{source.stem}_again"
    lora = parse_lora(config.lora or "")
    model = Model(config.ckpt_path, lora, mesh, origin.dtype, config.offload, origin.attention)
    # As many at once as then, so that the arrays have the same shapes; copies stand for the others.
    return Plan(model, [Job(request, stem)] * origin.batch_size, origin.batch_size, origin)


def run(plan: Plan) -> None:
    """Make the videos of a plan that are not there yet, writing each batch when it is ready. Raises OsjaxError."""
    from osjax.pipeline import Pipeline  # not above: imports JAX, and mistakes in the plan should be told at once

    pipeline = Pipeline.load(**dataclasses.asdict(plan.model))
    if plan.origin and plan.origin.bundle_sha256 != pipeline.bundle.digest:
        raise OsjaxError(f"the video was made with another bundle, {plan.origin.bundle}: name it with --ckpt_path")
    if plan.origin and _digests(plan.origin.loras) != _digests(pipeline.loras):
        used = ";".join(f"{each.name}:{each.weight}" for each in plan.origin.loras)
        raise OsjaxError(
            f"the video was made with the LoRAs {used}: name them with --lora"
            if used
            else "the video was made without LoRAs: leave out --lora"
        )
    for job in plan.jobs:
        pipeline.shape(job.request)  # what cannot be drawn is told before a folder is made
    for folder in {job.stem.parent for job in plan.jobs}:
        if not os.access(make_folder(folder), os.W_OK):
            raise OsjaxError(f"cannot write to {folder}: choose another --save_dir")
    if plan.model.path is None:
        _say("no --ckpt_path: the embedded tiny bundle draws, which knows coloured shapes that move and nothing else")
    _draw(_refined(plan, plan.refinement, pipeline) if plan.refinement else plan, pipeline)


def tell(plan: Plan) -> None:
    """Say what a plan takes, whatever of it is made already. Raises OsjaxError if that does not fit."""
    from osjax.pipeline import Pipeline

    pipeline = Pipeline.load(**dataclasses.asdict(plan.model))
    dry_run.tell([[job.request for job in group] for group in _groups(plan)], pipeline)


def _groups(plan: Plan) -> list[Sequence[Job]]:
    return [plan.jobs[start : start + plan.batch_size] for start in range(0, len(plan.jobs), plan.batch_size)]


def _refined(plan: Plan, refinement: Refinement, pipeline: Pipeline) -> Plan:
    earlier = [found and found.request for found in map(_found, plan.jobs)]
    requests = refine([job.request for job in plan.jobs], earlier, refinement, pipeline)
    jobs = [dataclasses.replace(job, request=request) for job, request in zip(plan.jobs, requests, strict=True)]
    return dataclasses.replace(plan, jobs=jobs)


def _draw(plan: Plan, pipeline: Pipeline) -> None:
    # Groups stay as they are, however many of their videos are made already: the last bits depend on a group's size.
    groups = _groups(plan)
    missing = [plan.missing(group, pipeline) for group in groups]
    total = sum(map(len, missing))
    if total < len(plan.jobs) and not plan.origin:
        _say(f"{len(plan.jobs) - total} of {len(plan.jobs)} are made already: kept")
    done = 0
    for group, places in zip(groups, missing, strict=True):
        if not places:
            continue
        _say(f"{done + 1} of {total}: {', '.join(group[place].stem.name for place in places)}")
        videos = pipeline.run([job.request for job in group])
        for place in places:
            path, *_ = videos[place].save(group[place].stem)
            print(path, flush=True)
            if plan.origin:
                _compare(plan.origin, provenance.read(path))
        done += len(places)


def is_made(job: Job, pipeline: Pipeline) -> bool:
    """Whether the job's video is there, whole, and was made for the same request with the same weights and dtype."""
    found = _found(job)
    if found is None:
        return False
    made = found.request, found.bundle_sha256, found.dtype, _digests(found.loras)
    return made == (job.request.recorded(), pipeline.bundle.digest, pipeline.dtype, _digests(pipeline.loras))


def _found(job: Job) -> provenance.Provenance | None:
    """How the video was made that lies where the job's belongs, if one does."""
    if not provenance.is_finished(job.stem, job.request.num_frames):
        return None
    try:
        return provenance.read(provenance.result_path(job.stem, job.request.num_frames))
    except OsjaxError:  # a file of another program's: ours takes its place
        return None


def parse_lora(text: str) -> tuple[tuple[str, float], ...]:
    """`PATH:WEIGHT;PATH…` → (path, weight) of each; a weight left out is 1.

    What stands behind the last colon is the weight if it is a number, unless the whole is a path that exists.
    """
    return tuple(_parse_one_lora(part.strip()) for part in text.split(";") if part.strip())


def _parse_one_lora(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0


def _digests(loras: Sequence[provenance.UsedLoRA]) -> list[tuple[str, float]]:
    """What decides the weights: folders may be renamed."""
    return [(each.sha256, each.weight) for each in loras]


def _rows(config: ConfigDict) -> tuple[list[batch.Row], str]:
    """The rows to make and the name of their outputs where they have none of their own."""
    path = config.dataset.data_path
    if path is not None and (config.prompt is not None or config.ref is not None):
        raise OsjaxError("--dataset.data_path brings its own prompts and references: leave out --prompt and --ref")
    if path is not None:
        return batch.read_csv(path), Path(path).stem
    if config.prompt is None:
        raise OsjaxError("nothing to make: give --prompt, or a CSV of prompts by --dataset.data_path")
    return [batch.Row(0, config.prompt, batch.split_refs(config.ref or ""))], "prompt"


def _folder(sampling: ConfigDict) -> str:
    """`video_256px`, `image_768px`, `video_64x96`."""
    kind = "image" if sampling.num_frames == 1 else "video"
    return f"{kind}_{sampling.resolution or f'{sampling.width}x{sampling.height}'}"


def _request(config: ConfigDict, output: batch.Output) -> Request:
    sampling = config.sampling_option.to_dict()
    seed = sampling.pop("seed")
    score = {} if config.motion_score == DYNAMIC else {"motion_score": config.motion_score}
    return Request(
        prompt=output.row.text,
        refs=output.row.refs,
        negative_prompt=config.negative_prompt,
        cond_type=config.cond_type,
        seed=(config.seed if seed is None else seed) + output.sample,
        fps=config.fps_save,
        sample_posterior=config.sample_posterior,
        **score,
        **sampling,
    )


def _compare(old: provenance.Provenance, new: provenance.Provenance) -> None:
    """Say whether a repeated video is the same, and if not, what differs about the way it was made."""
    if new.frames_sha256 == old.frames_sha256:
        _say("same frames, bit for bit")
        return
    names = ("osjax_version", "jax_version", "device")
    changed = [name for name in names if getattr(old, name) != getattr(new, name)]
    _say(f"the frames differ; changed since: {', '.join(changed) or 'nothing that the file tells'}")


def _say(line: str) -> None:
    print(f"osjax: {line}", file=sys.stderr, flush=True)
