"""A trained model in memory, ready to be asked."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from foundry_jax import generate as generation
from foundry_jax import sharding
from foundry_jax.config import ShardingConfig
from foundry_jax.data.tokenize import Tokenizer
from foundry_jax.generate import Sampling
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.transformer import Transformer, num_params
from foundry_jax.schema import require
from foundry_jax.train_step import unbox
from foundry_jax.zoo.load import abstract_params, load
from foundry_jax.zoo.source import Source


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model, its parameters laid out by a plan, and its tokenizer.

    name: where it came from.
    config: its architecture; config.dtype is that of its matrix products.
    stop_ids: ids of the tokens that end what it writes.
    adapters: what the model takes as its collection "lora", if it is not merged into the parameters.
    """

    name: str
    config: ModelConfig
    params: dict
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    plan: sharding.Plan | None
    adapters: dict | None = None

    @property
    def model(self) -> Transformer:
        """The Linen module: model.apply(variables, tokens) -> (logits, None)."""
        return Transformer(self.config)

    @property
    def variables(self) -> dict:
        """What the module is applied to."""
        return {"params": self.params} if self.adapters is None else {"params": self.params, "lora": self.adapters}

    def logits(self, tokens_BL: jax.Array) -> jax.Array:
        """Returns logits_BLV in float32."""
        with self._context():
            return _logits(self.config, self.variables, jnp.asarray(tokens_BL, jnp.int32))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Returns what the model writes after each prompt, up to one of its stop tokens; see generate.Sampling.

        Raises:
            UserError: the model has no tokenizer, or an option is out of range.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.encode(text) for text in texts]
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        new = self.generate_ids(ids, max_tokens=max_tokens, sampling=sampling)
        found = [self.tokenizer.decode(row, skip_special=True) for row in new]
        return found[0] if isinstance(prompts, str) else found

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Returns the new ids of each prompt, without the stop id."""
        with self._context():
            return generation.generate(
                self.config, self.variables, prompts, max_tokens=max_tokens, stop_ids=self.stop_ids, sampling=sampling
            )

    def stream_ids(self, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling | None = None) -> Iterator[int]:
        """Yields the new ids of one prompt as they are found, up to a stop id."""
        with self._context():
            for tokens in generation.stream(
                self.config, self.variables, [prompt], max_tokens=max_tokens, sampling=sampling
            ):
                if int(tokens[0]) in self.stop_ids:
                    return
                yield int(tokens[0])

    def encode(self, prompt: str) -> list[int]:
        """Returns the ids of a prompt, with what the model's tokenizer puts before it.

        Raises:
            UserError: the model has no tokenizer.
        """
        require(self.tokenizer is not None, f"{self.name} has no tokenizer.json: use generate_ids with token ids.")
        return [*self.tokenizer.start_ids, *self.tokenizer.encode(prompt)]

    def _context(self) -> contextlib.AbstractContextManager:
        return self.plan.context() if self.plan else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, variables: dict, tokens_BL: jax.Array) -> jax.Array:
    return Transformer(config).apply(variables, tokens_BL)[0]


def pretrained(
    source: Source,
    *,
    dtype: str = "float32",
    plan: sharding.Plan | None = None,
    device: jax.Device | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Pretrained:
    """Returns a source's model with its parameters on the devices of a plan, or all on one device.

    Raises:
        UserError: an unknown dtype, or files that cannot be read.
    """
    config = dataclasses.replace(source.model, dtype=dtype)
    require(plan is None or device is None, "Give a plan or a device, not both.")
    boxed = abstract_params(config)
    if device is None:
        plan = plan or automatic_plan(config)
        shardings = plan.shardings(boxed)
    else:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(device), unbox(boxed))
    params = load(source.read, config, shardings, dtype, progress, source.slowest)
    return Pretrained(source.name, config, params, source.tokenizer(), source.stop_ids, plan)


def automatic_plan(config: ModelConfig) -> sharding.Plan:
    """Returns the planner's choice for all devices."""
    free = ShardingConfig(strategy="auto", fsdp_min_params=1e9, data=0, fsdp=0, tensor=0)
    return sharding.plan(num_params(config), jax.device_count(), free)
