"""`osjax generate`: options → jobs (a request and a place for its files) → videos.

The configuration ends here: what goes on are frozen dataclasses.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from osjax import batch, provenance
from osjax.cli import dry_run, made, options
from osjax.cli.illustrating import Illustration, picture_of, picture_stem, read_illustration, started_from
from osjax.cli.refining import DYNAMIC, Refinement, read_refinement, refine, without_score
from osjax.errors import OsjaxError
from osjax.files import make_folder
from osjax.request import EXACT, Request

if TYPE_CHECKING:
    from osjax.pipeline import Pipeline
    from osjax.video import Video

# With --from everything else is as it was; these say where things lie, not what is drawn.
_FREE_TO_REPEAT = frozenset({"save_dir", "ckpt_path", "lora", "offload", "offload_blocks", "dry_run"})


@dataclasses.dataclass(frozen=True)
class Model:
    """What draws: the arguments of `Pipeline.load`. path: of a bundle, or None for the embedded one; lora: folders
    and weights."""

    path: str | None
    lora: tuple[tuple[str, float], ...]
    mesh: str
    dtype: str
    precision: str
    offload: bool
    offload_blocks: bool | None
    attention: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to make.

    stem: the path of its files without their endings; where: the line of a CSV that asks for it, or ''; refinement:
    what a language model is asked first.
    """

    request: Request
    stem: Path
    where: str = ""
    refinement: Refinement | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole command. origin: the provenance that `--from` repeats; illustration: the pictures that videos start from,
    if they are to be drawn first."""

    model: Model
    jobs: Sequence[Job]
    batch_size: int
    origin: provenance.Provenance | None = None
    illustration: Illustration | None = None

    def groups(self) -> list[list[Job]]:
        """The jobs that are drawn together; however many of them are made already, because the last bits of a video
        depend on the size of its group."""
        places = batch.group([job.request.shared() for job in self.jobs], self.batch_size)
        return [[self.jobs[place] for place in group] for group in places]

    def missing(self, group: Sequence[Job], pipeline: Pipeline) -> list[int]:
        """Which of a group's videos are to be made. Of copies for `--from`, the one at the old place."""
        if self.origin:
            return [self.origin.batch_index]
        return [place for place, job in enumerate(group) if not made.is_made(job.request, job.stem, pipeline)]


def main(argv: Sequence[str]) -> int:
    """Makes what the command line `argv` asks for; the exit status. Raises OsjaxError."""
    read = options.read(argv)
    planned = plan_repeat(read) if read.repeat else plan(read.config)
    (tell if read.config.dry_run else run)(planned)
    return 0


def plan(config: ConfigDict) -> Plan:
    """The jobs of a prompt or a CSV, all checked before the first is made. Raises OsjaxError."""
    if config.batch_size < 1 or config.num_sample < 1:
        raise OsjaxError("batch_size and num_sample count videos: give numbers above 0")
    columns = options.Columns()
    rows, name = _rows(config, columns)
    rows = batch.select(rows, config.start_index, config.end_index)
    outputs = batch.plan_outputs(rows, fallback=name, samples=config.num_sample)
    jobs = [_job(config, columns, output) for output in outputs]
    lora = parse_lora(config.lora or "")
    means = config.dtype, config.precision, config.offload, config.offload_blocks, config.attention
    model = Model(config.ckpt_path, lora, config.mesh, *means)
    return Plan(model, jobs, config.batch_size, illustration=read_illustration(config))


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
    blocks = config.offload_blocks
    if blocks is None and config.offload and origin.in_blocks:
        blocks = True  # as then, for the last bits; where it came as a whole, it does so again if it can
    means = origin.dtype, origin.precision, config.offload, blocks, origin.attention
    model = Model(config.ckpt_path, lora, mesh, *means)
    # As many at once as then, so that the arrays have the same shapes; copies stand for the others.
    return Plan(model, [Job(request, stem)] * origin.batch_size, origin.batch_size, origin)


