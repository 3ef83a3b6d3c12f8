r"""What ``python -m flowguard`` runs: the same as ``flowguard``."""

import sys

from flowguard.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
