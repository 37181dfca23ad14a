"""Descriptions of file locations for readers on another machine.

On this machine, a path says where a file is. But a pod's output is read in the Kubeflow UI or with kubectl, where the
pod's paths mean nothing: there, the file is on a claim, in an artifact, or on the pod's own disk.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

OWN_DISK = "the pod's own disk, which is deleted with the pod"
# An absolute path, but not the path in a URL or in a parameter's value (`files:/corpus`)
_PATH = re.compile(r"(?<![^\s,;='\"(\[`>])/(?!/)[^\s,;:'\")\]`<>]*")


@dataclass(frozen=True)
class Place:
    """A directory's description: for example a claim, and the directory's path inside it ("": its root)."""

    name: str
    inside: str = ""


@dataclass(frozen=True)
class Places:
    """The directories of a pod and their descriptions. If there are none (a local machine), paths stay unchanged."""

    known: Mapping[str, Place] = field(default_factory=dict)  # by absolute path

    def in_words(self, text: str) -> str:
        """The text with each path below a known directory replaced by its description.

        >>> Places({"/data": Place("claim llm-data")}).in_words("written into /data/models/tiny.")
        'written into models/tiny on claim llm-data.'
        """
        return _PATH.sub(lambda found: self._place(found[0]), text) if self.known else text

    def _place(self, path: str) -> str:
        end = "." * (len(path) - len(path.rstrip(".")))  # of the sentence
        found = PurePosixPath(path.rstrip("."))
        for directory in (found, *found.parents):
            if place := self.known.get(str(directory)):
                inside = PurePosixPath(place.inside) / found.relative_to(directory)
                return (place.name if str(inside) == "." else f"{inside} on {place.name}") + end
        return path
