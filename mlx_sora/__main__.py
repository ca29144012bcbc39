"""`python -m mlx_sora`."""

import sys

from mlx_sora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
