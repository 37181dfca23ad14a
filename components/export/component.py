"""The export component."""

from kfp import dsl

from components.runtime import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export(config: dict, checkpoint: dsl.Input[dsl.Model], exported_model: dsl.Output[dsl.Model]) -> None:
    """Write the committed global parameters as a directory that `transformers` loads."""
    from components import steps

    steps.export(config, checkpoint, exported_model)
