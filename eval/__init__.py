"""Evaluation of exported models on standard tasks, through lm-eval.

Reads Hugging Face folders and result files; knows nothing of the trainer or the optimizers.
Import from it as `from eval.harness import evaluate`: a bare `import eval` hides the builtin.
"""
