"""The Hugging Face Hub, or one of its kind: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the rest hold here too.

huggingface_hub asks, authenticates and explains; `transfer` brings the bytes.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP client, which is another one in each major version
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from osjax.errors import OsjaxError
from osjax.hub import transfer
from osjax.hub.source import RemoteFile

_PASSING = (408, 429, 500, 502, 503, 504)  # statuses that another try may not meet


class HuggingFace:
    """A Source. `endpoint` is the hub's address, by default HF_ENDPOINT or the public one. Raises OsjaxError."""

    def __init__(self, endpoint: str | None = None, pauses: Sequence[float] = transfer.PAUSES):
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._pauses = pauses
        if not re.fullmatch(r"https?://([^/:@\s]+|\[[\da-f:]+])(:\d{1,5})?(/\S*)?", self._endpoint):
            raise OsjaxError("HF_ENDPOINT is no plain address: give one such as https://huggingface.co")

    def files(self, repo: str, revision: str | None) -> list[RemoteFile]:
        """See Source. One request; the files are those of the commit that the revision is now."""
        api = HfApi(endpoint=self._endpoint, library_name="osjax")
        try:
            info = api.model_info(
                repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
        except (HTTPError, OfflineModeIsEnabled, ValueError) as error:
            raise self._explained(error, repo, f"revision {revision}") from error
        return [self._remote(repo, info.sha, sibling) for sibling in info.siblings or ()]

    def held(self, file: RemoteFile, folder: Path) -> int:
        """See Source."""
        return transfer.held(file, folder)

    def fetch(self, file: RemoteFile, folder: Path) -> None:
        """See Source."""
        transfer.receive(file, folder, functools.partial(self._open, file), self._pauses)

    def _remote(self, repo: str, revision: str, sibling: object) -> RemoteFile:
        if sibling.size is None:
            raise OsjaxError(f"{self._endpoint} does not tell how large {sibling.rfilename} is: choose another hub")
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        return RemoteFile(repo, revision, sibling.rfilename, sibling.size, digest)

    @contextlib.contextmanager
    def _open(self, file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """A transfer.Opener. The client drops the token where the hub sends it on to another host."""
        url = hf_hub_url(file.repo, file.path, revision=file.revision, endpoint=self._endpoint)
        headers = build_hf_headers(library_name="osjax")
        headers |= {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
                hf_raise_for_status(response)
                skipped = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
                yield start if skipped else 0, response.iter_bytes()
        except HfHubHTTPError as error:
            if error.response.status_code in _PASSING:
                raise transfer.BrokenConnectionError(f"status {error.response.status_code}") from error
            raise self._explained(error, file.repo, file.path) from error
        except OfflineModeIsEnabled as error:
            raise self._explained(error, file.repo, file.path) from error
        except HTTPError as error:
            raise transfer.BrokenConnectionError(_kind(error)) from error

    def _explained(self, error: Exception, repo: str, what: str) -> OsjaxError:
        """What an error of the client means, in none of its own words, which may hold signed addresses."""
        return OsjaxError(self._line(error, repo, what))

    def _line(self, error: Exception, repo: str, what: str) -> str:
        hub, page = self._endpoint, f"{self._endpoint}/{repo}"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        match error:
            case OfflineModeIsEnabled():
                return "HF_HUB_OFFLINE is set: unset it, or go on with `osjax convert` if the files are there"
            case HFValidationError():
                return f"no hub has a model named {repo}: give OWNER/NAME"
            case GatedRepoError():
                return f"{repo} is gated: accept its licence at {page} and set HF_TOKEN to a token of yours"
            case RevisionNotFoundError():
                return f"{repo} has no {what}: leave out --revision, or give a branch, tag or commit"
            case EntryNotFoundError():
                return f"{repo} has no {what} any more: run the same command again"
            case RepositoryNotFoundError():
                return f"there is no {page}, or it is private: check the name, or set HF_TOKEN"
            case HfHubHTTPError() if status in (401, 403):
                return f"{page} is refused ({status}): set HF_TOKEN to a valid token that may read it"
            case HfHubHTTPError() if status in _PASSING:
                return f"{hub} fails (status {status}): try again later"
            case HTTPError() if status is None:
                return f"cannot reach {hub} ({_kind(error)}): check the network, and HF_ENDPOINT"
            case _:
                answer = f"status {status}" if status else "no JSON"
                return f"{hub} does not answer like a hub ({answer}): check HF_ENDPOINT"


def _kind(error: Exception) -> str:
    return type(error).__name__
