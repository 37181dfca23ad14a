"""Documents in files: plain text, JSON and CSV, which may be compressed, and Parquet and Arrow tables.

The libraries' own loaders treat a path as a pattern and keep a cache; these readers do neither.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
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
BATCH_ROWS = 64  # rows of a Parquet file in memory at a time; a text may be a whole book
_RATIO = 4  # of compressed text, approximately
_ARROW_FILE = b"ARROW1"  # start of a file, as opposed to a stream
_PIECE = 32 * 2**10  # characters; longer plain texts are divided, so that part of a single one can be held out
_LONGEST_FIELD = 2**30  # characters in a field of a CSV file
_MARKS = {  # byte-order marks, longer ones first; the codec drops UTF-8's
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def format_of(path: Path) -> str | None:
    """The format indicated by a file's name, a key of `FORMATS`; None if it is none of them."""
    name, compressed = _name(path)
    found = (kind for kind, endings in FORMATS.items() if name.endswith(endings))
    return next((kind for kind in found if not (compressed and kind in ("Parquet", "Arrow"))), None)


def text_size(path: Path) -> int:
    """Approximate number of bytes of text in a file."""
    return path.stat().st_size * (_RATIO if _name(path)[1] or path.suffix.lower() == ".parquet" else 1)


def documents(path: Path) -> Iterator[str]:
    """The documents in a file: pieces of a plain text, or the column `text` of each row. Rows without it are skipped.

    A plain text of more than 32768 characters becomes several documents, divided at line ends.

    Raises:
        ValueError: The content does not have the format indicated by the name, with the reason.
        OSError: The file cannot be read.
    """
    kind = format_of(path)
    try:
        if kind in ("Parquet", "Arrow"):
            yield from _cells(path, kind)
            return
        with _opened(path) as raw:
            start = raw.peek(4)
            encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
            with io.TextIOWrapper(raw, encoding, newline="\n" if kind == "text" else "") as file:
                yield from _READERS[kind or "text"](file, path)
    except UnicodeDecodeError as error:
        name = "UTF-8" if error.encoding.startswith("utf-8") else f"{error.encoding}, as its byte-order mark says"
        advice = "convert it, for example with iconv -f latin1 -t utf-8"
        raise ValueError(
            f"is not {name}: it has a byte 0x{error.object[error.start]:02x} where that is invalid: {advice}"
        ) from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"is not a complete {_name(path)[1]} file: {error}") from None
    except OSError as error:
        if error.errno is not None:  # a problem of the disk, not of the content
            raise
        raise ValueError(f"is not a complete {_name(path)[1] or kind} file: {error}") from None


def _name(path: Path) -> tuple[str, str]:
    """A file's name in lower case without its compression suffix, and that suffix."""
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
    """A pyarrow stream as a Python stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _pieces(file: IO[str], _: Path) -> Iterator[str]:
    """A plain text in pieces that end at line ends, if lines are shorter than a piece. Line ends are kept."""
    while piece := file.read(_PIECE) + file.readline(_PIECE):
        if "\0" in piece:
            raise ValueError("is not text: it has bytes of value 0")
        yield piece


def _json_rows(file: IO[str], path: Path) -> Iterator[str]:
    """One row per line; a `.json` file may also be one list of rows, or one row on several lines."""
    whole = ""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError as error:
            if not _name(path)[0].endswith(".json") or whole:
                raise ValueError(f"line {number} {error}") from None
            whole = line + file.read()  # a value on many lines
            row = _parsed(whole)
        for one in row if isinstance(row, list) else [row]:
            if not isinstance(one, dict):
                raise ValueError(f"line {number} holds a {type(one).__name__}, not an object with a field `text`")
            yield from _text(one, f"line {number}", list(one))


def _parsed(text: str) -> Any:
    """The value of a JSON text. Raises ValueError if it is invalid, or an object has the field `text` twice."""
    try:
        value = json.loads(text)
        if text.count('"text"') > 1:  # Python keeps the last one silently
            json.loads(text, object_pairs_hook=_with_one_text)
    except RecursionError:
        raise ValueError("is JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    return value


def _with_one_text(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if [key for key, _ in pairs].count("text") > 1:
        raise ValueError("has an object with the field `text` twice")
    return dict(pairs)


def _csv_rows(file: IO[str], path: Path) -> Iterator[str]:
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.DictReader(file, delimiter="\t" if _name(path)[0].endswith(".tsv") else ",", strict=True)
    try:
        if (rows.fieldnames or ()) and list(rows.fieldnames or ()).count("text") > 1:
            raise ValueError("has the column `text` twice")
        for row in rows:
            if None in row:  # the reader's key for excess fields: text with an unquoted comma would be cut off
                fields = len(rows.fieldnames or ()) + len(row[None])
                problem = f"has {fields} fields in line {rows.line_num}, more than its header"
                raise ValueError(f"{problem}: text that contains the separator must be quoted")
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
    """The cells of the column `text` of a Parquet file, or of an Arrow file (`datasets` writes Arrow streams)."""
    import pyarrow as pa

    try:
        with path.open("rb") as file:
            schema, batches = _table(file, kind)
            if schema.names.count("text") != 1:
                count = "no column `text`" if "text" not in schema.names else "the column `text` twice"
                raise ValueError(f"has {count}; it has {', '.join(schema.names) or 'none'}")
            form = schema.field("text").type
            plain = form.value_type if pa.types.is_dictionary(form) else form
            if not any(check(plain) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
                raise ValueError(f"has no text in the column `text`, but {form}")
            for batch in batches:
                yield from (cell for cell in batch.column("text").to_pylist() if cell is not None)
    except pa.ArrowException as error:
        raise ValueError(f"is not a complete {kind} file: {error}") from None


def _table(file: IO[bytes], kind: str) -> tuple[Any, Iterator[Any]]:
    """The schema and the record batches of a Parquet file, or of an Arrow stream or file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "Parquet":
        table = pq.ParquetFile(file)
        return table.schema_arrow, table.iter_batches(BATCH_ROWS, columns=["text"])
    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)
    if is_file:
        whole = pa.ipc.open_file(file)
        return whole.schema, map(whole.get_batch, range(whole.num_record_batches))
    stream = pa.ipc.open_stream(file)
    return stream.schema, iter(stream)


_READERS: dict[str, Callable[[IO[str], Path], Iterator[str]]] = {"text": _pieces, "JSON": _json_rows, "CSV": _csv_rows}
