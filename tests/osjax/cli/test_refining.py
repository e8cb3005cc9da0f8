"""`--refine_prompt True` and `--motion_score dynamic`, from the command line to files, with a server on loopback."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from osjax import provenance
from osjax.cli import generate, main, options
from osjax.cli.refining import refine
from osjax.errors import OsjaxError
from osjax.pipeline import Pipeline
from osjax.refine.instructions import REWRITE, Kind
from osjax.request import Request
from tests.osjax.refine.chat_server import KEY, refused, said, serving

SMALL = ["--num_frames", "5", "--num_steps", "2", "--height", "16", "--width", "32"]
ASKING = ["--refine-prompt", "True", "--motion-score", "dynamic", "--refine.model", "teller", "--refine.retries", "0"]


def helpful(question):
    content = question.content if isinstance(question.content, str) else question.content[0]["text"]
    return said("6" if question.is_score else f"{content}, told at length")


@pytest.fixture
def chat(monkeypatch):
    """A server that helps, known to the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    with serving(helpful) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        yield server


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(progress=False)


def plan(*words):
    return generate.plan(options.read([*SMALL, *ASKING, *map(str, words)]).config)


def refined(made, pipeline, earlier=None):
    """The requests of a plan as they are drawn."""
    return refine(
        [job.request for job in made.jobs], earlier or [None] * len(made.jobs), made.jobs[0].refinement, pipeline
    )


def rows(tmp_path, *lines):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return ["--dataset.data_path", path]


def written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_from_the_command_line_to_videos_and_again(chat, tmp_path, capfd, monkeypatch):
    where = [*rows(tmp_path, "text", "a dog", "a cat"), "--batch_size", "2", "--save_dir", tmp_path / "out"]
    words = ["generate", *SMALL, *ASKING, *map(str, where)]
    assert main.main(words) == 0
    video = tmp_path / "out" / "video_32x16" / "rows_0001.mp4"
    found = provenance.read(video)
    assert (found.prompt, found.prompt_used) == ("a cat", "a cat, told at length. 24 FPS. 6 motion score.")
    assert video.with_suffix(".txt").read_text() == found.prompt_used
    advice = {"refined_prompt": "a cat, told at length", "dynamic_score": "6", "refined_by": "teller"}
    assert advice.items() <= found.request.items()
    assert sorted(question.is_score for question in chat.questions) == [False, False, True, True]
    assert {question.authorization for question in chat.questions} == {f"Bearer {KEY}"}

    assert main.main(words) == 0
    assert len(chat.questions) == 4, "what the first run got is used again"
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    assert main.main(["generate", "--from", str(video), "--save_dir", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr()
    assert "2 of 2 are made already: kept" in printed.err
    assert "same frames, bit for bit" in printed.err
    assert provenance.read(video.with_name("rows_0001_again.mp4")).request == found.request
    assert KEY not in printed.out + printed.err
    assert b"told at length" in written(tmp_path)
    assert KEY.encode() not in written(tmp_path)


def test_a_csv_is_asked_for_once_a_prompt(chat, tmp_path, pipeline):
    made = plan(*rows(tmp_path, "text", "a cat", "a dog", "a cat"), "--num_sample", "2")
    requests = refined(made, pipeline)
    assert len(chat.questions) == 4
    assert [each.refined_prompt for each in requests] == [
        f"a {animal}, told at length" for animal in ("cat", "cat", "dog", "dog", "cat", "cat")
    ]
    assert {(each.dynamic_score, each.motion_score, each.refined_by) for each in requests} == {("6", "4", "teller")}
    assert [each.prompt for each in requests] == [job.request.prompt for job in made.jobs]
    assert [each.seed for each in requests] == [job.request.seed for job in made.jobs]


def test_rows_say_for_themselves_what_is_asked(chat, tmp_path, pipeline):
    lines = ["text,motion-score,refine_prompt", "a cat,,", "a dog,3,", "rain,dynamic,False", "snow,2,0"]
    made = plan(*rows(tmp_path, *lines))
    jobs = generate.refined(made, pipeline).jobs
    told = [(job.request.refined_prompt, job.request.dynamic_score, job.request.motion_score) for job in jobs]
    assert told == [
        ("a cat, told at length", "6", "4"),
        ("a dog, told at length", None, "3"),
        (None, "6", "4"),
        (None, None, "2"),
    ]
    assert sorted(question.content for question in chat.questions) == [
        "a cat",
        "a cat, told at length",
        "a dog",
        "rain",
    ]


def test_an_interrupted_csv_goes_on_with_the_prompts_it_has(chat, tmp_path, pipeline):
    made = plan(*rows(tmp_path, "text", "a cat", "a dog"))
    requests = refined(made, pipeline)
    chat.questions.clear()
    lying = [requests[0].recorded() | {"refined_prompt": "an older answer"}, None]
    again = refined(made, pipeline, lying)
    assert [each.refined_prompt for each in again] == ["an older answer", "a dog, told at length"]
    assert {question.content for question in chat.questions} == {"a dog", "a dog, told at length"}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"refined_by": "another model"},
        {"refined_prompt": None},
        {"dynamic_score": None},
        {"refined_prompt": None, "dynamic_score": None, "refined_by": None},
    ],
)
def test_what_lies_there_from_other_commands_is_asked_for_anew(change, chat, pipeline):
    made = plan("--prompt", "a cat")
    (request,) = refined(made, pipeline)
    chat.questions.clear()
    assert refined(made, pipeline, [request.recorded() | change]) == [request]
    assert len(chat.questions) == 2


