"""Pages against the store's layout, and the adapter against the embedded store."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engines.fakes import FakeBlockStore  # noqa: E402
from engines.tiny import PROMPTS  # noqa: E402

from kvstore import Attention, KVStore, Layout, hash_chain  # noqa: E402
from kvstore.errors import InvalidArgument  # noqa: E402
from kvstore_engines.adapter import SessionStore  # noqa: E402
from kvstore_engines.engine import Engine  # noqa: E402
from kvstore_engines.layouts import layout_of  # noqa: E402
from kvstore_engines.parallel import SingleRank  # noqa: E402

pytestmark = pytest.mark.engines

PUT_ID = bytes(range(16))
LAYOUT = Layout(
    model="m",
    attention=Attention.GQA,
    layers=2,
    kv_heads=3,
    head_dim=4,
    dtype="float32",
    block_tokens=4,
)
CELL_BYTES = LAYOUT.block_bytes // 3


@pytest.fixture
def store() -> Iterator[KVStore]:
    with KVStore(dram=1 << 20) as embedded:
        yield embedded
        embedded.check()


class OneRank(SingleRank):
    """A rank that holds some heads and meets nobody."""

    def __init__(self, heads: range) -> None:
        self._heads = heads

    def kv_heads(self, total: int) -> range:
        return self._heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "deepseek_v2", "deepseek_v3"])
def test_a_page_has_the_bytes_of_a_block(name: str, dtype: Any, tiny: Any) -> None:
    folder = tiny(name)[0]
    layout = layout_of(folder, 16, dtype)
    engine = Engine(folder, store=None, num_pages=1, dtype=dtype)
    assert engine.pool.page_nbytes == layout.block_bytes
    latent = name.startswith("deepseek")
    assert layout.attention is (Attention.MLA if latent else Attention.GQA)
    assert layout.n_cells == (1 if latent else 2)


def block_of_transformers(cache: Any, index: int) -> Any:
    """What the store's layout says of a block, from transformers' cache of the same tokens."""
    here = slice(index * 16, index * 16 + 16)
    keys, values = (
        torch.stack([getattr(layer, part)[0, :, here] for layer in cache.layers])
        for part in ("keys", "values")
    )
    if keys.shape != values.shape:  # a latent and its rotated key, [layers, 1, 16, width]
        return torch.cat((keys, values), dim=-1)[:, 0]
    return torch.stack((keys, values), dim=2).transpose(0, 1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3"])
def test_a_block_holds_what_transformers_caches(name: str, tiny: Any) -> None:
    folder, model = tiny(name)
    store = FakeBlockStore(16)
    result = Engine(folder, store=store, num_pages=8).generate([PROMPTS[3]], 31)[0]
    tokens = [*PROMPTS[3], *result.token_ids]
    with torch.inference_mode():
        cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    chain = store.chain(tokens)
    assert len(store.blocks) == len(chain) == 5  # three of the prompt, two completed by decoding
    for i, key in enumerate(chain):
        wanted = block_of_transformers(cache, i)
        block = torch.from_numpy(store.blocks[key.tobytes()]).view(torch.float32)
        torch.testing.assert_close(block.view(wanted.shape), wanted, atol=1e-4, rtol=1e-4)


def test_layouts_differ_by_model_dtype_and_block(tiny: Any) -> None:
    llama, qwen3 = tiny("llama")[0], tiny("qwen3")[0]
    layouts = {
        layout_of(folder, tokens, dtype)
        for folder in (llama, qwen3)
        for tokens in (16, 32)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(layouts) == 8
    with pytest.raises(InvalidArgument, match="dtype"):
        layout_of(llama, 16, torch.float64)


def test_a_rank_has_its_heads_cells_of_the_page(tiny: Any) -> None:
    folder = tiny("llama")[0]
    layout = layout_of(folder, 16, torch.float32)
    whole = Engine(folder, store=None, num_pages=4)
    whole.generate([PROMPTS[2]], 1)
    for heads in (range(1), range(1, 2)):
        rank = Engine(folder, store=None, num_pages=4, parallel=OneRank(heads))
        cells = [layout.cells[i] for i in layout.cells_of(heads=heads)]
        assert rank.pool.page_nbytes == sum(cell.nbytes for cell in cells)


def test_ranks_make_one_block_and_get_their_own_cells(store: KVStore) -> None:
    parts = [SessionStore(store, "n", LAYOUT, heads) for heads in (range(1), range(1, 3))]
    whole = SessionStore(store, "n", LAYOUT)
    chain = whole.chain(range(8))
    block = np.random.default_rng(3).integers(0, 256, (2, LAYOUT.block_bytes), np.uint8)
    shares = [list(block[:, :CELL_BYTES].copy()), list(block[:, CELL_BYTES:].copy())]
    destinations = [np.zeros(LAYOUT.block_bytes, np.uint8) for _ in range(2)]
    assert parts[0].put(chain, shares[0], put_id=PUT_ID) == 2
    assert whole.get_into(chain, destinations).n_hit == 0  # the other rank's cells are missing
    assert parts[1].put(chain, shares[1], put_id=PUT_ID) == 2
    found = whole.get_into(chain, destinations)
    assert (found.n_hit, found.tier) == (2, "dram")
    assert np.array_equal(destinations, block)
    got = [np.zeros(2 * CELL_BYTES, np.uint8) for _ in range(2)]
    assert parts[1].get_into(chain, got).n_hit == 2
    assert np.array_equal(got, block[:, CELL_BYTES:])
    assert parts[0].put(chain, shares[0], put_id=bytes(16)) == 0  # there already


def test_a_chain_goes_on_where_it_was_left(store: KVStore) -> None:
    adapter = SessionStore(store, "n", LAYOUT)
    whole = adapter.chain(range(12))
    rest = adapter.chain(range(4, 12), whole[0].tobytes())
    assert np.array_equal(np.concatenate((whole[:1], rest)), whole)
    key = store.open_namespace("n", LAYOUT).key
    assert np.array_equal(whole, hash_chain(range(12), block_tokens=4, key=key))


def test_blocks_of_a_session_that_ended_are_evicted_first(store: KVStore) -> None:
    layout = Layout.opaque(model="m", block_bytes=60_000, block_tokens=1)
    adapter = SessionStore(store, "n", layout)
    block = np.ones(layout.block_bytes, np.uint8)
    chains = [adapter.chain([i]) for i in range(40)]
    for chain in chains[:8]:
        assert adapter.put(chain, [block], put_id=PUT_ID) == 1
    adapter.hint_session_ends(chains[5])
    count = 8
    while not store.stats().evicted:
        assert adapter.put(chains[count], [block], put_id=PUT_ID) == 1
        count += 1
    found = [adapter.get_into(chain, [block.copy()]).n_hit for chain in chains[:count]]
    assert [i for i, n_hit in enumerate(found) if not n_hit] == [5]
