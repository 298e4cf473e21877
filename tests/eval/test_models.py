"""Which model is evaluated is known exactly, and what would be scored as something else is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from eval.errors import EvalError
from eval.models import load_model
from eval.schema import ModelIdentity
from eval.sources import ModelSource, locate_model
from tests.eval.conftest import TOKENIZER, export_model, small_llama

CPU = torch.device("cpu")
BERT = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def identity_of(folder: Path, **options: Any) -> ModelIdentity:
    options = {"dtype": "auto", "device": CPU, "trust_remote_code": False, **options}
    return load_model(locate_model(folder), **options)[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export_model(tmp_path / "model", small_llama())


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# --- names --------------------------------------------------------------------------------------


def test_a_name_may_carry_a_revision(tmp_path: Path) -> None:
    assert locate_model("some/model") == ModelSource("hub", "some/model", None)
    assert locate_model("some/model@v1.0") == ModelSource("hub", "some/model", "v1.0")
    assert locate_model("some/model@refs/pr/3").revision == "refs/pr/3"
    assert locate_model("some/model", "abc") == locate_model("some/model@abc", "abc")
    with pytest.raises(EvalError, match="names another revision"):
        locate_model("some/model@abc", "main")
    for bad in ("some/model@", "some/model@a b", "a/b/c", "../x"):
        with pytest.raises(EvalError, match="no model at"):
            locate_model(bad)


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(EvalError, match="has no revision 'main'"):
        locate_model(folder, "main")
    named = folder.rename(folder.with_name("model@home"))
    assert locate_model(named) == ModelSource("folder", str(named))


# --- what is recorded ---------------------------------------------------------------------------


def test_the_identity_says_what_decides_about_scores(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = small_llama()
    identity = identity_of(folder, progress=True)
    assert identity["parameters"] == model.num_parameters()
    assert identity["parameters_without_embeddings"] == model.num_parameters() - 2 * 8192 * 32
    assert (identity["dtype"], identity["bos"], identity["context_length"]) == ("float32", "none", 128)
    printed = capfd.readouterr().err
    for part in (identity["sha256"][:12], "float32 on cpu", "context of 128 tokens", "no BOS token", "0.5M parameters"):
        assert part in printed


def test_tied_tables_and_positions_count_as_embeddings(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        BertConfig(**BERT, is_decoder=True)  # embeddings of words, positions and types
    )
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    tables = (8192 + 64 + 2) * 32 + 8192  # and the biases of the output layer
    identity = identity_of(tmp_path)
    assert identity["parameters_without_embeddings"] == identity["parameters"] - tables


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_may_be_of_each_dtype(folder: Path, dtype: Any) -> None:
    model, _, identity = load_model(locate_model(folder), dtype=dtype, device=CPU, trust_remote_code=False)
    assert identity["dtype"] == dtype
    assert model.dtype == getattr(torch, dtype)
    assert identity["sha256"] == identity_of(folder)["sha256"]  # of the files


def tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), **(tokens or {"eos_token": "<|endoftext|>"}))


def test_the_token_before_each_text_is_recorded(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    token = "<|endoftext|>"
    number = next(added["id"] for added in content["added_tokens"] if added["content"] == token)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    before = identity_of(folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    after = identity_of(folder)
    assert (before["bos"], after["bos"]) == ("none", token)
    assert before["sha256"] != after["sha256"]


def change_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_the_config(folder: Path) -> None:
    edit(folder / "config.json", rms_norm_eps=1e-3)


def change_the_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", model_max_length=77)


@pytest.mark.parametrize("change", [change_a_weight, change_the_config, change_the_tokenizer])
def test_whatever_decides_about_scores_changes_the_digest(folder: Path, change: Callable[[Path], None]) -> None:
    before = identity_of(folder)["sha256"]
    (folder / "README.md").write_text("other words")
    assert identity_of(folder)["sha256"] == before
    change(folder)
    assert identity_of(folder)["sha256"] != before


def test_weights_in_pieces_are_all_part_of_the_digest(tmp_path: Path) -> None:
    folder = export_model(tmp_path / "model", small_llama())
    (folder / "model.safetensors").unlink()
    small_llama().save_pretrained(folder, max_shard_size="600KB")
    pieces = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(pieces) > 1
    before = identity_of(folder)
    assert sorted(before["weights_sha256"]) == pieces
    for piece in pieces:
        weights = load_file(folder / piece)
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, folder / piece, metadata={"format": "pt"})
        after = identity_of(folder)
        assert after["sha256"] != before["sha256"]
        before = after
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../elsewhere"}}')
    with pytest.raises(EvalError, match=r"not a valid index of weights|cannot load the model"):
        identity_of(folder)


# --- what is refused ----------------------------------------------------------------------------


def save_bert(kind: type, folder: Path) -> None:
    torch.manual_seed(0)
    kind(BertConfig(**BERT)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def test_an_encoder_is_refused_by_its_name(tmp_path: Path) -> None:
    save_bert(BertForMaskedLM, tmp_path)
    with pytest.raises(EvalError, match=r"not a causal language model: its config\.json names BertForMaskedLM"):
        identity_of(tmp_path)


@pytest.mark.parametrize("architectures", [None, ["BertLMHeadModel"], ["Unheard"]])
def test_an_encoder_is_refused_by_what_it_does(tmp_path: Path, architectures: list[str] | None) -> None:
    save_bert(BertLMHeadModel, tmp_path)
    edit(tmp_path / "config.json", architectures=architectures, is_decoder=False)
    with pytest.raises(EvalError, match=r"depends on later ones \(BertLMHeadModel, an encoder\)"):
        identity_of(tmp_path)


def test_the_same_weights_as_a_decoder_are_scored(tmp_path: Path) -> None:
    save_bert(BertLMHeadModel, tmp_path)
    edit(tmp_path / "config.json", is_decoder=True)
    assert identity_of(tmp_path)["context_length"] == 64


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    config = BartConfig(
        vocab_size=8192,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EvalError, match="not a causal language model"):
        identity_of(tmp_path)


def test_weights_that_the_model_has_no_place_for_are_refused(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(EvalError, match=r"contain 9 tensors that the model.*model\.layers\.1\."):
        identity_of(folder)


def test_constants_of_older_versions_are_not_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in ("self_attn.masked_bias", "self_attn.rotary_emb.inv_freq"):
        weights[f"model.layers.0.{name}"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert identity_of(folder)["parameters"] > 0


@pytest.mark.parametrize("kept", ["none", "the same", "another"])
def test_tied_weights_that_differ_are_refused(folder: Path, kept: str) -> None:
    """lm-eval ties them, whatever was loaded: one of the two would be ignored."""
    edit(folder / "config.json", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    if kept == "none":
        del weights["lm_head.weight"]
    elif kept == "the same":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if kept == "another":
        with pytest.raises(EvalError, match=r"says that weights are tied, but lm_head\.weight has values of its own"):
            identity_of(folder)
    else:
        identity_of(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(EvalError, match="contains only an adapter; merge it"):
        identity_of(folder)


def test_a_tokenizer_without_a_token_for_empty_contexts_is_refused(folder: Path) -> None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(folder / file, bos_token=None, eos_token=None)
    with pytest.raises(EvalError, match="neither a BOS nor an EOS token"):
        identity_of(folder)


def test_weights_that_are_not_part_of_the_digest_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(EvalError, match=r"has no weights: none of model\.safetensors"):
        identity_of(folder)
    edit(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(EvalError, match=r"names a file of weights, in transformers_weights; rename"):
        identity_of(folder)


def test_a_token_beyond_the_models_is_refused_though_there_are_not_too_many(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    entries = content["model"]["vocab"]
    entries[max(entries, key=lambda entry: entries[entry])] = 9000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(EvalError, match="has tokens up to number 9,000, but the model knows only 8,192"):
        identity_of(folder)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_weights_that_would_run_code_do_not(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(EvalError, match=r"would run code when read \(none was run\); convert them to saf"):
        identity_of(folder)
    assert not (tmp_path / "ran").exists()


def test_a_reason_on_the_second_line_is_shown(folder: Path) -> None:
    edit(folder / "config.json", num_attention_heads=3)
    with pytest.raises(EvalError, match=r"cannot load .*hidden size \(32\) is not a multiple") as caught:
        identity_of(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["forward", "get_input_embeddings"])
def test_a_model_that_fails_is_an_error_of_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError("only on the moon")

    monkeypatch.setattr(LlamaForCausalLM, method, fail)
    with pytest.raises(EvalError, match=r"cannot (load|run) the model .*NotImplementedError: only on the moon"):
        identity_of(folder)


# --- code that comes with a model ---------------------------------------------------------------

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


def add_code(folder: Path, marker: Path) -> None:
    """Make a Llama folder one that only its own code can load."""
    (folder / "modeling_odd.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
    edit(folder / "config.json", model_type="odd", architectures=["OddModel"], auto_map=classes)


def test_code_runs_only_if_it_is_allowed_to(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "marker"
    plain = identity_of(folder)
    add_code(folder, marker)
    with pytest.raises(EvalError, match=r"none of it was run.*--trust-remote-code"):
        identity_of(folder)
    assert not marker.exists()
    trusted = identity_of(folder, trust_remote_code=True)
    assert marker.exists()
    assert trusted["parameters"] == plain["parameters"]
    (folder / "modeling_odd.py").write_text((folder / "modeling_odd.py").read_text() + "# changed\n")
    assert identity_of(folder, trust_remote_code=True)["sha256"] != trusted["sha256"]


@pytest.mark.parametrize("place", ["a folder below", "another repository"])
def test_code_that_is_not_next_to_the_weights_is_part_of_the_digest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    add_code(folder, tmp_path / "marker")
    code = folder / "modeling_odd.py"
    if place == "a folder below":
        (folder / "parts").mkdir()
        code = folder / "parts" / "layers.py"
        code.touch()
    else:
        (tmp_path / "elsewhere").mkdir()
        code = code.rename(tmp_path / "elsewhere" / code.name)
        found = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
        edit(folder / "config.json", auto_map={kind: f"{code.parent}--{name}" for kind, name in found.items()})
    before = identity_of(folder, trust_remote_code=True)["sha256"]
    assert identity_of(folder, trust_remote_code=True)["sha256"] == before
    code.write_text(code.read_text() + "# changed\n")
    assert identity_of(folder, trust_remote_code=True)["sha256"] != before


def test_code_of_a_tokenizer_does_not_run_either(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / "odd_tokenizer.py").write_text(CODE.format(marker=str(marker)))
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OddTokenizer",
        auto_map={"AutoTokenizer": ["odd_tokenizer.OddTokenizer", None]},
    )
    with pytest.raises(EvalError, match=r"none of it was run.*--trust-remote-code"):
        identity_of(folder)
    assert not marker.exists()


@pytest.mark.parametrize("content", ["[" * 100_000, '{"architectures": 3}'])
def test_a_config_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EvalError, match=r"cannot load the model .*: config\.json: "):
        load_model(locate_model(tmp_path), dtype="auto", device=torch.device("cpu"), trust_remote_code=False)
