"""Client of a hub: lists the files of a repository and fetches them with resume.

The only module that uses huggingface_hub, for login, proxies and the protocol. `hf_hub_download`
discards a partial file when its process ends; the `http_get` below it continues one. Everything
goes over plain HTTP: no xet, no hf_transfer.
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
from mlx_sora.errors import WeightsError, shell_words
from mlx_sora.manage.sources import PartSource, choose_files
from mlx_sora.utils.files import git_sha1, sha256

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

#: Attempts in a row without progress before a download stops.
ATTEMPTS = 3
#: Seconds between two attempts.
RETRY_DELAY = 1.0

#: SHA-256, or git's SHA-1.
_CHECKSUM = r"[0-9a-f]{40}|[0-9a-f]{64}"

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
        """Return the SHA-256 of `file` if it is this file, else None.

        on_progress: gets the bytes read so far.
        """
        if not file.is_file() or file.is_symlink() or file.stat().st_size != self.size:
            return None
        found = sha256(file, on_progress)
        same = found if len(self.checksum) == len(found) else git_sha1(file)
        return found if same == self.checksum else None


@dataclass(frozen=True)
class Hub:
    """A server with the hub's protocol. endpoint: its URL, None for huggingface_hub's default."""

    endpoint: str | None = None

    @property
    def address(self) -> str:
        """URL of the server for messages and provenance."""
        from huggingface_hub import constants

        return self.endpoint or str(constants.ENDPOINT)

    def files(self, source: PartSource) -> list[RemoteFile]:
        """List the files of `source` that a model folder needs, at one commit.

        With HF_HUB_OFFLINE set, they are those of the hub's cache. Raises WeightsError for an
        unreachable server, for an unknown, gated or pickle-only repository, and for an invalid
        answer.
        """
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            return _cached_listing(source)

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
        names = choose_files(source, list(siblings))
        return [self._remote_file(source, commit, name, siblings[name]) for name in names]

    def fetch(self, file: RemoteFile, partial: Path, on_progress: Callable[[int], None]) -> None:
        """Fetch what `partial` lacks of `file`. Does not check the content.

        on_progress: gets the size of `partial`. Raises WeightsError; `partial` then stays, unless
        it is longer than the file.
        """
        failures = 0
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
                    "Do not trust this server with the file; try another --endpoint.",
                ) from error
            except Exception as error:
                if not _is_transient(error):
                    raise _user_error(error, f"{file.repo} {file.name}", self.address) from error
                reason = _reason(error)
            size = partial.stat().st_size
            failures = 0 if size > before else failures + 1
            if failures >= ATTEMPTS:
                raise WeightsError(
                    f"{file.name} of {file.repo} stopped at {size} of {file.size} bytes: {reason}.",
                    _RETRY_FIX,
                )
            if size < file.size:
                time.sleep(RETRY_DELAY)
        if partial.stat().st_size > file.size:
            partial.unlink()
            raise WeightsError(f"The partial {file.name} was too long; it is deleted.", _RETRY_FIX)

    def _continue_file(
        self, file: RemoteFile, partial: Path, on_progress: Callable[[int], None]
    ) -> None:
        from huggingface_hub.file_download import hf_hub_url, http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(file.repo, file.name, revision=file.revision, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="mlx_sora", library_version=__version__)
        # A compressed body could not be continued in the middle.
        headers["Accept-Encoding"] = "identity"
        with _BoundedFile(partial, file.size, on_progress) as out:
            http_get(url, out, resume_size=out.tell(), headers=headers)

    def _remote_file(
        self, source: PartSource, commit: str, name: str, sibling: RepoSibling
    ) -> RemoteFile:
        """Take size and checksum from the listing, or request them if a mirror leaves them out."""
        checksum = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        size = sibling.lfs.size if sibling.lfs else sibling.size
        if size is None or checksum is None:
            from huggingface_hub import get_hf_file_metadata, hf_hub_url

            url = hf_hub_url(source.repo, name, revision=commit, endpoint=self.endpoint)
            with self._client_errors(f"{source} {name}"):
                facts = get_hf_file_metadata(url)
            size, checksum = facts.size, facts.etag
        known = re.fullmatch(_CHECKSUM, str(checksum))
        if known is None or type(size) is not int or size < 0:
            raise WeightsError(
                f"{self.address} states no size and checksum of {name} in {source.repo}.",
                "A file that cannot be verified is not fetched; try another --endpoint.",
            )
        path = f"{source.part}/{name.rpartition('/')[2]}"
        return RemoteFile(path, source.repo, commit, name, size, str(checksum))

    @contextmanager
    def _client_errors(self, subject: str) -> Iterator[None]:
        """Raise WeightsError about `subject` for an error of the client inside the block."""
        try:
            with _plain_http():
                yield
        except WeightsError:
            raise
        except Exception as error:
            raise _user_error(error, subject, self.address) from error


def cached_copies(file: RemoteFile) -> Iterator[Path]:
    """Yield the places of `file` in the hub's cache, where `hf download` put it; unchecked."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    found = try_to_load_from_cache(file.repo, file.name, revision=file.revision)
    if isinstance(found, str):
        yield Path(found).resolve()
    # Another commit may hold the same content, which is named after its checksum.
    repo = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=file.repo, repo_type="model")
    yield repo / "blobs" / file.checksum


