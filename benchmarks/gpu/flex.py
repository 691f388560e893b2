"""FlexDecoding over pages: microseconds per call of several masks and scores.

32 query heads, 8 KV heads of 128, bfloat16, pages of 16 tokens scattered at random over one pool.
Beside them the hand-written kernel for what it can do too, and the same graph with torch's default
options. Each call is timed in a graph of several over other pages, together eleven times as large
as the L2, with its plan made before, as layers find it; the plan has a column of its own. Every
row is checked against float64 before it counts. The floor is a kernel that only reads as many
bytes, in the same run.

Each line compiles for some seconds, so the most telling ones come first, and what would begin after
`--seconds` is left out. `--sweep` times several options.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, TypedDict

import torch
import triton

from benchmarks.gpu.gqa import READ_BLOCK, read_kernel
from benchmarks.gpu.timing import graph_us, rotations
from kvstore_kernels.flex import Options, flex_attention_paged, options_for
from kvstore_kernels.flex_masks import (
    MaskMod,
    ScoreMod,
    alibi,
    alibi_slopes,
    causal,
    sliding_window,
    soft_cap,
)
from kvstore_kernels.flex_plan import PagePlan, plan_pages
from kvstore_kernels.flex_reference import flex_reference

HEADS, KV_HEADS, DIM = 32, 8, 128
WINDOW, CAP = 1024, 30.0
MAX_ERROR = 5e-3
KV_BYTES = 2 * DIM * KV_HEADS * 2  # of a token


class Mods(TypedDict, total=False):
    """What is done to scores."""

    score_mod: ScoreMod
    mask_mod: MaskMod


class TorchOptions(Options):
    """Those that torch takes by itself."""

    def for_torch(self) -> dict[str, Any]:
        """None."""
        return {}


@dataclass(frozen=True)
class Shape:
    """A batch of sequences of one length, and pages for several such batches."""

    batch: int
    context: int
    page_tokens: int = 16

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.context}"

    @property
    def options(self) -> Options:
        return options_for(
            batch=self.batch,
            kv_heads=KV_HEADS,
            rows=HEADS // KV_HEADS,
            row_bytes=2 * DIM,
            longest=self.context,
            multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count,
        )

    def nbytes(self, mod: str) -> int:
        """KV bytes that a call has to read."""
        tokens = min(self.context, WINDOW) if mod == "window" else self.context
        return self.batch * tokens * KV_BYTES

    @cached_property
    def inputs(self) -> Inputs:
        """Made when they are first wanted; they take most of the GPU's memory for large shapes."""
        return Inputs(self)


class Inputs:
    """Queries, pools and page tables of a shape."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator("cuda").manual_seed(shape.batch)
        width = shape.context // shape.page_tokens
        times = rotations(shape.nbytes("none"))
        pages = times * shape.batch * width
        pool = torch.empty(
            (pages, KV_HEADS, 2, shape.page_tokens, DIM), dtype=torch.bfloat16, device="cuda"
        )
        for at in range(0, pages, 4096):  # float32 of all of it would not fit
            chunk = pool[at : at + 4096]
            chunk.copy_(torch.randn(chunk.shape, generator=generator, device="cuda"))
        self.k, self.v = pool.unbind(2)
        self.words = pool.view(-1).view(torch.int32)
        order = torch.randperm(pages, generator=generator, device="cuda").int()
        self.tables = order.view(times, shape.batch, width).unbind(0)
        self.lengths = torch.full((shape.batch,), shape.context, dtype=torch.int32, device="cuda")
        size = (shape.batch, 1, HEADS, DIM)
        self.queries = [
            torch.randn(size, generator=generator, device="cuda").bfloat16() for _ in self.tables
        ]

    def plan(self, table: torch.Tensor, mods: Mods) -> PagePlan:
        return plan_pages(self.k, table, self.lengths, **mods)

    def call(self, i: int, plan: PagePlan, options: Options, mods: Mods) -> torch.Tensor:
        return flex_attention_paged(
            self.queries[i],
            self.k,
            self.v,
            self.tables[i],
            self.lengths,
            plan=plan,
            options=options,
            **mods,
        )


@lru_cache
def mods_of(name: str) -> Mods:
    """By the name of a row; what the last of a sequence's tokens sees causally is everything."""
    return {
        "none": Mods(mask_mod=causal),
        "window": Mods(mask_mod=sliding_window(WINDOW)),
        "alibi": Mods(mask_mod=causal, score_mod=alibi(alibi_slopes(HEADS, "cuda"))),
        "soft cap": Mods(mask_mod=causal, score_mod=soft_cap(CAP)),
    }[name]


