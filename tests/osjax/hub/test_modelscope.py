"""ModelScope's own client against a server on loopback that answers like ModelScope."""

import hashlib
import json
import re
import sys
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from osjax.errors import OsjaxError
from osjax.hub import download
from osjax.hub.modelscope import ModelScope
from osjax.hub.sets import Part
from tests.osjax.hub.hub_server import Handler, Hub, serve

REPO = "someone/model"
FILES = {"model.safetensors": np.random.default_rng(0).bytes(600_000), "sub/config.json": b'{"width": 4}'}


class ModelScopeHandler(Handler):
    def respond(self, path, asked, authorization):
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        found = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", path)
        repo = found and self.hub.repos.get(found[1])
        if not repo or query.get("Revision") not in ("master", "v1"):
            self.refuse(404)
        elif self.hub.token:
            self.refuse(403)
        elif found[2]:
            files = [self.entry(path, content) for path, content in repo.items()]
            self.answer(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}).encode())
        else:
            self.send(repo[query["FilePath"]], query["FilePath"], asked)

    def entry(self, path, content):
        size = self.hub.sizes.get(path, len(content))
        return {"Path": path, "Size": size, "Sha256": hashlib.sha256(content).hexdigest(), "Type": "blob"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    with serve(Hub({REPO: FILES}), ModelScopeHandler) as hub:
        yield hub


def get(hub, folder, repo=REPO, revision=None):
    source = ModelScope(hub.endpoint)
    plan = download.plan(source, [Part(repo)], folder, revision)
    download.fetch(source, plan)
    return plan


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("revision", [None, "v1"])
def test_what_is_needed_comes_whole_and_comes_once(hub, tmp_path, revision):
    assert len(get(hub, tmp_path / "ckpts", revision=revision).missing) == 2
    assert content(tmp_path / "ckpts") == FILES
    assert get(hub, tmp_path / "ckpts").missing == ()


def test_a_broken_connection_goes_on(hub, tmp_path):
    hub.breaks["model.safetensors"] = [300_000]
    get(hub, tmp_path / "ckpts")
    assert content(tmp_path / "ckpts") == FILES
    assert "bytes=300000-" in hub.sent("repo")


def test_no_room(hub, tmp_path):
    hub.sizes["model.safetensors"] = 10**18
    with pytest.raises(OsjaxError, match="not enough room"):
        get(hub, tmp_path / "ckpts")


@pytest.mark.parametrize(
    ("wrong", "line"),
    [({"repo": "no/body"}, "ModelScope has no no/body"), ({"revision": "v9"}, "check the name and --revision")],
)
def test_what_is_not_there(hub, tmp_path, wrong, line):
    with pytest.raises(OsjaxError, match=line):
        get(hub, tmp_path / "ckpts", **wrong)


def test_a_refusal_names_the_token(hub, tmp_path):
    hub.token = "secret"
    with pytest.raises(OsjaxError, match="MODELSCOPE_API_TOKEN"):
        get(hub, tmp_path / "ckpts")


def test_without_its_client_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)  # as Python marks what cannot be imported
    with pytest.raises(OsjaxError, match=r"pip install 'osjax\[modelscope\]'"):
        ModelScope()
