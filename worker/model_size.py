"""How large a model's weights are, as far as this machine knows without asking anybody."""

from __future__ import annotations

from pathlib import Path

from vecfleet.worker.model_files import PACKAGE_PREFIX, find_directory


def weight_bytes(name: str) -> int | None:
    """Bytes of the model's weights; None for a hub's model that is still to be downloaded.

    Raises ``ConfigError`` for a directory or a package that is not there.
    """
    folder = _cached(name) if _is_hub_id(name) else find_directory(name)
    if folder is None:
        return None
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None


def _is_hub_id(name: str) -> bool:
    return (
        not name.startswith((PACKAGE_PREFIX, "/", ".", "~"))
        and name.count("/") == 1
        and not Path(name).is_dir()
    )


def _cached(name: str) -> Path | None:
    # Imported here: who reads a directory needs no hub client.
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None
