"""The project's version, from pyproject.toml, and the container image built from it."""

from importlib.metadata import version

VERSION = version("diloco-pipelines")
DEFAULT_IMAGE = f"diloco-pipelines-python:{VERSION}"
