"""What data.source says: names, options, weights."""

import pytest

from foundry_jax.data.mixture import Part, opened, own_options
from foundry_jax.data.sources import SOURCES, chat, jsonl, pystdlib, text
from foundry_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n')
    return tmp_path


def test_a_name_takes_the_common_path_and_an_option_overrules_it(folder):
    (part,) = opened("text", str(folder / "a.txt"))
    assert part == Part(text.find(str(folder / "a.txt")), 1.0, True)
    (part,) = opened(f"text(path={str(folder / 'a.txt')!r})", "nowhere")
    assert [document.text for document in part.source] == ["one"]


def test_a_mixture_has_parts_in_order_with_weights_and_what_is_held_out(folder):
    source = f"pystdlib(path='', weight=2), jsonl(text='body', weight=0.5, held_out=False), text(path={str(folder)!r})"
    parts = opened(source, str(folder / "b.jsonl"))
    assert [part.source for part in parts] == [
        pystdlib.find(""), jsonl.find(str(folder / "b.jsonl"), text="body"), text.find(str(folder))
    ]  # fmt: skip
    assert [(part.weight, part.held_out) for part in parts] == [(2.0, True), (0.5, False), (1.0, True)]


def test_the_same_files_read_in_other_ways_are_other_data(folder):
    path = str(folder / "b.jsonl")
    sources = [text.find(path), chat.find(path), jsonl.find(path), jsonl.find(path, text="body"),
               jsonl.find(path, text="body", id="body"), SOURCES["constitution"](path)]  # fmt: skip
    assert len({str(source.fingerprint()) for source in sources}) == len(sources)


@pytest.mark.parametrize("name", SOURCES)
def test_options_of_a_source_have_types_and_defaults_and_no_common_names(name):
    assert not {"path", "weight", "held_out"} & set(own_options(SOURCES[name]))
    defaults = SOURCES[name].__kwdefaults__ or {}
    assert list(defaults) == own_options(SOURCES[name])
    assert all(type(value) is SOURCES[name].__annotations__[key] for key, value in defaults.items())


@pytest.mark.parametrize(
    "name",
    # Of the hub nothing can be said without the package `datasets`, which `make oracle` installs.
    [
        pytest.param(name, marks=[pytest.mark.oracle] * (name == "huggingface"))
        for name in SOURCES
        if name != "pystdlib"
    ],
)
@pytest.mark.parametrize("path", ["", "nowhere/at/all"])
def test_every_source_says_what_its_path_must_be(name, path, monkeypatch):
    from foundry_jax.data import hub

    monkeypatch.setattr(hub, "hub_answers", lambda repository: lambda: False)
    with pytest.raises(UserError, match=r"data\.path") as caught:
        SOURCES[name](path)
    assert "\n" not in str(caught.value) and (not path or path in str(caught.value))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "data.source is empty; choose from: bin, chat, "),
        ("txt", "Unknown data.source 'txt'. Did you mean 'text'?"),
        ("text(paht='x')", "Unknown option of data.source=text 'paht'. Did you mean 'path'?"),
        ("text(text='x')", "Unknown option of data.source=text 'text'"),
        ("text('x')", "must be names, each perhaps with options"),
        ("text(", "must be names, each perhaps with options"),
        ("text(weight=0)", "data.source=text: weight=0 must be a finite number above 0; leave the source out instead"),
        ("text(weight=-1)", "weight=-1 must be a finite number above 0"),
        ("text(weight='x')", "data.source=text: weight='x' must be a number"),
        ("text(weight='nan')", "weight=nan must be a finite number above 0"),
        ("text(weight=1e999)", "weight=inf must be a finite number above 0"),
        ("text(held_out=1)", "held_out=1 must be true or false"),
        ("jsonl(text=1)", "data.source=jsonl: text=1 must be text"),
        ("text(held_out=False), text(held_out=False)", "holds nothing out, and validation needs text"),
        ("pystdlib, text", r"has no meaning for data.source=pystdlib; use text, or pystdlib\(path=''\)"),
    ],
)
def test_what_cannot_be_meant_is_explained(source, message, folder):
    with pytest.raises(UserError, match=message) as caught:
        opened(source, str(folder / "a.txt"))
    assert "\n" not in str(caught.value)
