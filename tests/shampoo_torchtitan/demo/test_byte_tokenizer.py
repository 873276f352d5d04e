"""The tokenizer that needs no download."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from torchtitan.components.tokenizer import HuggingFaceTokenizer

from shampoo_torchtitan.demo.byte_tokenizer import (
    VOCABULARY,
    write_byte_tokenizer,
    write_default,
)
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS


def read(folder) -> HuggingFaceTokenizer:
    if JOBS_ARE_FUNCTIONS:
        return HuggingFaceTokenizer.Config().build(tokenizer_path=str(folder))
    return HuggingFaceTokenizer(str(folder))


def test_any_text_survives_and_documents_are_marked(tmp_path):
    write_byte_tokenizer(tmp_path / "t")
    tokenizer = read(tmp_path / "t")
    text = 'def f(x):\n\treturn "héllo 世界 \x00"  # spaces   kept\n'
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert len(ids) == len(text.encode()) + 2
    assert [ids[0], ids[-1]] == [tokenizer.bos_id, tokenizer.eos_id] == [256, 257]
    assert tokenizer.decode(ids[1:-1]) == text


def test_our_flavors_have_room_for_its_tokens(tmp_path):
    write_byte_tokenizer(tmp_path / "t")
    assert read(tmp_path / "t").get_vocab_size() <= VOCABULARY


def test_ranks_may_write_it_at_the_same_time(tmp_path):
    folder = tmp_path / "new" / "t"
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        list(pool.map(write_byte_tokenizer, [folder] * 8))
    assert [p.name for p in folder.parent.iterdir()] == ["t"]  # and no scratch folders
    assert read(folder).eos_id is not None


def test_only_the_demo_jobs_own_is_made_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_default("./assets/hf/Llama-3.1-8B")
    assert not list(tmp_path.iterdir())
    write_default("outputs/byte_tokenizer")
    assert read("outputs/byte_tokenizer").eos_id is not None
    (tmp_path / "outputs/byte_tokenizer/tokenizer.json").write_text("mine")
    write_default("outputs/byte_tokenizer")
    assert (tmp_path / "outputs/byte_tokenizer/tokenizer.json").read_text() == "mine"
