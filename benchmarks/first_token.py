"""Time to first token of vLLM with and without us, on a CPU: `python -m benchmarks.first_token`.

For each way to keep KV one engine stores the beginnings of all prompts and ends; then fresh
engines, one of each way, serve the same prompts, one after the other in a shuffled order, so that a
drifting machine hurts all alike. One and the same engine is up to a tenth faster or slower from
start to start, so all are started several times, and vLLM alone is there twice: how far the two
are apart says what the other figures are worth. Every first token is compared with that of vLLM
alone. vLLM's prefix cache is off, so that what is found was stored by another process. Copies
between vLLM's KV memory and its host memory need a GPU; on a CPU the offloading connector gets a
stand-in for them, for its own file tier and for ours.

What the connector costs where it finds nothing is measured in one engine: some prompts in a row
that are looked up, computed and stored, beside as many that say `cache: false`, whose KV is neither
looked up nor stored, in a shuffled order.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import limits
from benchmarks.daemon import daemon
from kvstore_engines.smollm2 import ensure_smollm2

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "tests" / "integrations" / "real" / "vllm"
BLOCK = 32
LENGTH = 20 * BLOCK + 1  # a prompt: 20 blocks, and a token that is always computed
SHARES = (0.0, 0.5, 0.9)
VOCABULARY = 49_152
PLAIN = "vLLM alone"
AGAIN = f"{PLAIN}, again"
CONNECTOR = "kvstore, connector"
IN_A_ROW = 4  # prompts; what is stored behind an answer slows down the next one
PAIRS = 40
POOL_BYTES = 6 << 30  # of which each way to us fills a share, also while it serves
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "block_size": BLOCK,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "seed": 0,
    "prefix_caching_hash_algo": "sha256_cbor",
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "PYTHONPATH": str(STAND_IN),
}


class EngineError(RuntimeError):
    """An engine did not start, or ended."""


class Engine:
    """One vLLM, from begin to end of a `with`."""

    def __init__(self, python: Path, log: Path, arguments: dict[str, Any]) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [python, "-P", Path(__file__).with_name("first_token_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        self._path = log
        self._ask({**ARGUMENTS, **arguments})

    def serve(self, prompt: list[int], **parameters: Any) -> dict[str, Any]:
        """See `first_token_worker`."""
        return self._ask([prompt, parameters])

    def close(self) -> None:
        """Ends it by itself, so that what it was storing is stored."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def _ask(self, message: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(message), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            raise EngineError(f"{answer['error']}: {self._path.read_text(errors='replace')[-800:]}")
        return answer


def ways(folder: Path, target: str) -> dict[str, dict[str, Any]]:
    """Arguments of each engine."""
    return {
        PLAIN: {},
        AGAIN: {},
        CONNECTOR: _transfer(
            "KVStoreConnector",
            {"target": target, "tenant": "connector"},
            kv_connector_module_path="kvstore_integrations.vllm.connector",
        ),
        "kvstore, tier": _tiered(
            {
                "type": "KVStoreTier",
                "module_path": "kvstore_integrations.vllm.tier",
                "target": target,
                "tenant": "tier",
            }
        ),
        "vLLM's file tier": _tiered({"type": "fs", "root_dir": str(folder / "files")}),
    }


