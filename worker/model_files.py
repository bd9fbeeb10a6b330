"""Finds a model's files by its name and reads what kind of model they hold.

A name is a directory, ``package:NAME`` for a Python package that carries a model, or the id of a
repository on the Hugging Face hub.  Weights are read from safetensors files only, and no code that
comes with a model is ever run.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from vecfleet.common.engine_names import Quantization, TaskName
from vecfleet.common.errors import ConfigError
from vecfleet.common.model import ModelCard, RerankMethod, Space, Task
from vecfleet.worker.matryoshka import Matryoshka, read_matryoshka
from vecfleet.worker.model_shape import ModelShape, read_shape

PACKAGE_PREFIX = "package:"
DEFAULT_MAX_TOKENS = 8192  # the longest cut that is chosen for a model, not by the user
FINGERPRINT_CHUNK_BYTES = 32 << 20

Kind = Literal["embedding", "cross-encoder", "qwen3-reranker"]

_PICKLES = ("bin", "pt", "pth", "pkl", "ckpt")  # how weights end that any code may be in
_DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*/*.json"]
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "*.model")
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's directory and what its configuration says."""

    name: str
    path: Path
    kind: Kind
    fingerprint: str  # of weights and tokenizer, 32 hex digits
    dimension: int  # of its vectors, 0 for a reranker
    max_tokens: int
    shape: ModelShape
    pooling: str = ""  # "mean", "cls" or "last"; empty for a reranker
    prompts: dict[str, str] = field(default_factory=dict)
    document_prompt: str = ""
    matryoshka: Matryoshka | None = None  # None: its vectors cannot be cut

    @property
    def computes_in_parts(self) -> bool:
        """Whether a text may be computed over several steps, as its last token sees all others."""
        return self.shape.causal and self.pooling in ("last", "")

    @property
    def space(self) -> Space:
        """The space of its vectors, or a reranker's weights in the same form."""
        pooling = self.pooling or self.kind
        return Space(
            self.fingerprint, pooling, True, self.dimension, self.document_prompt, self.max_tokens
        )

    def card(
        self,
        *,
        dtype: str,
        engine: str,
        served_name: str | None = None,
        quantization: Quantization = "none",
        settings: dict[str, Any] | None = None,
    ) -> ModelCard:
        """What a worker announces. An embedding model reranks too, by cosine."""
        methods: dict[Kind, RerankMethod] = {
            "embedding": "cosine",
            "cross-encoder": "cross-encoder",
            "qwen3-reranker": "qwen3",
        }
        tasks: tuple[Task, ...] = ("embed", "rerank") if self.kind == "embedding" else ("rerank",)
        return ModelCard(
            name=served_name or self.name,
            tasks=tasks,
            space=self.space.id,
            dimension=self.dimension,
            max_tokens=self.max_tokens,
            dtype=dtype,
            engine=engine,
            rerank_method=methods[self.kind],
            prompts=dict(self.prompts),
            matryoshka=self.matryoshka is not None,
            matryoshka_dimensions=self.matryoshka.dimensions if self.matryoshka else (),
            matryoshka_least=self.matryoshka.least if self.matryoshka else 1,
            pooling=self.pooling,
            quantization=quantization,
            settings=dict(settings or {}),
        )


def find_model(name: str, *, max_tokens: int | None = None, task: TaskName = "auto") -> ModelFiles:
    """Resolve ``name``, downloading from the hub where needed and allowed.

    ``max_tokens`` lowers the length that texts are cut to, or sets it for a model that says none.
    Raises ``ConfigError`` that says what is missing.
    """
    path = find_directory(name)
    config = _read_json(path / "config.json")
    _check_weights(name, path)
    kind = _kind(name, path, config, task)
    pooling = _pooling(path, config) if kind == "embedding" else ""
    given = _read_json(path / "config_sentence_transformers.json", missing={})
    prompts = {str(k): str(v) for k, v in (given.get("prompts") or {}).items()}
    chosen = [*_DOCUMENT_PROMPTS, given.get("default_prompt_name")]
    document_prompt = next((prompts[key] for key in chosen if key in prompts), "")
    dimension = int(config["hidden_size"]) if kind == "embedding" else 0
    return ModelFiles(
        name=name,
        path=path,
        kind=kind,
        fingerprint=fingerprint(path),
        dimension=dimension,
        max_tokens=_max_tokens(path, config, max_tokens),
        shape=read_shape(path, config),
        pooling=pooling,
        prompts=prompts,
        document_prompt=document_prompt if kind == "embedding" else "",
        matryoshka=read_matryoshka(name, path, config, given, dimension) if dimension else None,
    )


def find_directory(name: str) -> Path:
    """The directory that holds the model's config.json; raises ``ConfigError``."""
    if name.startswith(PACKAGE_PREFIX):
        return _package_directory(name.removeprefix(PACKAGE_PREFIX))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} holds no config.json, so it is no model", field="model")
        return path
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ConfigError(
            f"there is no model {name!r}: give a directory that exists, package:NAME for an "
            "installed package with a model in it, or a hub id such as owner/name",
            field="model",
        )
    return _hub_directory(name)


