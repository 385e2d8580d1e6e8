"""`python -m stepcell`: the command line where its script is not on the path."""

from stepcell.cli import main

main(prog_name="stepcell")
