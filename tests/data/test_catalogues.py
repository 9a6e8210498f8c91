"""Sources that other libraries read: TensorFlow Datasets without TensorFlow, and Hugging Face's `datasets`."""

import importlib
import json
import pathlib
import subprocess
import sys
import time

import huggingface_hub
import numpy as np
import pytest

from foundry_jax.data import hub
from foundry_jax.data.document import Document
from foundry_jax.data.sources import huggingface, tfds
from foundry_jax.errors import UserError

TEXTS = [f"text {i} ü" for i in range(40)]

# ------------------------------------------------------------------------------------------------ TFDS


# `make oracle` installs the package `datasets`, `make test` does not.
needs_datasets = pytest.mark.oracle


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """A folder with the data set `stories`, prepared as array_record files."""
    library = importlib.import_module("tensorflow_datasets")

    class Stories(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("1.0.0")

        def _info(self):
            text, number = library.features.Text(), library.features.Scalar(np.int64)
            features = library.features.FeaturesDict({"text": text, "n": number})
            return library.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(TEXTS), "bad": self._generate_examples(["a", b"caf\xe9"])}

        def _generate_examples(self, texts):
            yield from ((i, {"text": text, "n": i}) for i, text in enumerate(texts))

    folder = tmp_path_factory.mktemp("tfds")
    Stories(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def stories(catalogue):
    return str(catalogue / "stories" / "1.0.0")


def test_examples_are_documents_in_an_order_that_never_changes(stories, monkeypatch):
    source = tfds.find(stories)
    found = list(source)
    assert sorted(one.text for one in found) == sorted(TEXTS)
    assert found[3].id == "stories/1.0.0/train:3"
    monkeypatch.setattr(tfds, "EXAMPLES", 7)
    assert list(source) == list(tfds.find(stories)) == found
    assert source.undecodable() == []


def test_a_split_may_be_a_part(stories):
    half = tfds.find(stories, split="train[:50%]")
    assert [one.text for one in half] == [one.text for one in tfds.find(stories)][:20]
    assert len({str(source.fingerprint()) for source in (half, tfds.find(stories), tfds.find(stories, text="n"))}) == 3


def test_a_name_is_looked_for_where_tfds_keeps_its_data(catalogue, monkeypatch):
    file_utils = importlib.import_module("tensorflow_datasets.core.utils.file_utils")
    monkeypatch.setattr(file_utils.constants, "DATA_DIR", str(catalogue))
    assert len(list(tfds.find("stories"))) == len(list(tfds.find("stories:1.0.0"))) == 40


def test_what_tfds_does_not_have_is_named(stories, tmp_path):
    for path, options, message in [
        ("storys", {}, r"No data set of TFDS at data\.path='storys': .*; tfds\.builder\(NAME, file_format=\"array_rec"),
        (str(tmp_path), {}, r"No data set of TFDS at data\.path=.*Could not read dataset info"),
        (stories, {"split": "trian"}, r"Cannot read split='trian' of stories/1\.0\.0: Unknown split 'trian'"),
        (stories, {"split": "train[:x]"}, r"Cannot read split='train\[:x\]'"),
        (stories, {"text": "body"}, r"no field 'body'; it has '\w+', '\w+'\. Say .*tfds\(text='...'\)"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            tfds.find(path, **options)
        assert "\n" not in str(caught.value)


def test_what_is_no_text_is_named(stories):
    with pytest.raises(UserError, match="stories/1.0.0/train, example 0: 'n' must be text, not int"):
        list(tfds.find(stories, text="n"))
    with pytest.raises(UserError, match=r"example \d: not UTF-8: byte 0xe9 at offset 3 of the text"):
        list(tfds.find(stories, split="bad"))


def test_files_for_tensorflow_alone_are_refused(stories, tmp_path):
    folder = pathlib.Path(stories)
    (tmp_path / "features.json").write_text((folder / "features.json").read_text())
    info = json.loads((folder / "dataset_info.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="Cannot read split='train' of stories/1.0.0: .*TFRECORD is not supported"):
        tfds.find(str(tmp_path))


@pytest.mark.slow
def test_reading_takes_no_tensorflow(stories):
    program = (
        "import sys; from foundry_jax.data.sources import tfds\n"
        f"print(len(list(tfds.find({stories!r}))), 'tensorflow' in sys.modules, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["40", "False", "False"]


# ------------------------------------------------------------------------------------------------ datasets


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder that `datasets` loads."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = [json.dumps({"text": text, "name": f"n{i}", "number": i}) for i, text in enumerate(TEXTS)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return str(folder)


@needs_datasets
def test_rows_of_a_data_set_are_documents(rows):
    source = huggingface.find(rows)
    assert [one.text for one in source] == TEXTS == [one.text for one in source]
    assert next(iter(source)) == Document(f"{rows}, train:1", "text 0 ü")
    assert [one.id for one in huggingface.find(rows, split="train[:3]", id="name")] == ["n0", "n1", "n2"]
    prints = [huggingface.find(rows, **options).fingerprint() for options in ({}, {}, {"text": "name"}, {"id": "name"})]
    assert prints[0] == prints[1] and len(set(map(str, prints))) == 3


@needs_datasets
def test_what_a_data_set_does_not_have_is_named(rows):
    for options, message in [
        (
            {"split": "trian"},
            r"data\.path=.*split='trian' cannot be loaded: Unknown split \"trian\".*\. Instead, get its files",
        ),
        ({"config": "x"}, "cannot be loaded: .*BuilderConfig 'x' not found"),
        ({"text": "body"}, r"no field 'body'; it has 'text', 'name', 'number'\. Say .*huggingface\(text='...'\)"),
        ({"id": "key"}, r"no field 'key'; .*huggingface\(id='...'\)"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            huggingface.find(rows, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="row 1: 'number' must be text, not int"):
        list(huggingface.find(rows, text="number"))


@needs_datasets
def test_without_an_answer_of_the_hub_it_says_so_soon(monkeypatch, tmp_path):
    def silence(repository, timeout):
        time.sleep(9)

    assert hub.HUB_SECONDS < 3  # the rest of 5 s is for starting Python and JAX
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub, "dataset_info", silence)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"data\.path='a/stories' .* the hub does not answer, nor .* Instead, get its"):
        huggingface.find("a/stories")
    assert time.monotonic() - start < 2


@needs_datasets
def test_what_is_cached_is_read_without_the_hub(monkeypatch, tmp_path, rows):
    datasets = pytest.importorskip("datasets")
    seen = []

    def load(path, *, name, split):
        seen.append((path, name, split, datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        return real(rows, split=split)

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "hub_answers", lambda repository: lambda: False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "a___my_stories").mkdir()
    assert len(list(huggingface.find("a/my-stories", config="en"))) == 40
    assert seen == [("a/my-stories", "en", "train", True, True)]
    assert not datasets.config.HF_HUB_OFFLINE


def test_without_the_package_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs the package datasets: pip install 'foundry-jax\[data\]'. Instead, get its files"
    ):
        huggingface.find("a/stories")
