"""The export component."""

from kfp import dsl

from components.runtime import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export(config: dict, checkpoint: dsl.Input[dsl.Model], exported_model: dsl.Output[dsl.Model]) -> None:
    """Write the committed global parameters as a directory that `transformers` loads with `from_pretrained`.

    It contains a model card and the card's data (`training.json`). On a cluster it also contains the scores
    (`evaluation.json`), because one pod exports and evaluates.

    Args:
        config: The output `config` of precache.
        checkpoint: The output `checkpoint` of train.
        exported_model: The directory. Its metadata gives the model's round, step, samples and tokens.
    """
    from components import steps

    steps.export(config, checkpoint, exported_model)
