"""One engine process: a job a line on standard input, a reply a line on standard output.

Run as `python -m kvstore_engines.worker`, or once a rank with --rank, --size and --rendezvous.
Lines are JSON: `Job` in, `{"results": [...]}` or `{"error": "..."}` out.
"""

import argparse
import contextlib
import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from kvstore import Attention
from kvstore.errors import Unavailable
from kvstore_client import KVStoreClient
from kvstore_engines.adapter import SessionStore
from kvstore_engines.engine import Engine
from kvstore_engines.gloo import GlooGroup, GlooParallel
from kvstore_engines.jobs import EngineSpec, Job
from kvstore_engines.layouts import layout_of
from kvstore_engines.parallel import Parallel, SingleRank

STORE_TIMEOUT_S = 2.0  # what a store that hangs may cost a step, once: then it counts as away


class Worker:
    """Answers jobs with the engine they name; the last one is kept, for what comes next."""

    def __init__(self, group: GlooGroup | None, resources: contextlib.ExitStack) -> None:
        self._group = group
        self._resources = resources
        self._client = functools.cache(self._connect)
        self._engine = functools.lru_cache(maxsize=1)(self._build)

    def reply(self, line: str) -> str:
        """One reply; whatever goes wrong is said in it."""
        try:
            job = Job.decode(line)
            results = self._engine(job.engine).generate(
                job.prompts, job.new_tokens, job.session_ends
            )
        except Exception as error:
            return json.dumps({"error": f"{type(error).__name__}: {error}"})
        return json.dumps({"results": [asdict(result) for result in results]})

    def _connect(self, target: str, verify_reads: bool) -> KVStoreClient:
        connect = functools.partial(
            KVStoreClient, target, timeout_s=STORE_TIMEOUT_S, verify_reads=verify_reads
        )
        try:
            client = connect()
        except Unavailable as error:
            print(f"engine runs without the store for now: {error}", file=sys.stderr)
            client = connect(lazy=True)
        return self._resources.enter_context(client)

    def _build(self, spec: EngineSpec) -> Engine:
        parallel = self._parallel(spec.split)
        model, dtype = Path(spec.model), getattr(torch, spec.dtype)
        store = None
        if spec.target:
            layout = layout_of(model, spec.block_tokens, dtype)
            # The latent cache has no heads to share out: every rank gets all of it.
            latent = layout.attention is Attention.MLA
            heads = None if latent else parallel.kv_heads(layout.kv_heads)
            client = self._client(spec.target, spec.verify_reads)
            store = SessionStore(client, spec.namespace, layout, heads)
        return Engine(
            model,
            store=store,
            num_pages=spec.num_pages,
            block_tokens=spec.block_tokens,
            dtype=dtype,
            parallel=parallel,
        )

    def _parallel(self, split: tuple[int, ...]) -> Parallel:
        return GlooParallel(self._group, split) if self._group else SingleRank()


def main() -> None:
    """Serves jobs until standard input ends."""
    parser = argparse.ArgumentParser(prog="kvstore_engines.worker")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--size", type=int, default=1)
    parser.add_argument("--rendezvous", type=Path)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    given = parser.parse_args()
    with contextlib.ExitStack() as resources:
        group = None
        if given.rendezvous:
            group = resources.enter_context(
                GlooGroup(given.rank, given.size, given.rendezvous, timeout_s=given.timeout_s)
            )
        worker = Worker(group, resources)
        for line in sys.stdin:
            print(worker.reply(line), flush=True)


if __name__ == "__main__":
    main()
