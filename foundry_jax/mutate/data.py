"""Mutations of the data: what is trained on, never what is validated on.

They import what they need of `data` when they are called: it imports numpy, which --help does without.
"""

from foundry_jax.config import PAIR_LOSSES
from foundry_jax.errors import UserError
from foundry_jax.registry import lookup
from foundry_jax.schema import coerce, require

FORMAT_VARIANTS = {
    "own": "the chat template that the tokenizer brings",
    "chatml": "a turn between <|im_start|> and <|im_end|>; OpenAI 2023, Qwen 2024, 2407.10671",
    "llama3": "a turn after <|start_header_id|> and <|end_header_id|>; Dubey et al. 2024, 2407.21783",
    "alpaca": "an instruction and a response under headings, one turn; Taori et al. 2023 (stanford_alpaca)",
}
PACKING_VARIANTS = {
    "stream": "one endless text, each document seeing those before it; Radford et al. 2019 (GPT-2)",
    "split": "the same cut, but documents do not see each other; Zhao et al. 2024, 2402.13991",
    "pad": "one document a sequence, the rest padding",
    "first_fit": "whole documents into the first sequence with room; Krell et al. 2021, 2107.02027",
    "best_fit": "whole documents into the fullest sequence with room; Ding et al. 2024, 2404.10830",
}
CURRICULUM_VARIANTS = {
    "none": "all sequences from the first step on",
    "length": "short documents first; Platanios et al. 2019, 1903.09848",
    "compression": "documents first that zlib makes small; Bengio et al. 2009",
    "perplexity": "documents first that a reference model finds likely; Wu et al. 2020, 2012.03107",
}
FILTER_VARIANTS = {
    "none": "every training document",
    "standard": "a recipe of the filters that need no numbers; Rae et al. 2021, 2112.11446",
    "length": "not too short, not too long, in characters; Rae et al. 2021, 2112.11446",
    "exact": "the first of equal documents; Lee et al. 2021, 2107.06499",
    "near": "the first of nearly equal documents, by MinHash; Broder 1997; Lee et al. 2021, 2107.06499",
    "repetition": "lines, paragraphs and phrases that do not repeat; Rae et al. 2021, 2112.11446",
    "characters": "enough letters, few symbols; Rae et al. 2021, 2112.11446",
    "urls": "few links; Penedo et al. 2023, 2306.01116",
}


def conversation_format(config, name: str, train: str = ""):
    """How conversations are spelled, and what of them is trained on: own, chatml, llama3 or alpaca[:assistant or all].

    Ouyang et al. 2022, 2203.02155.
    """
    lookup(FORMAT_VARIANTS, name, "format of conversations")
    return {"data.format": f"{name}(train={train!r})" if train else name}


def data_filter(config, *filters: str):
    """What training documents must pass, in order: names, perhaps with numbers, such as exact:near(threshold=0.8).

    Rae et al. 2021, 2112.11446.
    """
    from foundry_jax.data.filters import FILTERS, RECIPES

    require(bool(filters), f"data_filter needs names such as exact:near; choose from {', '.join(FILTER_VARIANTS)}.")
    if filters == ("none",):
        return {"data.filters": ""}
    for one in filters:
        lookup(FILTERS | RECIPES, one.partition("(")[0], "filter")
    return {"data.filters": ", ".join(RECIPES.get(one, one) for one in filters)}


def packing(config, name: str, bins: str = ""):
    """How documents are put into sequences: stream, split, pad, first_fit[:bins] or best_fit[:bins].

    Krell et al. 2021, 2107.02027.
    """
    lookup(PACKING_VARIANTS, name, "packing")
    return {"data.packing": f"{name}(bins={bins})" if bins else name}


def curriculum(config, kind: str, pacing: str = "", start: str = "", steps: str = ""):
    """Which sequences come first: length or compression[:linear, root or step[:share at first[:share of the steps]]].

    perplexity takes its model as well: curriculum=perplexity(model='smollm2-135m'). Bengio et al. 2009.
    """
    lookup(CURRICULUM_VARIANTS, kind.partition("(")[0], "curriculum")
    given = {"pacing": pacing and repr(pacing), "start": start, "steps": steps}
    require(
        "(" not in kind or not any(given.values()),
        f"curriculum={kind} has options in brackets, and more after it; write all of them in the brackets.",
    )
    numbers = ", ".join(f"{key}={value}" for key, value in given.items() if value)
    return {"data.curriculum": f"{kind}({numbers})" if numbers else kind}


def constitution(config, path: str, share: str = "0.1"):
    """A JSONL file of (principle, prompt, chosen, rejected) is mixed in: pairs to dpo, chosen answers to other losses.

    Share is its part of the pairs, or of the sequences. Bai et al. 2022, 2212.08073.
    """
    from foundry_jax.data import mixture, pair_files

    part = coerce(share, float, "constitution: share")
    require(0 < part < 1, f"constitution: share={part:g} must be between 0 and 1.")
    spelled = _format_of(config)
    if config.loss.name in PAIR_LOSSES:
        others = [one.weight for one in pair_files.parse(config.data.preferences)]
        call = _call(path, part, others)
        return spelled | {"data.preferences": f"{_as_call(config.data.preferences)}, {call}"}
    others = [one.weight for one in mixture.parse(config.data.source)]
    call = _call(path, part, others)
    return spelled | {"data.source": f"{config.data.source}, {call}"}


def _call(path: str, share: float, others: list[float]) -> str:
    """Returns the call that takes its share beside others of these weights."""
    if "'" in path:
        raise UserError(f"constitution: path={path!r} must not hold a quotation mark.")
    return f"constitution(path='{path}', weight={sum(others) * share / (1 - share):.6g}, held_out=False)"


def _as_call(preferences: str) -> str:
    """Returns data.preferences as calls, which a bare path is not."""
    return preferences if preferences.rstrip().endswith(")") else f"pairs(path={preferences!r})"


def _format_of(config) -> dict[str, str]:
    """Returns the format that a tokenizer fitted here needs, which brings no template."""
    return {"data.format": "chatml"} if config.data.format == "own" and not config.init.source else {}
