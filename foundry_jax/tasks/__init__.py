"""Evaluation tasks, one file each: `run` asks a model about the items of one of TASKS.

For example:

    scorer = Scorer(load_pretrained("smollm2-135m"))
    result = run(TASKS["mmlu"]("../shared/data", shots=5), scorer, "evals/mmlu", limit=570)
"""

from foundry_jax.tasks.constitution import Constitution
from foundry_jax.tasks.gsm8k import GSM8K
from foundry_jax.tasks.humaneval import HumanEval
from foundry_jax.tasks.mmlu import MMLU
from foundry_jax.tasks.running import run

__all__ = ["TASKS", "run"]

TASKS = {task.name: task for task in (GSM8K, MMLU, HumanEval, Constitution)}
