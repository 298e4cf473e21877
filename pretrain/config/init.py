"""Config section `init`: what a new run takes over from another run, or from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, field_validator

from pretrain.config.base import CONTENTS, RESULT, Section

_FROM = """\
What a new run starts from; null: from initial weights. A run folder (its newest intact checkpoint), a checkpoint, or a
Hugging Face folder: an export, or any Llama in safetensors whose shape is that of the section `model`. Read only when
the run starts: once it has a checkpoint of its own, the run resumes from that. The manifest records the ancestry."""

# `from` is a keyword, so no class statement can declare it.
_FIELDS: dict[str, Any] = {
    "from": (Annotated[str | None, CONTENTS], Field(None, min_length=1, description=" ".join(_FROM.split())))
}
_Source: Any = create_model("_Source", __base__=Section, **_FIELDS)


class InitConfig(_Source):
    """What a new run takes over from another run. A run is continued by the same command instead, without this."""

    key_class = RESULT

    take: Literal["weights", "weights+optimizer", "all"] = "weights"
    """`weights`: the weights; everything else begins anew, the data and the schedule included. `weights+optimizer`:
    also the state of the optimizer, which must keep the same tensors. `all`: also the step, the position in the data
    and the random generators. The new run then continues at the next step, and equals, step by step, a run that had
    its settings from the start, as long as those agree about the steps already taken. The model, the tokenizer, the
    data and the batch must be those of the earlier run; other mixtures may follow in `data.stages`."""

    @property
    def source(self) -> str | None:
        """The key `from`."""
        found: str | None = getattr(self, "from")
        return found

    @field_validator("from")
    @classmethod
    def _is_a_folder(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError("expected a folder of this machine")
        return value

    def ineffective(self) -> dict[str, str]:
        """Return `take` if nothing is taken over."""
        return {"take": "init.from is null, so nothing is taken over"} if self.source is None else {}

    def implied(self) -> Collection[str]:
        """Return `from` if it is null: every run was trained from its beginning at first."""
        return ("from",) if self.source is None else ()
