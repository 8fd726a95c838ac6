"""Streaming parser of multipart/form-data: the parts' bytes by name, in memory, with or without a filename."""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

_PIECE = 2**17
"""Least size of the pieces in which a part is collected."""


class MultipartError(ValueError):
    """The body is malformed or breaks a limit; the message is one sentence."""


class PartTooLarge(MultipartError):
    """A part is larger than its limit in `max_bytes`."""


async def read_parts(
    content_type: str, stream: AsyncIterable[bytes], max_parts: int, max_bytes: Mapping[str, int] | None = None
) -> dict[str, bytes]:
    """Reads the parts of a `multipart/form-data` body.

    Args:
        content_type: the request's header, which holds the boundary.
        stream: the body; bounding its length is the caller's business.
        max_parts: most parts.
        max_bytes: part's name -> its largest size; other parts may be as large as the body.

    Returns:
        Part's name -> its bytes.

    Raises:
        PartTooLarge: as soon as a part is over its `max_bytes`.
        MultipartError: if the body is malformed or ends early, has too many parts, or two of one name.
    """
    parts = _PartCollector(max_parts, max_bytes or {})
    try:
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not boundary:
            raise MultipartError("the Content-Type names no multipart boundary.")
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.begin,
                "on_header_field": parts.header_field,
                "on_header_value": parts.header_value,
                "on_header_end": parts.header_end,
                "on_headers_finished": parts.headers_finished,
                "on_part_data": parts.data,
                "on_part_end": parts.part_end,
                "on_end": parts.end,
            },
        )
        async for chunk in stream:
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise MultipartError("the body is not well-formed multipart.") from error
    if not parts.complete:
        raise MultipartError("the body ends before its last multipart boundary.")
    return parts.by_name


class _PartCollector:
    """Callbacks of the parser, which collect the parts by name."""

    def __init__(self, max_parts: int, max_bytes: Mapping[str, int]) -> None:
        self.max_parts = max_parts
        self.max_bytes = max_bytes
        self.by_name: dict[str, bytes] = {}
        self.complete = False
        self._pieces: list[bytes] = []  # of _PIECE bytes: one buffer that grows leaves holes of all its sizes in memory
        self._piece = bytearray()
        self._name = ""
        self._field = b""
        self._value = b""
        self._disposition = b""

    def begin(self) -> None:
        self._field = self._value = self._disposition = b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def headers_finished(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name", b"").decode(errors="replace")
        if not name:
            raise MultipartError("a part of the multipart body has no name.")
        if name in self.by_name:
            raise MultipartError(f"there are two parts {name[:70]!r}: give every part a name of its own.")
        if len(self.by_name) == self.max_parts:
            raise MultipartError(f"the body has more than {self.max_parts} parts.")
        self._name = name
        self.by_name[name] = b""

    def data(self, data: bytes, start: int, end: int) -> None:
        most = self.max_bytes.get(self._name)
        if most is not None and sum(map(len, self._pieces)) + len(self._piece) + end - start > most:
            raise PartTooLarge(f"the part `{self._name}` is over {most} bytes")
        self._piece += data[start:end]
        if len(self._piece) >= _PIECE:
            self._pieces.append(bytes(self._piece))
            self._piece.clear()

    def part_end(self) -> None:
        self.by_name[self._name] = b"".join([*self._pieces, self._piece])
        self._pieces.clear()
        self._piece.clear()

    def end(self) -> None:
        self.complete = True
