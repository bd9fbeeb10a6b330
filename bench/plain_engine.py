"""What the engine is compared with: ``python -m vecfleet.bench.plain_engine MODEL TEXTS [DTYPE]``.

transformers as its users run it on a CPU: bfloat16, the library's own tokenizer and attention,
texts sorted by length, padded batches within a budget of tokens (the best of those tried).
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from vecfleet.bench import texts
from vecfleet.bench.child import serve
from vecfleet.worker.model_files import find_model

BATCH_TOKENS = 4096


def batches(lengths: list[int]) -> Iterator[list[int]]:
    """Places of texts, longest first, as many at once as fit padded into the budget."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    at = 0
    while at < len(order):
        size = max(1, BATCH_TOKENS // lengths[order[at]])
        yield order[at : at + size]
        at += size


async def main(model: str, path: str, dtype: str = "bfloat16") -> None:
    """Serve the parent's commands."""
    files = find_model(model)
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    network = AutoModel.from_pretrained(files.path, dtype=getattr(torch, dtype)).eval()
    pool = texts.load(Path(path))

    async def embed(command: dict[str, Any]) -> dict[str, Any]:
        """All texts, sorted by length; mean pooling. Vectors go to the file ``save``, if named."""
        began = time.perf_counter()
        encoded = tokenizer(pool, truncation=True, max_length=files.max_tokens)["input_ids"]
        rows = torch.empty((len(pool), files.dimension))
        with torch.inference_mode():
            for places in batches([len(ids) for ids in encoded]):
                batch = tokenizer.pad(
                    {"input_ids": [encoded[p] for p in places]}, return_tensors="pt"
                )
                hidden = network(**batch).last_hidden_state.float()
                mask = batch["attention_mask"].unsqueeze(-1)
                pooled = (hidden * mask).sum(1) / mask.sum(1)
                rows[places] = torch.nn.functional.normalize(pooled, dim=1)
        seconds = time.perf_counter() - began
        if "save" in command:
            np.save(command["save"], rows.numpy())
        tokens = sum(len(ids) for ids in encoded)
        return {"texts": len(pool), "tokens": tokens, "seconds": seconds}

    await serve({"embed": embed})


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
