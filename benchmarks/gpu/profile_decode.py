"""Something for a profiler to look at: decode kernels alone, or engines with a store.

    python -m benchmarks.gpu.profile_decode gqa      the hand-written kernel, launch after launch
    python -m benchmarks.gpu.profile_decode flex     the same shape by flex_attention
    python -m benchmarks.gpu.profile_decode mla      latent attention
    python -m benchmarks.gpu.profile_decode engine   an engine that puts and one that gets

What is compiled and warmed up comes first and is outside of the part that profilers are told to
look at (cudaProfilerStart and Stop). `--torch FILE` has torch's own profiler look at that part,
prints its table and writes a trace for chrome://tracing or Perfetto. `docs/profiling.md` has the
commands of the other profilers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from kvstore_kernels.ranges import DECODE, span

HEADS, KV_HEADS, DIM, PAGE_TOKENS = 32, 8, 128, 16
MLA_HEADS, LATENT, ROPE, MLA_PAGE_TOKENS = 128, 512, 64, 64
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 1024, 16


@contextmanager
def looked_at(trace: Path | None) -> Iterator[None]:
    """The part that profilers look at."""
    with ExitStack() as stack:
        profiler = stack.enter_context(torch.profiler.profile()) if trace else None
        torch.cuda.synchronize()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        begun = time.perf_counter()
        yield
        torch.cuda.synchronize()
        print(f"{time.perf_counter() - begun:.3f} s")
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
    if profiler and trace:
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=25))
        profiler.export_chrome_trace(str(trace))


def paged(batch: int, context: int, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A page table over all pages of a pool, in any order, and lengths."""
    width = context // page_tokens
    table = torch.randperm(batch * width, device="cuda").int().view(batch, width)
    return table, torch.full((batch,), context, dtype=torch.int32, device="cuda")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def gqa(batch: int, context: int) -> Callable[[], object]:
    """One launch of the hand-written kernel."""
    from kvstore_kernels.gqa_decode import gqa_decode
    from kvstore_kernels.gqa_form import GqaForm, GqaWorkspace

    form = GqaForm(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, page_tokens=PAGE_TOKENS)
    table, lengths = paged(batch, context, PAGE_TOKENS)
    k, v = random(table.numel(), KV_HEADS, 2, PAGE_TOKENS, DIM).unbind(2)
    q = random(batch, 1, HEADS, DIM)
    workspace = GqaWorkspace(form, max_sequences=batch, device="cuda")
    workspace.load(workspace.plan([context] * batch))
    return lambda: gqa_decode(q, k, v, table, lengths, workspace)


def flex(batch: int, context: int) -> Callable[[], object]:
    """One call of flex_attention, with its plan made before, as layers find it."""
    from kvstore_kernels.flex import flex_attention_paged
    from kvstore_kernels.flex_plan import plan_pages

    table, lengths = paged(batch, context, PAGE_TOKENS)
    k, v = random(table.numel(), KV_HEADS, 2, PAGE_TOKENS, DIM).unbind(2)
    q = random(batch, 1, HEADS, DIM)
    plan = plan_pages(k, table, lengths)
    return lambda: flex_attention_paged(q, k, v, table, lengths, plan=plan)


def mla(batch: int, context: int) -> Callable[[], object]:
    """One launch of the kernel that is chosen for latent attention."""
    from kvstore_kernels.decode import DecodeWorkspace, Rules, decode_attention

    table, lengths = paged(batch, context, MLA_PAGE_TOKENS)
    pages = random(table.numel(), MLA_PAGE_TOKENS, LATENT + ROPE)
    q = random(batch, 1, MLA_HEADS, LATENT + ROPE)
    workspace = DecodeWorkspace(max_sequences=batch, device="cuda")
    rules = Rules(scale=(128 + ROPE) ** -0.5)
    workspace.step([context] * batch)
    return lambda: decode_attention(q, pages, None, table, lengths, workspace, rules=rules)


def save_model(folder: Path) -> None:
    """A random Llama of eight layers, small but for its KV."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def engines(trace: Path | None, *, graphs: bool) -> None:
    """One engine computes prompts and puts their blocks, another one gets these and goes on."""
    from kvstore import KVStore
    from kvstore_engines.adapter import SessionStore
    from kvstore_engines.engine import Engine
    from kvstore_engines.layouts import layout_of

    prompts = [[(7 * i + j * j) % 8191 for j in range(PROMPT_TOKENS)] for i in range(PROMPTS)]
    pages = PROMPTS * (PROMPT_TOKENS + NEW_TOKENS) // PAGE_TOKENS + PROMPTS
    with tempfile.TemporaryDirectory() as made, KVStore(dram=1 << 30) as store:
        save_model(Path(made))
        layout = layout_of(Path(made), PAGE_TOKENS, torch.bfloat16)

        def engine() -> Engine:
            return Engine(
                Path(made),
                store=SessionStore(store, "profiled", layout),
                num_pages=pages,
                block_tokens=PAGE_TOKENS,
                dtype=torch.bfloat16,
                device="cuda",
                graphs=graphs,
            )

        puts, gets = engine(), engine()
        for each in (puts, gets):  # compiles, and captures
            each.generate([[number] * 40 for number in range(PROMPTS)], 4)
        with looked_at(trace):
            for each in (puts, gets):
                results = each.generate(prompts, NEW_TOKENS)
                print([f"{result.time_to_first_token_s * 1e3:.1f} ms" for result in results])


def main() -> None:
    """Runs one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("gqa", "flex", "mla", "engine"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--torch", type=Path, metavar="FILE", help="torch's profiler, and its trace"
    )
    parser.add_argument("--one-by-one", action="store_true", help="no CUDA graphs in engines")
    given = parser.parse_args()
    torch.manual_seed(1)
    if given.what == "engine":
        engines(given.torch, graphs=not given.one_by_one)
        return
    step = {"gqa": gqa, "flex": flex, "mla": mla}[given.what](given.batch, given.context)
    for _ in range(3):
        step()
    with looked_at(given.torch):
        for _ in range(given.steps):
            with span(DECODE):
                step()


if __name__ == "__main__":
    main()
