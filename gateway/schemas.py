"""JSON schemas of request bodies, for the OpenAPI document; the handlers check by hand."""

from __future__ import annotations

from typing import Any

from vecfleet.common import limits

Schema = dict[str, Any]

_STRING: Schema = {"type": "string", "minLength": 1}
_FLAG: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_TEXTS: Schema = {"type": "array", "items": _STRING, "minItems": 1}
_TOP_K: Schema = {"type": "integer", "minimum": 1, "maximum": limits.MAX_TOP_K, "default": 10}
_COUNT: Schema = {"type": "integer", "minimum": 1}


def _object(*required: str, **properties: Schema) -> Schema:
    """What is not ``required`` may be null, which says the same as leaving it out."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {
            name: schema if name in required else _or_null(schema)
            for name, schema in properties.items()
        },
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _enum(*values: str) -> Schema:
    return {"type": "string", "enum": list(values), "default": values[0]}


def _inputs(most: int) -> Schema:
    return {"oneOf": [_STRING, {**_TEXTS, "maxItems": most}]}


EMBEDDINGS = _object(
    "input",
    input=_inputs(limits.MAX_INPUTS),
    model=_STRING,
    encoding_format=_enum("float", "base64", "bytes"),
    dimensions=_COUNT,
    user=_STRING,
    prompt_name=_STRING,
    instruction=_STRING,
    truncate={**_FLAG, "default": True},
)
EMBED = _object(
    "inputs",
    inputs=_inputs(limits.MAX_INPUTS),
    truncate={**_FLAG, "default": False},
    truncation_direction=_enum("right", "Right"),
    prompt_name=_STRING,
    instruction=_STRING,
    normalize={"const": True},
    dimensions=_COUNT,
)

_DOCUMENT_LIST: Schema = {**_TEXTS, "maxItems": limits.MAX_RERANK_DOCUMENTS}
RERANK_V1 = _object(
    "query",
    "documents",
    model=_STRING,
    query=_STRING,
    documents={
        "type": "array",
        "maxItems": limits.MAX_RERANK_DOCUMENTS,
        "items": {"oneOf": [_STRING, _object("text", text=_STRING)]},
    },
    top_n=_COUNT,
    return_documents={**_FLAG, "default": False},
    rank_fields={"const": ["text"]},
    max_chunks_per_doc=_COUNT,
    max_tokens_per_doc=_COUNT,
    truncation={**_FLAG, "default": True},
    instruction=_STRING,
)
RERANK_V2 = _object(
    "query",
    "documents",
    model=_STRING,
    query=_STRING,
    documents=_DOCUMENT_LIST,
    top_n=_COUNT,
    max_tokens_per_doc=_COUNT,
    priority={"type": "integer", "minimum": 0, "maximum": 999},
    instruction=_STRING,
)
RERANK: Schema = {
    "oneOf": [
        _object(
            "query",
            "texts",
            query=_STRING,
            texts=_DOCUMENT_LIST,
            raw_scores={**_FLAG, "default": False},
            return_text={**_FLAG, "default": False},
            truncate={**_FLAG, "default": False},
            truncation_direction=_enum("right", "Right"),
        ),
        _object(
            "query",
            "documents",
            query=_STRING,
            documents=_DOCUMENT_LIST,
            instruction=_STRING,
            top_k=_TOP_K,
            min_confidence={**_NUMBER, "minimum": 0, "maximum": 1, "default": 0.5},
            model=_STRING,
        ),
    ]
}

_SCORE: Schema = {**_NUMBER, "minimum": -1, "maximum": 1}
PLAIN_SEARCH = _object(
    "query",
    query=_STRING,
    task_description=_STRING,
    top_k=_TOP_K,
    score_threshold={**_SCORE, "default": 0.7},
)
SEARCH = _object(
    query=_STRING,
    vector={"type": "array", "items": _NUMBER},
    top_k=_TOP_K,
    threshold=_SCORE,
    exact={**_FLAG, "default": False},
    task_description=_STRING,
    instruction=_STRING,
    rerank={
        "oneOf": [
            _FLAG,
            _object(model=_STRING, top_n=_COUNT, candidates=_COUNT, instruction=_STRING),
        ]
    },
)

COLLECTION = _object(
    model=_STRING,
    policy=_enum("auto", "articles", "exact"),
    recall_target={**_NUMBER, "minimum": 0.5, "maximum": 1, "default": 0.98},
    versions=_enum("assigned", "given"),
    dimensions=_COUNT,
)
DOCUMENT = _object(
    "id",
    "text",
    id=_STRING,
    text=_STRING,
    metadata={"type": "object"},
    version={"type": "integer", "minimum": 1},
)
DOCUMENTS: Schema = {
    "oneOf": [
        _object("documents", documents={"type": "array", "items": DOCUMENT, "minItems": 1}),
        DOCUMENT,
    ]
}
DEAD_RETRY = _object(text=_STRING, document=_STRING)
