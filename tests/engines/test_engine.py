"""The engine gives transformers' greedy tokens, with and without a store."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engines.fakes import FakeBlockStore, NotingAttention  # noqa: E402
from engines.smollm2 import NEW_TOKENS, Reference  # noqa: E402
from engines.tiny import MODELS, PROMPTS, reference, save_tiny  # noqa: E402

from kvstore.errors import InvalidArgument  # noqa: E402
from kvstore_engines.engine import Engine  # noqa: E402
from kvstore_engines.store_port import GetResult  # noqa: E402

pytestmark = pytest.mark.engines


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_transformers_greedy(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path)
    engine = Engine(tmp_path, store=None, num_pages=12)
    results = engine.generate(PROMPTS, 20)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == reference(model, prompt, 20)
        assert (result.matched_tokens, result.tier, result.stored_blocks) == (0, None, 0)
    assert engine.pool.free_pages == 12


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_prefix_comes_from_the_store(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    plain = Engine(tmp_path, store=None, num_pages=8).generate([PROMPTS[3]], 20)[0]
    store = FakeBlockStore(16)
    first = Engine(tmp_path, store=store, num_pages=8).generate([PROMPTS[3]], 20)[0]
    second = Engine(tmp_path, store=store, num_pages=8).generate([PROMPTS[3]], 20)[0]
    assert plain.token_ids == first.token_ids == second.token_ids
    assert (first.matched_tokens, first.stored_blocks) == (0, 4)  # three of the prompt, one decoded
    assert (second.matched_tokens, second.tier, second.stored_blocks) == (48, "fake", 0)
    assert [position for _, _, position in store.puts] == [0, 3, 3]  # what was got is not put
    store.zero()
    spoiled = Engine(tmp_path, store=store, num_pages=8).generate([PROMPTS[3]], 20)[0]
    assert spoiled.matched_tokens == 48
    assert spoiled.token_ids != plain.token_ids


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_only_what_was_not_matched_is_computed(name: str, tiny: Any) -> None:
    folder = tiny(name)[0]
    store, prompt = FakeBlockStore(16), PROMPTS[3]
    for computed in (50, 2):  # of 50 tokens, 48 are full blocks
        noted = NotingAttention()
        Engine(folder, store=store, num_pages=8, attention=noted).generate([prompt], 3)
        assert noted.passes == [[(computed, 50)], [(1, 51)], [(1, 52)]]


def test_requests_join_those_that_run_and_wait_for_pages(tiny: Any) -> None:
    folder, model = tiny("llama")
    noted = NotingAttention()
    engine = Engine(folder, store=None, num_pages=7, attention=noted)
    done = {}
    wanted = [(PROMPTS[2], 9), (PROMPTS[1], 4), (PROMPTS[3], 3)]  # 3, 2 and 4 pages
    ids = []
    for prompt, count in wanted:
        ids.append(engine.submit(prompt, count))
        done.update((r.request_id, r) for r in engine.step())
    while engine.busy:
        done.update((r.request_id, r) for r in engine.step())
    for request_id, (prompt, count) in zip(ids, wanted, strict=True):
        assert done[request_id].token_ids == reference(model, prompt, count)
    assert noted.passes == [
        [(37, 37)],
        [(16, 16)],
        [(1, 38)],
        [(1, 39), (1, 17)],  # the third request waits: two pages are free
        [(1, 40), (1, 18)],
        [(1, 41), (1, 19)],  # the second has all its tokens
        [(50, 50)],
        [(1, 42)],
        [(1, 43), (1, 51)],
        [(1, 44), (1, 52)],
        [(1, 45)],
    ]
    assert engine.pool.free_pages == 7


@pytest.mark.parametrize("many", [False, True])
def test_a_sequence_ends_itself_as_in_transformers(many: bool, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    end = reference(model, PROMPTS[3], 20)[6]
    ends = [96, end] if many else end
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model.generation_config.eos_token_id = ends
    wanted = reference(model, PROMPTS[3], 20)
    assert len(wanted) <= 7
    engine = Engine(tmp_path, store=None, num_pages=8)
    assert engine.generate([PROMPTS[3]], 20)[0].token_ids == wanted
    assert engine.pool.free_pages == 8


def test_one_prompt_token_is_always_computed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    store = FakeBlockStore(16)
    for _ in range(2):
        result = Engine(tmp_path, store=store, num_pages=8).generate([PROMPTS[1] * 2], 4)[0]
    assert (result.prompt_tokens, result.matched_tokens) == (32, 16)


def test_a_broken_store_is_a_miss(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    plain = Engine(tmp_path, store=None, num_pages=8).generate([PROMPTS[3]], 20)[0]
    broken = FakeBlockStore(16, broken=True)
    result = Engine(tmp_path, store=broken, num_pages=8).generate([PROMPTS[3]], 20)[0]
    assert result.token_ids == plain.token_ids
    assert (result.matched_tokens, result.stored_blocks) == (0, 0)


class LyingStore(FakeBlockStore):
    """A store that claims more than it was asked for, or less than nothing."""

    claimed = 0

    def get_into(
        self, hashes: NDArray[np.uint8], destinations: Sequence[NDArray[np.uint8]]
    ) -> GetResult:
        return GetResult(self.claimed, "fake")


@pytest.mark.parametrize("claimed", [-1, 0, 4])
def test_a_store_that_claims_the_impossible_is_a_miss(claimed: int, tiny: Any) -> None:
    folder, model = tiny("llama")
    store = LyingStore(16)
    store.claimed = claimed
    result = Engine(folder, store=store, num_pages=8).generate([PROMPTS[3]], 20)[0]
    assert result.token_ids == reference(model, PROMPTS[3], 20)
    assert (result.matched_tokens, result.tier) == (0, None)


def test_page_bytes_are_the_block_layout(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    engine = Engine(tmp_path, store=None, num_pages=2, dtype=torch.bfloat16)
    assert engine.pool.storage.shape == (2, 2, 3, 2, 16, 8)
    view = engine.pool.rows_of([1])[0]
    view[:] = np.arange(view.size, dtype=np.uint32).astype(np.uint8)
    block = engine.pool.storage[1].contiguous().view(torch.uint8).numpy().reshape(-1)
    assert view.size == 2 * 3 * 2 * 16 * 8 * 2
    assert np.array_equal(block, view)


def test_smollm2_equals_transformers(smollm2: Reference) -> None:
    results = Engine(smollm2.folder, store=None, num_pages=8).generate(smollm2.prompts, NEW_TOKENS)
    assert [result.token_ids for result in results] == smollm2.tokens


def test_each_block_is_hashed_once_and_put_with_its_place(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    store = FakeBlockStore(16)
    engine = Engine(tmp_path, store=store, num_pages=8)
    result = engine.generate([PROMPTS[3]], 31)[0]
    assert result.stored_blocks == 5  # 80 of the 50 + 31 tokens
    assert store.hashed_tokens == 80
    whole = store.chain([*PROMPTS[3], *result.token_ids])
    assert sorted(store.blocks) == sorted(key.tobytes() for key in whole)
    places = [(parent, position) for _, parent, position in store.puts]
    assert places == [(b"", 0), (whole[2].tobytes(), 3), (whole[3].tobytes(), 4)]
    assert len({put_id for put_id, _, _ in store.puts}) == 3
    assert all(len(put_id) == 16 for put_id, _, _ in store.puts)


def test_the_store_is_told_of_a_session_that_ends_and_of_no_other(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    store = FakeBlockStore(16)
    engine = Engine(tmp_path, store=store, num_pages=8)
    engine.generate([PROMPTS[2]], 20)
    assert store.ended == []
    result = engine.generate([PROMPTS[3]], 20, session_ends=True)[0]
    whole = store.chain([*PROMPTS[3], *result.token_ids])
    assert store.ended == [key.tobytes() for key in whole]
    store.broken = True
    assert engine.generate([PROMPTS[3]], 20, session_ends=True)[0].token_ids == result.token_ids


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "field"),
    [
        ([], 1, "prompt_ids"),
        ([1], 0, "max_new_tokens"),
        ([97], 1, "prompt_ids"),
        ([-1], 1, "prompt_ids"),
        ([1] * 200, 57, "prompt_ids"),
        ([1] * 120, 40, "num_pages"),
    ],
)
def test_an_impossible_request_names_its_field(
    prompt: list[int], new_tokens: int, field: str, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path)
    engine = Engine(tmp_path, store=None, num_pages=8)
    with pytest.raises(InvalidArgument) as raised:
        engine.submit(prompt, new_tokens)
    assert raised.value.field == field
    assert not engine.busy


def test_an_impossible_request_among_others_queues_none(tiny: Any) -> None:
    engine = Engine(tiny("llama")[0], store=None, num_pages=8)
    with pytest.raises(InvalidArgument, match="prompt_ids"):
        engine.generate([PROMPTS[2], []], 4)
    assert not engine.busy


@pytest.mark.parametrize("field", ["num_pages", "block_tokens"])
def test_an_engine_without_room_is_refused(field: str, tiny: Any) -> None:
    with pytest.raises(InvalidArgument) as raised:
        Engine(tiny("llama")[0], store=None, **{"num_pages": 8, field: 0})
    assert raised.value.field == field


def test_the_last_token_needs_no_page(tiny: Any) -> None:
    folder, model = tiny("llama")
    engine = Engine(folder, store=None, num_pages=2)  # 32 tokens: 16 of the prompt, 16 fed back
    assert engine.generate([PROMPTS[1]], 17)[0].token_ids == reference(model, PROMPTS[1], 17)
    with pytest.raises(InvalidArgument, match=r"num_pages: .* 3 pages"):
        engine.submit(PROMPTS[1], 18)
    engine = Engine(folder, store=None, num_pages=3)
    assert engine.generate([PROMPTS[1]], 18)[0].token_ids == reference(model, PROMPTS[1], 18)
