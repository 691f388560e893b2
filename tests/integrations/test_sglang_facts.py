"""Which of SGLang's engines share pages: those where nothing that makes their bytes differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integrations.sglang_double import RELEASE, StorageConfig, save_weights
from integrations.sglang_pool import HostPool

from kvstore_integrations.settings import ConfigurationError
from kvstore_integrations.sglang.facts import identity_of
from kvstore_integrations.sglang.pages import PageForm
from kvstore_integrations.sglang.settings import PageSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "model")


def namespace(
    arguments: dict[str, Any],
    pool: HostPool | None = None,
    *,
    release: str = RELEASE,
    model_revision: str = "",
    **ranks: Any,
) -> str:
    pool = pool or HostPool(32)
    form = PageForm(tokens=pool.page_size, pieces=pool.pieces)
    return identity_of(
        arguments,
        StorageConfig(**ranks),
        pool,
        form,
        release=release,
        model_revision=model_revision,
    ).namespace("default")


def arguments(model: Path, **others: Any) -> dict[str, Any]:
    return {"model_path": str(model), "dtype": "auto", "attention_backend": "fa3", **others}


def test_equal_engines_share(model: Path, tmp_path: Path) -> None:
    same = save_weights(tmp_path / "model")
    assert namespace(arguments(model)) == namespace(arguments(same, mem_fraction_static=0.5))


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "float16"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"quantization": "fp8"},
        {"json_model_override_args": '{"rope_scaling": {}}'},
        {"attention_backend": "flashinfer"},
        {"load_format": "dummy"},
        {"weight_version": "step-2"},
        {"device": "cpu"},
    ],
)
def test_engines_that_compute_otherwise_share_nothing(model: Path, other: dict[str, Any]) -> None:
    assert namespace(arguments(model)) != namespace(arguments(model, **other))


@pytest.mark.parametrize(
    "pool",
    [
        HostPool(32, page_size=32),
        HostPool(32, layout="layer_first"),
        HostPool(32, layout="page_head"),
        HostPool(32, dtype="torch.bfloat16"),
        HostPool(32, start_layer=4, end_layer=8),
        HostPool(32, head_num=4, head_dim=32, v_head_dim=32),
        HostPool(32, latent=1024),
    ],
)
def test_pages_that_lie_otherwise_or_hold_another_part_are_others(
    model: Path, pool: HostPool
) -> None:
    assert namespace(arguments(model)) != namespace(arguments(model), pool)


def test_ranks_share_latents_but_not_heads(model: Path) -> None:
    ranks = [{"tp_rank": 0, "tp_size": 2}, {"tp_rank": 1, "tp_size": 2}, {}]
    heads = {namespace(arguments(model), **each) for each in ranks}
    latents = {namespace(arguments(model), is_mla_model=True, **each) for each in ranks}
    assert (len(heads), len(latents)) == (3, 1)


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("kind", ["pp", "attn_cp"])
def test_ranks_of_layers_and_of_parts_of_the_context_share_nothing(
    model: Path, kind: str, mla: bool
) -> None:
    names = {
        namespace(arguments(model), is_mla_model=mla, **{f"{kind}_rank": i, f"{kind}_size": 2})
        for i in range(2)
    }
    assert len(names) == 2


def test_releases_of_sglang_share_nothing(model: Path) -> None:
    assert namespace(arguments(model)) != namespace(arguments(model), release="0.5.24")


def test_weights_are_told_by_content_or_by_the_revision_that_is_set(
    model: Path, tmp_path: Path
) -> None:
    other = save_weights(tmp_path / "model", content=b"others")
    assert namespace(arguments(model)) != namespace(arguments(other))
    one, two = [namespace(arguments(model), model_revision=each) for each in ("1", "2")]
    assert one != two
    assert one == namespace(arguments(other), model_revision="1")


def test_a_model_of_the_hub_is_told_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    told = arguments(Path("org/model"), revision="main")
    with pytest.raises(ConfigurationError, match="Set `model_revision`"):
        namespace(told)
    names = set()
    for commit in ("a" * 40, "b" * 40):
        folder = tmp_path / "models--org--model"
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        names.add(namespace(told))
    assert len(names) == 2


def test_adapters_are_told_by_content(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    told = arguments(model, lora_paths=[{"lora_name": "a", "lora_path": str(folder)}])
    with pytest.raises(ConfigurationError, match="Set `model_revision`"):
        namespace(told)
    names = {namespace(arguments(model))}
    for weights in (b"1", b"2"):
        (folder / "adapter_model.safetensors").write_bytes(weights)
        names.add(namespace(told))
    names.add(namespace(told, model_revision="1"))
    assert len(names) == 4


def test_a_draft_model_and_scales_are_part_of_it(model: Path, tmp_path: Path) -> None:
    draft = save_weights(tmp_path / "draft", content=b"others")
    scales = tmp_path / "scales.json"
    names = {namespace(arguments(model))}
    names.add(namespace(arguments(model, speculative_draft_model_path=str(draft))))
    for text in ("1", "2"):
        scales.write_text(text)
        names.add(namespace(arguments(model, quantization_param_path=str(scales))))
    assert len(names) == 4


# -- settings --------------------------------------------------------------------------


def test_what_sglang_reads_itself_is_no_setting_of_ours() -> None:
    raw = {
        "backend_name": "kvstore",
        "module_path": "m",
        "class_name": "c",
        "interface_v1": 1,
        "allocator": "shm",
        "file_storage_path": "/x",
        "tenant": "t",
        "ttl_s": 60,
    }
    read = PageSettings.of_backend(raw)
    assert (read.tenant, read.ttl_s) == ("t", 60)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, 'add "interface_v1": 1'),
        ({"interface_v1": 0}, 'add "interface_v1": 1'),
        ({"interface_v1": 1, "tagret": "x"}, "extra-config: tagret: .* Known are: target, token"),
        ({"interface_v1": 1, "tenant": "a/b"}, "tenant: "),
        ({"interface_v1": 1, "ttl_s": 0}, "ttl_s: "),
    ],
)
def test_a_wrong_setting_is_named(raw: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PageSettings.of_backend(raw)
