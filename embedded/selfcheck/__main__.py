"""`python -m embedded.selfcheck`: what `fathom selfcheck` is."""

import sys

from embedded.selfcheck.command import main

if __name__ == "__main__":
    sys.exit(main())
