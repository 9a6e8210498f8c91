"""Tiny Hugging Face checkpoints, written without torch: every tensor under its own name, transposed by hand."""

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

VOCAB, DIM, HEADS, KV_HEADS, HEAD_DIM, MLP_DIM, LAYERS = 300, 20, 6, 2, 4, 28, 3

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": MLP_DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}


def tensors(seed: int = 0, dtype=ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    """Returns the tensors of a Llama with tied embeddings, as transformers names them."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        noise = rng.normal(0, 0.15 if len(shape) > 1 else 0.2, shape)
        return (noise + (len(shape) == 1)).astype(dtype)

    found = {"model.embed_tokens.weight": draw(VOCAB, DIM), "model.norm.weight": draw(DIM)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found |= {
            f"{layer}input_layernorm.weight": draw(DIM),
            f"{layer}post_attention_layernorm.weight": draw(DIM),
            f"{layer}self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, DIM),
            f"{layer}self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, DIM),
            f"{layer}self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, DIM),
            f"{layer}self_attn.o_proj.weight": draw(DIM, HEADS * HEAD_DIM),
            f"{layer}mlp.gate_proj.weight": draw(MLP_DIM, DIM),
            f"{layer}mlp.up_proj.weight": draw(MLP_DIM, DIM),
            f"{layer}mlp.down_proj.weight": draw(DIM, MLP_DIM),
        }
    return found


def write(
    folder: pathlib.Path,
    found: Mapping[str, np.ndarray] | None = None,
    *,
    files: int = 1,
    tokenizer: bool = True,
    **keys,
) -> pathlib.Path:
    """Returns the folder with a checkpoint in it, its tensors dealt out over some files; keys change config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    found = tensors() if found is None else found
    if files == 1:
        save_file(dict(found), folder / "model.safetensors", {"format": "pt"})
    else:
        names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
        where = {name: names[i % files] for i, name in enumerate(found)}
        for name in names:
            save_file({key: x for key, x in found.items() if where[key] == name}, folder / name, {"format": "pt"})
        total = sum(x.nbytes for x in found.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | keys))
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: pathlib.Path, vocab_size: int = VOCAB) -> None:
    """Writes a byte-level BPE tokenizer of that many tokens, with two control tokens for chats."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the model and the theme of that other mother; another one of them, and then the end. " * 3
    backend.train_from_iterator([text + "".join(f" word{i} thing{i * 7}" for i in range(200))], trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": CHATML}))


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
