"""The hub's many errors, in one sentence each."""

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import ConfigError, TrainingError


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
