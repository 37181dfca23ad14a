"""The hub: rows of its Parquet datasets, and its many errors in one sentence each."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from datasets import IterableDataset

_END_BYTES = 64 << 10


@contextmanager
def hub_errors(field: str, name: str, instead: str = "") -> Iterator[None]:
    """Turn what the hub's libraries raise in this block into an error that a person can act on.

    Args:
        field: The parameter that named something on the hub.
        name: What it named.
        instead: What could be done instead, as the rest of a sentence.

    Raises:
        ConfigError: There is nothing of that name, or the user may not have it.
        TrainingError: The hub cannot be reached, or failed.
    """
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    also = f", {instead}" if instead else ""
    try:
        yield
    except (ConfigError, TrainingError):
        raise
    except GatedRepoError:
        reason = "is gated: accept its terms on the hub and set HF_TOKEN in the environment"
        raise ConfigError(field, name, reason + also) from None
    except RevisionNotFoundError:
        raise ConfigError(field, name, "has no such revision on the hub") from None
    except (RepositoryNotFoundError, DatasetNotFoundError):
        reason = "is not on the hub, or is private: check its name, or set HF_TOKEN in the environment"
        raise ConfigError(field, name, reason + also) from None
    except DataFilesNotFoundError as error:
        raise ConfigError(field, name, f"is not laid out as it should be: {_first_line(error)}") from None
    except HfHubHTTPError as error:
        raise TrainingError(f"{field} {name}: the hub answered with an error: {_first_line(error)}") from error
    except Exception as error:
        raise TrainingError(
            f"{field} {name} cannot be fetched from the hub ({_first_line(error)}): check the network{also}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class HubRows:
    """The rows of a dataset's files: on the Hugging Face Hub, or in a local folder of the same layout.

    Args:
        spec: The dataset as a user writes it.
        argument: The part after its name: "", a folder, or `<repository>[@<revision>]`.
        repository: Repository on the hub, unless the argument names one.
        shards: Glob of the files to read.
        loader: Format of the files: a loader of `datasets`, such as "parquet" or "json".
        raw: Columns of pictures or audio that stay undecoded, as the bytes of their files.

    Attributes:
        is_path: Whether the argument names a folder, which may not exist.
    """

    def __init__(
        self,
        spec: str,
        argument: str,
        repository: str,
        shards: str,
        *,
        loader: str = "parquet",
        raw: tuple[str, ...] = (),
    ) -> None:
        self._spec, self._shards, self._loader, self._raw = spec, shards, loader, raw
        self._folder = Path(argument).expanduser()
        self._is_local = bool(argument) and self._folder.is_dir()
        self.is_path = self._is_local or argument.startswith((".", "/", "~"))
        name, _, revision = argument.partition("@")
        self._repository, self._revision = name or repository, revision or None

    def check(self) -> None:
        """Raise ConfigError for a folder that does not exist or has no such files."""
        if self.is_path and not self._is_local:
            raise ConfigError("dataset", self._spec, "no such folder")
        if self._is_local and not self._local_shards():
            raise ConfigError("dataset", self._spec, f"holds no {self._shards}")

    def identity(self, name: str) -> str | None:
        """The folder with its absolute path; None for a dataset on the hub."""
        return f"{name}:{self._folder.absolute()}" if self._is_local else None

    def revision(self) -> str:
        """The commit on the hub. For a folder, a hash of its files' names, sizes and ends, where Parquet keeps its
        statistics and gzip a checksum."""
        if self._is_local:
            digest = hashlib.sha256()
            for path in self._local_shards():
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - _END_BYTES))
                    digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read())
            return f"local copy, sha256 {digest.hexdigest()}"
        from huggingface_hub import HfApi

        with hub_errors("dataset", self._spec):
            return str(HfApi().dataset_info(self._repository, revision=self._revision).sha)

    def local_bytes(self) -> int:
        """Total size of a folder's files; 0 for a dataset on the hub."""
        return sum(path.stat().st_size for path in self._local_shards()) if self._is_local else 0

    def count(self, usual: int) -> int:
        """Number of rows: for a folder of Parquet as its files state, otherwise `usual`."""
        if not self._is_local:
            return usual
        import pyarrow.parquet as pq

        try:
            return sum(pq.read_metadata(path).num_rows for path in self._local_shards())
        except (OSError, ValueError) as error:
            raise ConfigError("dataset", self._spec, f"cannot be read: {_first_line(error)}") from None

    def features(self) -> "Mapping[str, Any] | None":
        """The columns' types, if the files state them."""
        return self._rows(self._revision).features

    def read(self, revision: str) -> Iterator[dict[str, Any]]:
        """Stream the rows of that revision, in the order of the shards."""
        from datasets import Audio, Image

        with hub_errors("dataset", self._spec):
            rows = self._rows(revision)
            for name in self._raw:
                form = (rows.features or {}).get(name)
                if isinstance(form, Audio | Image):
                    rows = rows.cast_column(name, type(form)(decode=False))
            yield from rows

    def _rows(self, revision: str | None) -> "IterableDataset":
        from datasets import load_dataset

        if self._is_local:
            files = [str(path) for path in self._local_shards()]
            return load_dataset(self._loader, data_files={"train": files}, split="train", streaming=True)
        shards = {"train": self._shards}
        return load_dataset(self._repository, data_files=shards, split="train", streaming=True, revision=revision)

    def _local_shards(self) -> list[Path]:
        return sorted(self._folder.glob(self._shards))
