"""The baseline's architecture, small enough to train while you wait.

python -m foundry_jax.main --config=configs/tiny.py          # or :mla, :gqa_1kv,lr=3e-4, ...

On 2 CPU cores: 50 s, compilation included, imports not; 4.560 nats per token, 2.085 bits per byte (Python 3.11).
"""

from ml_collections import ConfigDict

from configs import baseline
from foundry_jax import mutate


def get_config(arg: str = "") -> ConfigDict:
    """Returns the tiny config with the mutations named in `arg` applied."""
    c = baseline.get_config()
    c.name = "tiny"
    c.num_steps = 300
    c.model.context_length = 128
    c.model.num_layers = 4
    c.model.model_dim = 128
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.model.window = 32
    c.model.kv_lora_rank = 48
    c.model.qk_nope_head_dim = 16
    c.model.qk_rope_head_dim = 16
    c.model.v_head_dim = 32
    c.data.vocab_size = 2048
    c.data.validation = "document(fraction=0.01)"
    c.data.batch_size = 16
    c.optimizer.learning_rate = 3e-3
    c.optimizer.min_learning_rate = 3e-4
    c.optimizer.warmup_steps = 30
    c.checkpoint.every = 100
    c.eval.every = 100
    return mutate.apply(c, arg, lineage=__file__)
