"""Asking a hub what a repository holds, and fetching one file of it, resuming what is there.

The only module that touches huggingface_hub: its client gives us login, proxies and the protocol.
`hf_hub_download` is not used, because it throws a partial file away when its process ends; the
`http_get` below it continues one. Everything goes over plain HTTP: no xet, no hf_transfer.
"""

from __future__ import annotations

import errno
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_sora import __version__
from mlx_sora.errors import WeightsError
from mlx_sora.manage.sources import PartSource, choose_files
from mlx_sora.utils.files import git_sha1, sha256

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

#: Attempts in a row that may bring nothing before a file is given up for now.
ATTEMPTS = 3
#: Seconds between two such attempts.
RETRY_DELAY = 1.0

_RETRY_FIX = "Run the command again; it continues where it stopped."


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch. path: in the model folder; name: in `repo` at the commit `revision`.

    checksum: hexadecimal SHA-256 for files in LFS, else git's SHA-1 of the content.
    """

    path: str
    repo: str
    revision: str
    name: str
    size: int
    checksum: str

    def matches(self, file: Path, on_progress: Callable[[int], None] | None = None) -> str | None:
        """The SHA-256 of `file` if it is this one, else None. watch: told the bytes read so far."""
        if not file.is_file() or file.is_symlink() or file.stat().st_size != self.size:
            return None
        found = sha256(file, on_progress)
        same = found if len(self.checksum) == len(found) else git_sha1(file)
        return found if same == self.checksum else None


@dataclass(frozen=True)
class Hub:
    """A server that speaks the hub's protocol. endpoint None: huggingface_hub's own choice."""

    endpoint: str | None = None

    @property
    def address(self) -> str:
        """The server as messages and provenance name it."""
        from huggingface_hub import constants

        return self.endpoint or str(constants.ENDPOINT)

    def files(self, source: PartSource) -> list[RemoteFile]:
        """The files of `source` that a model folder needs, at one commit.

        Raises WeightsError: unreachable, unknown, gated, only pickles, hostile or useless answers.
        """
        from huggingface_hub import HfApi

        api = HfApi(self.endpoint, library_name="mlx_sora", library_version=__version__)
        with self._client_errors(str(source)):
            try:
                info = api.model_info(source.repo, revision=source.revision, files_metadata=True)
                siblings = {str(sibling.rfilename): sibling for sibling in info.siblings or ()}
            except (KeyError, TypeError, AttributeError) as error:
                raise _invalid_listing(self.address, source.repo) from error
        commit = str(info.sha)
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise _invalid_listing(self.address, source.repo)
        chosen = choose_files(source, list(siblings))
        return [self._remote_file(source, commit, name, siblings[name]) for name in chosen]

    def fetch(self, file: RemoteFile, partial: Path, on_progress: Callable[[int], None]) -> None:
        """Bring `part` to the file's size, from where it stands. watch: told the bytes there are.

        The content is not checked here. Raises WeightsError; what has arrived stays in `part`,
        except when it is too long to be a beginning of the file.
        """
        vain = 0
        partial.touch()
        while (before := partial.stat().st_size) < file.size:
            try:
                with _plain_http():
                    self._continue_file(file, partial, on_progress)
                reason = "the server ended early"
            except _TooLongError as error:
                partial.unlink()
                raise WeightsError(
                    f"{file.name} of {file.repo} is longer than the {file.size} bytes announced.",
                    "The server is not to be trusted with this file; try another --endpoint.",
                ) from error
            except Exception as error:
                if not _is_transient(error):
                    raise _user_error(error, f"{file.repo} {file.name}", self.address) from error
                reason = _reason(error)
            have = partial.stat().st_size
            vain = 0 if have > before else vain + 1
            if vain >= ATTEMPTS:
                raise WeightsError(
                    f"{file.name} of {file.repo} stopped at {have} of {file.size} bytes: {reason}.",
                    _RETRY_FIX,
                )
            if have < file.size:
                time.sleep(RETRY_DELAY)
        if partial.stat().st_size > file.size:
            partial.unlink()
            raise WeightsError(
                f"The beginning of {file.name} was too long and is gone.", _RETRY_FIX
            )

    def _continue_file(self, file: RemoteFile, part: Path, watch: Callable[[int], None]) -> None:
        """One request for what `part` lacks."""
        from huggingface_hub.file_download import hf_hub_url, http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(file.repo, file.name, revision=file.revision, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="mlx_sora", library_version=__version__)
        # A compressed body could not be continued in the middle.
        headers["Accept-Encoding"] = "identity"
        with _BoundedFile(part, file.size, watch) as out:
            http_get(url, out, resume_size=out.tell(), headers=headers)

    def _remote_file(
        self, source: PartSource, commit: str, name: str, sibling: RepoSibling
    ) -> RemoteFile:
        """Size and checksum: from the listing, else (mirrors that leave them out) by asking."""
        checksum = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        size = sibling.lfs.size if sibling.lfs else sibling.size
        if size is None or checksum is None:
            from huggingface_hub import get_hf_file_metadata, hf_hub_url

            url = hf_hub_url(source.repo, name, revision=commit, endpoint=self.endpoint)
            with self._client_errors(f"{source} {name}"):
                facts = get_hf_file_metadata(url)
            size, checksum = facts.size, facts.etag
        known = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", str(checksum))
        if known is None or type(size) is not int or size < 0:
            raise WeightsError(
                f"{self.address} states no size and checksum of {name} in {source.repo}.",
                "A file that cannot be verified is not fetched; try another --endpoint.",
            )
        path = f"{source.part}/{name.rpartition('/')[2]}"
        return RemoteFile(path, source.repo, commit, name, size, str(checksum))

    @contextmanager
    def _client_errors(self, what: str) -> Iterator[None]:
        """Turn what the client raises inside into WeightsErrors about `what`."""
        try:
            with _plain_http():
                yield
        except WeightsError:
            raise
        except Exception as error:
            raise _user_error(error, what, self.address) from error


class _TooLongError(Exception):
    """More bytes than the file may have."""


class _BoundedFile(io.FileIO):
    """A file to append to, which tells how long it is and refuses to outgrow `limit` bytes."""

    def __init__(self, path: Path, limit: int, watch: Callable[[int], None]) -> None:
        super().__init__(path, "ab", opener=lambda p, f: os.open(p, f | os.O_NOFOLLOW, 0o666))
        self._limit, self._watch = limit, watch

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > self._limit:
            raise _TooLongError
        rest = memoryview(data)
        while rest:
            rest = rest[super().write(rest) :]
        self._watch(self.tell())
        return len(data)


@contextmanager
def _plain_http() -> Iterator[None]:
    """huggingface_hub without its bars, messages, transfer programs and telemetry; then as before.

    Its telemetry would ask huggingface.co even where another endpoint is given.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    # Those that this version of the library does not have are left alone.
    switches = {"HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_ENABLE_HF_TRANSFER": False}
    before = {name: getattr(constants, name) for name in switches if hasattr(constants, name)}
    verbosity = logging.get_verbosity()
    # With HF_HUB_DISABLE_PROGRESS_BARS=0 the user wants theirs; the library would only warn.
    ours = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if ours:
        disable_progress_bars()
    for name in before:
        setattr(constants, name, switches[name])
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if ours:
            enable_progress_bars()
        for name, value in before.items():
            setattr(constants, name, value)


