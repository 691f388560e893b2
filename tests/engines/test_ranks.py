"""Tensor parallelism: ranks share one model and one put, and give transformers' tokens."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engines.fakes import FakeBlockStore  # noqa: E402
from engines.smollm2 import NEW_TOKENS, Reference  # noqa: E402
from engines.spoiling import corrupt, spoil  # noqa: E402
from engines.tiny import PROMPTS, reference  # noqa: E402

from kvstore.errors import InvalidArgument  # noqa: E402
from kvstore_engines.engine import Engine  # noqa: E402
from kvstore_engines.jobs import EngineSpec, Job, Result, WorkerError  # noqa: E402
from kvstore_engines.launch import Workers, workers  # noqa: E402
from kvstore_engines.parallel import SingleRank, even_share, share_of_heads  # noqa: E402

pytestmark = pytest.mark.engines

HALVES = (1, 1)
QUERY_HALVES = (2, 2)  # latent attention has no key/value heads to split, but four of queries
ONE_AND_TWO = (1, 2)


def ask(to: Workers, engine: EngineSpec, prompts: list[list[int]], count: int) -> list[Result]:
    """The ranks' common results; what they stored is rank 0's."""
    answers = to.ask(Job(engine=engine, prompts=prompts, new_tokens=count))
    for other in answers[1:]:
        assert [r.token_ids for r in other] == [r.token_ids for r in answers[0]]
        assert [r.matched_tokens for r in other] == [r.matched_tokens for r in answers[0]]
        assert [r.stored_blocks for r in other] in (
            [r.stored_blocks for r in answers[0]],
            [0] * len(prompts),  # of latent attention rank 0 puts, and nobody else
        )
    return answers[0]


def halves(name: str) -> tuple[int, int]:
    return QUERY_HALVES if name.startswith("deepseek") else HALVES


@pytest.mark.parametrize(
    "name", ["llama", "llama3", "qwen2", "qwen3", "deepseek_v2_groups", "deepseek_v3_yarn"]
)
def test_two_ranks_give_the_tokens_of_one(name: str, tiny: Any, ranks: Workers) -> None:
    folder, model = tiny(name)
    results = ask(ranks, EngineSpec(model=str(folder), split=halves(name)), PROMPTS, 20)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == reference(model, prompt, 20)


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3"])
def test_blocks_do_not_depend_on_who_wrote_them(
    writers: int, name: str, tiny: Any, target: str, ranks: Workers, decode: Workers
) -> None:
    folder, model = tiny(name)
    whole = EngineSpec(model=str(folder), target=target, namespace=f"by {writers}")
    split = dataclasses.replace(whole, split=halves(name))
    sides = [(decode, whole), (ranks, split)]
    (writer, wrote), (reader, reads) = sides if writers == 1 else sides[::-1]
    assert ask(writer, wrote, [PROMPTS[3]], 20)[0].stored_blocks == 4
    result = ask(reader, reads, [PROMPTS[3]], 20)[0]
    assert result.token_ids == reference(model, PROMPTS[3], 20)
    assert (result.matched_tokens, result.tier, result.stored_blocks) == (48, "dram", 0)


@pytest.mark.parametrize("writers", [1, 2])
def test_smollm2_on_one_and_two_of_its_heads(
    writers: int, smollm2: Reference, target: str, ranks: Workers, decode: Workers
) -> None:
    namespace, model = f"smollm2 by {writers}", str(smollm2.folder)
    sides = [
        (decode, EngineSpec(model=model, target=target, namespace=namespace)),
        (ranks, EngineSpec(model=model, target=target, namespace=namespace, split=ONE_AND_TWO)),
    ]
    (writer, wrote), (reader, reads) = sides if writers == 1 else sides[::-1]
    ask(writer, wrote, smollm2.prompts, 1)
    for i, result in enumerate(ask(reader, reads, smollm2.prompts, NEW_TOKENS)):
        assert result.token_ids == smollm2.tokens[i]
        assert result.matched_tokens == (len(smollm2.prompts[i]) - 1) // 16 * 16 > 0


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_two_ranks_attend_to_what_they_got(
    name: str, tiny: Any, target: str, ranks: Workers, decode: Workers
) -> None:
    folder, model = tiny(name)
    engine = EngineSpec(model=str(folder), target=target, namespace="spoiled for ranks")
    spoil(target, engine, PROMPTS[3])
    result = ask(ranks, dataclasses.replace(engine, split=halves(name)), [PROMPTS[3]], 20)[0]
    assert result.matched_tokens == 48
    assert result.token_ids != reference(model, PROMPTS[3], 20)


def test_of_latent_attention_one_rank_puts(tiny: Any, target: str, ranks: Workers) -> None:
    engine = EngineSpec(
        model=str(tiny("deepseek_v2")[0]), target=target, namespace="latent", split=QUERY_HALVES
    )
    answers = ranks.ask(Job(engine=engine, prompts=[PROMPTS[3]], new_tokens=20))
    assert [results[0].stored_blocks for results in answers] == [4, 0]


def test_a_cell_that_one_rank_cannot_read_is_a_miss_for_both(
    tiny: Any, target: str, ranks: Workers
) -> None:
    folder, model = tiny("llama")
    engine = EngineSpec(
        model=str(folder),
        target=target,
        namespace="one bad cell",
        split=HALVES,
        verify_reads=True,
    )
    ask(ranks, engine, [PROMPTS[3]], 1)
    corrupt(target, engine, PROMPTS[3], block=1)  # rank 1's half of it
    result = ask(ranks, engine, [PROMPTS[3]], 20)[0]
    assert result.matched_tokens == 16
    assert result.token_ids == reference(model, PROMPTS[3], 20)


def test_a_split_that_misfits_is_refused_and_named(tiny: Any, ranks: Workers) -> None:
    llama, latent = (str(tiny(name)[0]) for name in ("llama", "deepseek_v3"))
    for model, split, named in [
        (llama, (1, 2), "split: .* 2 heads"),
        (llama, (2, 0), "split: .* without a head"),
        (llama, (1,), "split: .* 2 ranks"),
        (latent, (1, 1), "split: .* 4 heads"),
    ]:
        job = Job(engine=EngineSpec(model=model, split=split), prompts=[[1]], new_tokens=1)
        for rank in ranks.ranks:
            rank.send(job)
        for rank in ranks.ranks:
            with pytest.raises(WorkerError, match=named):
                rank.receive(30)


def lose_a_rank(job: Job, pids: list[int]) -> None:
    with workers(2, timeout_s=20) as started:
        pids += [rank.process.pid for rank in started.ranks]
        started.ask(job)
        started.ranks[1].kill()
        started.ranks[0].send(job)
        started.ranks[0].receive(20)


def test_a_rank_that_dies_ends_the_job_and_leaves_no_process(tiny: Any) -> None:
    job = Job(
        engine=EngineSpec(model=str(tiny("llama")[0]), split=HALVES),
        prompts=[PROMPTS[3]],
        new_tokens=20,
    )
    pids: list[int] = []
    with pytest.raises(WorkerError):
        lose_a_rank(job, pids)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


class OtherRankFindsLess(SingleRank):
    """A rank beside one that finds one block at most; notes the collective calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def agree_min(self, value: int) -> int:
        self.calls.append("agree")
        return min(value, 1)

    def broadcast_bytes(self, data: bytes) -> bytes:
        self.calls.append(f"broadcast {len(data)}")
        return data


