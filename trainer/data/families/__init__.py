"""One file per dataset family: each module defines a `DatasetFamily` named `FAMILY`."""
