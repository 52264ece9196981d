"""`python -m bptool`."""

from bptool.cli.main import main

main()
