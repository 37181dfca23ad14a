"""The train component."""

from kfp import dsl

from components.runtime import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    config: dict,
    precached: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    training_metrics: dsl.Output[dsl.Metrics],
    training_summary: dsl.Output[dsl.Markdown],
) -> None:
    """Train with DiLoCo until `total_steps`, with one worker per node. A run that has a checkpoint resumes from it.

    The step starts the workers (processes on one machine, jobs on a cluster), follows them and prints their progress.

    Args:
        config: The output `config` of precache.
        precached: The output `precached` of precache; training starts after it.
        checkpoint: The final checkpoint's `global.safetensors`; on a cluster, the names of the claims that hold it.
        training_metrics: Final losses, rounds, steps, samples, bytes sent and received, goodput.
        training_summary: The run on one page, with links to its trackers and, on a cluster, the `kubectl` line.
    """
    from components import steps

    steps.train(config, checkpoint, training_metrics, training_summary)
