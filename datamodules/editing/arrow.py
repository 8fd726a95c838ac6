"""Reads rows of Parquet and Arrow files; an image is read, from the file itself, when it is asked for.

By pyarrow rather than `datasets`, which copies a Parquet file into its cache, images included, before the first row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["image", "value", "other"]
"""Kind of a column: images (binary, or `datasets`' struct), values that fit into JSON, or neither."""

SUFFIXES = (".parquet", ".arrow")


class ArrowRows:
    """A file of rows, opened when first read, so that each loader process opens its own.

    Args:
        path: `.parquet`, or `.arrow` as `datasets` writes it (`save_to_disk`) and as Feather files have it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._latest: tuple[int, str, Any] | None = None  # row group, column and its values

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None, "_latest": None}

    @property
    def kinds(self) -> dict[str, Kind]:
        """Name of each column -> what it holds."""
        file = self._open()
        with self._one_line_errors():
            schema = file.schema_arrow if self._is_parquet else file.schema
            return {field.name: _kind(field.type) for field in schema}

    def read(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Reads all rows of some columns as Python values."""
        file = self._open()
        with self._one_line_errors():
            table = file.read(columns=list(columns)) if self._is_parquet else file.select(list(columns))
            rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    def image(self, row: int, column: str) -> bytes:
        """Reads the bytes of an image file from a binary column or from `datasets`' `{"bytes", "path"}`.

        Args:
            row: index of the row.
            column: name of the column. Where it has a path alone, that is relative to the file of rows.

        Raises:
            ValueError: if there are neither bytes nor a file.
        """
        with self._one_line_errors():
            value = self._value(row, column)
        data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, bytes):
            return data
        if not name:
            raise ValueError(f"its `{column}` holds no bytes")
        file = self.path.parent / name
        if not file.is_file():
            raise ValueError(f"its `{column}` holds no bytes, and there is no file {file}")
        return file.read_bytes()

    @property
    def _is_parquet(self) -> bool:
        return self.path.suffix == ".parquet"

    def _value(self, row: int, column: str) -> Any:
        file = self._open()
        if not self._is_parquet:
            return file.column(column)[row].as_py()  # the file is mapped into memory: nothing but this row is read
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if row < size:
                # evaluation takes rows in their order: one group at a time is enough
                if self._latest is None or self._latest[:2] != (group, column):
                    self._latest = (group, column, file.read_row_group(group, columns=[column]).column(column))
                return self._latest[2][row].as_py()
            row -= size
        raise IndexError(row)

    def _open(self) -> Any:
        if self._file is None:
            try:
                import pyarrow as pa
                import pyarrow.ipc
                import pyarrow.parquet
            except ImportError as error:
                raise ValueError(f"{self.path} needs pyarrow ({error}): run `pip install -e '.[data]'`.") from error
            with self._one_line_errors():
                if self._is_parquet:
                    self._file = pa.parquet.ParquetFile(self.path)
                else:
                    source = pa.memory_map(str(self.path))
                    seekable = source.read(6) == b"ARROW1"
                    source.seek(0)
                    self._file = (pa.ipc.open_file if seekable else pa.ipc.open_stream)(source).read_all()
        return self._file

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Context manager: turns pyarrow's errors (damaged bytes, names or texts that are no UTF-8) into one line."""
        from pyarrow import ArrowException

        try:
            yield
        except (OSError, ArrowException, UnicodeDecodeError) as error:
            kind, said = self.path.suffix[1:].capitalize(), " ".join(str(error).split())[:200]
            raise ValueError(f"{self.path} cannot be read as {kind} ({said}): fetch it anew.") from error


def _kind(type_: Any) -> Kind:
    from pyarrow import types

    binary = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    if any(is_one(type_) for is_one in binary):
        return "image"
    if types.is_struct(type_):
        return "image" if {"bytes", "path"} & {field.name for field in type_} else "other"
    if types.is_list(type_) or types.is_large_list(type_) or types.is_dictionary(type_):
        return "value" if _kind(type_.value_type) == "value" else "other"
    values = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_floating)
    return "value" if any(is_one(type_) for is_one in (*values, types.is_boolean)) else "other"


@dataclass(frozen=True)
class Image:
    """Callable that reads the bytes of one row's image."""

    rows: ArrowRows
    row: int
    column: str

    def __call__(self) -> bytes:
        """Reads the bytes of the image file."""
        return self.rows.image(self.row, self.column)

    def __str__(self) -> str:
        return f"in `{self.column}`"
