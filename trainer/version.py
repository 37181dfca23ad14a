"""The project's version, which pyproject.toml alone states, and the container image built from it."""

from importlib.metadata import version

VERSION = version("diloco-pipelines")
DEFAULT_IMAGE = f"diloco-pipelines-python:{VERSION}"
