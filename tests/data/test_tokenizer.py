"""Tokenizers: the `tokenizers` library (and `transformers` once) says what the ids must be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from bptool.data.tokenizer import BpeTokenizer, ByteTokenizer, load_tokenizer
from bptool.errors import DataError, StorageError

TEXT = "def f(x):\n    return x + 1\n\n\nclass Größe:\n\tpass\r\n  # 日本 🎉 \x00\x7f\n"
STORIES = [f"the cat {n} sat on the mat, and the dog {n} sat on the cat\n" * 5 for n in range(20)]


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(STORIES, 290)


@given(st.text())
def test_bytes_are_utf8(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_bytes_decode_what_is_no_text() -> None:
    decode = ByteTokenizer().decode
    assert decode([0xE2, 0x82, 65]) == "\ufffdA"  # two thirds of a euro sign
    assert decode([65, 256, 50256, 66]) == "A\ufffd\ufffdB"
    assert decode(ByteTokenizer().encode("Hi").tolist()) == "Hi"


def test_bytes_separate_documents_by_a_blank_line() -> None:
    assert ByteTokenizer().encode_documents(["ab", "", "c"]).tobytes() == b"ab\n\n\n\nc"


def test_saved_bytes_are_bytes_to_the_library(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    ByteTokenizer().save(path)
    library = tokenizers.Tokenizer.from_file(str(path))
    everything = "".join(map(chr, range(0x250))) + TEXT
    assert library.encode(everything).ids == list(everything.encode())
    assert library.decode(list(everything.encode())) == everything
    assert library.get_vocab_size() == 256
    assert sorted(library.get_vocab()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert isinstance(load_tokenizer(path), ByteTokenizer)
    library.save(str(path))
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_saved_bytes_are_bytes_to_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ByteTokenizer().save(tmp_path / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
    assert tokenizer.decode(list(TEXT.encode()), clean_up_tokenization_spaces=False) == TEXT


def test_bpe_round_trip_and_size(bpe: BpeTokenizer) -> None:
    assert bpe.vocab_size == 290
    assert bpe.decode(bpe.encode(TEXT).tolist()) == TEXT  # bytes that it never saw among them
    assert len(bpe.encode(STORIES[0])) < len(STORIES[0]) / 3
    assert bpe.encode(TEXT).dtype == np.uint16
    assert bpe.encode("").tolist() == []
    assert bpe.description == "BPE with 290 ids"


def test_bpe_is_deterministic(bpe: BpeTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "here.json")
    code = f"""
from pathlib import Path
from bptool.data.tokenizer import BpeTokenizer
BpeTokenizer.train({STORIES!r}, 290).save(Path({str(tmp_path / "there.json")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_documents_are_separated_by_end_of_text(bpe: BpeTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stream = bpe.encode_documents(STORIES[:3]).tolist()
    end = [library.token_to_id("<|endoftext|>")]
    assert end == [bpe.end_of_text] == [0]
    first, second, third = (library.encode(story).ids for story in STORIES[:3])
    assert stream == [*first, *end, *second, *end, *third]
    assert bpe.decode([0]) == "<|endoftext|>"


def test_spelling_of_a_special_token_is_text(bpe: BpeTokenizer) -> None:
    ids = bpe.encode("a<|endoftext|>b").tolist()
    assert bpe.end_of_text not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"


def test_long_document_in_pieces_has_the_ids_of_the_whole(tmp_path: Path) -> None:
    """Runs of white space, which merge, wherever a piece could end; then lines, where pieces do end."""
    bpe = BpeTokenizer.train(["x_\n\n \n\n\n "] * 50 + STORIES, 300)
    bpe.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "x_\n\n \n\n\n " * 20_000 + "日本\n" * 50_000 + "".join(STORIES) * 20
    assert len(text) > 3 * 2**17
    assert bpe.encode(text).tolist() == library.encode(text).ids


def test_reads_any_tokenizer_of_the_library(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "cat": 1, "</s>": 7}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.enable_truncation(2)
    words.enable_padding(length=9)
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == 8  # ids have a hole; the embedding needs rows up to the largest
    assert loaded.end_of_text == 7
    assert loaded.encode("cat dog cat cat").tolist() == [1, 0, 1, 1]  # neither cut nor filled up


def test_tokenizer_without_end_of_text_separates_by_blank_line(tmp_path: Path) -> None:
    bytes_and_a_merge = json.loads(json.dumps(json.loads(_saved_bytes(tmp_path))))
    bytes_and_a_merge["model"]["vocab"]["aa"] = 256
    bytes_and_a_merge["model"]["merges"] = [["a", "a"]]
    (tmp_path / "merge.json").write_text(json.dumps(bytes_and_a_merge))
    loaded = load_tokenizer(tmp_path / "merge.json")
    assert isinstance(loaded, BpeTokenizer)
    assert loaded.encode_documents(["aa", "b"]).tolist() == [256, 10, 10, 98]


def _saved_bytes(folder: Path) -> str:
    ByteTokenizer().save(folder / "tokenizer.json")
    return (folder / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', '{"model": 3}', "\ud800", "[" * 100_000],
)
def test_malformed_tokenizer(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"tokenizer\.json' is no tokenizer\.json of the tokenizers library"):
        load_tokenizer(path)


def test_empty_vocabulary(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="its vocabulary is empty"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^tokenizer: 'byte' does not exist, did you mean 'bytes'\?"):
        load_tokenizer(Path("byte"))
    with pytest.raises(DataError, match=r"tokenizer\.json' does not exist"):
        load_tokenizer(tmp_path)


def test_unreadable_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_vocabulary_without_room(bpe: BpeTokenizer) -> None:
    with pytest.raises(DataError, match=r"256 bytes and <\|endoftext\|> alone are 257 ids") as caught:
        BpeTokenizer.train(STORIES, 256)
    assert "model.vocab_size=4096" in caught.value.remedy
    assert BpeTokenizer.train(STORIES, 257).vocab_size == 257


def test_text_without_ids(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"cat": 0}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(tmp_path).encode("dog")


def test_library_is_imported_late_and_survives_a_fork() -> None:
    code = """
import os, sys
import bptool.data.dataset
assert not {"tokenizers", "torch"} & set(sys.modules), "imported too early"
from bptool.data.tokenizer import BpeTokenizer
tokenizer = BpeTokenizer.train(["a b c"] * 500, 260)
tokenizer.encode_documents(["a b c"] * 500)
if os.fork() == 0:
    tokenizer._library_tokenizer.encode_batch(["a b c"] * 500)  # as a user's own code could; hangs with threads on
    os._exit(0)
os.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, ["true", "true", "false", "2"]), ({"TOKENIZERS_PARALLELISM": "false"}, ["false", "false", "false", "0"])],
)
def test_threads_are_used_as_the_user_decides(chosen: dict[str, str], expected: list[str]) -> None:
    """The switch during the first training, during the second, and after; then the number of threads started."""
    code = """
import os
from bptool.data.tokenizer import BpeTokenizer
def documents():
    print(os.environ["TOKENIZERS_PARALLELISM"])
    yield from ["a b c"] * 500
before = len(os.listdir("/proc/self/task"))
BpeTokenizer.train(documents(), 260)
BpeTokenizer.train(documents(), 260)
print(os.environ["TOKENIZERS_PARALLELISM"], len(os.listdir("/proc/self/task")) - before)
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("counts threads in /proc")
    env = {"PYTHONPATH": ":".join(sys.path), "RAYON_NUM_THREADS": "2", **chosen}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected
