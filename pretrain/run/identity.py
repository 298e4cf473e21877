"""The identity of a run: what two launches must have in common to be the same run, and what may change on resume.

Each config key declares a class where it is defined (`pretrain.config.base.KeyClass`). On resume the *result* keys
must match, and the contents of data and tokenizer, which stand in for their paths; a change of *numerics* keys, of
where the run ends, or of a sampled validation set prints a warning; everything else may change.

The identity of a saved run is derived from its stored config and the digests of its files, so that checkpoints of
every version are compared in the same way. The identity recorded in a checkpoint is for human readers, except for the
digests of the tokenizer and of the run's ancestor, which are recorded nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pretrain.checkpoint.store import CheckpointReader
from pretrain.config import Config, ConfigError, identity_hash, parse_stored_config
from pretrain.config.base import leaves
from pretrain.config.loader import read_yaml
from pretrain.run.folder import RunError, RunFolder

TOKENIZER = "tokenizer contents"
VALIDATION = "validation contents"
ANCESTOR = "init.from contents"
DECAY_START = "schedule.decay_start_tokens"
"""The key that may follow a longer budget; see `Identity.check`."""


@dataclass(frozen=True)
class Identity:
    """What a run computes. Keys are dotted paths of the config, or the path of a file key followed by ``contents``.

    Attributes:
        result: what is trained.
        numerics: in which arithmetic.
        length: where it ends.
        scheduled: whether the learning rate depends on where it ends.
        batch_tokens: tokens of a step.
        files: path and digest of each file, in order, for each key of `result` about the contents of a local source.
        validation: digest of the validation set of remote or prepared sources; None: not known, or there is none.
    """

    result: dict[str, Any]
    numerics: dict[str, Any]
    length: dict[str, Any]
    scheduled: bool
    batch_tokens: int
    files: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    validation: str | None = None

    @classmethod
    def of(
        cls, config: Config, data: Mapping[str, Any], tokenizer_sha256: str, ancestor_sha256: str | None = None
    ) -> Self:
        """Return the identity of a config whose files are known.

        Args:
            config: the run.
            data: `pretrain.data.fingerprint` of its data.
            tokenizer_sha256: of the file `tokenizer.path`.
            ancestor_sha256: of what `init.from` names; None if it names nothing.
        """
        result: dict[str, Any] = {}
        numerics, length = {}, {}
        for path, value, of in leaves(Config, config.resolved()):
            if of.extends:
                length[path] = value
            elif of.kind == "numerics":
                numerics[path] = value
            elif of.kind == "result" and not of.by_content:
                result[path] = value
        for index, limit in enumerate(config.data.epoch_limits):
            # A limit that only refuses to start does not change what is trained.
            result.pop(key := f"data.sources.{index}.max_epochs", None)
            if config.data.past_max_epochs == "end_source":
                result[key] = limit or "no limit"
        files: dict[str, list[tuple[str, str]]] = {}
        for index, source in enumerate(data["sources"]):
            key = f"data.sources.{index} contents"
            result[key] = _contents(source)
            if "locked" not in source:  # a lock says what the files of a remote source are: none can be repaired
                files[key] = [(file["path"], file["sha256"]) for file in source["files"]]
        result[TOKENIZER] = tokenizer_sha256
        if ancestor_sha256 is not None:
            result[ANCESTOR] = ancestor_sha256
        scheduled = config.schedule.kind != "constant"
        return cls(result, numerics, length, scheduled, config.train.global_batch_tokens, files)

    @property
    def tokenizer(self) -> str:
        """Digest of the tokenizer's file."""
        return str(self.result[TOKENIZER])

    @classmethod
    def of_checkpoint(cls, index: Mapping[str, Any]) -> Self:
        """Return the identity of the run that wrote a checkpoint.

        Raises:
            ConfigError: its config cannot be read by this version.
            RunError: it does not record what it was trained on.
        """
        return cls._of_record(parse_stored_config(index["config"]), index["provenance"], index["identity"])

    @classmethod
    def _of_record(cls, config: Config, described: Mapping[str, Any], identity: Mapping[str, Any]) -> Self:
        try:
            found = cls.of(config, described["data"], identity[TOKENIZER], identity.get(ANCESTOR))
            return replace(found, validation=identity.get(VALIDATION))
        except (KeyError, TypeError):
            raise RunError("the digests of its data and tokenizer are missing") from None

    @classmethod
    def of_run(cls, folder: RunFolder) -> Self | None:
        """Return the identity of the run in a folder, as last launched; None if it has not been launched.

        Raises:
            RunError: its manifest or its config is missing or cannot be read.
        """
        manifest = folder.manifest()
        if manifest is None:
            return None
        try:
            config = parse_stored_config(read_yaml(folder.path / "config.yaml"))
            return cls._of_record(config, manifest, manifest.get("identity", {}))
        except (ConfigError, RunError) as error:
            raise RunError(
                f"{folder.path}: already holds a run, but its config.yaml or manifest.json cannot be used, so it is "
                f"not known whether this is the same run: {error}"
            ) from None

    def record(self) -> dict[str, Any]:
        """Return what a manifest or a checkpoint keeps of it: plain data, flat."""
        validation = {VALIDATION: self.validation} if self.validation else {}
        return {**self.result, **self.length, **self.numerics, **validation}

    def check(
        self,
        saved: Identity,
        where: Path,
        step: int = 0,
        repairable: Collection[str] = (),
        *,
        extend: bool = False,
    ) -> list[str]:
        """Compare with what was saved; return the warnings for a resume from there.

        Args:
            saved: the identity of the run that is to be resumed.
            where: its folder, for messages.
            step: its current step.
            repairable: files of data whose contents may have changed.
            extend: it is to be extended: it may not become shorter, and the decay of its schedule may start later.

        Raises:
            RunError: it is another run, or would end before `step`; lists every key that differs and what to do.
        """
        repaired = {key: files for key in self.files if (files := self._repaired(saved, key, repairable))}
        warnings = [
            f"{key}: {', '.join(files)} changed after damage in it ended this run: taken as repaired, so reading "
            "continues at the same row"
            for key, files in repaired.items()
        ]
        changed = differences(
            {key: value for key, value in saved.result.items() if key not in repaired},
            {key: value for key, value in self.result.items() if key not in repaired},
        )
        if extend and (moved := self._moved_decay(saved, changed)):
            warnings.append(moved)
            changed = []
        if changed:
            lines = [f"{where}: this run was started with different settings:", *(f"  {line}" for line in changed)]
            lines.append("restore them to resume the run, or choose another run.name to start a new one")
            raise RunError("\n".join(lines))
        trained = step * self.batch_tokens
        for key, tokens in self.length.items():
            if tokens < trained:
                raise RunError(f"{where}: {key}: expected at least the {trained:,} tokens trained on, got {tokens:,}")
            if extend and tokens < saved.length[key]:
                raise RunError(
                    f"{where}: {key}: --extend expects at least the {saved.length[key]:,} tokens of the run, got "
                    f"{tokens:,}"
                )
            if tokens != saved.length[key] and self.scheduled:
                warnings.append(
                    f"{key} was {saved.length[key]:,}, now {tokens:,}: the schedule ends there, so the learning rates "
                    "of the remaining steps change"
                )
        if changed := differences(saved.numerics, self.numerics):
            warnings.append(f"numerics changed, so results will differ in rounding: {'; '.join(changed)}")
        if saved.validation and self.validation and saved.validation != self.validation:
            warnings.append(
                "the validation set is not that of the earlier launches, so validation losses before and after this "
                "resume cannot be compared: restore validation.max_tokens, validation.max_read_mib and validation.npz"
            )
        return warnings

    def _moved_decay(self, saved: Identity, changed: list[str]) -> str | None:
        """Return a warning if all that changed is that the decay starts later, as the run ends later."""
        before, now = (one.result.get(DECAY_START) for one in (saved, self))
        if len(changed) != 1 or before is None or now is None or now < before:
            return None
        return f"{DECAY_START} was {before:,}, now {now:,}"

    def _repaired(self, saved: Identity, key: str, repairable: Collection[str]) -> list[str]:
        """Return the files of a source that changed if they may have, and nothing else did."""
        before, now = saved.files.get(key, []), self.files[key]
        if len(before) != len(now):
            return []
        changed = [new for old, new in zip(before, now, strict=True) if old[1] != new[1]]
        return [path for path, _ in changed] if all(path in repairable for path, _ in changed) else []

    def check_checkpoint(
        self, reader: CheckpointReader, repairable: Collection[str] = (), *, extend: bool = False
    ) -> list[str]:
        """Do the same for a checkpoint, at the step that it was saved at.

        Raises:
            RunError: as for `check`, or its config cannot be read by this version.
        """
        try:
            saved = Identity.of_checkpoint(reader.index)
        except (ConfigError, RunError) as error:
            raise RunError(f"{reader.folder}: cannot determine whether this is the same run: {error}") from None
        return self.check(saved, reader.folder, reader.index["step"], repairable, extend=extend)


def _contents(source: Mapping[str, Any]) -> str:
    """What a source holds: its files in the order in which they are read, whatever they are called."""
    if locked := source.get("locked"):
        return f"{locked['files']} files, {source['bytes']:,} bytes, sha256 {locked['sha256']}"
    digests = [file["sha256"] for file in source["files"]]
    files = "1 file" if len(digests) == 1 else f"{len(digests)} files"
    return f"{files}, {source['bytes']:,} bytes, sha256 {identity_hash({'files': digests})}"


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The keys that differ, one line each. A key that has no effect is absent, which is the same as null."""
    return [
        f"{key}: {saved.get(key)!r} in the run, {wanted.get(key)!r} now"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]