def _cached_listing(source: PartSource) -> list[RemoteFile]:
    """List the files of `source` at the commit in the hub's cache. Raises WeightsError."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(source.repo, revision=source.revision, local_files_only=True)
        snapshot = Path(str(found))
        files = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*")}
        names = choose_files(source, [name for name, path in files.items() if path.is_file()])
    except (OSError, ValueError, WeightsError) as error:
        message = f"HF_HUB_OFFLINE is set, and the hub's cache does not hold all of {source}."
        raise WeightsError(message, "Unset it.") from error
    blobs = {name: files[name].resolve() for name in names}
    return [
        RemoteFile(
            f"{source.part}/{name.rpartition('/')[2]}",
            source.repo,
            snapshot.name,
            name,
            blob.stat().st_size,
            blob.name if re.fullmatch(_CHECKSUM, blob.name) else git_sha1(blob),
        )
        for name, blob in blobs.items()
    ]


class _TooLongError(Exception):
    """More bytes than the file may have."""


class _BoundedFile(io.FileIO):
    """A file to append to, of at most `limit` bytes; reports its size."""

    def __init__(self, path: Path, limit: int, on_progress: Callable[[int], None]) -> None:
        super().__init__(path, "ab", opener=lambda p, f: os.open(p, f | os.O_NOFOLLOW, 0o666))
        self._limit, self._on_progress = limit, on_progress

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > self._limit:
            raise _TooLongError
        rest = memoryview(data)
        while rest:
            rest = rest[super().write(rest) :]
        self._on_progress(self.tell())
        return len(data)


@contextmanager
def _plain_http() -> Iterator[None]:
    """Disable progress bars, messages, transfer programs and telemetry of huggingface_hub.

    Its telemetry contacts huggingface.co even if another endpoint is set.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    # Not every version of the library has both.
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
    """Return the HTTP status of a client error, 0 without one."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _is_transient(error: Exception) -> bool:
    """Return True if another attempt may succeed: lost connection, cut body, busy server."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return _status(error) in (408, 416, 429) or _status(error) >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return _is_network_error(error) or (isinstance(error, OSError) and error.errno is None)


def _is_network_error(error: Exception) -> bool:
    # The HTTP client depends on the version of huggingface_hub.
    clients = {"requests", "urllib3", "httpx", "httpx2", "httpcore"}
    return isinstance(error, (ConnectionError, TimeoutError)) or any(
        base.__module__.split(".")[0] in clients for base in type(error).__mro__
    )


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")


def _invalid_listing(address: str, repo: str) -> WeightsError:
    return WeightsError(
        f"The answer of {address} about {repo} is not a listing of a model repository.",
        "Check --endpoint, and in a browser whether this network asks to sign in first.",
    )


def _local_fault(error: Exception) -> WeightsError | None:
    """Return the error of a token, certificates or a proxy of this machine; None for others."""
    from huggingface_hub import get_token

    if isinstance(error, ValueError):
        wrong = next((c for c in get_token() or "" if not "!" <= c <= "~"), None)
        if wrong is not None:
            message = f"The access token contains {wrong!r}, which no token has."
            return WeightsError(message, "Copy it again, without quotes, into HF_TOKEN.")
    if isinstance(error, OSError):
        for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            path = os.environ.get(name)
            if path and not Path(path).exists():
                return WeightsError(
                    f"{name} names certificates in {path}, which does not exist.",
                    f"Correct {name}, or unset it.",
                )
    # huggingface_hub 1 asks through httpx, which raises an ImportError; versions before through
    # requests, which raises a ValueError.
    if isinstance(error, (ImportError, ValueError)) and "SOCKS" in str(error):
        package = "socksio" if isinstance(error, ImportError) else "pysocks"
        message = f"The environment sets a SOCKS proxy ({_reason(error)})."
        return WeightsError(
            message, f"Run {shell_words('pip', 'install', package)}, or unset ALL_PROXY."
        )
    return None


def _user_error(error: Exception, subject: str, address: str) -> WeightsError:
    from huggingface_hub import errors

    local = _local_fault(error)
    if local is not None:
        return local
    login = "log in with `hf auth login` or set HF_TOKEN"
    status = _status(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return WeightsError("HF_HUB_OFFLINE is set: downloads are disabled.", "Unset it.")
    if isinstance(error, errors.GatedRepoError):
        repo = subject.split(maxsplit=1)[0].partition("@")[0]
        fix = f"Accept its terms at {address}/{repo}, then {login}."
        return WeightsError(f"{subject} is gated.", fix)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        message = f"{address} has no {subject}, or you have no access to it ({status})."
        return WeightsError(message, f"Check the name; for a private repository {login}.")
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsError(f"{address} has no {subject}.", "Check the revision.")
    if isinstance(error, errors.HfHubHTTPError):
        message = f"{address} answered {status} for {subject}."
        return WeightsError(message, "It was moved or deleted." if status == 404 else _RETRY_FIX)
    if isinstance(error, (ValueError, RecursionError)):  # no JSON, or nested without end
        return _invalid_listing(address, subject)
    if _is_network_error(error):
        message = f"Cannot reach {address}: {_reason(error)}."
        return WeightsError(message, f"Check the connection. {_RETRY_FIX}")
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return WeightsError("The disk is full.", f"Make room. {_RETRY_FIX}")
        return WeightsError(f"Cannot write {subject}: {error.strerror or error}.", _RETRY_FIX)
    raise error
