"""`python -m server` is `fathom serve`; a command's name in front is understood as well."""

import sys

from server.cli import COMMANDS, main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in {*COMMANDS, "--version"}:
        arguments = ["serve", *arguments]
    sys.exit(main(arguments))
