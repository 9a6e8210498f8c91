"""Mutations of the training recipe."""

from foundry_jax.config import OPTIMIZERS, SCHEDULES
from foundry_jax.errors import UserError
from foundry_jax.registry import lookup


def lr(config, peak: str):
    """Peak learning rate; the minimum keeps its ratio to the peak. Smith 2015, 1506.01186."""
    o = config.optimizer
    ratio = o.min_learning_rate / o.learning_rate if o.learning_rate else 0.0
    try:
        return {
            "optimizer.learning_rate": float(peak),
            "optimizer.min_learning_rate": float(f"{float(peak) * ratio:.6g}"),
        }
    except ValueError:
        raise UserError(f"lr={peak!r} must be a number such as 3e-4.") from None


def schedule(config, name: str, decay_fraction: str = ""):
    """Shape of the learning rate over the run: cosine, linear, constant or wsd[:share of the steps spent decaying].

    Cosine: Loshchilov & Hutter 2016, 1608.03983; wsd: MiniCPM 2024, 2404.06395.
    """
    lookup(SCHEDULES, name.partition("(")[0], "schedule")
    return {"optimizer.schedule": f"{name}({decay_fraction})" if decay_fraction else name}


def optimizer(config, name: str):
    """The update rule: adamw (Loshchilov & Hutter 2017, 1711.05101) or lion (Chen et al. 2023, 2302.06675)."""
    lookup(OPTIMIZERS, name, "optimizer")
    return {"optimizer.name": name}


def batch_size(config, size: str):
    """Sequences per optimizer step, over all devices. McCandlish et al. 2018, 1812.06162."""
    return {"data.batch_size": size}


def warmup(config, steps: str):
    """Steps of linear warm-up. Goyal et al. 2017, 1706.02677."""
    return {"optimizer.warmup_steps": steps}


def grad_clip(config, norm: str):
    """Largest global gradient norm; 0 switches clipping off. Pascanu et al. 2012, 1211.5063."""
    return {"optimizer.clip_norm": norm}


def weight_decay(config, rate: str):
    """Decoupled weight decay of matrices. Loshchilov & Hutter 2017, 1711.05101."""
    return {"optimizer.weight_decay": rate}


def adam_betas(config, beta1: str, beta2: str):
    """Decay rates of the first and second moment. Kingma & Ba 2014, 1412.6980."""
    return {"optimizer.beta1": beta1, "optimizer.beta2": beta2}


def ema(config, decay: str):
    """Decay of the exponential moving average of the weights; 0 makes it equal the raw weights.

    Polyak & Juditsky 1992, https://doi.org/10.1137/0330046.
    """
    return {"optimizer.ema_decay": decay}


# The numbers that may follow the name of a loss, in order.
LOSS_NUMBERS = {
    "cross_entropy": (),
    "focal": ("focal_gamma",),
    "dpo": ("dpo_beta", "label_smoothing"),
    "ipo": ("dpo_beta",),
}


def loss(config, name: str, *numbers: str):
    """The training loss, with new numbers if any: cross_entropy, focal:gamma, dpo:beta:smoothing, ipo:beta."""
    known = lookup(LOSS_NUMBERS, name, "loss")
    if len(numbers) > len(known):
        raise UserError(f"loss={name} takes {':'.join((name, *known))}, not {':'.join((name, *numbers))!r}.")
    return {"loss.name": name} | {f"loss.{key}": number for key, number in zip(known, numbers, strict=False)}


def dpo(config, pairs: str = "", beta: str = ""):
    """Direct preference optimization on a JSONL file of pairs (prompt, chosen, rejected), by default the config's.

    Rafailov et al. 2023, 2305.18290.
    """
    given = {"data.preferences": pairs, "loss.dpo_beta": beta}
    return {"loss.name": "dpo"} | {key: value for key, value in given.items() if value}


def label_smoothing(config, epsilon: str):
    """Probability mass spread evenly over the vocabulary in the training loss; of dpo, the share of swapped pairs.

    Szegedy et al. 2015, 1512.00567.
    """
    return {"loss.label_smoothing": epsilon}


def z_loss(config, weight: str):
    """Weight of logsumexp(logits)^2 in the training loss. PaLM 2022, 2204.02311."""
    return {"loss.z_loss": weight}


def lora_rank(config, rank: str):
    """Rank of the adapters that are trained instead of the parameters; 0 trains all. Hu et al. 2021, 2106.09685."""
    return {"lora.rank": rank}


def lora_alpha(config, alpha: str):
    """Weight of the adapters, divided by their rank. Hu et al. 2021, 2106.09685."""
    return {"lora.alpha": alpha}


def lora_dropout(config, rate: str):
    """Dropout rate before the adapters. Hu et al. 2021, 2106.09685."""
    return {"lora.dropout": rate}


def steps(config, count: str):
    """Optimizer steps of the run; the schedule stretches with it. Hoffmann et al. 2022, 2203.15556."""
    return {"num_steps": count}
