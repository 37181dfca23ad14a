"""The precache component. It alone takes all flat parameters; the later steps take the `config` that it passes on."""

import linecache
from typing import Any

from kfp import dsl

from components.step import IMAGE
from trainer.config import TrainingConfig

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
        config: The parameters with a run id, a run directory, a launcher and a namespace, by flat name.
        job_id: Names the run when `run_id` is empty, so that a retried step has the same one.
    """
    values = dict(locals())
    from components.precache.run import run

    run(values.pop("precached"), values.pop("config"), values.pop("job_id"), values)
'''


def _component() -> Any:
    arguments = [f"    {p.name}: {p.type.__name__} = {p.default!r}," for p in TrainingConfig.parameters()]
    source = _SOURCE.format(parameters="\n".join(arguments))
    file = "<components.precache>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # where inspect looks for it
    namespace: dict[str, Any] = {"dsl": dsl, "__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    return dsl.component(namespace["precache"], base_image=IMAGE, install_kfp_package=False)


precache = _component()
