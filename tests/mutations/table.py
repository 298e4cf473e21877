"""The mutations: one fault each, and the tests that must notice it.

`old` has to occur exactly once in all Python files below `folder`; a file may move, a mutation that no longer applies
is an error. `tests` are few and fast, and at least one of them must turn red.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One change of the product that makes it wrong or wasteful."""

    name: str
    folder: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str


COUNTING = "tests/counting/"

MUTATIONS = (
    # Issue 11, fault 7: what costs.
    Mutation(
        "wandb-log-emptied",
        "pretrain/run",
        "self.run.log({",
        "dict({",
        (COUNTING + "test_wandb.py::test_every_step_is_logged_with_its_numbers_against_our_step",),
        "WandbTracker.log sends nothing",
    ),
    Mutation(
        "mfu-of-one-rank",
        "pretrain/training",
        "peak = self.peak_flops * self.engine.world_size",
        "peak = self.peak_flops",
        (COUNTING + "test_ranks.py::test_the_utilisation_is_of_the_peak_of_all_ranks",),
        "the utilisation ignores the number of ranks",
    ),
    Mutation(
        "no-sync-unused",
        "pretrain/engine",
        "contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)",
        "contextlib.nullcontext()",
        (COUNTING + "test_ranks.py::test_gradients_are_reduced_once_a_step_however_many_micro_batches[3-4]",),
        "gradients are reduced in every micro-batch",
    ),
    Mutation(
        "chunked-loss-keeps-logits",
        "pretrain/model",
        "checkpoint(self._loss, h, y, use_reentrant=False) if torch.is_grad_enabled() else self._loss(h, y)",
        "self._loss(h, y)",
        (COUNTING + "test_step.py::test_a_chunked_loss_keeps_no_logits[llama]",),
        "train.loss_chunk_tokens saves no memory",
    ),
    Mutation(
        "deterministic-ignored",
        "pretrain",
        "torch.use_deterministic_algorithms(deterministic)",
        "torch.use_deterministic_algorithms(False)",
        (COUNTING + "test_step.py::test_deterministic_kernels_are_asked_for_while_training[True]",),
        "run.deterministic asks for nothing",
    ),
    Mutation(
        "old-folder-deleted-first",
        "pretrain",
        "        final.rename(replaced)\n",
        "        shutil.rmtree(final)\n",
        (COUNTING + "test_run.py::test_the_old_folder_is_deleted_only_after_the_new_one_has_its_name",),
        "publish_folder deletes the old folder before the new one has its name",
    ),
    Mutation(
        "network-factors-wrong",
        "pretrain/planning",
        'return {"all_reduce": 2 * around, "all_to_all": 1.0}.get(operation, around)',
        'return {"all_reduce": around, "all_to_all": 1.0}.get(operation, around)',
        ("tests/planning/test_plan.py::test_bytes_on_the_wire_are_those_of_rings",),
        "aurora plan counts an all-reduce like half of one",
    ),
    Mutation(
        "gradients-planned-once-less",
        "pretrain/planning",
        "elements * (rounds if stage == 2 else 1)",
        "elements",
        ("tests/distributed/test_traffic.py::test_the_bytes_planned_are_the_bytes_counted",),
        "aurora plan lets ZeRO 2 reduce once a step",
    ),
    Mutation(
        "quarter-of-the-activations",
        "pretrain/planning",
        "return tokens * (layers + top + logits) + copies",
        "return (tokens * (layers + top + logits) + copies) // 4",
        ("tests/planning/test_activations.py::test_saved_activations_are_counted_to_the_byte",),
        "aurora plan promises a quarter of the activations",
    ),
    # Options whose purpose is time, traffic, memory or an outside effect.
    Mutation(
        "activation-checkpointing-ignored",
        "pretrain/model",
        'if every != "none":',
        "if False:",
        (COUNTING + "test_step.py::test_checkpointed_layers_are_computed_twice[full-3-llama]",),
        "train.activation_checkpointing saves no memory",
    ),
    Mutation(
        "compile-ignored",
        "pretrain/engine",
        "        if self.config.train.compile:\n            module.compile()",
        "        if self.config.train.compile:\n            module.eval().train()",
        (COUNTING + "test_step.py::test_compile_compiles_once_and_every_micro_batch_calls_that[True]",),
        "train.compile compiles nothing",
    ),
    Mutation(
        "fused-ignored",
        "optimizers",
        'if options["fused"]:',
        "if False:",
        (COUNTING + "test_step.py::test_fused_adamw_is_one_kernel_for_each_group[True]",),
        "optimizer.adamw.fused calls the plain kernel",
    ),
    Mutation(
        "wire-always-fp32",
        "pretrain/engine",
        "wire_dtype = self.config.engine.wire_dtype",
        'wire_dtype = "fp32"',
        (COUNTING + "test_ranks.py::test_a_bf16_wire_moves_half_the_bytes_of_momenta_and_steps",),
        "engine.wire_dtype bf16 moves as much as fp32",
    ),
    Mutation(
        "communication-always-fp32",
        "pretrain/engine",
        '"communication_data_type": engine.communication_dtype',
        '"communication_data_type": "fp32"',
        (COUNTING + "test_ranks.py::test_gradients_are_summed_over_ranks_in_the_communication_dtype",),
        "engine.communication_dtype bf16 moves as much as fp32",
    ),
    Mutation(
        "workers-never-started",
        "pretrain/data",
        'config.workers if split == "train" else 0',
        "0",
        (COUNTING + "test_run.py::test_as_many_reading_processes_live_as_asked[2]",),
        "data.workers starts no process",
    ),
    Mutation(
        "validation-reads-everything",
        "pretrain/training",
        "self.settings.max_tokens // config.sequence_length",
        "10**9",
        (COUNTING + "test_run.py::test_validation_reads_as_much_as_asked_as_often",),
        "validation.max_tokens does not limit anything",
    ),
    Mutation(
        "telemetry-every-step",
        "pretrain/neurons",
        "return is_due(self.settings.every_steps, step, last) or step == self.settings.reference_step",
        "return True",
        (COUNTING + "test_run.py::test_neurons_are_measured_as_often_as_asked[4-measured1]",),
        "telemetry.every_steps is not looked at",
    ),
    Mutation(
        "nothing-kept-for-good",
        "pretrain/checkpoint",
        "if keep_every_steps and step_of(f) % keep_every_steps == 0",
        "if False",
        (COUNTING + "test_run.py::test_as_many_checkpoints_are_written_and_kept_as_asked",),
        "checkpoint.keep_every_steps keeps nothing",
    ),
    # The other faults of issue 11.
    Mutation(
        "every-value-error-is-bad-input",
        "pretrain/processes",
        'if isinstance(error, UserError):\n        failure["exit_code"] = error.exit_code',
        'if isinstance(error, (UserError, ValueError)):\n        failure["exit_code"] = 2',
        ("tests/processes/test_failures.py::test_only_bad_input_loses_its_traceback",),
        "fault 1: a bug of our own ends with exit code 2",
    ),
    Mutation(
        "launcher-names-another-rank",
        "pretrain/processes",
        '(failure["kind"] == "lost", failure["kind"] == "peer", failure["time"])',
        '(failure["kind"] == "own", failure["time"])',
        (
            "tests/processes/test_failures.py::test_a_lost_connection_is_blamed_after_every_other_failure",
            "tests/processes/test_failures.py::test_an_error_on_one_rank_is_shown_there_and_named_first_by_the_launcher",
        ),
        "fault 1: the launcher blames a rank that only lost another",
    ),
    Mutation(
        "error-stays-on-its-rank",
        "pretrain/engine",
        "            raise PeerError(*failures[0])\n",
        "            pass\n",
        ("tests/distributed/test_errors_cross_ranks.py",),
        "fault 1: the other ranks do not learn of an error",
    ),
    Mutation(
        "numerics-out-of-identity",
        "pretrain",
        "                numerics[path] = value\n",
        "                continue\n",
        (
            "tests/test_identity.py::test_a_sweep_gives_each_setting_a_run_of_its_own",
            "tests/test_identity.py::test_other_arithmetic_is_announced_and_used",
        ),
        "fault 2: a change of precision is neither announced nor does it name a sweep's run",
    ),
    Mutation(
        "index-digest-unchecked",
        "pretrain/checkpoint",
        'if "digest" in index and index["digest"] != index_digest(index):',
        "if False:",
        ("tests/checkpoint/test_store.py::test_no_value_of_the_index_can_be_changed_or_deleted",),
        "fault 3: an edited counter is used on resume without an error",
    ),
    Mutation(
        "cover-unchecked",
        "pretrain/checkpoint",
        "if end != prod(shape):",
        "if False:",
        ("tests/checkpoint/test_store.py::test_an_index_that_does_not_hold_together_is_refused_whatever_its_digest",),
        "fault 3: a missing fragment reads uninitialised memory",
    ),
    Mutation(
        "second-reader-counts-a-llama",
        "pretrain/run",
        "return None if model is None else parameter_count(model)",
        'return None if model is None else parameter_count(model.model_copy(update={"architecture": "llama"}))',
        ("tests/run/test_reader.py::test_they_are_counted_as_the_trainer_does_for_runs_that_lack_them",),
        "fault 4: the report counts a speedrun model as a Llama",
    ),
    Mutation(
        "git-at-every-save",
        "pretrain/run",
        "@functools.cache\ndef git_commit()",
        "def git_commit()",
        (COUNTING + "test_run.py::test_a_save_starts_no_process",),
        "fault 5: every save starts processes",
    ),
    Mutation(
        "resolved-config-judged-as-a-persons",
        "pretrain/config",
        "        if info.context == STORED:\n",
        "        if False:\n",
        ("tests/config/test_effect.py::test_without_it_the_dump_leaves_it_out_and_an_older_dump_with_it_is_read",),
        "fault 9: what we write ourselves we do not accept",
    ),
    Mutation(
        "environment-divides-gradients",
        "pretrain/processes",
        "if name not in HARMLESS and not (several and name in LAUNCHER)]",
        "if name in LAUNCHER and not several]",
        ("tests/processes/test_environment.py::test_what_changes_training_is_unset_with_a_reason_and_put_back",),
        "fault 10: ACCELERATE_GRADIENT_ACCUMULATION_STEPS divides every gradient",
    ),
    Mutation(
        "one-rank-is-a-special-case",
        "pretrain/processes",
        "not (several and name in LAUNCHER)",
        "name not in LAUNCHER",
        ("tests/processes/test_environment.py::test_one_process_does_without",),
        "fault 8: what a launcher says of a single process reaches Accelerate",
    ),
)