def _transfer(name: str, extra: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = {
        "kv_connector": name,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    return {"kv_transfer_config": {**config, **more}}


def _tiered(tier: dict[str, Any]) -> dict[str, Any]:
    extra = {
        "spec_name": "CpuTieringSpec",
        "spec_module_path": "cpu_spec",
        "cpu_bytes_to_use": 512 << 20,
        "secondary_tiers": [tier],
    }
    return _transfer("OffloadingConnector", extra)


@dataclass
class Served:
    """What one way's engines answered to prompts of one share."""

    seconds: list[float] = field(default_factory=list)
    against_plain: list[float] = field(default_factory=list)  # the same prompt's ratio
    cached: int = 0
    shared: int = 0
    wrong: int = 0


Prompt = tuple[float, int, list[int]]  # share, tokens of whole blocks stored before, the tokens


def prompts(repeats: int, rng: random.Random) -> list[Prompt]:
    """In the order of serving."""
    return [
        (share, int(share * LENGTH) // BLOCK * BLOCK, _random_tokens(rng))
        for share in SHARES
        for _ in range(repeats)
    ]


def _random_tokens(rng: random.Random) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(LENGTH)]


def measure(
    python: Path, folder: Path, model: Path, starts: int, repeats: int
) -> tuple[dict[str, dict[float, Served]], list[float]]:
    """Serves the prompts of each start in all ways; and `overheads`."""
    found: dict[str, dict[float, Served]] = defaultdict(lambda: defaultdict(Served))
    rng = random.Random(7)
    work = [prompts(repeats, rng) for _ in range(starts)]
    with daemon(folder / "daemon", POOL_BYTES, "--no-grpc") as server:
        server.connect().close()
        configurations = {
            name: {"model": str(model), **arguments}
            for name, arguments in ways(folder, server.target).items()
        }
        for name, arguments in configurations.items():
            if name in (PLAIN, AGAIN) or not starts:
                continue
            _say(f"storing: {name}")
            with _engine(python, folder / f"{name}.store.log", arguments) as engine:
                for _, shared, prompt in itertools.chain(*work):
                    if shared:
                        engine.serve(prompt[: shared + 1])
                engine.serve(_random_tokens(rng)[: BLOCK + 1])  # a step in which stores end
        for start, share_of_work in enumerate(work):
            with contextlib.ExitStack() as stack:
                engines = {}
                for name in _shuffled(configurations, rng):
                    _say(f"start {start + 1} of {starts}: {name}")
                    made = _engine(python, folder / f"{name}.log", configurations[name])
                    engines[name] = stack.enter_context(made)
                for engine in engines.values():
                    engine.serve(_random_tokens(rng))  # warms up
                for asked in share_of_work:
                    _serve(asked, {name: engines[name] for name in _shuffled(engines, rng)}, found)
        _say("what a miss costs")
        with _engine(python, folder / "miss.log", configurations[CONNECTOR]) as engine:
            ratios = overheads(engine, rng)
    return {name: found[name] for name in configurations}, ratios


def overheads(engine: Engine, rng: random.Random) -> list[float]:
    """Of each pair of rows of prompts: seconds of the one that is looked up and stored, to those of
    the one that is not."""
    engine.serve(_random_tokens(rng))  # warms up
    ratios = []
    for _ in range(PAIRS):
        seconds = {}
        for cache in rng.sample([True, False], 2):
            row = [engine.serve(_random_tokens(rng), cache=cache) for _ in range(IN_A_ROW)]
            seconds[cache] = sum(answer["seconds"] for answer in row)
        ratios.append(seconds[True] / seconds[False])
    return ratios


def _shuffled(names: Iterable[str], rng: random.Random) -> list[str]:
    mixed = list(names)
    rng.shuffle(mixed)
    return mixed


def _serve(
    prompt: Prompt, engines: dict[str, Engine], found: dict[str, dict[float, Served]]
) -> None:
    share, shared, tokens = prompt
    answers = {name: engine.serve(tokens) for name, engine in engines.items()}
    plain = answers[PLAIN]
    for name, answer in answers.items():
        served = found[name][share]
        served.seconds.append(answer["seconds"])
        served.against_plain.append(answer["seconds"] / plain["seconds"])
        served.cached += answer["cached"]
        served.shared += shared
        served.wrong += answer["token"] != plain["token"]


@contextlib.contextmanager
def _engine(python: Path, log: Path, arguments: dict[str, Any]) -> Iterator[Engine]:
    engine = Engine(python, log, arguments)
    try:
        yield engine
    finally:
        engine.close()


def table(found: dict[str, dict[float, Served]], ratios: list[float]) -> str:
    """Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in limits.facts().items())
    lines = [f"Machine: {facts}.", ""]
    lines += _starts_table(found) if any(found.values()) else []
    low, middle, high = statistics.quantiles(ratios, n=4)
    lines += [
        f"The connector in one engine, {IN_A_ROW} prompts in a row that find nothing and are "
        f"stored, to as many with `cache: false`: {middle:.3f} of the time (median of "
        f"{len(ratios)} pairs; quartiles {low:.3f} and {high:.3f}).",
    ]
    return "\n".join(lines)


def _starts_table(found: dict[str, dict[float, Served]]) -> list[str]:
    lines = [
        f"SmolLM2-135M in fp32, prompts of {LENGTH} tokens. Time to first token: median ms, and "
        "the median of the ratios to vLLM alone, prompt by prompt. Hits: tokens that came from a "
        "cache, of those in shared whole blocks.",
        "",
        "| shared beginning | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |",
        "|---" * (len(SHARES) + 1) + "|",
    ]
    for name, by_share in found.items():
        cells = []
        for share in SHARES:
            served = by_share[share]
            cell = f"{1e3 * statistics.median(served.seconds):.0f}"
            cell += f" ({statistics.median(served.against_plain):.3f})"
            if served.shared:
                cell += f", hits {served.cached / served.shared:.0%}"
            cells.append(cell + (f", {served.wrong} WRONG" if served.wrong else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """The command; exits with 1 where a token is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with vLLM")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--starts", type=int, default=5, help="0: only what a miss costs")
    parser.add_argument("--repeats", type=int, default=4, help="prompts of each share in a start")
    options = parser.parse_args()
    model = ensure_smollm2().resolve()
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as name:
        found, ratios = measure(options.python, Path(name), model, options.starts, options.repeats)
    if options.json:
        document: dict[str, Any] = {
            name: {str(share): vars(served) for share, served in by_share.items()}
            for name, by_share in found.items()
        }
        options.json.write_text(json.dumps({**document, "overheads": ratios}))
    print(table(found, ratios))
    sys.exit(any(served.wrong for by in found.values() for served in by.values()))


if __name__ == "__main__":
    main()
