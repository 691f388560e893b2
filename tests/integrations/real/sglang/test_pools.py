"""SGLang's own host memory pools with our backend: their pages come back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.real.sglang import cpu_copies
from integrations.sglang_double import StorageConfig, save_weights
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

from daemon import Daemon, daemon
from kvstore_integrations.settings import ConfigurationError
from kvstore_integrations.sglang import storage

PAGE, PAGES = 16, 12
LAYOUTS = ("layer_first", "page_first", "page_first_direct")


def heads(layout: str, **of_device: Any) -> Any:
    """A pool of keys and values."""
    device = MHATokenToKVPool(
        size=PAGE * 4,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=2,
        head_dim=32,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
        **of_device,
    )
    info = device.get_device_pool_infos()[0].buffer_info
    return get_mha_host_pool_cls(info)(info, 3.0, 0, PAGE, layout, **_sizes(device))


def latents(layout: str) -> Any:
    """A pool of MLA's latents."""
    device = MLATokenToKVPool(
        size=PAGE * 4,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_lora_rank=48,
        qk_rope_head_dim=16,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
    )
    info = device.get_device_pool_infos()[0].buffer_info
    sizes = _sizes(device)
    return MLATokenToKVPoolHost(info, 3.0, 0, PAGE, layout, target_layer_num=3, **sizes)


def _sizes(device: Any) -> dict[str, Any]:
    return {
        "device_capacity_tokens": device.size,
        "start_layer": device.start_layer,
        "end_layer": device.end_layer,
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("server"), "--dram", "64MiB") as running:
        yield running


@pytest.fixture(autouse=True)
def arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a running server has told the process."""
    told = {"model_path": str(save_weights(tmp_path / "model", content=bytes(tmp_path)))}
    args = SimpleNamespace(resolved_dict=lambda: told)
    monkeypatch.setattr(storage, "get_server_args", lambda: args)
    monkeypatch.setattr(storage, "get_serving", lambda: SimpleNamespace(weight_version="1"))


def attached(server: Daemon, pool: Any, **ranks: Any) -> Any:
    config = StorageConfig(extra_config={"interface_v1": 1, "target": server.target}, **ranks)
    backend = storage.KVStoreHiCache(config, {})
    backend.register_mem_pool_host(pool)
    return backend


def indices(pages: list[int]) -> torch.Tensor:
    return (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()


@pytest.mark.parametrize(
    ("make", "layout", "pieces"),
    [
        *[(heads, layout, 6 if layout == "layer_first" else 2) for layout in LAYOUTS],
        (heads, "page_head", 2),
        *[(latents, layout, 3 if layout == "layer_first" else 1) for layout in LAYOUTS],
    ],
)
def test_pages_come_back_as_they_were(server: Daemon, make: Any, layout: str, pieces: int) -> None:
    first, second = make(layout), make(layout)
    for pool in (first, second):
        pool.kv_buffer.view(torch.uint8).random_(0, 256)
    keys = [f"{i:064x}" for i in range(1, 8)]
    source, target = [3, 0, 5, 9, 1, 8, 2], [7, 6, 0, 1, 2, 9, 4]
    one, two = attached(server, first), attached(server, second)
    assert len(one._pages._form.pieces) == pieces
    untouched = second.get_data_page(3 * PAGE).clone()
    assert one.batch_set_v1(keys, indices(source)) == [True] * 7
    assert two.batch_exists(keys) == 7
    assert two.batch_get_v1(keys, indices(target)) == [True] * 7
    for a, b in zip(source, target, strict=True):
        x, y = first.get_data_page(a * PAGE), second.get_data_page(b * PAGE)
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    assert torch.equal(
        untouched.view(torch.uint8), second.get_data_page(3 * PAGE).view(torch.uint8)
    )
    one.close()
    two.close()


def test_pages_of_keys_wider_than_values_come_back_as_they_were(server: Daemon) -> None:
    """These pools have no flat pages to compare, so their buffers are."""
    first, second = [heads("page_first", v_head_dim=16) for _ in range(2)]
    for pool in (first, second):
        for buffer in (pool.k_buffer, pool.v_buffer):
            buffer.view(torch.uint8).random_(0, 256)
    keys, pages = [f"{i:064x}" for i in range(1, PAGES)], list(range(PAGES - 1))
    one, two = attached(server, first), attached(server, second)
    assert one.batch_set_v1(keys, indices(pages)) == [True] * len(keys)
    assert two.batch_get_v1(keys, indices(pages)) == [True] * len(keys)
    n = len(pages) * PAGE
    for name in ("k_buffer", "v_buffer"):
        a, b = getattr(first, name)[:n], getattr(second, name)[:n]
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    one.close()
    two.close()


def test_layouts_share_nothing(server: Daemon) -> None:
    keys = [f"{i:064x}" for i in range(1, 3)]
    backends = [attached(server, heads(layout)) for layout in (*LAYOUTS, "page_head")]
    backends += [attached(server, latents(layout), is_mla_model=True) for layout in LAYOUTS]
    assert backends[0].batch_set_v1(keys, indices([0, 1])) == [True, True]
    assert [one.batch_exists(keys) for one in backends] == [2] + [0] * 6
    for one in backends:
        one.close()


def test_a_layout_that_has_no_addresses_fails_at_start(server: Daemon) -> None:
    with pytest.raises(ConfigurationError, match=r"page_unified.* --hicache-mem-layout"):
        attached(server, heads("page_unified"))


def test_the_stand_in_copies_pages_as_they_are() -> None:
    """`cpu_copies` is what the tests of whole engines rest on."""
    device, host = torch.arange(64.0).view(64, 1, 1), torch.zeros(4, 1, PAGE, 1, 1)
    layers, back = [device], [torch.zeros_like(device)]
    rows, places = indices([2, 0]), indices([1, 3])
    cpu_copies.copy_out(layers, [host], rows, places, PAGE)
    cpu_copies.copy_in([host], back, places, rows, 0, PAGE)
    assert torch.equal(back[0][rows], device[rows])
