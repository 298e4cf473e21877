"""Evaluation of exported models on standard tasks, with lm-eval.

This package reads Hugging Face folders and result files. It does not depend on the trainer or the optimizers.
Import from its modules, as in `from eval.harness import evaluate`: a bare `import eval` hides the builtin.
"""
