"""Datasets: one file per family. A family is a `DatasetFamily` named `FAMILY` in a module of `families/`.

`precache` reads a dataset once from its source, and writes it to a worker's volume in the form that training reads
fastest; training never contacts the hub. Every worker's volume contains the complete dataset. All workers traverse it
in the same order, `SampleOrder`, so disjoint ranges of positions are disjoint samples.
"""

from trainer.data.dataset import Dataset, Split, open_dataset, require_dataset
from trainer.data.precache import Run, check, directory, precache, precache_all
from trainer.data.registry import DatasetFamily, dataset_families, resolve
from trainer.data.sampling import SampleOrder, batches, evenly

__all__ = [
    "Dataset",
    "DatasetFamily",
    "Run",
    "SampleOrder",
    "Split",
    "batches",
    "check",
    "dataset_families",
    "directory",
    "evenly",
    "open_dataset",
    "precache",
    "precache_all",
    "require_dataset",
    "resolve",
]
