"""The whole model family once more, in float64 numpy, one query, one key, one head and one expert at a time.

Written to be obviously right and nothing else: the contract suite holds the real model against it, so it shares no code
with foundry_jax.model. It reads the fields of a ModelConfig, and parameters named as in an unrolled model
(block_0, block_1, ...). Each row of a batch is computed on its own. Sources are the papers named in the model's own
docstrings; tests/oracle/test_reference.py holds it against `transformers`.
"""

import ast
import math

import numpy as np

EMPTY = -1  # the position of padding
LATENT_EPSILON = 1e-6  # of the norms inside latent attention, whatever norm_epsilon says
NUMBERS = {  # what "name(number=value, ...)" may leave out
    "strided": {"stride": 16},
    "fixed": {"stride": 16, "summary": 4},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "original_length": 8192, "low": 1.0, "high": 4.0},
    "yarn": {
        "factor": 40.0,
        "original_length": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    },
    "softmax": {"experts": 8, "top_k": 2, "expert_dim": 0, "shared": 0, "dense_layers": 0, "balance": 0.01, "z": 0.001}
    | {"scale": 1.0, "groups": 1, "top_groups": 1, "bias_rate": 0.001},
}
NUMBERS["sigmoid"] = NUMBERS["softmax_unnormalized"] = NUMBERS["softmax"]


def logits(config, params, tokens, positions=None, segments=None) -> np.ndarray:
    """Returns float64 logits [B, L, V]; rows of padding (position EMPTY) hold nothing of meaning.

    positions [B or 1, L]: each token's place in its document, 0..L-1 if None. segments [B or 1, L]: its document.
    """
    tree, tokens = _float64(params["params"]), np.asarray(tokens)
    B, L = tokens.shape
    positions = np.broadcast_to(np.arange(L) if positions is None else np.asarray(positions), (B, L))
    segments = np.zeros((B, L), int) if segments is None else np.broadcast_to(np.asarray(segments), (B, L))
    return np.stack([_row(config, tree, tokens[b], positions[b], segments[b]) for b in range(B)])


def call(text: str) -> tuple[str, dict]:
    """Returns (name, numbers by name, left-out ones included) of "name" or "name(1, key=2)"."""
    node = ast.parse(text, mode="eval").body
    if isinstance(node, ast.Name):
        return node.id, dict(NUMBERS.get(node.id, {}))
    numbers = dict(NUMBERS[node.func.id])
    given = [ast.literal_eval(value) for value in node.args]
    numbers.update(zip(list(numbers)[: len(given)], given, strict=True))
    numbers.update({keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords})
    return node.func.id, numbers


def _float64(tree):
    if hasattr(tree, "items"):
        return {name: _float64(part) for name, part in tree.items()}
    return np.asarray(tree, np.float64)


def _row(c, tree, tokens, positions, segments):
    """Returns logits [L, V] of one row."""
    x = np.stack([tree["embed"]["embedding"][token] for token in tokens])
    if c.embedding == "scaled":
        x = x * math.sqrt(c.model_dim)
    if c.position == "learned":
        x = x + np.stack([tree["position_embed"]["embedding"][max(position, 0)] for position in positions])
    if c.embedding == "normed":
        x = _norm(c, tree["embed_norm"], x)
    for i in range(c.num_layers):
        visible = visible_pairs(c, c.pattern[i % len(c.pattern)], positions, segments)
        x = _layer(c, i, tree[f"block_{i}"], x, positions, visible)
    x = _norm(c, tree["final_norm"], x)
    return x @ (tree["embed"]["embedding"].T if c.tie_embeddings else tree["unembed"]["kernel"])


def _layer(c, i, block, x, positions, visible):
    attention = _latent_attention if c.attention == "mla" else _grouped_query_attention
    x = _sublayer(c, block, "attention", x, lambda h: attention(c, block["attention"], h, positions, visible))
    return _sublayer(c, block, "mlp", x, lambda h: _mlp_or_experts(c, i, block["mlp"], h))


def _sublayer(c, block, name, x, function):
    if c.norm_placement == "pre":
        return x + function(_norm(c, block[f"{name}_norm"], x))
    if c.norm_placement == "post":
        return x + _norm(c, block[f"{name}_post_norm"], function(x))
    assert c.norm_placement == "sandwich"
    return x + _norm(c, block[f"{name}_post_norm"], function(_norm(c, block[f"{name}_norm"], x)))


# ------------------------------------------------------------------------------------------------ masks


def visible_pairs(c, letter, positions, segments):
    """Returns [L, L], True where query i sees key j, for a layer with this letter of the pattern."""
    L = len(positions)
    visible = np.zeros((L, L), bool)
    for i in range(L):
        for j in range(L):
            if positions[j] != EMPTY and segments[i] == segments[j]:
                visible[i, j] = _sees(c, letter, int(positions[i]), int(positions[j]))
    return visible


