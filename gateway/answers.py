"""JSON schemas of answers and errors, and which of them a route gives, for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_NAME: Schema = {"type": ["string", "null"]}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_TIME: Schema = {"type": "number", "minimum": 0}
_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_MAP: Schema = {"type": "object"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(optional: dict[str, Schema] | None = None, **properties: Schema) -> Schema:
    """An object that always has ``properties`` and at times ``optional``, and nothing else."""
    return {
        "type": "object",
        "required": list(properties),
        "properties": {**properties, **(optional or {})},
        "additionalProperties": False,
    }


_USAGE = _object(prompt_tokens=_COUNT, total_tokens=_COUNT)
_ROW: Schema = {"oneOf": [_list(_NUMBER), _STRING]}  # base64
EMBEDDINGS = _object(
    object={"const": "list"},
    data=_list(_object(object={"const": "embedding"}, index=_COUNT, embedding=_ROW)),
    model=_STRING,
    usage=_USAGE,
)
EMBED = _list(_list(_NUMBER))

_SCORED = {"index": _COUNT, "relevance_score": _SHARE}
_META = _object(api_version=_object(version=_STRING), billed_units=_object(search_units=_COUNT))
RERANK_V1 = _object(
    id=_STRING,
    model=_STRING,
    method=_STRING,
    results=_list(_object({"document": _object(text=_STRING)}, **_SCORED)),
    usage=_USAGE,
    meta=_META,
)
RERANK_V2 = _object(id=_STRING, results=_list(_object(**_SCORED)), meta=_META)
RERANK: Schema = {
    "oneOf": [
        _list(_object({"text": _STRING}, index=_COUNT, score=_NUMBER)),
        _object(
            query=_STRING,
            ranked_documents=_list(
                _object(document=_STRING, relevance_score=_SHARE, confidence=_SHARE, rank=_COUNT)
            ),
            total_processed=_COUNT,
            method=_STRING,
            processing_time_ms=_TIME,
        ),
    ]
}

_SIMILARITY: Schema = {"type": "number", "minimum": -1.01, "maximum": 1.01}  # of rounded vectors
SEARCH = _object(
    {"rerank": _object(model=_STRING, method=_STRING)},
    collection=_STRING,
    model=_STRING,
    method=_STRING,
    results=_list(
        _object(
            {"metadata": _MAP, "relevance_score": _SHARE},
            id=_STRING,
            score=_SIMILARITY,
            text=_STRING,
        )
    ),
    search_ms=_TIME,
    total_ms=_TIME,
)
PLAIN_SEARCH = _object(
    query=_STRING,
    results=_list(
        _object(doc_id=_STRING, text=_STRING, similarity_score=_SIMILARITY, length=_COUNT)
    ),
    total_found=_COUNT,
    processing_time_ms=_TIME,
)

_RECORD = {
    "name": _STRING,
    "uid": _STRING,
    "model": _STRING,
    "space": _STRING,
    "dimension": _COUNT,
    "policy": _STRING,
    "recall_target": _SHARE,
    "versions": _STRING,
    "created_at": _TIME,
}
_STATS = _object(
    documents=_COUNT,
    segments=_COUNT,
    bytes=_COUNT,
    indexed=_COUNT,
    generation=_COUNT,
    quarantined=_list(_STRING),
)
COLLECTION = _object(**_RECORD)
COLLECTION_WITH_STATS = _object(**_RECORD, stats=_STATS)
COLLECTIONS = _object(collections=_list(COLLECTION))
COLLECTION_DELETED = _object(name=_STRING, uid=_STRING, deleted={"const": True})

DOCUMENT = _object({"metadata": _MAP}, id=_STRING, text=_STRING, version=_COUNT)
_STATE: Schema = {"type": "string", "enum": ["", "open", "closed", "done", "cancelled"]}
_LINE_ERROR = _object(line=_COUNT, field=_NAME, code=_STRING, message=_STRING)
_INGEST = {
    "submission_id": _STRING,
    "collection": _STRING,
    "state": _STATE,
    "accepted": _COUNT,
    "rejected": _COUNT,
    "errors": _list(_LINE_ERROR),
}
INGESTED = _object({"next_line": _COUNT}, **_INGEST)
DOCUMENT_DELETED = _object(submission_id=_STRING, collection=_STRING, state=_STATE)
_KNOWN_LATER: Schema = {"type": ["integer", "null"], "minimum": 0}
SUBMISSION = _object(
    id=_STRING,
    state=_STATE,
    collection=_STRING,
    documents=_KNOWN_LATER,
    committed=_COUNT,
    failed=_COUNT,
    pending=_KNOWN_LATER,
    created_at=_TIME,
    done_at={"type": ["number", "null"]},
    errors=_list(_MAP),
)

_DEAD = {
    "id": _STRING,
    "collection": _STRING,
    "tenant": _STRING,
    "task": _STRING,
    "submission": _STRING,
    "error": _object(code=_STRING, message=_STRING),
    "attempts": _COUNT,
    "worker": _STRING,
    "died_at": _TIME,
    "version": _COUNT,
    "count": _COUNT,
    "documents": _list(_object(id=_STRING, text=_NAME)),
}
DEAD_ENTRY = _object(**_DEAD)
DEAD_PAGE = _object(entries=_list(DEAD_ENTRY), cursor=_NAME)
DEAD_RETRIED = _object(id=_STRING, queued={"const": True})
DEAD_DROPPED = _object(id=_STRING, dropped={"const": True})
DEAD_SWEPT = _object(
    done=_COUNT,
    failed=_list(_object(id=_STRING, error=_object(code=_STRING, message=_STRING))),
    cursor=_NAME,
)

_MODEL = _object(
    id=_STRING,
    object={"const": "model"},
    created=_COUNT,
    owned_by=_STRING,
    tasks=_list(_STRING),
    dimension=_COUNT,
    max_tokens=_COUNT,
    rerank_method=_NAME,
    prompts=_list(_STRING),
    takes_instruction=_FLAG,
    matryoshka=_FLAG,
    matryoshka_dimensions=_list(_COUNT),
    matryoshka_least=_COUNT,
    engine=_STRING,
    dtype=_STRING,
    quantization=_STRING,
    pooling=_STRING,
    workers=_COUNT,
)
MODEL = _MODEL
MODELS = _object(object={"const": "list"}, data=_list(_MODEL))
HEALTH = _object(
    {
        "reason": _STRING,
        "documents_indexed": _COUNT,
        "gpu_count": _COUNT,
        "workers_paused": _COUNT,
        "memory_usage": _MAP,
    },
    status={"enum": ["healthy", "degraded", "unhealthy"]},
    model_loaded=_FLAG,
    index_available=_FLAG,
)
LIVE = _object(status={"const": "alive"})

_ABOUT = {"code": _STRING, "message": _STRING}
ERRORS: dict[str, Schema] = {
    "Error": _object(
        dict(_INGEST, next_line=_COUNT),  # of a stream that broke off: what was taken
        error=_object(**_ABOUT, field=_NAME, request_id=_STRING),
    ),
    "OpenAIError": _object(error=_object(**_ABOUT, type=_STRING, param=_NAME, request_id=_STRING)),
    "TeiError": _object(error=_STRING, error_type=_STRING, request_id=_STRING),
}


def _link(operation: str, parameters: dict[str, str], **more: Any) -> Schema:
    return {"operationId": operation, "parameters": parameters, **more}


_SUBMISSION = {"submission": "$response.body#/submission_id"}
_OF = {"collection": "$response.body#/name"}
_FIRST = {"collection": "$response.body#/collections/0/name"}
_INTO = {"collection": "$response.body#/collection"}
_SENT = {"collection": "$request.path.collection", "document": "$request.body#/documents/0/id"}
_HIT = {"collection": "$request.path.collection", "document": "$response.body#/results/0/id"}
_ENTRY = {"entry": "$response.body#/entries/0/id"}
LINKS_OF_COLLECTIONS = {
    "look": _link("get_one_collections", _FIRST),
    "fill": _link("post_collections_documents", _FIRST),
    "search": _link("post_collections_search", _FIRST),
    "delete": _link("delete_one_collections", _FIRST),
    "again": _link("put_one_collections", _FIRST),
}
LINKS_OF_COLLECTION = {
    "fill": _link("post_collections_documents", _OF),
    "look": _link("get_one_collections", _OF),
    "search": _link("post_collections_search", _OF),
    "delete": _link("delete_one_collections", _OF),
}
LINKS_OF_DELETED_COLLECTION = {"again": _link("put_one_collections", _OF)}
LINKS_OF_INGEST = {
    "follow": _link("get_one_submissions", _SUBMISSION),
    "cancel": _link("post_submissions_cancel", _SUBMISSION),
    "forget": _link("delete_one_submissions", _SUBMISSION),
    "read": _link("get_one_collections_documents", _SENT),
    "search": _link("post_collections_search", _INTO),
    "drop": _link("delete_one_collections", _INTO),
}
LINKS_OF_DELETED_DOCUMENT = {"follow": _link("get_one_submissions", _SUBMISSION)}
LINKS_OF_SEARCH = {
    "read": _link("get_one_collections_documents", _HIT),
    "delete": _link("delete_one_collections_documents", _HIT),
}
LINKS_OF_DEAD_PAGE = {
    "read": _link("get_one_dead", _ENTRY),
    "retry": _link("post_dead_retry", _ENTRY),
    "drop": _link("delete_one_dead", _ENTRY),
}
LINKS_OF_MODELS = {"look": _link("get_one_v1_models", {"model": "$response.body#/data/0/id"})}
_ALWAYS = (400, 401, 403, 404, 429, 500, 503, 504)
_WITH_BODY = (408, 409, 413, 422)
_TEI_PATHS = {"/embed": (422, 424), "/rerank": (422, 424)}


def responses(
    path: str,
    status: int,
    answer: Schema | None,
    *,
    has_body: bool,
    media: Sequence[str],
    errors: Sequence[int],
    is_open: bool,
) -> dict[str, Any]:
    """OpenAPI's ``responses`` of a route: its answer, and every error that it may give."""
    content = {kind: {"schema": {} if answer is None else answer} for kind in media[:1]}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media[1:]}
    found: dict[str, Any] = {str(status): {"description": "The answer", "content": content}}
    shape = f"#/components/schemas/{_error_of(path)}"
    codes = {*_ALWAYS, *(_WITH_BODY if has_body else ()), *errors, *_TEI_PATHS.get(path, ())}
    if is_open:  # a probe, which asks for nothing and says itself what is wrong
        codes = {500}
        if path == "/health":
            found["503"] = {**found[str(status)], "description": "No worker serves a model"}
    for code in sorted(codes):
        error = {"schema": {"$ref": shape}}
        found.setdefault(
            str(code),
            {"description": HTTPStatus(code).phrase, "content": {"application/json": error}},
        )
    return found


def _error_of(path: str) -> str:
    if path.startswith("/v1/"):
        return "OpenAIError"
    return "TeiError" if path in _TEI_PATHS else "Error"
