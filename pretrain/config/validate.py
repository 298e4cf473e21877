"""Plain data into a validated `Config`. All problems are reported together."""

from __future__ import annotations

import copy
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pretrain.config.base import STORED, section_in
from pretrain.config.data import is_remote
from pretrain.config.effect import without_effect
from pretrain.config.errors import ConfigError
from pretrain.config.loader import read_yaml
from pretrain.config.overrides import apply_overrides
from pretrain.config.plain import text_problems, value_problems
from pretrain.config.schema import Config
from pretrain.processes.errors import did_you_mean, nearest
from pretrain.processes.redaction import holds_secret

MISSING = "required, but missing"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config in a YAML file with ``section.key=value`` overrides applied.

    Raises:
        ConfigError: with every problem found.
    """
    data = read_yaml(Path(path))
    problems = apply_overrides(data, overrides)
    if problems:
        raise ConfigError(problems)
    _find_lock(data, Path(path))
    return parse_config(data)


def lock_beside(config_file: Path) -> Path:
    """Return the lock file that belongs to a config: ``run.lock.json`` for ``run.yaml``."""
    return config_file.with_suffix(".lock.json")


def _find_lock(data: dict[str, Any], config_file: Path) -> None:
    """Set `data.lock` to the lock next to the config, if there is one and the config names none."""
    section = data.get("data")
    if not isinstance(section, dict) or "lock" in section:
        return
    sources = section.get("sources")
    if not isinstance(sources, list):
        return
    paths = [source.get("path") for source in sources if isinstance(source, dict)]
    if any(is_remote(path) for path in paths if isinstance(path, str)) and lock_beside(config_file).is_file():
        section["lock"] = str(lock_beside(config_file))


def parse_config(data: Mapping[str, Any]) -> Config:
    """Return the config in plain data that a person wrote: options without an effect are errors.

    Raises:
        ConfigError: with every problem found.
    """
    return _parse(data, stored=False)


def parse_stored_config(data: Mapping[str, Any]) -> Config:
    """Return the config in plain data that this program wrote, into a checkpoint or a run folder.

    Every default was written out there, by this version or an older one, so an option without an effect is not an
    error.

    Raises:
        ConfigError: with every problem found.
    """
    match data:
        case {"data": {"document_mask": True} | {"reset_positions": True}, "train": {**train}}:
            # Before there was a choice, every mask was dense; a run that continues with another prints a warning.
            data = {**data, "train": {"document_attention": "dense", **train}}
    return _parse(data, stored=True)


def _parse(data: Mapping[str, Any], stored: bool) -> Config:
    """Validate section by section, so that a fault in one section does not hide those of another."""
    try:
        if not stored and (of_texts := text_problems(data)):
            raise ConfigError(of_texts)
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from None
    problems = [
        f"{key}: unknown section{did_you_mean(key, Config.model_fields)}"
        for key in data
        if key not in Config.model_fields
    ]
    sections: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        if name not in data and not field.is_required():
            sections[name] = field.get_default(call_default_factory=True)
            continue
        if name not in data:
            problems.append(f"{name}: section is missing")
            continue
        section, found = validate_section(field.annotation, data[name], name, stored)
        problems += found
        if section is not None:
            sections[name] = section
    if not stored:
        of_values = [f"{path}: {problem}" for path, problem in value_problems(data) if not _mentions(problems, path)]
        problems += of_values
    problems += _cross_checks(sections)
    if not stored:
        problems += _given_without_effect(sections)
    if problems:
        raise ConfigError(problems)
    return Config.model_validate(sections, context=STORED if stored else None)


def _mentions(problems: Sequence[str], path: str) -> bool:
    """Whether one of some problems is about a key already."""
    return any(problem.startswith(f"{path}: ") for problem in problems)


def validate_section(model: Any, value: Any, name: str, stored: bool = False) -> tuple[Any, list[str]]:
    """Return a validated section, or None, and the problems.

    Faults of single keys must not hide faults between the other keys, so the section is validated a second time
    without the keys at fault.
    """
    if value is None:
        value = {}
    if not isinstance(value, dict):
        return None, [f"{name}: expected a section with keys, got {_shown(value)}"]
    try:
        return model.model_validate(value, context=STORED if stored else None), []
    except ValidationError as error:
        errors = _one_per_fault(model, error.errors(include_url=False))
    problems = [message for item in errors for message in _messages(model, item, name)]
    rest = copy.deepcopy(value)
    given = [item["loc"] for item in errors if item["type"] != "missing" and item["loc"]]
    removed = [loc for loc in given if _delete(rest, loc)]
    if removed:
        # A key that was removed is not missing.
        again = validate_section(model, rest, name, stored)[1]
        keys = tuple(f"{'.'.join(map(str, [name, *item['loc']]))}:" for item in errors)
        again = [p for p in again if p not in problems and not p.endswith(MISSING) and not p.startswith(keys)]
        problems += [p for p in again if not _rests_on(model, removed, p)]
    return None, problems


def _rests_on(model: type[BaseModel], removed: Sequence[Sequence[int | str]], problem: str) -> bool:
    """Whether a problem is one of the default that stands in for a removed key: it names the key, or that default.

    A key that is unknown may have been meant for the one that it resembles.
    """
    words = {str(loc[-1]) for loc in removed}
    for loc in removed:
        meant = [str(loc[0])] if loc[0] in model.model_fields else nearest(loc[0], model.model_fields)
        defaults = [model.model_fields[name].default for name in meant if len(loc) == 1]
        words.update(meant, (default for default in defaults if isinstance(default, str)))
    return not words.isdisjoint(re.findall(r"\w+", problem.partition(": ")[2]))


def _one_per_fault(model: type[BaseModel], errors: Sequence[Any]) -> list[dict[str, Any]]:
    """Pydantic's errors with one for each fault.

    It reports a value that fits no member of a union once per member, and a collection as too short when its items
    are at fault.
    """
    found: dict[Any, dict[str, Any]] = {}
    for error in errors:
        loc = error["loc"]
        if any(other["loc"][: len(loc)] == loc and len(other["loc"]) > len(loc) for other in errors):
            continue
        field = model.model_fields.get(loc[0]) if loc else None
        if field is None or not _is_union(field.annotation):
            found[loc, error["msg"]] = error
        elif loc[:1] in found:
            found[loc[:1]]["msg"] += f", or {_lower_first(error['msg'])}"
        else:
            found[loc[:1]] = {**error, "loc": loc[:1]}
    return list(found.values())


def _is_union(annotation: Any) -> bool:
    """Whether pydantic tries several types; null beside a single type is not one of them."""
    members = set(typing.get_args(annotation)) - {type(None)}
    return typing.get_origin(annotation) in (typing.Union, types.UnionType) and len(members) > 1


def _delete(value: Any, loc: tuple[int | str, ...]) -> bool:
    """Remove the key at `loc` if there is one; whether there was."""
    for key in loc[:-1]:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return False
    return isinstance(value, dict) and value.pop(loc[-1], _delete) is not _delete


def _messages(model: type[BaseModel], error: Any, section: str) -> list[str]:
    """Our wording of one pydantic error; a validator that found several problems gives several."""
    loc = [str(part) for part in error["loc"]]
    path = ".".join([section, *loc])
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return [f"{path}: unknown key{did_you_mean(loc[-1], _fields_at(model, error['loc'][:-1]))}"]
    if kind == "missing":
        return [f"{path}: {MISSING}"]
    if kind == "value_error":
        lines = str(error["ctx"]["error"]).split("\n")
        # A section's own validator names the key itself; a field's validator states only the expectation.
        own = isinstance(value, (dict, BaseModel))
        return [f"{path}.{line}" if own else f"{path}: {line}, got {_shown(value)}" for line in lines]
    expected = _lower_first(error["msg"]).replace("valid tuple", "list")  # YAML knows no tuples
    return [f"{path}: {expected}, got {_shown(value)}"]


def _shown(value: object) -> str:
    """A value for a message; not one that holds a URL, in which there may be a password, or a token."""
    text = repr(value)
    if "://" in text:
        return f"a {type(value).__name__} with a URL"
    return f"a {type(value).__name__} that is not shown" if holds_secret(text) else text


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _fields_at(model: Any, loc: Sequence[int | str]) -> list[str]:
    """Names of the fields of the section found by walking `loc` from `model`, past places in lists and mappings."""
    is_key = False
    for part in loc:
        if isinstance(part, int) or is_key:
            is_key = False
            continue
        annotation = model.model_fields[part].annotation
        is_key = typing.get_origin(annotation) is dict
        model = section_in(annotation)
    return list(model.model_fields)


def _cross_checks(sections: Mapping[str, Any]) -> list[str]:
    """Problems between sections that are each valid by themselves."""
    problems = []
    model, train, schedule = (sections.get(name) for name in ("model", "train", "schedule"))
    if model and train:
        length = train.sequence_length or model.context_length
        if length > model.context_length:
            problems.append(
                f"train.sequence_length: expected at most model.context_length ({model.context_length}), got {length}"
            )
        problems += _not_multiple("train.global_batch_tokens", train.global_batch_tokens, "the sequence length", length)
        sequences = train.global_batch_tokens // length
        if train.global_batch_tokens % length == 0 and sequences % train.micro_batch_sequences:
            problems.append(
                f"train.micro_batch_sequences: expected a divisor of the {sequences} sequences of a "
                f"global batch, got {train.micro_batch_sequences}"
            )
    if train:
        problems += _not_multiple(
            "train.total_tokens", train.total_tokens, "train.global_batch_tokens", train.global_batch_tokens
        )
    samples = sections.get("samples")
    if model and samples and model.architecture != "llama" and samples.every_steps is not None:
        problems.append(
            f"samples.every_steps: expected null, since model.architecture {model.architecture} cannot generate text, "
            f"got {samples.every_steps}"
        )
    problems += _evaluation_problems(sections)
    if sections.get("engine") and sections["engine"].kind != "plain":
        problems += _engine_problems(sections)
    if train and schedule:
        problems += _schedule_problems(schedule, train.total_tokens)
    return problems


def _evaluation_problems(sections: Mapping[str, Any]) -> list[str]:
    """What contradicts the scoring of checkpoints."""
    evaluation, model, checkpoint = (sections.get(name) for name in ("evaluation", "model", "checkpoint"))
    if not evaluation or evaluation.every_steps is None:
        return []
    problems = []
    if model and model.architecture != "llama":
        problems.append(
            f"evaluation.every_steps: expected null, since model.architecture {model.architecture} cannot be exported, "
            f"got {evaluation.every_steps}"
        )
    if checkpoint:
        every = checkpoint.save_every_steps
        problems += _not_multiple(
            "evaluation.every_steps", evaluation.every_steps, "checkpoint.save_every_steps", every
        )
    return problems


def _schedule_problems(schedule: Any, total_tokens: int) -> list[str]:
    """What the schedule and the length of the run say of each other."""
    problems = []
    if schedule.kind == "wsd" and schedule.decay_start_tokens is not None:
        before = schedule.decay_start_tokens
        if before >= total_tokens:
            problems.append(
                f"schedule.decay_start_tokens: expected less than train.total_tokens ({total_tokens:,}), got "
                f"{before:,}; for a run without decay, set schedule.kind constant"
            )
        too_long = schedule.warmup_tokens > before
    else:
        decay = schedule.decay_fraction * total_tokens if schedule.kind == "wsd" else 0
        before = total_tokens - decay
        too_long = schedule.warmup_tokens + decay > total_tokens
    if too_long:
        problems.append(
            f"schedule.warmup_tokens: expected at most the {before:,.0f} tokens before the decay, got "
            f"{schedule.warmup_tokens:,}"
        )
    return problems


def _given_without_effect(sections: Mapping[str, Any]) -> list[str]:
    """The keys that were given, and not as null, although another section leaves them without an effect."""
    problems = []
    for path, why in without_effect(sections).items():
        name, *below = path.split(".")
        section = sections[name]
        for key in below[:-1]:
            section = getattr(section, key)
        given = below[-1:] if below else sorted(section.model_fields_set)
        prefix = path.rpartition(".")[0] if below else name
        problems += [
            f"{prefix}.{key}: has no effect: {why}; remove it"
            for key in given
            if key in section.model_fields_set and getattr(section, key) is not None
        ]
    return problems


def _engine_problems(sections: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed and FSDP2 do not support, or handle incorrectly without an error."""
    engine, problems = sections["engine"], []
    if train := sections.get("train"):
        problems += [f"engine.{problem}" for problem in engine.precision_problems(train.precision)]
        if train.compile and engine.kind == "deepspeed":
            problems.append("train.compile: expected false with engine.kind deepspeed, whose hooks it cannot trace")
    samples = sections.get("samples")
    if samples and samples.every_steps is not None and engine.shards_weights:
        sharded = "engine.kind fsdp2" if engine.kind == "fsdp2" else "engine.zero_stage 3"
        problems.append(
            f"samples.every_steps: expected null with {sharded}, where no rank has the whole model, "
            f"got {samples.every_steps}"
        )
    model = sections.get("model")
    if model and model.architecture != "llama" and model.embedding_dtype != "fp32":
        problems.append(
            f"model.embedding_dtype: expected fp32 with engine.kind {engine.kind}, which casts the whole model, "
            f"got {model.embedding_dtype}"
        )
    return problems


def _not_multiple(key: str, value: int, of: str, unit: int) -> list[str]:
    if value % unit == 0:
        return []
    below, above = value // unit * unit, (value // unit + 1) * unit
    near = f"{below} or {above}" if below else f"{above}"
    return [f"{key}: expected a multiple of {of} ({unit}), got {value}; nearest: {near}"]