def _sees(c, letter, query, key):
    """Returns whether the token at place `query` of a document sees the one at place `key`."""
    if key > query:
        return False
    if letter == "L":
        return True
    if letter == "S":
        return query - key < c.window
    assert letter == "P"
    name, number = call(c.sparse)
    stride = number["stride"]
    if name == "strided":
        return query - key < stride or (query - key) % stride == 0
    assert name == "fixed"
    return key // stride == query // stride or key % stride >= stride - number["summary"]


# ------------------------------------------------------------------------------------------------ attention


def _grouped_query_attention(c, p, x, positions, visible):
    q, k, v = (_linear(p[name], x) for name in ("query", "key", "value"))  # [L, N, H], [L, K, H], [L, K, H]
    q, k = _normed(c, p, "query_norm", q), _normed(c, p, "key_norm", k)
    if c.position == "rope":
        q, k = _rotate(c, q, positions, pairs=False), _rotate(c, k, positions, pairs=False)
    y = _attend(c, q, k, v, positions, visible, 1 / math.sqrt(c.head_dim))
    return _merge_heads(p["out"], y)


def _latent_attention(c, p, x, positions, visible):
    nope, rope = c.qk_nope_head_dim, c.qk_rope_head_dim
    if c.q_lora_rank:
        latent = _rms(p["query_norm"], _linear(p["query_down"], x), LATENT_EPSILON)
        q = _linear(p["query_up"], latent)
    else:
        q = _linear(p["query"], x)
    down = _linear(p["kv_down"], x)
    latent = _rms(p["kv_norm"], down[:, : c.kv_lora_rank], LATENT_EPSILON)
    up = _linear(p["kv_up"], latent)  # [L, N, nope + v]
    q_rope, k_rope = q[:, :, nope:], down[:, None, c.kv_lora_rank :]
    scale = 1 / math.sqrt(nope + rope)
    if c.position == "rope":
        q_rope, k_rope = _rotate(c, q_rope, positions, pairs=True), _rotate(c, k_rope, positions, pairs=True)
        name, number = call(c.rope_scaling)
        if name == "yarn":
            scale *= _mscale(number["factor"], number["mscale_all_dim"]) ** 2
    q = np.concatenate([q[:, :, :nope], q_rope], axis=-1)
    k = np.concatenate([up[:, :, :nope], np.repeat(k_rope, c.num_heads, axis=1)], axis=-1)
    y = _attend(c, q, k, up[:, :, nope:], positions, visible, scale)
    return _merge_heads(p["out"], y)


def _normed(c, p, name, x):
    """Returns queries or keys after qk_norm: over each head's entries, or over all heads' at once."""
    if c.qk_norm == "none":
        return x
    if c.qk_norm == "head":
        return np.stack([_norm(c, p[name], x[:, n]) for n in range(x.shape[1])], axis=1)
    assert c.qk_norm == "whole"
    return _norm(c, p[name], x.reshape(len(x), -1)).reshape(x.shape)


def _attend(c, q, k, v, positions, visible, scale):
    """Returns [L, N, Hv]; a query that sees nothing (padding) gets zeros."""
    (L, N, _), K = q.shape, k.shape[1]
    slopes = alibi_slopes(N) if c.position == "alibi" else [0.0] * N
    y = np.zeros((L, N, v.shape[-1]))
    for n in range(N):
        kv = n // (N // K)
        for i in range(L):
            keys = [j for j in range(L) if visible[i, j]]
            scores = []
            for j in keys:
                score = scale * np.dot(q[i, n], k[j, kv])
                if c.attention_softcap:
                    score = c.attention_softcap * math.tanh(score / c.attention_softcap)
                scores.append(score + slopes[n] * (int(positions[j]) - int(positions[i])))
            for j, weight in zip(keys, _softmax(np.array(scores)), strict=True):
                y[i, n] += weight * v[j, kv]
    return y


def _merge_heads(p, y):
    """Returns [L, D]: the sum over heads of what each head's output map makes of it."""
    out = sum(y[:, n] @ p["kernel"][n] for n in range(y.shape[1]))
    return out + p["bias"] if "bias" in p else out


# ------------------------------------------------------------------------------------------------ positions


