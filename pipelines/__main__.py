"""`python -m pipelines`."""

from pipelines.cli import main
from trainer.errors import run_main

if __name__ == "__main__":
    run_main(main)