def test_ranks_take_only_what_all_of_them_found(tiny: Any) -> None:
    folder, model = tiny("llama")
    store = FakeBlockStore(16)
    Engine(folder, store=store, num_pages=8).generate([PROMPTS[3]], 1)
    engine = Engine(folder, store=store, num_pages=8, parallel=OtherRankFindsLess())
    result = engine.generate([PROMPTS[3]], 20)[0]
    assert result.matched_tokens == 16
    assert result.token_ids == reference(model, PROMPTS[3], 20)


def test_a_store_that_fails_on_one_rank_skips_no_collective_call(tiny: Any) -> None:
    folder: Path = tiny("llama")[0]
    calls = []
    for broken in (False, True):
        parallel = OtherRankFindsLess()
        store = FakeBlockStore(16, broken=broken)
        Engine(folder, store=store, num_pages=8, parallel=parallel).generate([PROMPTS[3]], 20)
        calls.append(parallel.calls)
    assert calls[0] == calls[1]
    assert calls[0].count("agree") == 1
    assert calls[0].count("broadcast 16") == 2  # a put id for the prompt's blocks, one for the next


def test_shares_cover_everything_once() -> None:
    assert [share_of_heads((1, 2), rank, 3) for rank in (0, 1)] == [range(1), range(1, 3)]
    for total, size in [(48, 2), (7, 3), (2, 2)]:
        shares = [even_share(total, rank, size) for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(total))
    for split, total in [((1, 1), 3), ((3, 0), 3), ((), 1), ((-1, 4), 3)]:
        with pytest.raises(InvalidArgument, match="split"):
            share_of_heads(split, 0, total)
