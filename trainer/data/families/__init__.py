"""One file a dataset family: each module defines a `DatasetFamily` named `FAMILY`."""
