"""The environment of the tests that ask a server on loopback."""

import pytest

from tests.osjax.refine.chat_server import KEY


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A key, and no proxy between the client and loopback."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
