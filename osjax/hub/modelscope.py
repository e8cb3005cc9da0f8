"""ModelScope, through its own client, which resumes and checks by itself: pip install 'osjax[modelscope]'."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from osjax.errors import OsjaxError
from osjax.hub.source import RemoteFile


class ModelScope:
    """A Source. `endpoint` is the hub's address, by default MODELSCOPE_ENDPOINT or the public one.

    Raises OsjaxError if the client is not installed.
    """

    def __init__(self, endpoint: str | None = None):
        try:
            import modelscope_hub
        except ImportError as error:
            raise OsjaxError("ModelScope needs its client: pip install 'osjax[modelscope]'") from error
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # each try is a warning, with its address
        self._client = modelscope_hub
        self._api = modelscope_hub.HubApi(endpoint=endpoint)

    def files(self, repo: str, revision: str | None) -> list[RemoteFile]:
        """See Source."""
        with self._explaining(repo):
            listed = self._api.list_repo_files(repo, "model", revision=revision)
        revision = revision or "master"
        return [RemoteFile(repo, revision, each.path, each.size, each.sha256) for each in listed if not each.is_dir]

    def held(self, file: RemoteFile, folder: Path) -> int:
        """See Source: the client does not say."""
        return 0

    def fetch(self, file: RemoteFile, folder: Path) -> None:
        """See Source."""
        with self._explaining(f"{file.path} of {file.repo}"):
            self._api.download_file(
                file.repo,
                "model",
                file.path,
                revision=file.revision,
                local_dir=folder,
                expected_sha256=file.digest,
                file_size=file.size,
            )

    @contextlib.contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Turns the client's errors into one line, with none of their own text."""
        client = self._client
        try:
            yield
        except client.NotExistError as error:
            raise OsjaxError(f"ModelScope has no {what}: check the name and --revision") from error
        except (client.AuthenticationError, client.PermissionDeniedError) as error:
            raise OsjaxError(
                f"ModelScope refuses {what}: accept its licence there, and set MODELSCOPE_API_TOKEN"
            ) from error
        except client.FileIntegrityError as error:
            raise OsjaxError(f"{what} did not come as ModelScope lists it: run the same command again") from error
        except (client.HubError, OSError) as error:
            raise OsjaxError(
                f"{what} stopped ({type(error).__name__}): check the network and the disk; the same command goes on"
            ) from error
