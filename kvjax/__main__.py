"""`python -m kvjax` is the command line."""

from kvjax.cli import main

main()