def _status(error: Exception) -> int:
    """HTTP status that an error of the client carries, or 0."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed: a lost connection, a cut body, a busy server."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return _status(error) in (408, 416, 429) or _status(error) >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return _is_network_error(error) or (isinstance(error, OSError) and error.errno is None)


def _is_network_error(error: Exception) -> bool:
    """Errors of the HTTP client, whichever one this version of huggingface_hub uses."""
    clients = {"requests", "urllib3", "httpx", "httpx2", "httpcore"}
    return isinstance(error, (ConnectionError, TimeoutError)) or any(
        base.__module__.split(".")[0] in clients for base in type(error).__mro__
    )


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")


def _invalid_listing(address: str, repo: str) -> WeightsError:
    return WeightsError(
        f"What {address} answers about {repo} is no listing of a model repository.",
        "Check --endpoint.",
    )


def _user_error(error: Exception, what: str, address: str) -> WeightsError:
    """What an error of the client means to the user, and what to do."""
    from huggingface_hub import errors

    login = "log in with `hf auth login` or set HF_TOKEN"
    status = _status(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return WeightsError("HF_HUB_OFFLINE is set: nothing may be fetched.", "Unset it.")
    if isinstance(error, errors.GatedRepoError):
        repo = what.split(maxsplit=1)[0].partition("@")[0]
        fix = f"Accept its terms at {address}/{repo}, then {login}."
        return WeightsError(f"{what} is gated.", fix)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        message = f"{address} has no {what}, or not for you ({status})."
        return WeightsError(message, f"Check the name; for a private repository {login}.")
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsError(f"{address} has no {what}.", "Check the revision.")
    if isinstance(error, errors.HfHubHTTPError):
        message = f"{address} answered {status} for {what}."
        return WeightsError(message, "It has moved or gone." if status == 404 else _RETRY_FIX)
    if isinstance(error, ValueError):
        return _invalid_listing(address, what)
    if _is_network_error(error):
        message = f"Cannot reach {address}: {_reason(error)}."
        return WeightsError(message, f"Check the connection. {_RETRY_FIX}")
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return WeightsError("The disk is full.", f"Make room. {_RETRY_FIX}")
        return WeightsError(f"Cannot write {what}: {error.strerror or error}.", _RETRY_FIX)
    raise error
