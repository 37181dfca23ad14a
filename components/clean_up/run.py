"""What the clean-up component does."""

from collections.abc import Mapping
from typing import Any

from components.launcher import launcher_of
from components.precache.run import resolve
from components.step import step


def run(job_id: str, values: Mapping[str, Any]) -> None:
    """End what still runs of a training.

    Args:
        job_id: As in `resolve`.
        values: The parameters that name the run and its deployment, by flat name.
    """
    with step("clean_up"):
        launcher_of(resolve(values, job_id)).clean_up()
