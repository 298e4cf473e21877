"""An exported folder has what llama.cpp's converter reads: tested with gguf, the package that the converter uses.

The converter itself is in no package. What follows here is its course for a Llama with a byte-level BPE tokenizer; the
names of tensors and keys, the special tokens and the merges come from gguf. transformers then reads the file back.
"""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.export.folder import ModelCard, export_folder

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = REPOSITORY / "assets/tokenizer/tokenizer.json"
PACKAGES = REPOSITORY / ".cache/gguf"

# Runs with gguf on its path: writes a GGUF file from the exported folder, reads it back, and notes what it found.
CONVERTER = """
import json, sys
from pathlib import Path
import gguf, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder, work = map(Path, sys.argv[1:])
config = json.loads((folder / "config.json").read_text())
assert config["architectures"] == ["LlamaForCausalLM"]
index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
weights = {name: tensor for part in sorted(set(index.values())) for name, tensor in load_file(folder / part).items()}
assert weights.keys() == index.keys()
layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
kv_heads = config["num_key_value_heads"]

writer = gguf.GGUFWriter(work / "model.gguf", gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
writer.add_name("exported")
writer.add_vocab_size(config["vocab_size"])
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(layers)
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(kv_heads)
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_freq_base(config["rope_theta"])
writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)

def permuted(tensor, count):
    # llama.cpp rotates neighbouring values, and transformers those half a head apart.
    halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)

names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
for name, tensor in weights.items():
    new = names.get_name(name, try_suffixes=(".weight",))
    assert new is not None, name
    for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
        if part in name:
            tensor = permuted(tensor, count)
    writer.add_tensor(new, tensor.contiguous().numpy())

tokenizer = json.loads((folder / "tokenizer.json").read_text())
vocabulary = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
tokens = [f"[PAD{place}]" for place in range(config["vocab_size"])]
for token, place in vocabulary.items():
    tokens[place] = token
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-2")
writer.add_token_list(tokens)
special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config["vocab_size"])
special.add_to_gguf(writer, quiet=True)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

reader = gguf.GGUFReader(work / "model.gguf")
ids = {name: int(reader.fields[f"tokenizer.ggml.{name}_token_id"].contents()) for name in ("bos", "eos", "padding")}
model = AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.load(work / "tokens.pt")).logits, work / "logits.pt")
(work / "found.json").write_text(json.dumps({
    "ids": ids,
    "added": special.add_special_token,
    "merges": len(special.merges),
    "theta": model.config.rope_parameters["rope_theta"],
}))
"""


@pytest.fixture(scope="module")
def packages() -> Path:
    """A folder with gguf, for PYTHONPATH."""
    complete = PACKAGES / "complete"
    PACKAGES.parent.mkdir(exist_ok=True)
    with PACKAGES.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(PACKAGES, ignore_errors=True)
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", PACKAGES, "gguf==0.19.*"]
            subprocess.run(install, check=True)
            complete.touch()
    return PACKAGES


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gguf_finds_every_tensor_and_token_and_the_logits_are_equal(
    tmp_path: Path, packages: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8200,  # larger than the tokenizer, as padded vocabularies are
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
    model = LlamaForCausalLM(config).eval()
    card = ModelCard("gguf", 1, 256, 9.0, None, None, [{"name": "x", "licence": "y"}], "a: 1", None, "aurora")
    out = tmp_path / "out"
    export_folder(model.state_dict(), model.config, TOKENIZER, card, out, max_shard_size="1MB")
    tokens = torch.randint(0, 8192, (4, 256))
    torch.save(tokens, tmp_path / "tokens.pt")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    subprocess.run([sys.executable, "-c", CONVERTER, out, tmp_path], check=True, cwd=tmp_path)

    found = json.loads((tmp_path / "found.json").read_text())
    raw = Tokenizer.from_file(str(TOKENIZER))
    end, padding = raw.token_to_id("<|endoftext|>"), raw.token_to_id("<|padding|>")
    assert found["ids"] == {"bos": end, "eos": end, "padding": padding}
    assert found["added"] == {}  # as in training and evaluation, no token is added to a text
    assert found["merges"] == len(json.loads(TOKENIZER.read_text())["model"]["merges"])
    assert found["theta"] == 50_000.0
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tokens).logits)
