"""`python -m apertus_mlx`: the command line."""

from apertus_mlx.cli import main

main()
