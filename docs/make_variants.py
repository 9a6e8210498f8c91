"""Writes docs/variants.md: every variant that a config argument can name, with its cost and what it reached.

    python docs/make_variants.py                  # write the page from docs/variants.json
    python docs/make_variants.py --train          # first train what docs/variants.json lacks
    python docs/make_variants.py --pairs=FILE     # the same for losses on pairs of completions, a JSONL file
    python docs/make_variants.py --speed          # first time every variant's step against the baseline's

Training took 12 minutes a seed on 2 CPU cores that also ran tests, as two processes with --part=1/2 and --part=2/2,
each under taskset.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Iterator

from foundry_jax import mutate

ROOT = pathlib.Path(__file__).parents[1]
TARGET, MEASURED = ROOT / "docs" / "variants.md", ROOT / "docs" / "variants.json"
CONFIG = "configs/tiny.py"
BASELINE = "gqa"
SEEDS, STEPS = 3, 80

# Mutations whose values are numbers, and with which value they are shown.
NUMBERS = ("softcap", "sliding_window", "pattern=SSSL", "tie_embeddings=false", "label_smoothing=0.1", "z_loss=1e-4")
# They train on pairs of completions and not on the corpus, so their bits per byte would say nothing.
ON_PAIRS = ("dpo", "ipo")
# Not a change of the model or the loss.
RECIPE = ("schedule", "optimizer", "conversation_format", "packing", "curriculum", "data_filter")

HEAD = """\
# Variants

<!-- Written by docs/make_variants.py from the tables in foundry_jax/mutate/ and the figures in docs/variants.json. -->

Every variant is a name in a config argument: `--config=configs/tiny.py:mla`, several joined by commas. The table
compares them on `configs/tiny.py`; what a row does not name is as in the baseline, its first row.

- Parameters, active FLOPs per token (forward, matrix products; of experts those a token meets, of attention the pairs
  the mask allows) and bytes of key/value cache per token (float32, averaged over {context} tokens) are computed from
  the config.
- Speed: tokens per second in training as a share of the baseline's, steps of both interleaved in one run.
- Bits per byte: on the whole validation text after {steps} steps, mean and standard deviation over {seeds} seeds. The
  baseline's rate is used for all, so a variant that wants another one looks worse than it is, and differences of
  the size of the standard deviation mean nothing: this is a sign that everything trains, not a ranking.
