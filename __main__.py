"""`python -m overcrank`."""

from overcrank.cli import main

main(prog_name="overcrank")
