"""What an engine is asked and answers, also as lines of JSON; imports no torch."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from kvstore.errors import InvalidArgument

DTYPES = ("float32", "bfloat16", "float16")


class WorkerError(RuntimeError):
    """A worker said that a job failed, gave no answer in time, or has died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """An engine to run jobs on. model: a checkpoint folder. target: the store's, None for none.

    split: the key/value heads of each rank (of latent attention, its query heads), empty for one
    rank. verify_reads: check the checksums of what is got.
    """

    model: str
    target: str | None = None
    namespace: str = "engines"
    num_pages: int = 64
    block_tokens: int = 16
    dtype: str = "float32"
    split: tuple[int, ...] = ()
    verify_reads: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidArgument("dtype", f"{self.dtype!r} is none of {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Prompts to run to the end on one engine, batched; all of them get `new_tokens` at most."""

    engine: EngineSpec
    prompts: list[list[int]]
    new_tokens: int
    session_ends: bool = False

    def encode(self) -> str:
        """One line."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def decode(cls, line: str) -> "Job":
        """Inverse of `encode`; TypeError or ValueError for a line that it did not write."""
        fields = json.loads(line)
        engine = fields.pop("engine")
        return cls(engine=EngineSpec(**{**engine, "split": tuple(engine["split"])}), **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished request: the generated tokens and where its prefix came from.

    stored_blocks: blocks that hold what this engine (or this rank) put for the request.
    """

    request_id: int
    token_ids: tuple[int, ...]
    prompt_tokens: int
    matched_tokens: int
    tier: str | None
    time_to_first_token_s: float
    stored_blocks: int


def read_reply(line: str) -> list[Result]:
    """The results in a worker's reply, in the order of the prompts; WorkerError if it has none."""
    reply: dict[str, Any] = json.loads(line)
    if "error" in reply:
        raise WorkerError(reply["error"])
    return [Result(**{**row, "token_ids": tuple(row["token_ids"])}) for row in reply["results"]]
