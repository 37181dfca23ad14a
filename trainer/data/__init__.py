"""Datasets: one file a family. A family is a `DatasetFamily` named `FAMILY` in a module of `families/`.

`precache` reads a dataset once, at its source, and leaves on a worker's volume what training reads fastest; training
itself never touches the hub. Every worker's volume holds the whole dataset; `SampleOrder` is the one order in which all
of them go through it, and a range of its positions is a disjoint share.
"""

from trainer.data.dataset import Dataset, Manifest, Split, SplitCounts, open_dataset
from trainer.data.precache import check, directory, precache, precache_all
from trainer.data.registry import DatasetFamily, dataset_families, resolve
from trainer.data.sampling import SampleOrder, batches, evenly

__all__ = [
    "Dataset",
    "DatasetFamily",
    "Manifest",
    "SampleOrder",
    "Split",
    "SplitCounts",
    "batches",
    "check",
    "dataset_families",
    "directory",
    "evenly",
    "open_dataset",
    "precache",
    "precache_all",
    "resolve",
]
