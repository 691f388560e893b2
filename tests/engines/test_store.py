"""Prefill in one process, decode in another, the real daemon between: transformers' tokens."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engines.smollm2 import NEW_TOKENS, Reference  # noqa: E402
from engines.tiny import PROMPTS, reference, reference_margins  # noqa: E402

from kvstore import hash_chain  # noqa: E402
from kvstore_client import KVStoreClient  # noqa: E402
from kvstore_engines.jobs import EngineSpec, Job, Result  # noqa: E402
from kvstore_engines.launch import Workers  # noqa: E402
from kvstore_engines.layouts import layout_of  # noqa: E402

pytestmark = pytest.mark.engines

BLOCK = 16
BF16_MARGIN = 0.1  # above it the two best logits keep their order in bfloat16


def run(workers: Workers, engine: EngineSpec, prompts: list[list[int]], count: int) -> list[Result]:
    return workers.ask(Job(engine=engine, prompts=prompts, new_tokens=count))[0]


def whole_blocks(prompt: list[int]) -> int:
    """Tokens that can come from a store: one is always computed."""
    return (len(prompt) - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3", "deepseek_v3_yarn"])
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


def spoil(target: str, engine: EngineSpec, prompt: list[int]) -> None:
    """Puts zeros in the place of the prompt's blocks."""
    layout = layout_of(Path(engine.model), BLOCK, torch.float32)
    with KVStoreClient(target) as client:
        namespace = client.open_namespace(engine.namespace, layout)
        hashes = hash_chain(prompt, block_tokens=BLOCK, key=namespace.key)
        assert client.drop(namespace, hashes) == len(hashes)
        zeros = [np.zeros(layout.block_bytes, np.uint8)] * len(hashes)
        assert client.put(namespace, hashes, zeros).stored == len(hashes)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
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


def test_bfloat16_gives_the_same_tokens_while_the_choice_is_clear(
    tiny: Any, target: str, prefill: Workers, decode: Workers
) -> None:
    folder, _ = tiny("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    engine = EngineSpec(model=str(folder), target=target, dtype="bfloat16")
    prompts = [[(i * 31 + j * 7 + j * j) % 97 for j in range(40 + i)] for i in range(8)]
    run(prefill, engine, prompts, 1)
    compared = 0
    for prompt, result in zip(prompts, run(decode, engine, prompts, 20), strict=True):
        assert result.matched_tokens == whole_blocks(prompt)
        for token, (wanted, margin) in zip(
            result.token_ids, reference_margins(model, prompt, 20), strict=True
        ):
            if token != wanted:
                assert margin <= BF16_MARGIN
                break  # what follows is another text
            compared += margin > BF16_MARGIN
    assert compared >= 120


def test_a_store_that_has_gone_costs_a_miss(tiny: Any, tmp_path: Path, decode: Workers) -> None:
    from daemon import daemon

    folder, model = tiny("llama")
    with daemon(tmp_path, "--dram", "16MiB") as running:
        engine = EngineSpec(model=str(folder), target=running.target)
        assert run(decode, engine, [PROMPTS[3]], 1)[0].stored_blocks == 3
    result = run(decode, dataclasses.replace(engine), [PROMPTS[3]], 20)[0]
    assert result.token_ids == reference(model, PROMPTS[3], 20)
    assert (result.matched_tokens, result.stored_blocks) == (0, 0)
