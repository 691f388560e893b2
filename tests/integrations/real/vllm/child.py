"""One vLLM in a process of its own, driven line by line: `python child.py` with JSON on stdin.

The first line holds the arguments of `vllm.LLM`; it answers when the engine is there, or with the
error. A further line is a list of requests {"prompt": token ids, "tokens": how many to generate,
"params": kv_transfer_params}, served together, answered with each one's tokens and how many of its
prompt's tokens came from a cache; or "metrics", answered with the counters and gauges by name.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log

    def answer(message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    sys.path.insert(0, str(Path(__file__).parent))
    import vllm

    try:
        engine = vllm.LLM(**json.loads(sys.stdin.readline()))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": True})
    for line in sys.stdin:
        requests = json.loads(line)
        if requests == "metrics":
            metrics = engine.get_metrics()
            answer({one.name: one.value for one in metrics if hasattr(one, "value")})
            continue
        prompts: Any = [{"prompt_token_ids": one["prompt"]} for one in requests]
        sampling = [
            vllm.SamplingParams(
                temperature=0.0,
                max_tokens=one["tokens"],
                ignore_eos=True,
                detokenize=False,
                extra_args={"kv_transfer_params": one["params"]} if one.get("params") else None,
            )
            for one in requests
        ]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        answer(
            [
                {"tokens": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens or 0}
                for one in outputs
            ]
        )
    del engine


if __name__ == "__main__":
    main()
