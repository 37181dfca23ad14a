"""`python -m pipelines`, and the command `diloco-pipelines`."""

from typing import NoReturn

from pipelines.cli import main
from trainer.errors import run_main


def run() -> NoReturn:
    """Run one command and end the process with its status."""
    run_main(main)


if __name__ == "__main__":
    run()
