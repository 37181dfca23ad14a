"""Classifying the files in a user's folder: training data, metadata, or another split."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

# By lower-case name. The first kind is always metadata; the second only next to tables, as in a dataset on the hub.
_METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json"}
_CARDS = {"readme.md", "license", "license.md", "license.txt", "citation.md", "changelog.md"}
_SYSTEM = {"__macosx", "thumbs.db", "desktop.ini"}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_TABLES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")

# Names of splits in the names of files and folders, as recognised by `datasets`
_TRAINING = {"train", "training"}
_OTHERS = {"test", "testing", "eval", "evaluation", "valid", "validation", "val", "dev"}


def files_below(root: Path) -> list[Path]:
    """Every file in a folder, in the order of the paths. Hidden and system files are skipped, links followed."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        status = Path(folder).stat()
        if (place := (status.st_dev, status.st_ino)) in seen:  # a link to a parent folder, or a second link
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in sorted(folders) if not _is_hidden(name)]
        found += [Path(folder, name) for name in names if not _is_hidden(name)]
    return sorted((path for path in found if path.is_file()), key=Path.as_posix)


def without_metadata(root: Path, paths: Sequence[Path]) -> list[Path]:
    """The files except those that describe a dataset: its card, its licence, the records of `datasets`."""
    of_tables = any(_is_table(path) and path.name.lower() not in _METADATA for path in paths)

    def describes(path: Path) -> bool:
        name = path.name.lower()
        if path.parent == root and name in _CARDS:
            return of_tables or _is_card(path)
        return name in _METADATA or (name.startswith("cache-") and name.endswith(".arrow"))  # of `Dataset.map`

    return [path for path in paths if not describes(path)]


def training_split(root: Path, paths: Sequence[Path]) -> tuple[list[Path], list[Path], Path]:
    """Divide files into those to train on and those of a test or validation split.

    A folder has splits if it (or its folder `data`) contains `train/` next to `test/`, `validation/` and the like, or
    only the folder `train/`; or if it contains tables whose folders or names are `train…` and `test…`, as on the hub.

    Returns:
        The files to train on, those of other splits, and the folder of the former.
    """
    for base in (root / "data", root) if root.is_dir() else ():
        names = {path: path.relative_to(base).parts for path in paths if path.is_relative_to(base)}
        folders = {parts[0].lower() for parts in names.values() if len(parts) > 1}
        training = [path for path, parts in names.items() if len(parts) > 1 and parts[0].lower() in _TRAINING]
        if training and len(folders) == 1:
            return list(paths), [], training_folder(base, training)
        if training and folders & _OTHERS:
            others = [path for path, parts in names.items() if len(parts) > 1 and parts[0].lower() in _OTHERS]
            return training, others, training_folder(base, training)
        split = {path: _split(names[path]) for path in names if _is_table(path)}
        if "train" in split.values() and "other" in split.values():
            others = [path for path in paths if split.get(path) == "other"]
            return [path for path in paths if path not in set(others)], others, root
    return list(paths), [], root


def training_folder(base: Path, training: Iterable[Path]) -> Path:
    """The folder of the training split below `base`."""
    return base / next(iter(training)).relative_to(base).parts[0]


def passed_over(paths: Iterable[Path], used: Collection[Path]) -> str:
    """Unused files, counted by suffix, for a log: "4 files: .docx 3, .bin 1"; "" if there are none."""
    rest = [path for path in paths if path not in used]
    endings = Counter(os.fsencode(path.suffix.lower() or path.name).decode("utf-8", "replace") for path in rest)
    listed = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(6))
    more = ", …" if len(endings) > 6 else ""
    return f"{len(rest)} file{'s' * (len(rest) > 1)}: {listed}{more}" if rest else ""


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_table(path: Path) -> bool:
    name = path.name.lower()
    ending = next((ending for ending in _COMPRESSIONS if name.endswith(ending)), "")
    return name.removesuffix(ending).endswith(_TABLES)


def _is_card(path: Path) -> bool:
    """Whether a file begins like a dataset's card on the hub, or is in a clone next to `.gitattributes`."""
    if path.suffix.lower() != ".md":
        return (path.parent / ".gitattributes").exists()
    with path.open("rb") as file:
        return file.read(4) in (b"---\n", b"---\r")


def _split(parts: Sequence[str]) -> str:
    """The split named by a file's path below the root: train, other, or "".

    It is the first word of the file's name (`train.csv`, `test-00000-of-00001.parquet`), or a folder's name.
    """
    first = parts[-1].lower().replace("_", "-").replace(".", "-").partition("-")[0]
    for word in (first, *(part.lower() for part in reversed(parts[:-1]))):
        if word in _TRAINING or word in _OTHERS:
            return "train" if word in _TRAINING else "other"
    return ""
