"""Finetuning a pretrained model on text or conversations: low-rank adapters (LoRA), or all parameters with lora_rank=0.

    python -m foundry_jax.main --config=configs/finetune.py --config.data.path=book.txt --config.data.validation=tail
    python -m foundry_jax.main --config=configs/finetune.py --config.data.source=chat --config.data.path=chats.jsonl

The argument may begin with model= and a name of the zoo, a folder, a GGUF file or a run; mutations follow. One of the
architecture (model=smollm2-135m,gqa_1kv) starts from what of the parameters fits it, and says what does not.

Adapters want a rate of about 2e-4, all parameters one of about 2e-5 (lora_rank=0,lr=2e-5). On a GPU set
model.dtype=bfloat16, and model.remat=none if memory allows.

The default model on tinyshakespeare.txt (:batch_size=4,steps=40,warmup=4 with model.context_length=128 and
data.validation="tail(0.01)"): 3.93 nats per token before, 3.55 after; 7 minutes on 2 busy CPU cores (2026-11).
"""

from ml_collections import ConfigDict

from configs import baseline
from foundry_jax import mutate, zoo
from foundry_jax.config import set_values

MODEL = "smollm2-135m"
CONTEXT_LENGTH = 512  # at most: what models can read is often more than one wants to pay for


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config for the model that comes first in `arg`, with the mutations after it applied."""
    first, _, rest = arg.partition(",")
    if first.startswith("model="):
        name, mutations = first.removeprefix("model="), rest
    else:
        name, mutations = MODEL, arg
    c = baseline.get_config()
    c.name = "finetune"
    c.num_steps = 300

    settings = zoo.settings_of(name)
    c = set_values(c, {f"model.{key}": value for key, value in settings.items()})
    if c.model.position != "learned":  # those have a parameter for each position
        c.model.context_length = min(c.model.context_length, CONTEXT_LENGTH)
    c.model.scan_layers = True
    c.model.remat = "full"
    c.init.source = name
    c.lora.rank = 16

    c.data.source = "text"
    c.data.batch_size = 8
    c.optimizer.learning_rate = 2e-4
    c.optimizer.min_learning_rate = 2e-5
    c.optimizer.warmup_steps = 20
    c.optimizer.weight_decay = 0.0
    c.optimizer.beta2 = 0.999
    c.optimizer.ema_decay = 0.99
    c.checkpoint.every = 100
    c.eval.every = 100
    c.eval.batch_size = 8
    return mutate.apply(c, mutations, lineage=__file__)
