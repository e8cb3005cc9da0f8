"""Files from a hub on loopback: broken connections, refusals, wrong content. The client is the real one."""

import fcntl
import time

import huggingface_hub
import numpy as np
import pytest

from osjax.errors import OsjaxError
from osjax.hub import download
from osjax.hub.huggingface import HuggingFace
from osjax.hub.sets import Part
from tests.osjax.hub.hub_server import COMMIT, Hub, serve

REPO = "someone/model"
WEIGHTS = np.random.default_rng(0).bytes(600_000)
FILES = {"model.safetensors": WEIGHTS, "sub/config.json": b'{"width": 4}', "README.md": b"read me"}


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    """What a user's environment has: the suite is offline otherwise. No token of this machine's user is sent."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub():
    with serve(Hub({REPO: dict(FILES)})) as hub:
        yield hub


def get(hub, folder, repo=REPO, patterns=("*",), revision=None):
    source = HuggingFace(hub.endpoint, pauses=(0.0, 0.0))
    plan = download.plan(source, [Part(repo, patterns)], folder, revision)
    download.fetch(source, plan)
    return plan


def refusal(hub, folder, **options):
    """The one line that a download ends with."""
    with pytest.raises(OsjaxError) as caught:
        get(hub, folder, **options)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)
    return str(caught.value)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NEEDED = {path: data for path, data in FILES.items() if path != "README.md"}


def test_what_is_needed_comes_whole_and_comes_once(hub, tmp_path):
    plan = get(hub, tmp_path)
    assert content(tmp_path) == NEEDED
    assert plan.room == sum(map(len, NEEDED.values()))
    seen = len(hub.seen)
    again = get(hub, tmp_path)
    assert (again.missing, again.room) == ((), 0)
    assert [request.path for request in hub.seen[seen:]] == [f"/api/models/{REPO}"]


def test_the_commit_that_was_listed_is_fetched(hub, tmp_path):
    get(hub, tmp_path, revision="main")
    assert hub.seen[0].path == f"/api/models/{REPO}/revision/main"
    assert all(f"/resolve/{COMMIT}/" in request.path for request in hub.seen[1:])


@pytest.mark.parametrize("ranges", [True, False], ids=["skips", "sends all again"])
def test_a_broken_connection_goes_on(hub, tmp_path, ranges):
    hub.breaks["model.safetensors"] = [300_000]
    hub.ranges = ranges
    get(hub, tmp_path)
    assert content(tmp_path) == NEEDED
    assert hub.sent("model.safetensors") == [None, "bytes=300000-"]


def test_a_connection_that_hangs_counts_as_broken(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.breaks["model.safetensors"], hub.stall = [300_000], 2.0
    begun = time.monotonic()
    get(hub, tmp_path)
    assert time.monotonic() - begun < hub.stall, "the server ended it"
    assert content(tmp_path) == NEEDED


def test_every_byte_that_comes_gives_new_patience(hub, tmp_path):
    hub.breaks["model.safetensors"] = [100_000, 0, 100_000, 0, 100_000, 0]
    get(hub, tmp_path)
    assert content(tmp_path) == NEEDED
    assert hub.sent("model.safetensors")[-1] == "bytes=300000-"


def test_a_connection_that_stays_broken_is_one_line_and_the_same_command_goes_on(hub, tmp_path):
    hub.breaks["model.safetensors"] = [250_000, 0, 0, 0, 0]
    line = refusal(hub, tmp_path)
    assert "250,000 of 600,000 bytes" in line
    assert "the same command goes on" in line
    assert "model.safetensors" not in content(tmp_path)
    hub.breaks.clear()
    plan = get(hub, tmp_path)
    assert plan.room == len(WEIGHTS) - 250_000 + len(FILES["sub/config.json"])
    assert hub.sent("model.safetensors")[-1] == "bytes=250000-"
    assert content(tmp_path) == NEEDED


def test_a_busy_hub_is_asked_again(hub, tmp_path):
    hub.statuses = [503, 429]
    get(hub, tmp_path)
    assert content(tmp_path) == NEEDED


def test_a_hub_that_stays_busy_is_told(hub, tmp_path):
    hub.statuses = [503] * 9
    assert "status 503" in refusal(hub, tmp_path)


@pytest.mark.parametrize("path", ["model.safetensors", "sub/config.json"], ids=["SHA-256", "Git"])
def test_wrong_content_is_not_kept(hub, tmp_path, path):
    hub.spoiled.add(path)
    assert f"{path} did not come as" in refusal(hub, tmp_path)
    assert not [name for name in content(tmp_path) if name.startswith(path)]
    hub.spoiled.clear()
    get(hub, tmp_path)
    assert content(tmp_path) == NEEDED


@pytest.mark.parametrize("claimed", [599_999, 600_001], ids=["too long", "too short"])
def test_wrong_size_is_not_kept(hub, tmp_path, claimed):
    hub.sizes["model.safetensors"] = claimed
    refusal(hub, tmp_path)
    assert "model.safetensors" not in content(tmp_path)


def test_a_file_of_the_users_is_not_replaced(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS[::-1])
    assert "move it away" in refusal(hub, tmp_path)
    assert content(tmp_path) == {"model.safetensors": WEIGHTS[::-1]}
    assert len(hub.seen) == 1


def test_no_room_is_told_before_anything_is_written(hub, tmp_path):
    hub.sizes["model.safetensors"] = 10**18  # no disk has it
    line = refusal(hub, tmp_path / "new" / "folder")
    assert line.startswith("not enough room, 1.00EB needed, ")
    assert str(tmp_path / "new" / "folder") in line
    assert not list(tmp_path.iterdir())
    assert len(hub.seen) == 1


def test_a_gated_model_names_its_page_and_the_token(hub, tmp_path):
    hub.token, hub.gated = "hf_secret", True
    line = refusal(hub, tmp_path)
    assert f"{hub.endpoint}/{REPO}" in line
    assert "HF_TOKEN" in line


def test_a_private_or_absent_repository(hub, tmp_path):
    assert "no/body" in refusal(hub, tmp_path, repo="no/body")
    hub.token = "hf_secret"
    assert "HF_TOKEN" in refusal(hub, tmp_path)


def test_a_token_is_sent_to_the_hub_alone_and_never_told(hub, tmp_path, monkeypatch, capfd):
    hub.token, hub.elsewhere = "hf_secret", True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.breaks["model.safetensors"] = [1000]
    get(hub, tmp_path)
    assert content(tmp_path) == NEEDED
    hosts = {request.host.split(":")[0]: request.authorization for request in hub.seen}
    assert hosts == {"127.0.0.1": "Bearer hf_secret", "localhost": None}
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_old")
    line = refusal(hub, tmp_path)
    printed = "".join(capfd.readouterr())
    assert "(401)" in line
    for secret in ("hf_secret", "SECRET"):
        assert secret not in line + printed


def test_no_such_revision(hub, tmp_path):
    assert "no revision v9" in refusal(hub, tmp_path, revision="v9")


def test_a_file_that_went_away(hub, tmp_path):
    hub.vanished.add("model.safetensors")
    assert "no model.safetensors any more" in refusal(hub, tmp_path)


def test_a_set_whose_files_are_not_there(hub, tmp_path):
    line = refusal(hub, tmp_path, patterns=["Open_Sora_v2.safetensors"])
    assert f"{REPO} holds no Open_Sora_v2.safetensors" in line


def test_a_path_that_leads_out_of_the_folder(hub, tmp_path):
    hub.repos[REPO]["../../escaped.json"] = b"{}"
    assert "leads out of its folder" in refusal(hub, tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_nobody_answers(tmp_path):
    with serve(Hub({})) as gone:
        pass
    assert "cannot reach" in refusal(gone, tmp_path)


@pytest.mark.parametrize("endpoint", ["hub.example", "http://a:b", "http://", "file:///etc", "http://me:secret@hub"])
def test_an_endpoint_that_is_no_address(endpoint):
    with pytest.raises(OsjaxError, match="HF_ENDPOINT") as caught:
        HuggingFace(endpoint)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("place", "answer"), [("/nowhere", "status 404"), ("/login", "no JSON")])
def test_what_answers_is_no_hub(hub, tmp_path, place, answer):
    hub.endpoint += place
    assert f"does not answer like a hub ({answer})" in refusal(hub, tmp_path)


def test_a_folder_that_is_a_file(hub, tmp_path):
    (tmp_path / "ckpts").write_text("mine")
    assert "ckpts" in refusal(hub, tmp_path / "ckpts")


def test_offline(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(hub, tmp_path)
    assert not hub.seen


def test_two_at_a_time_do_not_mix(hub, tmp_path):
    hub.breaks["model.safetensors"] = [1000, 0, 0, 0]
    refusal(hub, tmp_path)
    (part,) = tmp_path.glob("*.part")
    with part.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process" in refusal(hub, tmp_path)
    assert part.read_bytes() == WEIGHTS[:1000]