def flex_us(shape: Shape, mod: str, options: Options) -> float:
    """Of one call; raises ArithmeticError for a wrong result."""
    inputs, mods = shape.inputs, mods_of(mod)
    plans = [inputs.plan(table, mods) for table in inputs.tables]
    out = inputs.call(0, plans[0], options, mods)
    want = flex_reference(
        inputs.queries[0], inputs.k, inputs.v, inputs.tables[0], inputs.lengths, **mods
    )
    error = float((out.double() - want).norm() / want.norm())
    if not error <= MAX_ERROR:  # NaN too
        raise ArithmeticError(f"relative error {error:.1e}")
    del want
    return graph_us([partial(inputs.call, i, plan, options, mods) for i, plan in enumerate(plans)])


def floor_us(shape: Shape, mod: str) -> float:
    """Of reading as many bytes, others in each call."""
    count = shape.nbytes(mod) // 4
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def call(part: torch.Tensor) -> None:
        read_kernel[(triton.cdiv(count, READ_BLOCK),)](part, sink, count, READ_BLOCK, num_warps=4)

    parts = shape.inputs.words.split(count)[: len(shape.inputs.tables)]  # type: ignore[no-untyped-call]
    return graph_us([partial(call, part) for part in parts])


def plan_us(shape: Shape, mod: str) -> float:
    """Of making the plan, which is done once a step."""
    inputs, mods = shape.inputs, mods_of(mod)
    return graph_us([partial(inputs.plan, table, mods) for table in inputs.tables])


def gqa_us(shape: Shape, mod: str) -> float:
    """Of the hand-written kernel. Raises ImportError without it, ValueError where it cannot."""
    from kvstore_kernels.gqa_decode import gqa_decode
    from kvstore_kernels.gqa_form import GqaForm, GqaWorkspace

    if mod == "alibi":
        raise ValueError("the kernel has no ALiBi")
    form = GqaForm(
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        page_tokens=shape.page_tokens,
        window=WINDOW if mod == "window" else None,
        softcap=CAP if mod == "soft cap" else None,
    )
    inputs = shape.inputs
    workspace = GqaWorkspace(form, max_sequences=shape.batch, device="cuda")
    workspace.load(workspace.plan([shape.context] * shape.batch))
    out = torch.empty_like(inputs.queries[0])

    def call(q: torch.Tensor, table: torch.Tensor) -> None:
        gqa_decode(q, inputs.k, inputs.v, table, inputs.lengths, workspace, out=out)

    pairs = zip(inputs.queries, inputs.tables, strict=True)
    return graph_us([partial(call, q, table) for q, table in pairs])


LARGE, MIDDLE, SMALL = Shape(64, 8192), Shape(16, 4096), Shape(1, 4096)
LINES = [
    *((shape, "none") for shape in (LARGE, MIDDLE, SMALL)),
    *((LARGE, mod) for mod in ("window", "alibi", "soft cap")),
    *((SMALL, mod) for mod in ("window", "alibi", "soft cap")),
    *((MIDDLE, mod) for mod in ("window", "alibi", "soft cap")),
]


class Deadline:
    """What is left of the time that a run may take."""

    def __init__(self, seconds: float) -> None:
        self.begun = time.monotonic()
        self.seconds = seconds
        self.failed: list[str] = []

    @property
    def taken(self) -> float:
        return time.monotonic() - self.begun

    def attempt(self, name: str, measure: Callable[[], float], *, needed: bool) -> float | None:
        """None, and why is printed, for what comes too late or fails; a failure of what is needed
        is remembered."""
        if self.taken > self.seconds:
            print(f"  {name}: left out, {self.seconds:.0f} s are over")
            return None
        try:
            return measure()
        except ImportError:
            return None
        except Exception as error:  # the other lines are still worth their time
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
            print(f"  {name}: {reason}", flush=True)
            if needed:
                self.failed.append(name)
            return None