- Losses on pairs of completions never see the text that is validated on. Of them the table has the reward accuracy
  over the last tenth of the steps: how often the chosen completion gained more on the reference, here the model as it
  starts, than the rejected one (1,200 pairs of hh-rlhf's harmless-base test set, {pairs_epochs:.1f} passes over them).

Measured on {machine}, {date}.

"""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row: what to write after the colon, and where the idea comes from."""

    argument: str
    meaning: str
    source: str


def catalog() -> list[Variant]:
    """Returns the variants of all tables of names, and the mutations by numbers; the baseline first."""
    rows = []
    for mutation, choices in mutate.CHOICES.items():
        for name, text in choices.items() if mutation not in RECIPE else ():
            meaning, _, source = text.partition("; ")
            rows.append(Variant(name if mutation in mutate.VARIANTS else f"{mutation}={name}", meaning, source))
    for argument in NUMBERS:
        text = " ".join(mutate.MUTATIONS[argument.partition("=")[0]].__doc__.split()).rstrip(".")
        meaning, _, source = text.partition(". ")
        rows.append(Variant(argument, meaning, source))
    rows.sort(key=lambda row: row.argument != BASELINE)
    return list(unlike(rows))


def on_text() -> list[Variant]:
    """Returns the variants that train on the corpus."""
    return [row for row in catalog() if row.argument not in ON_PAIRS]


def unlike(rows: list[Variant]) -> Iterator[Variant]:
    """Yields the rows whose config no earlier row has."""
    from foundry_jax import config

    seen = set()
    for row in rows:
        settings = config.load(f"{ROOT / CONFIG}:{row.argument}", overrides_of(row.argument))
        if settings not in seen:
            yield row
        seen.add(settings)


def overrides_of(argument: str) -> list[str]:
    """Returns what a variant needs besides its name."""
    return ["data.preferences=pairs.jsonl"] if argument in ON_PAIRS else []


def settings_of(argument: str, *overrides: str):
    """Returns the config of a variant, its vocabulary known."""
    from foundry_jax import config, train

    settings = config.load(f"{ROOT / CONFIG}:{argument}", [*overrides_of(argument), *overrides])
    return train.with_vocabulary(settings, settings.data.vocab_size)


def read() -> dict:
    """Returns what was measured: {"machine", "date", "rows": {argument: {"bits_per_byte": {seed: x}, "speed": x}}}."""
    return json.loads(MEASURED.read_text("utf-8")) if MEASURED.exists() else {"rows": {}}


def record(argument: str, key: str, value) -> None:
    """Adds one figure to docs/variants.json; several processes may do so at once."""
    (ROOT / "runs").mkdir(exist_ok=True)
    with open(ROOT / "runs" / "variants.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        figures = read() | {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
        row = figures["rows"].setdefault(argument, {})
        row[key] = row.get(key, {}) | value if isinstance(value, dict) else value
        MEASURED.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", "utf-8")


def machine() -> str:
    """Returns the processor and the number of cores."""
    names = re.findall(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def train_missing(rows: list[Variant], key: str, *overrides: str) -> None:
    """Trains every variant with every seed that has no figure yet, and records the figure of that name."""
    from foundry_jax import compilation, train

    compilation.enable_cache()
    for row, seed in [(row, seed) for seed in range(SEEDS) for row in rows]:
        if str(seed) in read()["rows"].get(row.argument, {}).get(key, {}):
            continue
        chosen = [f"seed={seed}", f"num_steps={STEPS}", "checkpoint.every=1000000", "eval.every=1000000", *overrides]
        folder = ROOT / "runs" / "variants" / f"{re.sub(r'[^A-Za-z0-9_.]', '-', row.argument)}-{seed}"
        result = train.run(settings_of(row.argument, *chosen), folder, quiet=True)
        figure = FIGURES[key](folder, result)
        record(row.argument, key, {str(seed): round(figure, 4)})
        print(row.argument, seed, figure, flush=True)


def reward_accuracy(folder: pathlib.Path, _: dict) -> float:
    """Returns the mean over the last tenth of a run's steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    last = [row["reward_accuracy"] for row in rows if row["kind"] == "train" and row["step"] > 0.9 * STEPS]
    return statistics.mean(last)


FIGURES = {
    "bits_per_byte": lambda folder, result: result["validation"]["bits_per_byte"],
    "reward_accuracy": reward_accuracy,
}


def time_all(pairs: int = 5) -> None:
    """Times every variant's training step against the baseline's."""
    baseline = step_of(BASELINE)
    for row in on_text():
        step, ratios = step_of(row.argument), []
        for _ in range(pairs + 1):
            ratios.append(baseline() / step())
        record(row.argument, "speed", round(statistics.median(ratios[1:]), 2))
        print(row.argument, statistics.median(ratios[1:]), flush=True)


def step_of(argument: str):
    """Returns a function that trains one step and returns its seconds."""
    import jax
    import numpy as np

    from foundry_jax import compilation, sharding
    from foundry_jax.optimizer import hyperparameters
    from foundry_jax.train_step import Program

    settings = settings_of(argument)
    program, plan, hyper = Program.of(settings), sharding.plan(1, 1, settings.sharding), hyperparameters(settings)
    shape = (settings.data.batch_size, settings.model.context_length)
    compiled = compilation.compile_train_step(program, plan, shape)
    state = compilation.compile_init(program, plan)(hyper)
    tokens = np.random.default_rng(0).integers(0, settings.model.vocab_size, (2, *shape)).astype(np.int32)
    batch = {"inputs": tokens[0], "targets": tokens[1], "weights": np.ones(shape, np.float32)}

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch, hyper, {}))
        return time.perf_counter() - start

    return step


def cells(row: Variant, figures: dict) -> tuple[str, ...]:
    """Returns one line of the table."""
    from foundry_jax.model import transformer

    model = settings_of(row.argument).model
    found = figures["rows"].get(row.argument, {})
    key = "reward_accuracy" if row.argument in ON_PAIRS else "bits_per_byte"
    values = list(found.get(key, {}).values())
    figure = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else "not measured"
    return (
        f"`{row.argument}`",
        row.meaning,
        re.sub(r"(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", row.source),
        f"{transformer.num_params(model):,}",
        f"{transformer.flops_per_token(model) / 1e6:.2f} M",
        f"{transformer.kv_bytes_per_token(model):,.0f}",
        f"{found['speed']:.2f}" if "speed" in found else "on pairs",
        f"reward accuracy {figure}" if row.argument in ON_PAIRS else figure,
    )


def render() -> str:
    """Returns the whole page."""
    figures, context = read(), settings_of(BASELINE).model.context_length
    head = ("variant", "what it is", "source", "parameters", "active FLOPs", "KV bytes", "speed", "bits per byte")
    rows = [head, ("---",) * len(head), *[cells(row, figures) for row in catalog()]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    numbers = {name: figures.get(name, "") for name in ("machine", "date")}
    numbers["pairs_epochs"] = STEPS * settings_of(BASELINE).data.batch_size / 1200
    return HEAD.format(context=context, steps=STEPS, seeds=SEEDS, **numbers) + table + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--pairs", metavar="FILE")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--part", default="1/1", help="which share of the runs to train, such as 1/2")
    flags = parser.parse_args()
    if flags.train:
        part, parts = map(int, flags.part.split("/"))
        train_missing(on_text()[part - 1 :: parts], "bits_per_byte")
    if flags.pairs:
        rows = [row for row in catalog() if row.argument in ON_PAIRS]
        train_missing(rows, "reward_accuracy", f"data.preferences={flags.pairs}", "log.every=1")
    if flags.speed:
        time_all()
    TARGET.write_text(render(), "utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
