"""Documents in files: plain text, JSON, CSV, Parquet and Arrow tables, of which all but the last two may be compressed.

The libraries' own loaders treat a path as a pattern and keep a cache; these readers do neither.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

FORMATS = {
    "text": (
        *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml"),
        *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql"),
    ),
    "JSON": (".jsonl", ".json", ".ndjson"),
    "CSV": (".csv", ".tsv"),
    "Parquet": (".parquet",),
    "Arrow": (".arrow",),
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_RATIO = 4  # of compressed text, approximately
_PIECE = 32 * 2**10  # characters; longer plain texts are divided, so that part of a single one can be held out
_LONGEST_FIELD = 2**30  # characters in a field of a CSV file
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # byte-order marks; UTF-8's is dropped by its codec


def format_of(path: Path) -> str | None:
    """The format that a file's name stands for, a key of `FORMATS`; None if it is none of them."""
    name, compressed = _name(path)
    found = (kind for kind, endings in FORMATS.items() if name.endswith(endings))
    return next((kind for kind in found if not (compressed and kind in ("Parquet", "Arrow"))), None)


def text_size(path: Path) -> int:
    """Approximate number of bytes of text in a file."""
    return path.stat().st_size * (_RATIO if _name(path)[1] or path.suffix.lower() == ".parquet" else 1)


def documents(path: Path) -> Iterator[str]:
    """The documents in a file: pieces of a plain text, or the column `text` of each row; rows without it are skipped.

    A plain text of more than 32768 characters becomes several documents, divided at line ends.

    Raises:
        ValueError: The content is not of the format that the name stands for, with the reason.
        OSError: The file cannot be read.
    """
    kind = format_of(path)
    try:
        if kind in ("Parquet", "Arrow"):
            yield from _cells(path, kind)
            return
        with _opened(path) as raw:
            start = raw.peek(2)[:2]
            with io.TextIOWrapper(raw, _MARKS.get(start, "utf-8-sig"), newline="\n" if kind == "text" else "") as file:
                yield from _READERS[kind or "text"](file, path)
    except UnicodeDecodeError as error:
        byte = error.object[error.start] if isinstance(error.object, bytes) else 0
        advice = "convert it, for example with iconv -f latin1 -t utf-8"
        raise ValueError(f"is not UTF-8: it has a byte 0x{byte:02x} where none may be: {advice}") from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ValueError(f"is not a complete {_name(path)[1]} file: {error}") from None
    except OSError as error:
        if error.errno is not None:  # the disk's fault, not the content's
            raise
        raise ValueError(f"is not a complete {_name(path)[1] or kind} file: {error}") from None


def _name(path: Path) -> tuple[str, str]:
    """A file's name in lower case without the ending of a compression, and that ending."""
    name = path.name.lower()
    ending = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    return name.removesuffix(ending), ending


def _opened(path: Path) -> io.BufferedReader:
    """The file's content, decompressed."""
    ending = _name(path)[1]
    if ending == ".zst":
        import pyarrow as pa

        return io.BufferedReader(_ArrowStream(pa.input_stream(str(path), compression="zstd")))
    opened: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return io.BufferedReader(opened[ending](path)) if ending else path.open("rb")


class _ArrowStream(io.RawIOBase):
    """A stream of pyarrow's as one of Python's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _pieces(file: IO[str], _: Path) -> Iterator[str]:
    """A plain text in pieces that end with a line, if lines are shorter than a piece. Line ends are kept."""
    while piece := file.read(_PIECE) + file.readline(_PIECE):
        if "\0" in piece:
            raise ValueError("is not text: it has bytes of value 0")
        yield piece


def _json_rows(file: IO[str], path: Path) -> Iterator[str]:
    """A row a line; `.json` may also be one list of rows, or one row on several lines."""
    whole = ""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if not _name(path)[0].endswith(".json") or whole:
                raise ValueError(f"line {number} is not JSON: {error}") from None
            whole = line + file.read()  # a value on many lines
            row = _parsed(whole)
        for one in row if isinstance(row, list) else [row]:
            if not isinstance(one, dict):
                raise ValueError(f"line {number} holds a {type(one).__name__}, not an object with a field `text`")
            yield from _text(one, f"line {number}", list(one))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None


def _csv_rows(file: IO[str], path: Path) -> Iterator[str]:
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.DictReader(file, delimiter="\t" if _name(path)[0].endswith(".tsv") else ",", strict=True)
    try:
        for row in rows:
            yield from _text(row, f"line {rows.line_num}", list(rows.fieldnames or ()))
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num} is not CSV: {error}") from None


def _text(row: dict[str, Any], place: str, columns: list[str]) -> Iterator[str]:
    if "text" not in row:
        raise ValueError(f"has no column `text` in {place}; it has {', '.join(map(str, columns)) or 'none'}")
    if isinstance(text := row["text"], str):
        yield text
    elif text is not None:
        raise ValueError(f"has no text in the column `text` of {place}, but a {type(text).__name__}")


def _cells(path: Path, kind: str) -> Iterator[str]:
    """The cells of the column `text` of a Parquet file, or of an Arrow file as `datasets` writes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            if kind == "Parquet":
                table = pq.ParquetFile(file)
                schema, batches = table.schema_arrow, lambda: table.iter_batches(columns=["text"])
            else:
                stream = pa.ipc.open_stream(file)
                schema, batches = stream.schema, lambda: iter(stream)
            if "text" not in schema.names:
                raise ValueError(f"has no column `text`; it has {', '.join(schema.names) or 'none'}")
            form = schema.field("text").type
            if not any(check(form) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
                raise ValueError(f"has no text in the column `text`, but {form}")
            for batch in batches():
                yield from (cell for cell in batch.column("text").to_pylist() if cell is not None)
    except pa.ArrowException as error:
        raise ValueError(f"is not a complete {kind} file: {error}") from None


_READERS: dict[str, Callable[[IO[str], Path], Iterator[str]]] = {"text": _pieces, "JSON": _json_rows, "CSV": _csv_rows}
