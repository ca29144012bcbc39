# PYTHON_ARGCOMPLETE_OK
"""`python -m mlx_sora`, and the command `mlx_sora`."""

import signal
import sys


def main() -> int:
    """Run the command line and return the exit code. Ctrl-C while it loads leaves no traceback."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as behind a shell's `&`
    if not ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mlx_sora.cli import main as cli

    if not ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