@pytest.mark.parametrize(
    ("words", "kind", "images"),
    [
        ([], Kind.T2V, 0),
        (["--num_frames", "1"], Kind.T2I, 0),
        (["--num_frames", "1", "--cond_type", "i2v_head", "--ref", "REF"], Kind.T2I, 0),
        (["--cond_type", "i2v_head", "--ref", "REF"], Kind.I2V, 1),
        (["--cond_type", "i2v_loop", "--ref", "REF;REF"], Kind.I2V, 2),
    ],
)
def test_what_is_drawn_decides_how_it_is_asked(words, kind, images, chat, tmp_path, pipeline):
    ref = tmp_path / "a.png"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(ref)
    made = plan("--prompt", "a cat", *(word.replace("REF", str(ref)) for word in words))
    assert refined(made, pipeline)[0].refined_prompt == "a cat, told at length"
    question = chat.questions[0]
    assert question.instruction == REWRITE[kind]
    sent = [] if isinstance(question.content, str) else question.content[1:]
    assert [part["type"] for part in sent] == ["image_url"] * images


def test_in_vain_is_one_warning_and_the_prompt_as_it_is(chat, monkeypatch, tmp_path, pipeline, caplog):
    with serving(lambda _: refused(401)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        made = plan(*rows(tmp_path, "text", "a cat", "a dog", "rain"))
        requests = refined(made, pipeline)
    assert requests == [job.request for job in made.jobs]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("osjax")]
    start = "the server 127.0.0.1 refuses with status 401: check OPENAI_API_KEY; "
    assert lines == [
        f"{start}the prompt stays as it is (3 of 3)",
        f"{start}the motion score stays at its default (3 of 3)",
    ]


def test_strict_stops_before_anything_is_drawn(chat, monkeypatch, tmp_path, capfd):
    with serving(lambda _: refused(401)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        words = [*SMALL, *ASKING, "--refine.strict", "True", "--prompt", "a cat", "--save_dir", str(tmp_path / "out")]
        assert main.main(["generate", *words]) == 2
    printed = capfd.readouterr().err
    assert "osjax: error: the server 127.0.0.1 refuses with status 401: check OPENAI_API_KEY\n" in printed
    assert "denoise" not in printed
    assert KEY not in printed
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_missing_is_told_before_the_bundle_is_opened(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    with pytest.raises(OsjaxError, match=r"pip install 'osjax\[refine\]'"):
        plan("--prompt", "a cat", "--ckpt_path", "missing")
    monkeypatch.delitem(sys.modules, "openai")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(OsjaxError, match="set OPENAI_API_KEY"):
        plan("--prompt", "a cat", "--ckpt_path", "missing")


def test_without_the_options_nobody_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    made = generate.plan(options.read([*SMALL, "--prompt", "a cat", "--motion_score", "6"]).config)
    assert made.jobs[0].refinement is None
    assert made.jobs[0].request.motion_score == "6"


def test_a_request_records_itself_as_json_gives_it_back():
    recorded = Request("a cat", refs=("a.png",)).recorded()
    assert recorded == json.loads(json.dumps(recorded))
    assert recorded["refs"] == ["a.png"]
