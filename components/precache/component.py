"""The precache component. It alone takes the flat parameters; the later steps take the `config` that it hands on."""

import linecache
from collections.abc import Sequence
from typing import Any, Optional

from kfp import dsl

from components.step import IMAGE
from trainer.config import Parameter, TrainingConfig

# KFP ships a component's source and calls it with explicit arguments: a backend does not fill parameters into a dict.
# So the source is written here from the list of parameters, which stands in `TrainingConfig` and nowhere else.
_SOURCE = '''\
def precache(
    precached: dsl.Output[dsl.Dataset],
    config: dsl.OutputPath(dict),
    job_id: str = "",
{parameters}
):
    """Check every parameter, and download or read model and dataset into each worker's own directory.

    Args:
        precached: The dataset's manifest, and its counts.
        config: The parameters with a run id and a run directory, by flat name; those without a value left out.
        job_id: Names the run when `run_id` is empty, so that a retried step has the same one.
    """
    values = dict(locals())
    from components.precache.run import run

    run(values.pop("precached"), values.pop("config"), values.pop("job_id"), values)
'''


def precache_component(parameters: Sequence[Parameter]) -> Any:
    """The component with these parameters; one that is not among them takes its default.

    Args:
        parameters: All of them, for a backend. `kfp.local` cannot run a component whose optional number has no value:
            there, those that have one.
    """
    source = _SOURCE.format(parameters="\n".join(map(_argument, parameters)))
    file = "<components.precache>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # where inspect looks for it
    namespace: dict[str, Any] = {"dsl": dsl, "Optional": Optional, "__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    return dsl.component(namespace["precache"], base_image=IMAGE, install_kfp_package=False)


def _argument(parameter: Parameter) -> str:
    annotation = f"Optional[{parameter.type.__name__}]" if parameter.optional else parameter.type.__name__
    return f"    {parameter.name}: {annotation} = {parameter.default!r},"


precache = precache_component(TrainingConfig.parameters())
