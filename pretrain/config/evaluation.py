"""Config section `evaluation`: scores on evaluation tasks, measured while the run trains."""

from collections.abc import Collection
from typing import Annotated

from pydantic import Field, StringConstraints

from pretrain.config.base import EXECUTION, Section
from pretrain.config.fields import PositiveInt

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
DeviceName = Annotated[str, StringConstraints(pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$")]


class EvaluationConfig(Section):
    """Scores on evaluation tasks, measured while the run trains.

    Rank 0 starts a process that follows the run, as `aurora eval RUN --every-checkpoint --follow` does, and scores its
    checkpoints; the results are in `eval/` of the run folder, its output in `eval/follow.log`. Training does not wait
    for it before the end of the run, and does not depend on it: a failure is a warning. To score on other machines,
    leave this out and submit `slurm/eval.sbatch RUN --every-checkpoint --follow`.
    """

    key_class = EXECUTION

    every_steps: PositiveInt | None = None
    """Score the checkpoints whose step is a multiple of this, and the last one; null: none. A multiple of
    `checkpoint.save_every_steps`."""

    tasks: Annotated[tuple[TaskName, ...], Field(strict=False, min_length=1)] = ("hellaswag", "winogrande")
    """Names of tasks, as for `aurora eval --tasks`."""

    limit: PositiveInt | None = 1000
    """Items of each task, evenly spread over it; null: all."""

    device: DeviceName = "cpu"
    """Where the models are scored. On a GPU that trains as well, the model and its batches need memory in addition to
    the training; with `cpu`, the scoring runs at a lower priority than the training."""

    def ineffective(self) -> dict[str, str]:
        """Return every option but `every_steps` if nothing is scored."""
        fields = ("tasks", "limit", "device") if self.every_steps is None else ()
        return dict.fromkeys(fields, "evaluation.every_steps is null, so no checkpoint is scored")

    def implied(self) -> Collection[str]:
        """Return `every_steps` if it is null, as it was before there was this section."""
        return ("every_steps",) if self.every_steps is None else ()
