"""Train, export and evaluate the quickstart model, then print a summary. Started by scripts/quickstart."""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
import time
from pathlib import Path

from eval.items import fetch_items
from eval.result_table import format_table
from eval.results import RESULT_FILE
from eval.schema import EvalResult
from pretrain.config import Config, load_config
from pretrain.data import validation_text
from pretrain.files import file_sha256
from pretrain.processes.errors import UserError
from pretrain.run.json_lines import JsonLines

CONFIG = "configs/quickstart.yaml"
HELLASWAG_ITEMS = 2000
# HellaSwag starts with 3,243 video captions, so the first 2,000 items would include none of its how-tos.
SELECTION = "spread"


def main() -> int:
    """Run every stage that is not done yet; return the exit code of the first that fails."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--full", action="store_true", help="evaluate on all items of HellaSwag")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="config overrides")
    options = parser.parse_intermixed_args()

    try:
        config = load_config(CONFIG, options.overrides)
        started = time.monotonic()
        stage(1, "evaluation items")
        fetch_items()
        stage(2, f"training {config.run.name}")
        aurora("train", CONFIG, *options.overrides)
        stage(3, "export")
        folder = config.run_folder / "export"
        aurora("export", str(config.run_folder), str(folder))
        stage(4, "evaluation")
        limits = {"winogrande": None, "hellaswag": None if options.full else HELLASWAG_ITEMS}
        results = [evaluated(config, folder, task, limit) for task, limit in limits.items()]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
    summarise(config, results, time.monotonic() - started)
    return 0


def stage(number: int, title: str) -> None:
    """Print the title of a stage."""
    print(f"\n[{number}/4] {title}", flush=True)


def aurora(*arguments: str) -> None:
    """Run `aurora` in a separate process."""
    subprocess.run([sys.executable, "-m", "pretrain", *arguments], check=True)


def evaluated(config: Config, folder: Path, task: str, limit: int | None) -> EvalResult:
    """Return the result of a task: the one on disk if it has the same weights and items, otherwise a new one."""
    out = config.run_folder / "eval" / task
    weights = {path.name: file_sha256(path) for path in folder.glob("*.safetensors")}
    result = read_result(out / RESULT_FILE)
    if result and (result["model"].get("weights_sha256"), result["limit"], result["selection"]) == (
        weights,
        limit,
        SELECTION,
    ):
        print(f"{task}: already evaluated ({out / RESULT_FILE})")
        return result
    amount = [] if limit is None else ["--limit", str(limit)]
    aurora("eval", str(folder), "--tasks", task, "--out", str(out), "--selection", SELECTION, "--overwrite", *amount)
    result = read_result(out / RESULT_FILE)
    assert result is not None
    return result


def read_result(path: Path) -> EvalResult | None:
    """Read the result in a file; None if it is missing or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def summarise(config: Config, results: list[EvalResult], seconds: float) -> None:
    """Print the results and the paths of all files."""
    folder = config.run_folder
    last = [record for record in JsonLines(folder / "metrics.jsonl").read() if "validation_loss" in record][-1]
    text = validation_text(config.data).encode()
    packed = 8 * len(lzma.compress(text, preset=9)) / len(text)
    sample = JsonLines(folder / "samples.jsonl").read()[-1]
    bits = last["validation_bits_per_byte"]
    print(f"\n{config.run.name}: {last['step']} steps, {last['tokens']:,} tokens")
    print(f"validation loss {last['validation_loss']:.4f} nats per token on {len(text):,} bytes of held-out text")
    print(f"bits per byte   {bits:.4f} (xz -9 on the same text: {packed:.4f})")
    print(f"sample          {sample['prompt'] + sample['text']!r}")
    tasks = {name: task for result in results for name, task in result["tasks"].items()}
    print(format_table({**results[0], "tasks": tasks}))
    print("A model of this size, trained on so little text, is at chance on both tasks (0.25 and 0.50). The numbers")
    print("show that the evaluation runs, not that the model knows anything.")
    print(f"run             {folder} (metrics.jsonl, samples.jsonl, checkpoints/)")
    print(f"model           {folder / 'export'} (a Hugging Face folder)")
    print(f"evaluation      {folder / 'eval'}")
    print(f"this run took {seconds:.0f} seconds")
    if bits >= packed:
        sys.exit("error: the model does not compress its validation text better than xz")


if __name__ == "__main__":
    sys.exit(main())
