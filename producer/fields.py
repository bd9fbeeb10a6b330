"""From a row of a file to a document: which field is the id, the text, the version, metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vecfleet.common.document import Document, parse_document
from vecfleet.common.errors import ConfigError, InvalidInput, UnknownField

_PLAIN = frozenset(("id", "text", "metadata", "version"))
_METADATA = "metadata"


@dataclass(frozen=True, slots=True)
class FieldMap:
    """Which fields of a row make the document.

    A field ``metadata`` that is an object (or the JSON text of one) becomes the metadata; fields of
    ``metadata_fields`` are added to it, every field that is left where that is None. But a row
    that is a document as the other doors take it, with a ``metadata`` object and no field mapped,
    is held to their rule: a field that they do not know is refused. A row without an id gets one
    from its file and line; a whole number as id is written out in digits.
    """

    id_field: str = "id"
    text_field: str = "text"
    version_field: str = "version"
    metadata_fields: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        named = (self.id_field, self.text_field, self.version_field)
        if not all(named) or len(set(named)) < len(named):
            raise ConfigError("the id, text and version fields must have names of their own")

    @property
    def is_plain(self) -> bool:
        """Whether the document's own names are used."""
        return (self.id_field, self.text_field, self.version_field) == ("id", "text", "version")

    def parse(self, row: Mapping[str, Any], default_id: str) -> Document:
        """The document of a row; raises ``InvalidInput`` that names the field at fault."""
        if self.is_plain and row.keys() <= _PLAIN and type(row.get("id")) is str and row["id"]:
            metadata, version = row.get(_METADATA), row.get("version")
            is_object = self.metadata_fields is None and type(metadata) is dict
            if (metadata is None or is_object) and type(version) is not str:
                return parse_document(row)
        return self._parse_mapped(row, default_id)

    def _parse_mapped(self, row: Mapping[str, Any], default_id: str) -> Document:
        if self.text_field not in row:
            raise InvalidInput(f"there is no field {self.text_field!r}", field=self.text_field)
        document: dict[str, Any] = {
            "id": _document_id(row.get(self.id_field), default_id),
            "text": row[self.text_field],
        }
        version = row.get(self.version_field)
        if version is not None and version != "":
            document["version"] = _version(version)
        metadata = self._metadata(row)
        if metadata:
            document[_METADATA] = metadata
        return parse_document(document)

    def _metadata(self, row: Mapping[str, Any]) -> dict[str, Any]:
        given = row.get(_METADATA)
        if self.metadata_fields is not None:
            chosen = {name: row[name] for name in self.metadata_fields if name in row}
            if isinstance(chosen.get(_METADATA), dict | str):
                del chosen[_METADATA]
                return {**chosen, **_object(given)}
            return chosen
        taken = (self.id_field, self.text_field, self.version_field, _METADATA)
        rest = {name: value for name, value in row.items() if name not in taken}
        if rest and self.is_plain and isinstance(given, dict):
            unknown = next(iter(rest))
            raise UnknownField(
                f"{unknown} is not a field of a document (id, text, metadata, version); put it "
                "into metadata, or name it as a metadata field",
                field=unknown,
            )
        return rest if given is None or given == "" else {**rest, **_object(given)}


def _object(value: object) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise InvalidInput("metadata must be a JSON object", field=_METADATA)
    return value


def _document_id(value: object, default_id: str) -> object:
    if value is None or value == "":
        return default_id
    return str(value) if type(value) is int else value


def _version(value: object) -> object:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return int(value)
    return value