def run(plan: Plan) -> None:
    """Make the videos of a plan that are not there yet, writing each batch when it is ready. Raises OsjaxError."""
    from osjax.kernels.attention import APPROXIMATE  # not above: imports JAX, and mistakes should be told at once
    from osjax.models import quantized
    from osjax.pipeline import Pipeline

    pipeline = Pipeline.load(**dataclasses.asdict(plan.model))
    if plan.origin and plan.origin.bundle_sha256 != pipeline.bundle.digest:
        raise OsjaxError(f"the video was made with another bundle, {plan.origin.bundle}: name it with --ckpt_path")
    if plan.origin and made.lora_digests(plan.origin.loras) != made.lora_digests(pipeline.loras):
        used = ";".join(f"{each.name}:{each.weight}" for each in plan.origin.loras)
        raise OsjaxError(
            f"the video was made with the LoRAs {used}: name them with --lora"
            if used
            else "the video was made without LoRAs: leave out --lora"
        )
    parts = _parts(plan, pipeline)
    for part, artist in parts:
        for job in part.jobs:
            with batch.located(job.where):
                artist.shape(job.request)  # what cannot be drawn is told before a folder is made
    for folder in {job.stem.parent for part, _ in parts for job in part.jobs}:
        if not os.access(make_folder(folder), os.W_OK):
            raise OsjaxError(f"cannot write to {folder}: choose another --save_dir")
    if plan.model.path is None:
        _say("no --ckpt_path: the embedded tiny bundle draws, which knows coloured shapes that move and nothing else")
    if approximate := dict.fromkeys(job.request.speed for job in plan.jobs if job.request.speed != EXACT):
        _say(f"speed {', '.join(approximate)} is approximate: exact draws what the model says")
    if pipeline.residency.precision != quantized.FULL:
        _say(f"precision {pipeline.residency.precision} is approximate: weights in full draw what the model says")
    if pipeline.attention in APPROXIMATE:
        _say(f"attention {pipeline.attention} is approximate: auto draws what the model says")
    for number, (part, artist) in enumerate(parts, 1):
        draw(refined(part, artist), artist, last=number == len(parts))


def tell(plan: Plan) -> None:
    """Say what a plan takes, whatever of it is made already. Raises OsjaxError if that does not fit."""
    from osjax.pipeline import Pipeline  # not above, as in `run`

    pipeline = Pipeline.load(**dataclasses.asdict(plan.model))
    parts = [([[job.request for job in group] for group in part.groups()], on) for part, on in _parts(plan, pipeline)]
    dry_run.tell(parts)


def _parts(plan: Plan, pipeline: Pipeline) -> list[tuple[Plan, Pipeline]]:
    """What is drawn, one after the other, and by whom."""
    if not plan.illustration:
        return [(plan, pipeline)]
    pictures, videos = _illustrated(plan, plan.illustration, pipeline)
    return [(pictures, pipeline.of_images()), (videos, pipeline)]


def _illustrated(plan: Plan, illustration: Illustration, pipeline: Pipeline) -> tuple[Plan, Plan]:
    """(the pictures to draw first, the videos that start from them)."""
    pictures, videos = [], []
    for job in plan.jobs:
        with batch.located(job.where):
            picture = picture_of(job.request, illustration, pipeline)
        stem = picture_stem(job.stem)
        asked = job.refinement and without_score(job.refinement)
        pictures.append(dataclasses.replace(job, request=picture, stem=stem, refinement=asked))
        videos.append(dataclasses.replace(job, request=started_from(job.request, stem)))
    return dataclasses.replace(plan, jobs=pictures), dataclasses.replace(plan, jobs=videos)


def refined(plan: Plan, pipeline: Pipeline) -> Plan:
    """The plan with what a language model makes of the prompts whose jobs want it. Raises OsjaxError as `refine`."""
    jobs = list(plan.jobs)
    for refinement in dict.fromkeys(job.refinement for job in jobs if job.refinement):
        places = [place for place, job in enumerate(jobs) if job.refinement == refinement]
        found = [made.found(jobs[place].request, jobs[place].stem) for place in places]
        earlier = [each and each.request for each in found]
        requests = refine([jobs[place].request for place in places], earlier, refinement, pipeline)
        for place, request in zip(places, requests, strict=True):
            jobs[place] = dataclasses.replace(jobs[place], request=request)
    return dataclasses.replace(plan, jobs=jobs)


