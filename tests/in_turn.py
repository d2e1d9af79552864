"""Runs commands of kvjax in turn, in one process that imports it once.

    python tests/in_turn.py '[["generate", "--prompt", "x"], ["methods"]]'

Ends with the code of the first that fails, and says which that was.
"""

import json
import sys

from kvjax import cli

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        code = cli.run(arguments)
        if code:
            print(f"failed with {code}: kvjax {arguments}", file=sys.stderr)
            sys.exit(code)
