"""The Hugging Face Hub: rows of its datasets, and a clear message for each of its errors."""

import errno
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from trainer.config import TrainingConfig
from trainer.data.documents import BATCH_ROWS, documents
from trainer.data.registry import DatasetFamily
from trainer.errors import ConfigError, TrainingError, one_line

if TYPE_CHECKING:
    from datasets import IterableDataset
    from pyarrow.parquet import ParquetFile

T = TypeVar("T")

_END_BYTES = 64 << 10
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


@contextmanager
def hub_errors(field: str, name: str, instead: str = "") -> Iterator[None]:
    """Turn an exception that the hub's libraries raise in this block into an error that the user can act on.

    `field` is the parameter that names something on the hub, `name` its value, and `instead` an alternative for the
    user, as the rest of a sentence.

    Raises:
        ConfigError: Nothing with that name exists, or the user has no access.
        TrainingError: The hub cannot be reached, or failed.
    """
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    also = f", {instead}" if instead else ""
    try:
        yield
    except (ConfigError, TrainingError):
        raise
    # The user can change the name or the token
    except GatedRepoError:
        problem = f"is gated: accept its terms on the hub and set HF_TOKEN in the environment{also}"
        raise ConfigError(field, name, problem) from None
    except RevisionNotFoundError:
        raise ConfigError(field, name, "has no such revision on the hub") from None
    except (RepositoryNotFoundError, DatasetNotFoundError):
        problem = f"is not on the hub, or is private: check its name, or set HF_TOKEN in the environment{also}"
        raise ConfigError(field, name, problem) from None
    except DataFilesNotFoundError as error:
        raise ConfigError(field, name, f"does not have the expected layout: {_first_line(error)}") from None
    # The hub or the network failed
    except HfHubHTTPError as error:
        raise TrainingError(f"{field} {name}: the hub answered with an error: {_first_line(error)}") from error
    except Exception as error:
        if (cause := _of_the_cache(error)) is not None:
            problem = f"the hub's cache cannot be written ({cause}): set HF_HOME to a directory that can"
            raise TrainingError(f"{field} {name}: {problem}") from error
        problem = f"cannot be fetched from the hub ({_first_line(error)}): check the network{also}"
        raise TrainingError(f"{field} {name} {problem}") from error


def _of_the_cache(error: BaseException | None) -> OSError | None:
    """The exception in a chain that says which file could not be written; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE and error.filename:
            return error
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class HubDataset(DatasetFamily):
    """A dataset on the hub, or `<name>:<folder>` or `<name>:<repository>[@<revision>]` with the same layout.

    A mixin: it comes before the class for the kind of samples.
    """

    takes_argument = True
    local = False
    repository: ClassVar[str]  # on the hub, unless the argument names one
    shards: ClassVar[str]  # glob of the files to read
    loader: ClassVar[str] = "parquet"  # format of the files: a loader of `datasets`
    raw: ClassVar[str] = ""  # the column of pictures or audio, which is kept as the undecoded bytes of its files

    def __init__(self, argument: str, config: TrainingConfig) -> None:
        super().__init__(argument, config)
        self._folder = Path(argument).expanduser()
        self._is_local = bool(argument) and self._folder.is_dir()
        self.is_path = self._is_local or argument.startswith((".", "/", "~"))  # of a folder, which may not exist
        name, _, revision = argument.partition("@")
        self._repository, self._revision = name or self.repository, revision or None

    def check(self) -> None:
        super().check()
        if self.is_path and not self._is_local:
            raise ConfigError("dataset", self.spec, "no such folder")
        if self._is_local and not self._local_shards():
            raise ConfigError("dataset", self.spec, f"holds no {self.shards}")

    def identity(self) -> str:
        return f"{self.name}:{self._folder.absolute()}" if self._is_local else self.spec

    def revision(self) -> str:
        """The commit on the hub; for a folder, a hash of its files' names, sizes and ends.

        At a file's end, Parquet has its statistics and gzip a checksum.
        """
        if self._is_local:
            digest = hashlib.sha256()
            for path in self._local_shards():
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - _END_BYTES))
                    digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read())
            return f"local copy, sha256 {digest.hexdigest()}"
        from huggingface_hub import HfApi

        with hub_errors("dataset", self.spec):
            return str(HfApi().dataset_info(self._repository, revision=self._revision).sha)

    def local_bytes(self) -> int:
        """Total size of a folder's files; 0 for a dataset on the hub."""
        return sum(path.stat().st_size for path in self._local_shards()) if self._is_local else 0

    def row_count(self, usual: int) -> int:
        """Number of rows: for a folder of Parquet files, from their metadata; otherwise `usual`."""
        if not self._is_local:
            return usual
        return sum(self._read(path, lambda table: int(table.metadata.num_rows)) for path in self._local_shards())

    def features(self) -> Mapping[str, Any]:
        """The columns' types, if the files contain them."""
        from datasets import Features

        if not self._is_local:
            return self._stream(self._revision).features or {}
        return self._read(self._local_shards()[0], lambda table: Features.from_arrow_schema(table.schema_arrow))

    def rows(self, revision: str) -> Iterator[dict[str, Any]]:
        """Stream the rows of that revision, in the order of the shards."""
        from datasets import Audio, Image

        if self._is_local:
            yield from self._local_rows()
            return
        with hub_errors("dataset", self.spec):
            rows = self._stream(revision)
            if isinstance(form := (rows.features or {}).get(self.raw), Audio | Image):
                rows = rows.cast_column(self.raw, type(form)(decode=False))
            yield from rows

    def _stream(self, revision: str | None) -> "IterableDataset":
        from datasets import load_dataset

        shards = {"train": self.shards}
        return load_dataset(self._repository, data_files=shards, split="train", streaming=True, revision=revision)

    def _local_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of a folder's files. `load_dataset` would treat the characters `*?[]` in its path as a pattern."""
        import pyarrow.parquet as pq

        for path in self._local_shards():
            try:
                if self.loader == "json":
                    yield from ({"text": text} for text in documents(path))
                    continue
                with path.open("rb") as file:
                    for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
                        yield from batch.to_pylist()
            except (OSError, ValueError) as error:
                raise ConfigError("dataset", self.spec, f"{path} cannot be read: {one_line(error)}") from None

    def _read(self, path: Path, read: Callable[["ParquetFile"], T]) -> T:
        """The result of `read` for a Parquet file of the folder. Raises ConfigError if it is not one."""
        import pyarrow.parquet as pq

        try:
            with path.open("rb") as file:
                return read(pq.ParquetFile(file))
        except (OSError, ValueError) as error:
            raise ConfigError("dataset", self.spec, f"{path} cannot be read: {one_line(error)}") from None

    def _local_shards(self) -> list[Path]:
        return sorted(self._folder.glob(self.shards))
