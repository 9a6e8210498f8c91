"""Learning from preferences: direct preference optimization (DPO) of a pretrained model, by low-rank adapters.

    python -m foundry_jax.main --config=configs/dpo.py

reads pairs.jsonl, or what data.preferences and data.path name: {"prompt": ..., "chosen": ..., "rejected": ...} a line.
data.preferences is what is learned from; the preferred answers at data.path are only validated on. Part of the pairs is
held out, by their prompts, and at every evaluation the metrics say how much the model prefers what was chosen of those,
and how far it has gone from the model that it started from (preference_loss, reward_accuracy, kl). What DPO may still
change best was learned before, by configs/finetune.py: start from that run with model=runs/finetune.

The argument is that of configs/finetune.py.

The default model on 200 pairs of hh-rlhf as conversations (tests/bench/sft_and_dpo.py: :steps=50 with
model.context_length=96): the loss on 88 pairs that are held out is 0.687 (ln 2 before), reward accuracy 0.61 (0.51 to
0.71); 7 minutes on 2 CPU cores (2026-11).
"""

from ml_collections import ConfigDict

from configs import finetune
from foundry_jax import mutate

CONTEXT_LENGTH = 256  # at most: a pair is two sequences


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config for the model that comes first in `arg`, with the mutations after it applied."""
    first, _, rest = arg.partition(",")
    model, mutations = (first, rest) if first.startswith("model=") else ("", arg)
    c = finetune.get_config(model)
    c.name = "dpo"
    c.num_steps = 100
    if c.model.position != "learned":  # as in configs/finetune.py
        c.model.context_length = min(c.model.context_length, CONTEXT_LENGTH)

    c.data.source = "constitution"
    c.data.path = "pairs.jsonl"
    c.data.preferences = "pairs.jsonl"
    c.data.batch_size = 4
    c.loss.name = "dpo"
    c.loss.dpo_beta = 0.1
    c.optimizer.learning_rate = 1e-4
    c.optimizer.min_learning_rate = 1e-5
    c.optimizer.warmup_steps = 5
    c.optimizer.ema_decay = 0.9
    c.checkpoint.every = 50
    c.eval.every = 25
    c.log.every = 1
    return mutate.apply(c, mutations, lineage=__file__)