def table(deadline: Deadline) -> None:
    """Prints a line for each shape and mod, most telling first."""
    print(
        f"{'us per call':24}{'ours':>8}{'floor':>8}{'of it':>7}{'by hand':>9}{'ours/hand':>10}"
        f"{'torch':>8}{'plan':>7}{'compiled':>10}"
    )
    for shape, mod in LINES:
        name, begun = f"{shape.name}, {mod}", deadline.taken
        ours = deadline.attempt(name, partial(flex_us, shape, mod, shape.options), needed=True)
        compiled = deadline.taken - begun
        if ours is None:
            continue
        by_hand = None
        if mod != "alibi":
            by_hand = deadline.attempt(
                f"{name}, by hand", partial(gqa_us, shape, mod), needed=False
            )
        torch_us = None
        if mod == "none":
            torch_us = deadline.attempt(
                f"{name}, torch's options", partial(flex_us, shape, mod, torch_options()),
                needed=False,
            )  # fmt: skip
        plan = deadline.attempt(f"{name}, plan", partial(plan_us, shape, mod), needed=False)
        floor = deadline.attempt(f"{name}, floor", partial(floor_us, shape, mod), needed=False)
        print(
            f"{name:24}{ours:8.1f}{shown(floor):>8}{f'{floor / ours:.0%}' if floor else '-':>7}"
            f"{shown(by_hand):>9}"
            f"{f'{ours / by_hand:.2f}' if by_hand else '-':>10}{shown(torch_us):>8}"
            f"{shown(plan):>7}{compiled:8.1f} s",
            flush=True,
        )


def torch_options() -> Options:
    """Whose numbers are not looked at."""
    return TorchOptions(splits=0, tile=0, tile_rows=0, warps=0, stages=0)


def shown(micros: float | None) -> str:
    return "-" if micros is None else f"{micros:.1f}"


SWEEP = [
    *((LARGE, mod) for mod in ("none", "soft cap", "alibi")),
    *((MIDDLE, mod) for mod in ("none", "alibi")),
    (SMALL, "none"),
]


def candidates(shape: Shape) -> Iterator[Options]:
    """The options that are taken, and their neighbours, the likeliest first."""
    ours = shape.options
    yield ours
    for factor in (0.5, 2, 0.67, 1.33):
        splits = round(factor * ours.splits)
        if splits not in (0, ours.splits):
            yield replace(ours, splits=splits)
    yield replace(ours, stages=4)


def sweep(deadline: Deadline) -> None:
    """Prints a line for each shape, mod and options, and the best of each shape and mod."""
    best: dict[str, tuple[float, Options]] = {}
    tried = [(rank, at, each) for at, (shape, _) in enumerate(SWEEP)
             for rank, each in enumerate(candidates(shape))]  # fmt: skip
    for _, at, options in sorted(tried, key=lambda entry: entry[:2]):
        if deadline.taken > deadline.seconds:
            print(f"{deadline.seconds:.0f} s are over, the rest is left out")
            break
        shape, mod = SWEEP[at]
        name = f"{shape.name}, {mod}"
        micros = deadline.attempt(
            f"{name} {options}", partial(flex_us, shape, mod, options), needed=False
        )
        if micros is not None:
            print(f"{name:22}{options} {micros:8.1f}", flush=True)
            if name not in best or micros < best[name][0]:
                best[name] = micros, options
    print("best")
    for name, (micros, options) in best.items():
        print(f"{name:22}{options} {micros:8.1f}")


def main() -> None:
    """Prints a table; exits with 1 where a line failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="time several options")
    parser.add_argument("--seconds", type=float, default=85, help="begin nothing after so long")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    deadline = Deadline(arguments.seconds)
    (sweep if arguments.sweep else table)(deadline)
    print(f"{deadline.taken:.0f} s")
    if deadline.failed:
        sys.exit(f"failed: {'; '.join(deadline.failed)}")


if __name__ == "__main__":
    main()