def fingerprint(path: Path) -> str:
    """32 hex digits that stand for the weights and the tokenizer, wherever the files lie."""
    patterns = ("*.safetensors", *_TOKENIZER_FILES)
    files = [file for pattern in patterns for file in sorted(path.glob(pattern))]
    total = blake2b(digest_size=16)
    with ThreadPoolExecutor() as pool:
        for file in files:
            starts = range(0, file.stat().st_size, FINGERPRINT_CHUNK_BYTES)
            total.update(file.name.encode() + b"\0")
            for digest in pool.map(lambda start, f=file: _chunk_digest(f, start), starts):
                total.update(digest)
    return total.hexdigest()


def _chunk_digest(file: Path, start: int) -> bytes:
    with file.open("rb") as source:
        source.seek(start)
        return blake2b(source.read(FINGERPRINT_CHUNK_BYTES), digest_size=32).digest()


def _package_directory(package: str) -> Path:
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"the package {package} is not installed; run: pip install {package}", field="model"
        ) from None
    for file in files or []:
        if file.name == "config.json":
            directory = Path(str(file.locate())).parent
            if any(directory.glob("*.safetensors")):
                return directory
    raise ConfigError(
        f"the package {package} carries no directory with config.json and *.safetensors",
        field="model",
    )


def _hub_directory(name: str) -> Path:
    # Imported here: workers that read a directory need no hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"the model {name} is neither in the local cache nor can the hub be reached "
            "(HF_HUB_OFFLINE set, or no network); download it once, or give its directory",
            field="model",
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"the hub does not give the model {name}: {error}"[:400], field="model"
        ) from error


def _check_weights(name: str, path: Path) -> None:
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(file.name for end in _PICKLES for file in path.glob(f"*.{end}"))
    if pickles:
        raise ConfigError(
            f"{name} has its weights only as {pickles[0]}, a pickle, which can run any code; "
            "use a revision with *.safetensors or convert it",
            field="model",
        )
    raise ConfigError(f"{name} holds no *.safetensors with weights ({path})", field="model")


def _kind(name: str, path: Path, config: dict[str, Any], task: TaskName) -> Kind:
    architectures = " ".join(config.get("architectures") or [])
    label = Path(name).name.lower()
    if "ForSequenceClassification" in architectures and task != "embed":
        labels = len(config.get("id2label") or {}) or int(config.get("num_labels") or 2)
        if labels > 2:
            raise ConfigError(
                f"{name} classifies into {labels} labels; a reranker has one or two", field="model"
            )
        return "cross-encoder"
    is_causal = "ForCausalLM" in architectures
    pools = any(_module_class(module) == "Pooling" for module in _modules(path))
    if task == "rerank" or (task == "auto" and is_causal and not pools and "rerank" in label):
        if not is_causal or config.get("model_type") != "qwen3":
            raise ConfigError(
                f"{name} ({architectures or 'no architecture named'}) is no reranker that this "
                "engine knows: sequence classification with one or two labels, or Qwen3-Reranker",
                field="model",
            )
        return "qwen3-reranker"
    if is_causal and not pools and "embed" not in label:
        raise ConfigError(
            f"{name} is a causal language model without a pooling module; say whether it embeds "
            "or reranks (Qwen3-Embedding, Qwen3-Reranker)",
            field="model",
        )
    return "embedding"


def _pooling(path: Path, config: dict[str, Any]) -> str:
    modules = _modules(path)
    for module in modules:
        if _module_class(module) not in _KNOWN_MODULES:
            raise ConfigError(
                f"the model needs the module {_module_class(module)}, which this engine does not "
                f"run; it runs {', '.join(_KNOWN_MODULES)}",
                field="model",
            )
    for module in modules:
        if _module_class(module) == "Pooling":
            return _pooling_mode(_read_json(path / str(module["path"]) / "config.json"))
    return "last" if "ForCausalLM" in " ".join(config.get("architectures") or []) else "mean"


def _pooling_mode(config: dict[str, Any]) -> str:
    if "pooling_mode" in config:
        modes = [str(config["pooling_mode"])]
        known = [_POOLING_MODES[mode] for mode in modes if mode in _POOLING_MODES]
    else:
        modes = [
            key for key, on in config.items() if key.startswith("pooling_mode_") and on is True
        ]
        known = [_POOLING_FLAGS[mode] for mode in modes if mode in _POOLING_FLAGS]
    if len(modes) != 1 or len(known) != 1:
        raise ConfigError(
            f"the model pools by {', '.join(modes) or 'nothing'}; this engine pools by mean, cls "
            "or last token",
            field="model",
        )
    return known[0]


def _max_tokens(path: Path, config: dict[str, Any], wanted: int | None) -> int:
    positions = int(config.get("max_position_embeddings") or DEFAULT_MAX_TOKENS)
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= int(config.get("pad_token_id") or 0) + 1  # these count from there
    tokenizer = _read_json(path / "tokenizer_config.json", missing={})
    said = _read_json(path / "sentence_bert_config.json", missing={}).get("max_seq_length")
    limits = [positions, int(tokenizer.get("model_max_length") or positions)]
    if said:
        limits.append(int(said))
    elif wanted is None:
        limits.append(DEFAULT_MAX_TOKENS)
    if wanted is not None:
        limits.append(wanted)
    return min(limits)


def _modules(path: Path) -> list[dict[str, Any]]:
    found = _read_json(path / "modules.json", missing=[])
    return [module for module in found if isinstance(module, dict)]


def _module_class(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _read_json(file: Path, missing: Any = None) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        if missing is None:
            raise ConfigError(f"the model's file {file} is missing", field="model") from None
        return missing
    except ValueError as error:
        raise ConfigError(f"the model's file {file} is not JSON: {error}", field="model") from error
