"""What the demo asks: four questions behind one long system prompt."""

from collections.abc import Sequence

SYSTEM = (
    "You are the assistant of a small public library. You answer in one or two plain sentences. "
    "The library opens at nine and closes at eighteen from Monday to Friday, and at thirteen on "
    "Saturday; it is closed on Sunday. Books are lent for four weeks and may be renewed twice. "
    "Films are lent for one week. Children under twelve need a card signed by a parent. The "
    "reading room on the second floor is quiet; the ground floor is for talking and coffee. "
    "Do not invent rules that are not written here."
)
FIRST = "What is the capital of France?"
QUESTIONS = [
    [FIRST],
    ["How long may I keep a book?"],
    ["When do you close on Saturday?"],
    [FIRST, "The capital of France is Paris.", "And on which river does it lie?"],
]
ROLES = ("user", "assistant")


def prompt_text(turns: Sequence[str]) -> str:
    """A conversation in SmolLM2's chat format, open for the assistant's next answer."""
    said = "".join(
        f"<|im_start|>{ROLES[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns)
    )
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{said}<|im_start|>assistant\n"
