"""Ranks that put their heads' cells to a cluster of real nodes, and read them from there."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from cluster.nodes import nodes  # noqa: E402
from engines.tiny import PROMPTS, reference  # noqa: E402

from kvstore_engines.jobs import EngineSpec, Job  # noqa: E402
from kvstore_engines.launch import workers  # noqa: E402
from kvstore_proto.cluster.rpc import client_token  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.long]
TIMEOUT_S = 60.0


def test_what_two_ranks_put_to_a_cluster_is_read_by_one_and_by_two(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tiny("llama")
    with nodes(tmp_path, 2, "--transfer", "grpc", replicas=2) as running:
        monkeypatch.setenv("KVSTORE_CLUSTER_TOKEN", client_token(running.secret))
        target = f"cluster://{','.join(running.seeds)}?transfer=grpc"
        whole = EngineSpec(model=str(folder), target=target, namespace="ranks")
        split = dataclasses.replace(whole, split=(1, 1))
        with workers(2, timeout_s=TIMEOUT_S) as two, workers(timeout_s=TIMEOUT_S) as one:
            for to, spec, matched in ((two, split, 0), (one, whole, 48), (two, split, 48)):
                job = Job(engine=spec, prompts=[PROMPTS[3]], new_tokens=20)
                for (result,) in to.ask(job):
                    assert result.token_ids == reference(model, PROMPTS[3], 20)
                    assert result.matched_tokens == matched
        stats = [running.local(name).stats() for name in running.names]
        assert [each.blocks for each in stats] == [4, 4]
        assert not any(each.pending_blocks for each in stats)
