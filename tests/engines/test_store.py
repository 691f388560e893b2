"""Prefill in one process, decode in another, the real daemon between: transformers' tokens."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engines.smollm2 import NEW_TOKENS, Reference  # noqa: E402
from engines.spoiling import spoil  # noqa: E402
from engines.tiny import PROMPTS, reference, reference_margins  # noqa: E402

from kvstore_engines.jobs import EngineSpec, Job, Result  # noqa: E402
from kvstore_engines.launch import Workers  # noqa: E402

pytestmark = pytest.mark.engines

BLOCK = 16
FAMILIES = ["llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "deepseek_v3_yarn"]
BF16_MARGIN = 0.1  # above it the two best logits keep their order in bfloat16


def run(workers: Workers, engine: EngineSpec, prompts: list[list[int]], count: int) -> list[Result]:
    return workers.ask(Job(engine=engine, prompts=prompts, new_tokens=count))[0]


def whole_blocks(prompt: list[int]) -> int:
    """Tokens that can come from a store: one is always computed."""
    return (len(prompt) - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("name", FAMILIES)
def test_another_process_decodes_what_one_has_prefilled(
    name: str, tiny: Any, target: str, prefill: Workers, decode: Workers
) -> None:
    folder, model = tiny(name)
    engine = EngineSpec(model=str(folder), target=target)
    first = run(prefill, engine, PROMPTS, 1)
    assert [r.stored_blocks for r in first] == [len(prompt) // BLOCK for prompt in PROMPTS]
    for prompt, result in zip(PROMPTS, run(decode, engine, PROMPTS, 20), strict=True):
        assert result.token_ids == reference(model, prompt, 20)
        assert result.matched_tokens == whole_blocks(prompt)
        assert result.tier == ("dram" if whole_blocks(prompt) else None)


def test_smollm2_too(smollm2: Reference, target: str, prefill: Workers, decode: Workers) -> None:
    engine = EngineSpec(model=str(smollm2.folder), target=target)
    run(prefill, engine, smollm2.prompts, 1)
    for i, result in enumerate(run(decode, engine, smollm2.prompts, NEW_TOKENS)):
        assert result.token_ids == smollm2.tokens[i]
        assert result.matched_tokens == whole_blocks(smollm2.prompts[i]) > 0
    spoil(target, engine, smollm2.prompts[0])
    result = run(decode, engine, smollm2.prompts[:1], NEW_TOKENS)[0]
    assert result.matched_tokens == whole_blocks(smollm2.prompts[0])
    assert result.token_ids != smollm2.tokens[0]


def test_a_next_turn_finds_what_was_decoded(
    tiny: Any, target: str, prefill: Workers, decode: Workers
) -> None:
    folder, model = tiny("llama")
    engine = EngineSpec(model=str(folder), target=target, namespace="turns")
    answer = run(prefill, engine, [PROMPTS[2]], 30)[0]
    turn = [*PROMPTS[2], *answer.token_ids, 3, 1, 4, 1, 5]
    result = run(decode, engine, [turn], 10)[0]
    assert result.matched_tokens == 64  # of 37 + 30 tokens; the last one was never fed back
    assert result.token_ids == reference(model, turn, 10)


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3"])
def test_what_was_got_is_what_is_attended_to(
    name: str, tiny: Any, target: str, prefill: Workers, decode: Workers
) -> None:
    folder, model = tiny(name)
    engine = EngineSpec(model=str(folder), target=target, namespace="spoiled")
    run(prefill, engine, [PROMPTS[3]], 1)
    spoil(target, engine, PROMPTS[3])
    result = run(decode, engine, [PROMPTS[3]], 20)[0]
    assert result.matched_tokens == whole_blocks(PROMPTS[3])
    assert result.token_ids != reference(model, PROMPTS[3], 20)


def compare_bfloat16(
    folder: Path,
    prompts: list[list[int]],
    target: str,
    prefill: Workers,
    decode: Workers,
    new_tokens: int = 20,
) -> int:
    """How many clear choices of transformers in bfloat16 were followed, after the store's hits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    engine = EngineSpec(model=str(folder), target=target, dtype="bfloat16")
    run(prefill, engine, prompts, 1)
    clear = 0
    for prompt, result in zip(prompts, run(decode, engine, prompts, new_tokens), strict=True):
        assert result.matched_tokens == whole_blocks(prompt) > 0
        wanted = reference_margins(model, prompt, len(result.token_ids))
        for token, (best, margin) in zip(result.token_ids, wanted, strict=True):
            if token != best:
                assert margin <= BF16_MARGIN
                break  # what follows is another text
            clear += margin > BF16_MARGIN
    return clear


# Without routed experts: a rounding that picks another expert moves logits by more than any
# margin, in transformers too (4.2 between its own bfloat16 and float32, for this tiny model).
@pytest.mark.parametrize(
    ("name", "clear"), [("llama", 140), ("qwen3", 130), ("deepseek_v3_dense", 100)]
)
def test_bfloat16_gives_the_same_tokens_while_the_choice_is_clear(
    name: str, clear: int, tiny: Any, target: str, prefill: Workers, decode: Workers
) -> None:
    prompts = [[(i * 31 + j * 7 + j * j) % 97 for j in range(40 + i)] for i in range(8)]
    assert compare_bfloat16(tiny(name)[0], prompts, target, prefill, decode) >= clear


def test_smollm2_in_bfloat16_too(
    smollm2: Reference, target: str, prefill: Workers, decode: Workers
) -> None:
    prompt = smollm2.prompts[0]
    assert compare_bfloat16(smollm2.folder, [prompt], target, prefill, decode, new_tokens=8) >= 6
