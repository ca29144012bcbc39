"""`serve`: a queue of videos, an HTTP API and a page, on this machine or on the local network."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import re
import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import quote

from mlx_sora.cli.flags import add_debug_flag
from mlx_sora.errors import UsageError, printable
from mlx_sora.request.options import as_int
from mlx_sora.utils.files import explain_os_errors

if TYPE_CHECKING:
    from mlx_sora.server.security import Access

#: Packages of the extra `serve`.
_EXTRA = ("fastapi", "uvicorn", "python_multipart", "segno")

#: Environment variables with the token and with the folder of videos.
TOKEN_VARIABLE, FOLDER_VARIABLE = "MLX_SORA_TOKEN", "MLX_SORA_VIDEOS"

DEFAULT_PORT, DEFAULT_QUEUE, DEFAULT_RATE = 8420, 100, 12_000

_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,200}", re.ASCII)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a page and an HTTP API that make videos, one after the other",
        description="Serve a page and an HTTP API (OpenAI's for videos) that make the videos of a "
        "queue. Prints the address. Ctrl-C ends it; unfinished videos go on at the next start.",
    )
    parser.add_argument(
        "--folder",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="videos, uploads and the queue; default: mlx_sora in the user's folder of data",
    )
    parser.add_argument(
        "--listen",
        "--host",
        nargs="?",
        const="0.0.0.0",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="let other machines connect, with a token: the link and a QR code of it are printed; "
        "ADDRESS: only through this address of this machine",
    )
    parser.add_argument(
        "--port",
        type=_number("--port", 0, 65535),
        default=DEFAULT_PORT,
        metavar="N",
        help=f"port, 0 for a free one; default: {DEFAULT_PORT}",
    )
    parser.add_argument(
        "--token",
        metavar="TEXT",
        help=f"token that every client needs; default: ${TOKEN_VARIABLE}, or with --listen a "
        "random one that stays in FOLDER/token",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of this server, such as that of a proxy before it; can be repeated",
    )
    parser.add_argument(
        "--queue-length",
        type=_number("--queue-length", 1, 100_000),
        default=DEFAULT_QUEUE,
        metavar="N",
        help=f"most videos that wait; default: {DEFAULT_QUEUE}",
    )
    parser.add_argument(
        "--rate",
        type=_number("--rate", 1, 1_000_000),
        default=DEFAULT_RATE,
        metavar="N",
        help=f"most requests per minute of one address; default: {DEFAULT_RATE}",
    )
    add_debug_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; return 0."""
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}.", 'Run: pip install "mlx_sora[serve]"')
    from mlx_sora.server.http import serve
    from mlx_sora.server.queue import JobQueue, Limits

    folder = _folder(args.folder)
    with open_socket(args.listen, args.port) as listener:
        queue = JobQueue(folder, Limits(queued=args.queue_length))
        try:
            access = _access(args, folder)
            queue.start()
            show_address(listener, access, folder, queue.notices, sys.stderr)
            serve(queue, access, listener)
        except KeyboardInterrupt:  # how a server ends
            pass
        finally:
            queue.stop()
    return 0


def _number(flag: str, low: int, high: int) -> Any:
    def parse(text: str) -> int:
        try:
            number = as_int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be {low} to {high}, not {text[:40]!r}")
        return number

    return parse


def _folder(text: str | None) -> Path:
    """Return the folder, made if it is missing. Raises MlxSoraError if it cannot be written."""
    try:
        folder = Path(text or os.environ.get(FOLDER_VARIABLE) or _data_folder()).expanduser()
    except RuntimeError:
        raise UsageError("There is no home folder.", "Give --folder FOLDER.") from None
    folder = Path(os.path.abspath(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"Cannot write into {folder}: {error.strerror}.", "Give another --folder."
        ) from None
    return folder


def _data_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mlx_sora"
    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local" / "share") / "mlx_sora"


def open_socket(address: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises UsageError, in one line, if it cannot."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise UsageError(
            f"{address!r} is no address of this machine.", "Leave it out: --listen."
        ) from None
    family, kind, _, _, place = found[0]
    # asyncio sends at once only where the protocol is named; else an answer takes 40 ms.
    listener = socket.socket(family, kind, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"Cannot listen on {address} port {port}: {error.strerror}.",
            "Give another --port, or 0 for a free one.",
        ) from None
    return listener


def _access(args: argparse.Namespace, folder: Path) -> Access:
    from mlx_sora.server.security import Access

    listening = not _is_loopback(args.listen)
    names = [name.lower().rstrip(".") for name in args.allow_host]
    if listening:
        own = socket.gethostname().lower().removesuffix(".local")
        names += [own, f"{own}.local"]
    token = args.token or os.environ.get(TOKEN_VARIABLE)
    if token is None and listening:
        token = _stored_token(folder / "token")
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError(
            "A token has 16 to 200 letters, digits, dots and dashes.",
            "Leave --token out for a random one.",
        )
    return Access(token=token, listening=listening, names=tuple(names), rate=args.rate)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _stored_token(path: Path) -> str:
    """Return the token in a file that only the user can read; make it if it is missing."""
    with explain_os_errors(path):
        if not path.exists():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_urlsafe(24))
        return path.read_text("utf-8", "replace").strip()


def show_address(
    listener: socket.socket, access: Access, folder: Path, notices: list[str], stream: TextIO
) -> None:
    """Print the address on stdout, and on `stream` what goes with it: on a terminal a QR code."""
    host, port = listener.getsockname()[:2]
    link = f"http://{_reachable(host)}:{port}/"
    if access.token is not None:
        link += f"?token={quote(access.token)}"
    for notice in notices:
        print(printable(notice), file=stream)
    print(f"videos in {printable(str(folder))}; Ctrl-C ends the server", file=stream)
    if access.listening and stream.isatty():
        import segno

        segno.make(link, error="l").terminal(stream, compact=True)
    stream.flush()
    print(link, flush=True)


def _reachable(host: str) -> str:
    """Return an address of this machine that others reach, for one that stands for all."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if not address.is_unspecified:
        return f"[{host}]" if address.version == 6 else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.254.254.254", 1))  # sends nothing, but chooses an interface
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
