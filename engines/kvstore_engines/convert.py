"""A GGUF file made a Hugging Face folder of bfloat16 safetensors; the only use of transformers.

Run as `python -m kvstore_engines.convert GGUF FOLDER`, so that what transformers loads and prints
stays out of the caller's process.
"""

import sys
from pathlib import Path

import torch


def convert(source: Path, made: Path) -> None:
    """Dequantizes the model in the file `source`, and saves it and its tokenizer in `made`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = source.parent, source.name
    # Left packed, the model could not be saved.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),
    )
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(made)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
