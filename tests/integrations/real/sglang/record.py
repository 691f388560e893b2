"""What SGLang calls of our backend, recorded anew:
`python tests/integrations/real/sglang/record.py > tests/integrations/sglang_calls.json`,
with SGLang's Python and PYTHONPATH=tests."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from integrations.models import save_llama
from integrations.real.sglang.engine import PAGE, engine, hicache

from daemon import daemon

FIXTURE = Path(__file__).parents[2] / "sglang_calls.json"
_PROMPT = [(7 * i + 3) % 512 for i in range(10 * PAGE)]


def record(folder: Path) -> list[dict[str, Any]]:
    """The calls of two requests, of which the second begins like the first, in a fresh engine each
    as far as its caches go; paths are replaced by names."""
    model, calls = save_llama(folder / "model"), folder / "calls"
    with daemon(folder, "--dram", "64MiB") as server:
        config = hicache(server.target, module_path="recorder", class_name="Recorder")
        config |= {"model_path": str(model), "max_total_tokens": 1024}
        with engine(folder / "log", env={"SGLANG_CALLS": str(calls)}, **config) as made:
            made.run(_PROMPT[: 6 * PAGE + 5])
            made.forget()
            made.run(_PROMPT)
            made.forget()
        text = calls.read_text().replace(str(model), "MODEL").replace(server.target, "TARGET")
    return [json.loads(line) for line in text.splitlines()]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as at:
        recorded = record(Path(at))
    lines = ",\n".join(json.dumps(call) for call in recorded)
    sys.stdout.write(f"[\n{lines}\n]\n")