def draw(plan: Plan, pipeline: Pipeline, *, last: bool = False) -> None:
    """Draw the videos of a plan that are not there yet, its folders being there. Raises OsjaxError.

    A group is written while the next one is drawn: encoding keeps the host busy, drawing the devices. last: whether
    this is the last part of a command. What is not needed again is not kept for it: the transformer after the last
    group, and after the last part's texts their encoders.
    """
    from osjax.embedding import encode_all  # not above, as in `run`

    groups = [(group, places) for group in plan.groups() if (places := plan.missing(group, pipeline))]
    total = sum(len(places) for _, places in groups)
    if total < len(plan.jobs) and not plan.origin:
        _say(f"{len(plan.jobs) - total} of {len(plan.jobs)} are made already: kept")
    _read_references(dict.fromkeys(job for group, _ in groups for job in group), pipeline)
    requests = [[job.request for job in group] for group, _ in groups]
    if last:
        pipeline.residency.last_use("t5", "clip")
    done, written = 0, None
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:  # whose end is waited for, whatever happens here
        for (group, places), together, texts in zip(groups, requests, encode_all(pipeline, requests), strict=True):
            _say(f"{done + 1} of {total}: {', '.join(group[place].stem.name for place in places)}")
            if together is requests[-1] and not together[0].extend:
                pipeline.residency.last_use(pipeline.roles.mmdit)
            videos = pipeline.run(together, texts)
            if written:
                written.result()  # which raises what went wrong, and keeps but one group waiting
            drawn = {group[place].stem: videos[place] for place in places}
            written = writer.submit(_write, drawn, plan.origin)
            done += len(places)
        if written:
            written.result()


def _write(drawn: Mapping[Path, Video], origin: provenance.Provenance | None) -> None:
    """Writes videos under their stems, says where they are, and if they repeat one, whether they are the same."""
    for stem, video in drawn.items():
        path, *_ = video.save(stem)
        print(path, flush=True)
        if origin:
            _compare(origin, provenance.read(path))


def _read_references(jobs: Iterable[Job], pipeline: Pipeline) -> None:
    """Reads all references and keeps none: a file that cannot be used is told before anything is computed."""
    from osjax.sizes import read_references  # not above, as in `run`

    for job in jobs:
        with batch.located(job.where):
            read_references(job.request, pipeline.shape(job.request))


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


def _rows(config: ConfigDict, columns: options.Columns) -> tuple[list[batch.Row], str]:
    """The rows to make and the name of their outputs where they have none of their own."""
    path = config.dataset.data_path
    if path is not None and (config.prompt is not None or config.ref is not None):
        raise OsjaxError("--dataset.data_path brings its own prompts and references: leave out --prompt and --ref")
    if path is not None:
        return batch.read_csv(path, columns.spellings, columns.refused), Path(path).stem
    if config.prompt is None:
        raise OsjaxError("nothing to make: give --prompt, or a CSV of prompts by --dataset.data_path")
    return [batch.Row(0, config.prompt, batch.split_refs(config.ref or ""))], "prompt"


def _folder(sampling: ConfigDict) -> str:
    """`video_256px`, `image_768px`, `video_64x96`."""
    kind = "image" if sampling.num_frames == 1 else "video"
    return f"{kind}_{sampling.resolution or f'{sampling.width}x{sampling.height}'}"


def _job(config: ConfigDict, columns: options.Columns, output: batch.Output) -> Job:
    with batch.located(output.row.where):
        config = columns.configure(config, output.row.options)
        request = _request(config, output)
    stem = Path(config.save_dir) / _folder(config.sampling_option) / output.name
    return Job(request, stem, output.row.where, read_refinement(config))


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
    names = ("osjax_version", "jax_version", "device", "in_blocks")
    changed = [name for name in names if getattr(old, name) != getattr(new, name)]
    _say(f"the frames differ; changed since: {', '.join(changed) or 'nothing that the file tells'}")


def _say(line: str) -> None:
    print(f"osjax: {line}", file=sys.stderr, flush=True)