def alibi_slopes(num_heads: int) -> list[float]:
    """Returns 2^(-8/n), 2^(-16/n), ... for a power of two; else those of the next lower power and every other one of
    the next higher."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    finer = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(2 * power)]
    return slopes + finer[0::2][: num_heads - power]


def frequencies(theta, dim, rope_scaling="none") -> tuple[np.ndarray, float]:
    """Returns (dim / 2 radians per token, factor on cosine and sine), in float32 as torch computes them."""
    name, number = call(rope_scaling)
    plain = np.float32(1) / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    if name == "none":
        return plain, 1.0
    slow = plain / np.float32(number["factor"])
    if name == "linear":
        return slow, 1.0
    if name == "llama3":
        table = []
        for fast, slowed in zip(plain, slow, strict=True):
            turns = number["original_length"] * fast / (2 * math.pi)  # within the original length
            share = (turns - number["low"]) / (number["high"] - number["low"])
            share = min(max(share, 0.0), 1.0)
            table.append((1 - share) * slowed + share * fast)
        return np.array(table, np.float32), 1.0
    assert name == "yarn"

    def dim_that_turns(times):
        return dim * math.log(number["original_length"] / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_that_turns(number["beta_fast"])), 0)
    high = min(math.ceil(dim_that_turns(number["beta_slow"])), dim - 1)
    table = []
    for i in range(dim // 2):
        ramp = min(max((i - low) / (high - low if high != low else 0.001), 0.0), 1.0)
        table.append(ramp * slow[i] + (1 - ramp) * plain[i])
    factor = _mscale(number["factor"], number["mscale"]) / _mscale(number["factor"], number["mscale_all_dim"])
    return np.array(table, np.float32), factor


def _mscale(factor, mscale):
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _rotate(c, x, positions, *, pairs):
    """Returns x [L, N, H] turned by position: entries (i, i + H/2) together, or (2i, 2i + 1) if `pairs`."""
    (L, N, H), half = x.shape, x.shape[-1] // 2
    table, factor = frequencies(c.rope_theta, H, c.rope_scaling)
    y = np.zeros_like(x)
    for t in range(L):
        for i in range(half):
            angle = np.float32(positions[t]) * table[i]
            cos, sin = factor * float(np.cos(angle)), factor * float(np.sin(angle))
            a, b = (2 * i, 2 * i + 1) if pairs else (i, i + half)
            for n in range(N):
                y[t, n, a] = x[t, n, a] * cos - x[t, n, b] * sin
                y[t, n, b] = x[t, n, b] * cos + x[t, n, a] * sin
    return y


# ------------------------------------------------------------------------------------------------ norms, MLPs, experts


def _norm(c, p, x):
    """Returns x normed over its last axis."""
    if c.norm == "rmsnorm":
        return _rms(p, x, c.norm_epsilon)
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    y = (x - mean) / np.sqrt(variance + c.norm_epsilon) * p["scale"]
    if c.norm == "layernorm":
        return y + p["bias"]
    assert c.norm == "layernorm_nobias" and "bias" not in p
    return y


def _rms(p, x, epsilon):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * p["scale"]


def _linear(p, x):
    """Returns x [L, D] times a kernel [D, ...], plus the bias if there is one."""
    y = np.tensordot(x, p["kernel"], axes=1)
    return y + p["bias"] if "bias" in p else y


def _gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _gelu_tanh(x):
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {  # name -> (has a gate, activation)
    "swiglu": (True, lambda x: x * _sigmoid(x)),
    "geglu": (True, _gelu),
    "geglu_tanh": (True, _gelu_tanh),
    "glu": (True, _sigmoid),
    "gelu": (False, _gelu),
    "gelu_tanh": (False, _gelu_tanh),
    "relu2": (False, lambda x: np.maximum(x, 0) ** 2),
}


def _mlp(c, p, x):
    gated, activation = ACTIVATIONS[c.mlp]
    hidden = activation(_linear(p["gate"], x)) * _linear(p["up"], x) if gated else activation(_linear(p["up"], x))
    return _linear(p["down"], hidden)


def _mlp_or_experts(c, layer, p, x):
    name, number = call(c.moe)
    if name == "none" or layer < number["dense_layers"]:
        return _mlp(c, p, x)
    y = np.zeros_like(x)
    for t in range(len(x)):
        for expert, weight in _route(name, number, p["router"], x[t]):
            own = {part: {"kernel": linear["kernel"][expert]} for part, linear in p["experts"].items()}
            y[t] += weight * _mlp(c, own, x[t : t + 1])[0]
    return y + _mlp(c, p["shared"], x) if number["shared"] else y


def _route(name, number, p, x):
    """Returns [(expert, weight)] of one token."""
    scores = x @ p["kernel"]
    scores = _sigmoid(scores) if name == "sigmoid" else _softmax(scores)
    choice = scores + p["balance_bias"] if name == "sigmoid" else scores
    experts = set(range(len(scores)))
    if number["groups"] > 1:
        size = len(scores) // number["groups"]
        best = lambda g: sorted(choice[g * size : (g + 1) * size], reverse=True)  # noqa: E731
        value = [sum(best(g)[:2]) if name == "sigmoid" else best(g)[0] for g in range(number["groups"])]
        kept = sorted(range(number["groups"]), key=lambda g: -value[g])[: number["top_groups"]]
        experts = {expert for expert in experts if expert // size in kept}
    chosen = sorted(experts, key=lambda expert: -choice[expert])[: number["top_k"]]
    total = 1.0 if name == "softmax_unnormalized" else sum(scores[expert] for expert in chosen)
    return [(expert, number["scale"] * scores[expert] / total) for expert in chosen]


def _softmax(x):
    weights = np.exp(x - x.max()) if len(x) else x
    return weights / weights.sum()
