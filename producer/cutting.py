"""Cutting a stream of items into blocks with places; the same stream is always cut the same way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from vecfleet.common import codec, limits
from vecfleet.common.collection import VersionMode
from vecfleet.common.document import (
    Block,
    Document,
    check_document_id,
    check_text,
    check_version,
    parse_document,
)
from vecfleet.common.errors import InvalidInput
from vecfleet.common.hashing import content_key, id_key
from vecfleet.producer.items import Rejected, Sourced, reject

DIGEST_BYTES = 16
MOST_REJECTS = 256  # that gather before they are passed on

Item = Document | Mapping[str, Any] | Sourced | Rejected


@dataclass(slots=True)
class CutBlock:
    """A block, its place in the submission, and where its documents stand in the input."""

    place: int
    block: Block = field(default_factory=Block)
    files: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    digest: str = ""  # of what the block holds, hex; set by those who need it

    def __len__(self) -> int:
        return len(self.block)

    def set_digest(self) -> None:
        """Compute ``digest``."""
        block = self.block
        columns = codec.dumps([block.ids, block.texts, block.metadata, block.versions])
        self.digest = blake2b(columns, digest_size=DIGEST_BYTES).hexdigest()

    def set_version(self, version: int) -> None:
        """Give all documents one version."""
        self.block.versions = [version] * len(self)

    def id_keys(self) -> list[bytes]:
        """The index's key of each id."""
        return [id_key(document_id) for document_id in self.block.ids]

    def content_keys(self) -> bytes:
        """The index's keys of what the documents say, one after the other."""
        columns = zip(self.block.texts, self.block.metadata, strict=True)
        return b"".join(content_key(text, metadata) for text, metadata in columns)

    def only(self, places: list[int]) -> CutBlock:
        """The block with some of its documents, in its old place."""
        chosen = CutBlock(self.place, digest=self.digest)
        block = self.block
        for i in places:
            chosen.add(
                Document(block.ids[i], block.texts[i], block.metadata[i], block.versions[i]),
                self.files[i],
                self.lines[i],
            )
        chosen.block.size = block.size * len(places) // len(block)
        return chosen

    def add(self, document: Document, file: str, line: int) -> None:
        """Append one document."""
        self.block.add(document)
        self.files.append(file)
        self.lines.append(line)

    def rejected(self, place: int, code: str, message: str) -> Rejected:
        """The rejection of one document by the fleet."""
        return Rejected(
            self.files[place], self.lines[place], code, message, id=self.block.ids[place]
        )


class Cutter:
    """Checks items and puts them into blocks; what is no document goes to ``rejects``."""

    def __init__(self, versions: VersionMode) -> None:
        """``versions`` is the collection's, so that a version stands where it must."""
        self._versions = versions
        self._is_assigned = versions == "assigned"
        self._open = CutBlock(0)
        self._seen = 0
        self.rejects: list[Rejected] = []

    def take_rejects(self) -> list[Rejected]:
        """What was rejected since the last call."""
        rejects, self.rejects = self.rejects, []
        return rejects

    def feed(self, items: Iterable[Item]) -> Iterator[CutBlock | None]:
        """The blocks that ``items`` complete; None where there are ``rejects`` to be taken."""
        most_bytes, most_documents = limits.BLOCK_BYTES, limits.BLOCK_DOCUMENTS
        for item in items:
            if len(self.rejects) >= MOST_REJECTS:
                yield None
            self._seen += 1
            if type(item) is Sourced:
                document, file, line = item
            else:
                found = self._check(item)
                if found is None:
                    continue
                document, file, line = found, "", self._seen
            if (document.version is None) is not self._is_assigned:
                self._refuse_version(document, file, line)
                continue
            cut = self._open
            block = cut.block
            size = block.size + document.size
            if (size > most_bytes or len(block.ids) >= most_documents) and block.ids:
                self._open = CutBlock(cut.place + 1)
                self._open.add(document, file, line)
                yield cut
                continue
            # Block.add, in place: this is the hottest line of a producer.
            block.ids.append(document.id)
            block.texts.append(document.text)
            block.metadata.append(document.metadata)
            block.versions.append(document.version)
            block.size = size
            cut.files.append(file)
            cut.lines.append(line)

    def end(self) -> Iterator[CutBlock]:
        """The last block, where there is one."""
        if len(self._open):
            yield self._open
            self._open = CutBlock(self._open.place + 1)

    def _check(self, item: object) -> Document | None:
        if isinstance(item, Rejected):
            self.rejects.append(item)
            return None
        try:
            if isinstance(item, Document):
                return _checked(item)
            if not isinstance(item, Mapping):
                raise InvalidInput(f"a document is a mapping, not {type(item).__name__}")
            return parse_document(item)
        except InvalidInput as error:
            found = item.get("id") if isinstance(item, Mapping) else None
            text = str(item.get("text", "")) if isinstance(item, Mapping) else ""
            id = found if isinstance(found, str) else None
            self.rejects.append(reject(error, "", self._seen, text, id))
            return None

    def _refuse_version(self, document: Document, file: str, line: int) -> None:
        try:
            check_version(document, self._versions)
        except InvalidInput as error:
            self.rejects.append(reject(error, file, line, document.text, document.id))


def _checked(document: Document) -> Document:
    """The document itself where ``parse_document`` made it, which knows its size."""
    if document.size > 0:
        return document
    size = check_document_id(document.id) + check_text(document.text)
    return replace(document, size=size + len(document.metadata or b""))
