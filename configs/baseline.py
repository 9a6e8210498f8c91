"""The incumbent: a 6-layer, 384-wide decoder (GQA, RMSNorm, SwiGLU, RoPE) on the standard library's sources.

    python -m foundry_jax.main --config=configs/baseline.py          # or :mla, :gqa_1kv,lr=3e-4, ...

12.6 M parameters. A step takes 13 s on 2 CPU cores: meant for one GPU or more, and not yet measured there.
Every key there is stands here, with a comment; all other configs change some of these values.
"""

from ml_collections import ConfigDict

from foundry_jax import mutate


def get_config(arg: str = "") -> ConfigDict:
    """Returns the baseline with the mutations named in `arg` applied."""
    c = ConfigDict()
    c.name = "baseline"  # names the default run folder
    c.seed = 0  # parameters, dropout and data order
    c.num_steps = 5000  # optimizer steps

    c.model = ConfigDict()
    c.model.vocab_size = 0  # 0: the tokenizer's
    c.model.context_length = 256  # tokens a sequence
    c.model.num_layers = 6  # blocks of attention and MLP
    c.model.model_dim = 384  # width of the residual stream
    c.model.num_heads = 6  # query heads
    c.model.num_kv_heads = 2  # key/value heads; 0: one per query head
    c.model.head_dim = 0  # 0: model_dim / num_heads
    c.model.mlp_dim = 0  # 0: 8/3 model_dim, as many parameters as a plain MLP of 4 model_dim
    c.model.attention = "gqa"  # gqa, mla
    c.model.q_lora_rank = 0  # MLA: rank of the query projection; 0: full rank
    c.model.kv_lora_rank = 128  # MLA: rank of the cached key/value latent
    c.model.qk_nope_head_dim = 32  # MLA: query/key dims without position, per head
    c.model.qk_rope_head_dim = 32  # MLA: query/key dims with rotary position, per head
    c.model.v_head_dim = 64  # MLA: value dims per head
    c.model.bias = "none"  # none, qkv, attention (and its output), all (and the MLP)
    c.model.qk_norm = "none"  # a norm of queries and keys: none, head (each head), whole (all heads at once)
    c.model.attention_softcap = 0.0  # logits become cap * tanh(logits / cap); 0: no cap
    c.model.pattern = "L"  # one letter a layer, repeated: L full, S sliding window, P sparse
    c.model.window = 64  # tokens that an S layer sees, the current one included
    c.model.sparse = "strided(stride=16)"  # what P layers see: strided(stride=16), fixed(stride=16, summary=4)
    c.model.mlp = "swiglu"  # swiglu, geglu, geglu_tanh, glu; without a gate: gelu, gelu_tanh, relu2
    c.model.moe = "none"  # experts instead of MLPs: none, softmax(experts=8, top_k=2), sigmoid(experts=8, top_k=2), ...
    c.model.norm = "rmsnorm"  # rmsnorm, layernorm, layernorm_nobias
    c.model.norm_epsilon = 1e-5  # added to the mean square
    c.model.norm_placement = "pre"  # pre x + f(norm(x)), post x + norm(f(x)), sandwich x + norm(f(norm(x)))
    c.model.position = "rope"  # rope, alibi, learned, none
    c.model.rope_theta = 10000.0  # longest wavelength of the rotary embedding / 2 pi
    c.model.rope_scaling = "none"  # none, linear(factor=4), llama3(factor=8, ...), yarn(factor=40, ...)
    c.model.embedding = "plain"  # plain, scaled (times the root of model_dim), normed (a norm follows)
    c.model.tie_embeddings = True  # the output matrix is the embedding
    c.model.dropout = 0.0  # after the embedding, the attention and the MLP
    c.model.dtype = "float32"  # of matmuls; parameters, softmax and loss are always float32
    c.model.scan_layers = False  # one compiled block for all layers: compiles faster, may run slower
    c.model.remat = "none"  # recompute in the backward pass: none, dots (keep matmuls), full

    c.init = ConfigDict()
    c.init.source = ""  # a name of the zoo, a folder, a GGUF file or a run to start from; empty: random parameters
    c.init.fresh = False  # whether parameters that the source does not have are drawn by the seed

    c.lora = ConfigDict()
    c.lora.rank = 0  # of the low-rank adapters that are trained; 0: all parameters are
    c.lora.alpha = 32.0  # adapters are weighed by alpha / rank
    c.lora.dropout = 0.0  # before the adapters
    c.lora.targets = ".*"  # which linear maps have one: a regular expression for "attention/query", "mlp/down", ...
    c.lora.rslora = False  # alpha / sqrt(rank) instead, which suits large ranks

    c.data = ConfigDict()
    c.data.source = "pystdlib"  # pystdlib, text, jsonl, parquet, chat, ..., or several: text(path="a", weight=2), chat
    c.data.path = ""  # of the sources that name none: a file, folder or glob; bin: a folder with train.bin and val.bin
    c.data.tokenizer = "bpe"  # char, byte, bpe: fitted, if no model to start from brings one; or a tokenizer.json
    c.data.vocab_size = 8192  # of a fitted BPE tokenizer
    c.data.validation = "document(fraction=0.05)"  # not trained on; document: by a hash of its name; tail: the end
    c.data.filters = ""  # what training documents must pass, in order: length(min=200), exact, near(threshold=0.8), ...
    c.data.format = "own"  # how conversations are spelled: own (the tokenizer's template), chatml, llama3, alpaca
    c.data.packing = "stream"  # documents to sequences: stream, split, pad, first_fit, best_fit
    c.data.curriculum = "none"  # what comes first: none, length(pacing="linear", start=0.2, steps=0.5), ...
    c.data.batch_size = 64  # sequences, or pairs, per optimizer step, over all devices
    c.data.preferences = ""  # of dpo and ipo: JSONL of prompt, chosen, rejected; or pairs(path="a", weight=2), ...
    c.data.cache_dir = ""  # token cache; empty: $FOUNDRY_CACHE or ~/.cache/foundry_jax

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw, lion
    c.optimizer.learning_rate = 6e-4  # peak
    c.optimizer.min_learning_rate = 6e-5  # at the last step
    c.optimizer.schedule = "cosine"  # cosine, linear, constant, wsd(decay_fraction=0.2): a fifth decays
    c.optimizer.warmup_steps = 100  # of linear warm-up
    c.optimizer.weight_decay = 0.1  # decoupled; matrices only
    c.optimizer.decay_embeddings = True  # whether weight decay reaches the embedding and output matrices
    c.optimizer.beta1 = 0.9  # decay of the first moment
    c.optimizer.beta2 = 0.95  # decay of the second moment
    c.optimizer.epsilon = 1e-8  # added to the root of the second moment
    c.optimizer.clip_norm = 1.0  # largest global gradient norm; 0: no clipping
    c.optimizer.ema_decay = 0.9999  # moving average of the weights, evaluated beside the raw ones; 0: equal to them
    c.optimizer.accumulation_steps = 1  # micro-batches per step; 2 or more also measure the gradient noise scale

    c.loss = ConfigDict()
    c.loss.name = "cross_entropy"  # cross_entropy, focal; on pairs of completions: dpo, ipo
    c.loss.label_smoothing = 0.0  # probability spread over the vocabulary; dpo: share of pairs the wrong way round
    c.loss.z_loss = 0.0  # weight of logsumexp(logits)^2
    c.loss.focal_gamma = 2.0  # focal: (1 - p)^gamma weighs a token; 0: cross-entropy
    c.loss.dpo_beta = 0.1  # dpo, ipo: how dear it is to leave the reference

    c.sharding = ConfigDict()
    c.sharding.strategy = "auto"  # auto, none, ddp, fsdp
    c.sharding.fsdp_min_params = 1e9  # auto: fewer parameters than this are replicated (ddp)
    c.sharding.data = 0  # size of the mesh axis over batches; 0: the planner's choice
    c.sharding.fsdp = 0  # size of the mesh axis over batches and parameters
    c.sharding.tensor = 0  # size of the mesh axis over heads, mlp and vocabulary

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps
    c.checkpoint.keep_latest = 2  # newest checkpoints that stay
    c.checkpoint.keep_best = 1  # by validation loss

    c.eval = ConfigDict()
    c.eval.every = 500  # steps between passes over the whole validation set
    c.eval.batch_size = 64  # sequences
    c.eval.tasks = ""  # tasks to evaluate while training, such as "mmlu(every=1000, limit=200), constitution(ema=True)"

    c.log = ConfigDict()
    c.log.every = 10  # steps
    c.log.trackers = ""  # besides metrics.jsonl: tensorboard, wandb (comma separated)

    c.guard = ConfigDict()
    c.guard.max_skips = 5  # non-finite steps in a row that are skipped before rolling back to a checkpoint
    c.guard.max_rollbacks = 3  # roll-backs before the run fails
    return mutate.apply(c, arg, lineage=__file__)
