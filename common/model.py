"""What a model is to the fleet: its space, and the card a worker announces for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vecfleet.common.document import check_text
from vecfleet.common.errors import CorruptPayload, InvalidInput
from vecfleet.common.plain import build

Task = Literal["embed", "rerank"]
RerankMethod = Literal["cross-encoder", "qwen3", "cosine"]

QUERY = "query"  # the name of the prompt that stands before questions
_INSTRUCT = "Instruct: "


@dataclass(frozen=True, slots=True)
class Space:
    """What makes two vectors comparable; a collection pins it.

    dtype, engine and quantisation are left out on purpose: they change a vector by rounding only,
    and a worker shows with canary texts that its vectors agree.
    """

    weights: str  # fingerprint of the weights and the tokenizer, hex
    pooling: str  # "mean", "cls" or "last"
    normalized: bool
    dimension: int
    prompt: str  # put before every document's text
    max_tokens: int  # the length texts are cut to

    @property
    def id(self) -> str:
        """16 hex digits; part of queue names, so that no block reaches other weights."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a worker tells the fleet about the model it holds."""

    name: str  # as people name it: a hub id, a directory's name, or package:NAME
    tasks: tuple[Task, ...]
    space: str  # Space.id of the embeddings; for a reranker, its weights' id in the same form
    dimension: int  # 0 for a model that cannot embed
    max_tokens: int
    dtype: str
    engine: str  # "torch", "vllm", "fake", "null"
    rerank_method: RerankMethod | None = None
    prompts: dict[str, str] = field(default_factory=dict)  # name -> text put before the input
    pooling: str = ""
    quantization: str = "none"
    settings: dict[str, str | int | float] = field(default_factory=dict)  # what was chosen for it
    matryoshka: bool = False  # trained so that a vector's first numbers are a vector by themselves
    matryoshka_dimensions: tuple[int, ...] = ()  # what they may be cut to; empty: any number
    matryoshka_least: int = 1  # of any number

    @property
    def takes_instruction(self) -> bool:
        """Whether the query prompt tells the model a task, which another can replace.

        Such a prompt is ``Instruct: {task}`` and, on the next line, ``Query:``.
        """
        prompt = self.prompts.get(QUERY, "")
        return prompt.startswith(_INSTRUCT) and "\n" in prompt

    def query_prompt(self, task: str = "") -> str:
        """What the model reads before a question; ``task`` is for those that take one."""
        prompt = self.prompts.get(QUERY, "")
        if task and self.takes_instruction:
            return f"{_INSTRUCT}{task}\n{prompt.partition(chr(10))[2]}"
        return prompt

    def prompt_of(
        self, *, prompt: object = None, prompt_name: object = None, instruction: object = None
    ) -> str | None:
        """What stands before each text; None: what the model puts before documents.

        ``prompt`` is that itself, ``prompt_name`` one of ``prompts``, ``instruction`` the task of a
        question. Raises an ``InvalidInput`` that names the field at fault.
        """
        given = {"prompt": prompt, "prompt_name": prompt_name, "instruction": instruction}
        asked = [name for name, value in given.items() if value is not None]
        if not asked:
            return None
        if len(asked) > 1:
            raise InvalidInput(f"send {' or '.join(asked)}, not both", field=asked[-1])
        (name,), value = asked, given[asked[0]]
        if name == "instruction":
            check_text(value, name)
            if not self.takes_instruction:
                raise InvalidInput(
                    f"{self.name} takes no instruction: it has no query prompt with a task in it",
                    field=name,
                )
            return self.query_prompt(str(value))
        if not isinstance(value, str):
            raise InvalidInput(f"{name} must be a string", field=name)
        if name == "prompt":
            return value
        if value not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise InvalidInput(f"{self.name} has no prompt {value!r}; it has {known}", field=name)
        return self.prompts[value]

    def vector_length(self, dimensions: object = None) -> int:
        """How long the vectors are that are asked for with ``dimensions``.

        Raises an ``InvalidInput`` that says what is allowed.
        """
        if dimensions is None:
            return self.dimension
        if type(dimensions) is int and (
            dimensions == self.dimension
            or dimensions in self.matryoshka_dimensions
            or (
                self.matryoshka
                and not self.matryoshka_dimensions
                and self.matryoshka_least <= dimensions < self.dimension
            )
        ):
            return dimensions
        if not self.matryoshka:
            allowed = f"{self.dimension}: {self.name} is not trained for shorter vectors"
        elif self.matryoshka_dimensions:
            lengths = sorted({*self.matryoshka_dimensions, self.dimension})
            allowed = f"one of {', '.join(map(str, lengths))} for {self.name}"
        else:
            allowed = f"from {self.matryoshka_least} to {self.dimension} for {self.name}"
        raise InvalidInput(f"dimensions must be {allowed}", field="dimensions")

    def to_wire(self) -> dict[str, Any]:
        """The card as plain data."""
        tuples = {"tasks": self.tasks, "matryoshka_dimensions": self.matryoshka_dimensions}
        return {**asdict(self), **{name: list(values) for name, values in tuples.items()}}

    @classmethod
    def from_wire(cls, wire: object) -> ModelCard:
        """The card that ``to_wire`` wrote; raises ``CorruptPayload`` for what it did not."""
        card = build(cls, wire)
        if not card.tasks:
            raise CorruptPayload(f"model {card.name} has no task")
        return card
