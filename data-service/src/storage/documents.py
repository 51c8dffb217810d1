"""Documents as bytes: the JSON that backends write, and what they accept when reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from errors import InvalidEntry, InvalidRequest


def encode_document(path: str, data: Mapping[str, Any]) -> bytes:
    """The JSON of a document.

    Raises:
        InvalidEntry: it holds what JSON cannot express.
    """
    try:
        return orjson.dumps(dict(data))
    except TypeError as exc:
        raise InvalidEntry(f"{path}: the document is not expressible as JSON: {exc}") from exc


def read_json(_: int, content: bytes) -> dict[str, Any] | None:
    """The document as JSON says it, or None when the bytes are no JSON object."""
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def check_page(limit: int | None, offset: int) -> None:
    """Refuse a negative limit or offset.

    Raises:
        InvalidRequest: either is below zero.
    """
    if offset < 0 or (limit is not None and limit < 0):
        raise InvalidRequest(
            f"limit {limit} and offset {offset} need to be zero or more (no limit: None)"
        )
