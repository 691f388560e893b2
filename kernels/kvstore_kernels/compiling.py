"""Kernels compiled without a GPU, for what the compiler says of them: registers, spills, memory.

Each launcher's file, or one beside it, lists the specialisations that it uses as `variants()`.
Works with Triton 3.6 and later; `python -m kvstore_kernels.compiling` prints one JSON object of
all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = (
    "collate",
    "experts",
    "gqa_variants",
    "mla_decode",
    "mla_gluon",
    "mla_ring",
    "step",
    "xxh3",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One specialisation of a kernel, as its launcher would have it compiled.

    signature: Triton's type of each argument that is no constant ("*bf16", "i32", ...).
    constants: the tl.constexpr arguments. aligned: arguments divisible by 16, as pointers of torch
    are. options: num_warps, num_stages, maxnreg. gluon: written in Gluon. max_registers,
    max_spills, max_shared_bytes: bounds that a test holds the compiler to.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    gluon: bool = False
    max_registers: int = 255
    max_spills: int = 0
    max_shared_bytes: int = 232_448  # what a block of an H100 or H200 may have


@dataclass(frozen=True, slots=True)
class Usage:
    """What one variant needs: registers and bytes spilled a thread, shared memory a block."""

    registers: int
    spills: int
    shared_bytes: int


def compile_for(variant: Variant, capability: int = 90) -> Usage:
    """Compiles for a GPU of that compute capability (90: H100, H200); no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = list(variant.kernel.arg_names)
    signature = {n: variant.signature.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): value for n, value in variant.constants.items()}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned}
    source = (GluonASTSource if variant.gluon else ASTSource)(
        variant.kernel, signature, constants, attrs
    )
    options = {"enable_fp_fusion": True, **variant.options}  # Triton warns where it is not said
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    return Usage(registers, spills, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes spilled) of one thread, as the binary says."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(part.split(":")[:2] for part in printed.split() if part.count(":") == 1)
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def variants() -> Iterator[Variant]:
    """Of all kernels."""
    for name in MODULES:
        listed: Callable[[], Iterator[Variant]] = import_module(f"kvstore_kernels.{name}").variants
        yield from listed()


def main() -> None:
    """Prints {variant: {registers, spills, shared_bytes}}; fails when one is over its bounds."""
    import triton

    result: dict[str, Any] = {"triton": triton.__version__}
    over = []
    for variant in variants():
        usage = compile_for(variant)
        result[variant.name] = {
            "registers": usage.registers,
            "spills": usage.spills,
            "shared_bytes": usage.shared_bytes,
        }
        if (
            usage.registers > variant.max_registers
            or usage.spills > variant.max_spills
            or usage.shared_bytes > variant.max_shared_bytes
        ):
            over.append(variant.name)
    print(json.dumps(result, indent=2))
    if over:
        sys.exit(f"over their bounds: {', '.join(over)}")


if __name__ == "__main__":
    main()
