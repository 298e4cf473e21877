"""An exported folder is the model that was trained, and nothing else is ever overwritten."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from pretrain.export import folder as export
from pretrain.export.folder import ExportError, ModelCard, export_folder

TOKENIZER = Path(__file__).parents[1] / "assets/tokenizer/tokenizer.json"
TEXTS = [
    "",
    " ",
    "Call me Ishmael.",
    "  two  spaces , and a space before the comma ; n't don't",
    "\ttabs\r\nand\n\n\nlines\u2028separators",
    "naïve café — “quotes” … Ωμέγα Привет 你好 नमस्ते",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \ufeff\u200b\u202e\x00\x7f",
    "before<|endoftext|>after <|padding|> <|endoftext|>",
    "x" * 300,
    "The year 1234567890, $5.00; a+b=c @home #1",
]


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    options: dict[str, Any] = {
        "vocab_size": 8200,  # larger than the tokenizer, as padded vocabularies are
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(options | changes))).eval()


def card(**changes: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "run_name": "tiny",
        "step": 40,
        "tokens": 30_720,
        "train_loss": 5.25,
        "validation_loss": 5.5,
        "bits_per_byte": 1.875,
        "data_sources": [{"name": "Moby Dick", "licence": "CC0-1.0", "documents": 135}],
        "config_yaml": "run:\n  name: tiny\n",
        "git_commit": None,
        "optimizer": "aurora",
    }
    return ModelCard(**(fields | changes))


def save(model: LlamaForCausalLM, out: Path, tokenizer: Path = TOKENIZER, **options: Any) -> Path:
    export_folder(model.state_dict(), model.config, tokenizer, options.pop("card", card()), out, **options)
    return out


def logits(model: Any) -> Tensor:
    tokens = torch.randint(0, 8192, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: Tensor = model.eval()(tokens).logits
    return result


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_equal_before_and_after(tmp_path: Path, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    loaded, info = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "out"), output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is LlamaForCausalLM
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(model), logits(loaded))
    # The rotation base matters to these logits, so a lost one would have shown.
    other_base = llama(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    assert not torch.equal(logits(model), logits(other_base))


def test_tied_head_is_stored_once_and_may_be_absent(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    export_folder(state, model.config, TOKENIZER, card(), tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118, not a mapping
        assert file.metadata() == {"format": "pt"}
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))


def test_sharded_weights_load_alike(tmp_path: Path) -> None:
    model = llama()
    out = save(model, tmp_path / "out", max_shard_size="500KB")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert (out / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(out)))
    # One file in the place of many: no shard stays behind.
    save(model, out)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


def test_weights_that_share_memory_or_lie_transposed_are_stored_right(tmp_path: Path) -> None:
    model = llama()
    state = model.state_dict()
    size = state["model.layers.0.mlp.gate_proj.weight"].numel()
    flat = torch.randn(2 * size)
    state["model.layers.0.mlp.gate_proj.weight"] = flat[:size].view(48, 32)
    state["model.layers.0.mlp.up_proj.weight"] = flat[size:].view(32, 48).T
    model.load_state_dict(state)
    export_folder(state, model.config, TOKENIZER, card(), tmp_path / "out")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))


def test_dtype_of_the_checkpoint_is_kept(tmp_path: Path) -> None:
    out = save(llama().to(torch.bfloat16), tmp_path / "out")
    config = read_json(out / "config.json")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_config_speaks_both_generations_of_transformers(tmp_path: Path) -> None:
    model = llama()
    model.config.use_cache = False  # as while training
    out = save(model, tmp_path / "out")
    config = read_json(out / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000.0
    assert config["rope_scaling"] is None
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["use_cache"] is True
    assert read_json(out / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_scaled_rotation_survives(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0}
    model = llama(rope_parameters=rope)
    out = save(model, tmp_path / "out")
    assert read_json(out / "config.json")["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.rope_parameters == rope
    assert torch.equal(logits(model), logits(loaded))


def test_special_ids_are_the_tokenizers_own(tmp_path: Path) -> None:
    raw = Tokenizer.from_file(str(TOKENIZER))
    end, padding = raw.token_to_id("<|endoftext|>"), raw.token_to_id("<|padding|>")
    model = llama()
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)  # the library's defaults
    out = save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    for holder in (loaded.config, GenerationConfig.from_pretrained(out), tokenizer):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (end, end, padding)


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_those_of_the_raw_tokenizer(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    out = tmp_path_factory.getbasetemp() / "tokens"
    if not out.exists():
        save(llama(), out)
    raw, loaded = Tokenizer.from_file(str(TOKENIZER)), AutoTokenizer.from_pretrained(out)
    ids = raw.encode(text).ids
    assert loaded(text)["input_ids"] == loaded.encode(text) == ids
    assert loaded.decode(ids) == raw.decode(ids, skip_special_tokens=False)
    if "<|" not in text:
        assert loaded.decode(ids) == text


@pytest.mark.parametrize("prefix_space", [False, True])
def test_a_prefix_space_of_the_tokenizer_is_kept(tmp_path: Path, prefix_space: bool) -> None:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, vocab_size=300)
    raw.train_from_iterator(["the whale and the sea"] * 5, trainer)
    raw.save(str(tmp_path / "raw.json"))
    out = save(llama(), tmp_path / "out", tmp_path / "raw.json")
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.encode("the whale") == raw.encode("the whale").ids
    # Without a padding token in the vocabulary none is invented.
    assert loaded.pad_token is None
    assert "pad_token_id" not in read_json(out / "generation_config.json")
    assert read_json(out / "config.json")["pad_token_id"] is None


def test_weights_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    model = llama()
    state = model.state_dict()
    del state["model.norm.weight"]
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    state["_orig_mod.extra"] = torch.zeros(1)
    with pytest.raises(ExportError) as error:
        export_folder(state, model.config, TOKENIZER, card(), tmp_path / "out")
    for part in ("model.norm.weight is missing", "has shape [3, 5], expected [48, 32]", "_orig_mod.extra"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_mixed_dtypes_and_untied_heads_under_a_tied_config_are_refused(tmp_path: Path) -> None:
    model = llama()
    mixed = model.state_dict() | {"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)}
    with pytest.raises(ExportError, match="mix dtypes"):
        export_folder(mixed, model.config, TOKENIZER, card(), tmp_path / "out")
    model.config.tie_word_embeddings = True
    with pytest.raises(ExportError, match="ties the embeddings"):
        export_folder(model.state_dict(), model.config, TOKENIZER, card(), tmp_path / "out")


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="vocabulary ends at 99"):
        save(llama(vocab_size=100), tmp_path / "out")
    with pytest.raises(ExportError, match=r"no token '</s>' \(needed as bos_token\)"):
        save(llama(), tmp_path / "out", eos_token="</s>")
    with pytest.raises(ExportError, match="needed as pad_token"):
        save(llama(), tmp_path / "out", pad_token="<pad>")
    with pytest.raises(ExportError, match="cannot read the tokenizer"):
        save(llama(), tmp_path / "out", tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ExportError, match="cannot read the tokenizer"):
        save(llama(), tmp_path / "out", tmp_path / "broken.json")


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(llama(seed=0), out, card=card(step=1))
    save(llama(seed=1), out, card=card(step=2))
    assert read_json(out / "aurora.json")["step"] == 2
    assert torch.equal(logits(llama(seed=1)), logits(AutoModelForCausalLM.from_pretrained(out)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (save(llama(), tmp_path / "out") / "config.json").is_file()


@pytest.mark.parametrize("occupant", ["file", "notes", "export with notes", "other model", "tmp folder"])
def test_what_is_not_an_earlier_export_is_never_touched(tmp_path: Path, occupant: str) -> None:
    out = tmp_path / "out"
    if occupant == "file":
        out.write_text("mine")
    elif occupant == "tmp folder":
        (tmp_path / "out.tmp").mkdir()
        (tmp_path / "out.tmp/notes.txt").write_text("mine")
    elif occupant == "other model":
        out.mkdir()
        (out / "config.json").write_text('{"model_type": "gpt2"}')
    else:
        if occupant == "export with notes":
            save(llama(), out)
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ExportError, match=r"exists and"):
        save(llama(seed=1), out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = save(llama(), tmp_path / "out", card=card(step=1))

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_torch_state_dict", full_disk)
        with pytest.raises(ExportError, match="No space left"):
            save(llama(seed=1), out, card=card(step=2))
    assert read_json(out / "aurora.json")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_export_is_repeated(tmp_path: Path) -> None:
    partial = tmp_path / "out.tmp"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    out = save(llama(), tmp_path / "out")
    assert torch.equal(logits(llama()), logits(AutoModelForCausalLM.from_pretrained(out)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_made_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write the export"):
        save(llama(), tmp_path / "file/out")


def test_the_model_card_shows_text_from_data_literally(tmp_path: Path) -> None:
    nasty = "a|b\n<script>alert(1)</script> *x* [l](u) `c` \\"
    config_yaml = "run:\n  name: tiny\n  note: |\n    ```\n    # not a heading\n"
    sources = [{"name": nasty, "licence": "CC0"}, {"name": "b", "licence": "MIT", "bytes": 7}]
    text = (
        save(llama(), tmp_path / "out", card=card(data_sources=sources, config_yaml=config_yaml)) / "README.md"
    ).read_text(encoding="utf-8")
    _, front_matter, body = text.split("---\n", 2)
    assert yaml.safe_load(front_matter)["library_name"] == "transformers"
    assert "<script>" not in body
    (row,) = [line for line in body.splitlines() if "CC0" in line]
    assert row == (r"| a\|b &lt;script&gt;alert(1)&lt;/script&gt; \*x\* \[l\](u) \`c\` \\ | CC0 |  |")
    assert "| b | MIT | 7 |" in body
    assert f"````yaml\n{config_yaml.rstrip()}\n````" in body
    for fact in ("30,720", "5.2500", "5.5000", "1.8750", "aurora"):
        assert fact in body


def test_aurora_json_tells_the_run(tmp_path: Path) -> None:
    model = llama()
    out = save(model, tmp_path / "out", card=card(train_loss=float("nan"), bits_per_byte=None))
    content = read_json(out / "aurora.json")
    assert content["format"] == "aurora-export"
    assert (content["run_name"], content["step"], content["tokens"]) == ("tiny", 40, 30_720)
    assert content["train_loss"] is None
    assert content["validation_loss"] == 5.5
    assert content["bits_per_byte"] is None
    assert content["parameters"] == model.num_parameters()
    assert content["parameters_without_embeddings"] == model.num_parameters() - 2 * 8200 * 32
    assert content["data_sources"] == [{"name": "Moby Dick", "licence": "CC0-1.0", "documents": "135"}]
