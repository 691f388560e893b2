"""The real model, and transformers' greedy tokens for two prompts that share a beginning."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from engines.tiny import reference

from kvstore_engines.smollm2 import ensure_smollm2, load_tokenizer

NEW_TOKENS = 12
START = "The library opens at nine and closes at six, but on Saturdays it closes at one. "
QUESTIONS = ("The capital of France is", "On Saturdays, the library")


@dataclass(frozen=True)
class Reference:
    folder: Path
    prompts: list[list[int]]
    tokens: list[tuple[int, ...]]


def load_reference() -> Reference:
    folder = ensure_smollm2()
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer.encode(START + question).ids for question in QUESTIONS]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = [reference(model, prompt, NEW_TOKENS) for prompt in prompts]
    return Reference(folder, prompts, tokens)
