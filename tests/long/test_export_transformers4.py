"""An exported folder means the same to transformers 4.57, in an environment of its own, as to ours.

The environment (1.1 GB) is kept in .cache/ and made once.
"""

import fcntl
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.export.folder import ModelCard, export_folder

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = REPOSITORY / "assets/tokenizer/tokenizer.json"
ENVIRONMENT = REPOSITORY / ".cache/transformers4"

# Runs in the other environment: reads texts and tokens, writes what that transformers makes of them.
READER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4.57."), transformers.__version__
folder, work = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = json.load(open(f"{work}/texts.json"))
ids = [tokenizer.encode(text) for text in texts]
with torch.no_grad():
    logits = model.eval()(torch.load(f"{work}/tokens.pt")).logits
torch.save(logits, f"{work}/logits4.pt")
json.dump({
    "loading": {key: list(map(str, value)) for key, value in info.items()},
    "dtype": str(model.dtype),
    "theta": model.config.rope_theta,
    "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    "config": [model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id],
    "generation": [
        getattr(model.generation_config, f"{name}_token_id") for name in ("bos", "eos", "pad")
    ],
    "ids": ids,
    "decoded": [tokenizer.decode(row) for row in ids],
}, open(f"{work}/read4.json", "w"))
"""


@pytest.fixture(scope="module")
def python4() -> Path:
    """The interpreter of an environment with transformers 4.57 and our torch."""
    python, complete = ENVIRONMENT / "bin/python", ENVIRONMENT / "complete"
    ENVIRONMENT.parent.mkdir(exist_ok=True)
    # The tests of this file may run in several processes, of which one installs.
    with ENVIRONMENT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
            ours = f"torch=={torch.__version__.partition('+')[0]}"
            install = [python, "-m", "pip", "install", "-q", "transformers==4.57.*", ours, "numpy"]
            subprocess.run(install, check=True)
            complete.touch()
    return python


def thousand_texts() -> list[str]:
    """Half from the corpus, half of random characters of every plane and the special tokens."""
    rng = random.Random(4)
    documents = pq.read_table(REPOSITORY / "assets/corpus/moby_dick.parquet")["text"].to_pylist()
    texts = []
    for _ in range(500):
        document = rng.choice(documents)
        start = rng.randrange(len(document))
        texts.append(document[start : start + rng.randrange(400)])
    pieces = ["<|endoftext|>", "<|padding|>", " ", "  ", "\n", "\t", " ,", "n't", "👩‍👧", "e\u0301", "\u200b"]
    for _ in range(500):
        characters = [
            rng.choice(pieces)
            if rng.random() < 0.3
            else chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000), rng.randrange(128)]))
            for _ in range(rng.randrange(40))
        ]
        texts.append("".join(characters))
    return texts


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_4_reads_the_same_model_and_tokenizer(tmp_path: Path, python4: Path, tied: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        )
    ).eval()
    card = ModelCard("four", 1, 256, 9.0, None, None, [{"name": "x", "licence": "y"}], "a: 1", None, "aurora")
    export_folder(model.state_dict(), model.config, TOKENIZER, card, tmp_path / "out")

    texts = thousand_texts()
    tokens = torch.randint(0, 8192, (4, 256))
    torch.save(tokens, tmp_path / "tokens.pt")
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    subprocess.run([python4, "-c", READER, tmp_path / "out", tmp_path], check=True)
    read = json.loads((tmp_path / "read4.json").read_text())

    with torch.no_grad():
        ours = model(tokens).logits
    theirs = torch.load(tmp_path / "logits4.pt")
    assert torch.equal(theirs, ours)
    assert not any(read["loading"].values())
    assert read["dtype"] == "torch.float32"
    assert read["theta"] == 50_000.0

    raw = Tokenizer.from_file(str(TOKENIZER))
    special = [raw.token_to_id(token) for token in ("<|endoftext|>", "<|endoftext|>", "<|padding|>")]
    assert read["special"] == read["config"] == read["generation"] == special
    assert len(texts) == 1000
    encoded = [raw.encode(text).ids for text in texts]
    assert read["ids"] == encoded
    assert read["decoded"] == [raw.decode(ids, skip_special_tokens=False) for ids in encoded]
