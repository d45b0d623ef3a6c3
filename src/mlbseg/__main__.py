"""`python -m mlbseg`."""

from mlbseg.cli import main

main()
