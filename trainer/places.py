"""Where files are, in words that the reader of a text can use.

A person at this machine opens a path. What a pod prints is read in the Kubeflow UI or by kubectl, where none of the
pod's paths leads anywhere: there a file is on a claim, in an artifact, or on the pod's own disk, which ends with it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

OWN_DISK = "the pod's own disk, which ends with it"
# An absolute path. Not the part of a URL behind its scheme, nor that of a parameter's value (`files:/corpus`).
_PATH = re.compile(r"(?<![^\s,;='\"(\[`>])/(?!/)[^\s,;:'\")\]`<>]*")


@dataclass(frozen=True)
class Place:
    """What the reader knows a directory by: a claim, for example, and the directory's path inside it ("": its root)."""

    name: str
    inside: str = ""


@dataclass(frozen=True)
class Places:
    """The directories of a pod. Without any, as on a machine of one's own, a path is its own best description."""

    known: Mapping[str, Place] = field(default_factory=dict)  # by absolute path

    def in_words(self, text: str) -> str:
        """The text with each path below a known directory replaced.

        >>> Places({"/data": Place("claim llm-data")}).in_words("written into /data/models/tiny.")
        'written into models/tiny on claim llm-data.'
        """
        return _PATH.sub(lambda found: self._place(found[0]), text) if self.known else text

    def _place(self, path: str) -> str:
        end = "." * (len(path) - len(path.rstrip(".")))  # the sentence's
        found = PurePosixPath(path.rstrip("."))
        for directory in (found, *found.parents):
            if place := self.known.get(str(directory)):
                inside = PurePosixPath(place.inside) / found.relative_to(directory)
                return (place.name if str(inside) == "." else f"{inside} on {place.name}") + end
        return path
