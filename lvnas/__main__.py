"""`python -m lvnas`."""

from lvnas.cli import main

main()
