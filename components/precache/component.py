"""The precache component. It takes the parameters; later steps take the `config` that it outputs."""

import linecache
from typing import Any

from kfp import dsl

from components.parameters import common
from components.runtime import IMAGE

# KFP ships a component's source and calls it with explicit arguments; a backend does not collect parameters into a
# dict. So this source is generated from the configuration, the single list of parameters.
_SOURCE = '''\
def precache(
    precached: dsl.Output[dsl.Dataset],
    config: dsl.OutputPath(dict),
    job_id: str = "",
{parameters}
    advanced: dict = {{}},
):
    """Check all parameters and put the model and the dataset onto each worker's volume.

    On one machine, a volume is a subdirectory of the run's directory; on a cluster, it is a persistent volume claim. A
    bad parameter fails this step before anything is created. Only this component takes the training's parameters. It
    validates and completes them, and outputs them as `config` for the later steps.

    Args:
        precached: The held-out data with its manifest and tokenizer. Its metadata gives the dataset's counts.
        config: All parameters by flat name, including the run id, run directory, launcher and namespace chosen here.
        job_id: Names the run if `run_id` is empty, so that a retried step continues the same run.
{descriptions}
        advanced: All parameters that have no input here, by name.
    """
    values = dict(locals())
    from components import steps

    steps.precache(values.pop("precached"), values.pop("config"), values.pop("job_id"), values)
'''


def _component() -> Any:
    arguments = [f"    {p.name}: {p.type.__name__} = {p.default!r}," for p in common()]
    descriptions = [f"        {p.name}: {p.description}" for p in common()]
    source = _SOURCE.format(parameters="\n".join(arguments), descriptions="\n".join(descriptions))
    file = "<components.precache>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # `inspect` reads it from here
    namespace: dict[str, Any] = {"dsl": dsl, "__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    return dsl.component(namespace["precache"], base_image=IMAGE, install_kfp_package=False)


precache = _component()
