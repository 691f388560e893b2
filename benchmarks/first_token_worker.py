"""One vLLM in a process and environment of its own: JSON line by line on standard input.

The first line holds the arguments of `vllm.LLM`. Each further one is a prompt's token ids and its
parameters for the connector, answered with the seconds to its first token, that token, and how many
of the prompt's came from a cache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Serves until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log

    def answer(message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    import vllm

    try:
        engine = vllm.LLM(**json.loads(sys.stdin.readline()))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({})
    for line in sys.stdin:
        tokens, parameters = json.loads(line)
        prompt: Any = {"prompt_token_ids": tokens}
        sampling = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": parameters} if parameters else None,
        )
        begin = time.monotonic()
        (output,) = engine.generate([prompt], sampling, use_tqdm=False)
        answer(
            {
                "seconds": time.monotonic() - begin,
                "token": output.outputs[0].token_ids[0],
                "cached": output.num_cached_tokens or 0,
            }
        )


if __name__ == "__main__":
    main()
