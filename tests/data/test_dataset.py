"""Datasets: the split, the numbers that describe it, and every refusal."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bptool.config.schema import DataSettings
from bptool.data.batches import TokenBatches
from bptool.data.dataset import Dataset, open_dataset
from bptool.data.order import WindowOrder
from bptool.data.tokenizer import BpeTokenizer, ByteTokenizer
from bptool.errors import DataError
from bptool.interop.token_files import LLMC_GPT2, NANOGPT, Tokens, write_token_file


def dataset(train: Tokens, validation: Tokens | None = None) -> Dataset:
    return Dataset(train, train[:0] if validation is None else validation, None, "")


def text_file(folder: Path, text: str) -> str:
    (folder / "a.txt").write_text(text)
    return str(folder / "a.txt")


def test_standard_library_as_bytes() -> None:
    data = open_dataset(DataSettings(), vocab_size=256, sequence_length=256)
    assert isinstance(data.tokenizer, ByteTokenizer)
    assert data.train.dtype == np.uint8
    assert len(data.validation) == int(0.05 * (len(data.train) + len(data.validation)))
    assert re.fullmatch(r"Python 3\.\d+ standard library, \d+ files, \d+\.\d\d MiB, as bytes", data.description)
    head = data.train[:2000].tobytes().decode(errors="replace")
    assert any(word in head for word in ("import", "def ", '"""', "#"))


def test_held_out_tail_is_never_trained_on(tmp_path: Path) -> None:
    write_token_file(tmp_path / "ids.bin", np.arange(1000), NANOGPT)
    settings = DataSettings(source=str(tmp_path / "ids.bin"), validation_fraction=0.1)
    data = open_dataset(settings, vocab_size=1000, sequence_length=16)
    assert data.validation.tolist() == list(range(900, 1000))
    assert data.train.tolist() == list(range(900))
    assert isinstance(data.train, np.memmap)
    assert data.tokenizer is None
    assert data.description == "ids.bin, 1.00K tokens (nanoGPT uint16)"
    batches = TokenBatches(data.train, sequence_length=16, micro_batch_size=5, gradient_accumulation_steps=1, seed=9)
    n_steps = 100 * WindowOrder(900, 16, 9).n_windows // 5  # a hundred epochs, each cut in its own way
    largest = max(int(batch["targets"].max()) for step in range(n_steps) for batch in batches.micro_batches(step))
    assert largest == 899


def test_folder_as_bpe_reads_the_runs_tokenizer_again(tmp_path: Path) -> None:
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(f"the cat sat on the mat {n}\n" * 20)
    settings = DataSettings(source=str(tmp_path), tokenizer="bpe", validation_fraction=0.2)
    saved = tmp_path / ".run" / "tokenizer.json"
    trained = open_dataset(settings, vocab_size=280, sequence_length=4, tokenizer_file=saved)
    assert isinstance(trained.tokenizer, BpeTokenizer)
    assert int((np.concatenate([trained.train, trained.validation]) == trained.tokenizer.end_of_text).sum()) == 29
    assert trained.description.endswith("30 files, 15.04 KiB, as BPE with 280 ids")
    saved.parent.mkdir()
    BpeTokenizer.train(["zzz yyy"] * 9, 260).save(saved)
    again = open_dataset(settings, vocab_size=280, sequence_length=4, tokenizer_file=saved)
    assert again.tokenizer is not None
    assert again.tokenizer.vocab_size == 260
    by_name = settings.model_copy(update={"tokenizer": str(saved)})
    assert open_dataset(by_name, vocab_size=280, sequence_length=4).fingerprint == again.fingerprint


@pytest.mark.parametrize("ids", [[3] * 50, [0, 1] * 40, list(range(256)), [0, 0, 0, 200]])
def test_unigram_entropy_of_known_distributions(ids: list[int]) -> None:
    closed_forms = {1: 0.0, 2: math.log(2), 256: math.log(256)}
    quarter = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    expected = quarter if 200 in ids and len(ids) == 4 else closed_forms[len(set(ids))]
    assert dataset(np.array(ids, np.uint8)).unigram_entropy == pytest.approx(expected, abs=1e-12)


def test_unigram_entropy_over_several_chunks() -> None:
    """Ids that a later chunk is the first to hold: half zeros, a quarter ones, a quarter seven hundreds."""
    ids = np.zeros(2**21, np.uint16)
    ids[2**20 : 3 * 2**19], ids[3 * 2**19 :] = 1, 700
    assert dataset(ids).unigram_entropy == pytest.approx(1.5 * math.log(2), abs=1e-12)


def test_fingerprint_sees_each_token_and_the_split() -> None:
    ids = np.arange(3000).astype(np.uint16)
    same = dataset(ids[:2000].copy(), ids[2000:].copy()).fingerprint
    assert same == dataset(ids[:2000], ids[2000:]).fingerprint
    assert re.fullmatch(r"[0-9a-f]{64}", same)
    others = [dataset(ids[:1999], ids[1999:]), dataset(ids[:2000].astype(np.uint32), ids[2000:])]
    for position in (0, 1234, 1999, 2999):
        changed = ids.copy()
        changed[position] += 1
        others.append(dataset(changed[:2000], changed[2000:]))
    fingerprints = [same, *(other.fingerprint for other in others)]
    assert len(set(fingerprints)) == len(fingerprints)


def test_huge_split_is_sampled(tmp_path: Path) -> None:
    """2^27 + 5 tokens in a sparse file: head, tail and length count, and neither figure takes a second."""
    n_tokens = 2**27 + 5
    with (tmp_path / "ids.bin").open("wb") as file:
        file.truncate(2 * n_tokens)
    ids = np.memmap(tmp_path / "ids.bin", np.uint16, "r+")
    fingerprints = {dataset(ids).fingerprint, dataset(ids[:-1]).fingerprint}
    for position in (0, n_tokens - 1):
        ids[position] = 1
        fingerprints.add(dataset(ids).fingerprint)
    assert len(fingerprints) == 4
    p = 2 / 2**26  # the two ones are in the sample of 2^26, and all else is zero
    assert dataset(ids).unigram_entropy == pytest.approx(-p * math.log(p) - (1 - p) * math.log1p(-p), rel=1e-6)


def test_too_short_text_names_numbers_and_remedies(tmp_path: Path) -> None:
    settings = DataSettings(source=text_file(tmp_path, "x" * 200))
    with pytest.raises(DataError) as caught:
        open_dataset(settings, vocab_size=256, sequence_length=64)
    assert "200 tokens: 190 to train on, 10 held out; each split needs at least 65" in caught.value.message
    assert caught.value.remedy == (
        "data.validation_fraction=0.326, or training.sequence_length=9, or more text (1301 tokens are enough)"
    )


@given(n=st.integers(1, 400), length=st.integers(1, 100), fraction=st.floats(0.01, 0.99))
def test_each_remedy_for_a_short_text_works(
    tmp_path_factory: pytest.TempPathFactory, n: int, length: int, fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("short")
    settings = DataSettings(source=text_file(folder, "x" * n), validation_fraction=fraction)
    remedy = ""
    try:
        open_dataset(settings, vocab_size=256, sequence_length=length)
    except DataError as error:
        remedy = error.remedy
    assume(remedy)
    if found := re.search(r"validation_fraction=([\d.]+)", remedy):
        changed = settings.model_copy(update={"validation_fraction": float(found[1])})
        open_dataset(changed, vocab_size=256, sequence_length=length)
    if found := re.search(r"sequence_length=(\d+)", remedy):
        open_dataset(settings, vocab_size=256, sequence_length=int(found[1]))
    found = re.search(r"\((\d+) tokens are enough", remedy)
    assert found
    text_file(folder, "x" * int(found[1]))
    open_dataset(settings, vocab_size=256, sequence_length=length)


def test_model_smaller_than_the_tokenizer(tmp_path: Path) -> None:
    settings = DataSettings(source=text_file(tmp_path, "x" * 200))
    with pytest.raises(DataError, match=r"model\.vocab_size = 255 is smaller than the 256 ids") as caught:
        open_dataset(settings, vocab_size=255, sequence_length=4)
    assert caught.value.remedy == "model.vocab_size=256"


def test_token_file_beyond_the_model(tmp_path: Path) -> None:
    write_token_file(tmp_path / "ids.bin", np.arange(100), LLMC_GPT2)
    with pytest.raises(DataError, match="position 50 holds id 50"):
        open_dataset(DataSettings(source=str(tmp_path / "ids.bin")), vocab_size=50, sequence_length=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DataSettings(source="no-such.bin"), r"data\.source: 'no-such\.bin' does not exist"),
        (DataSettings(source="no-such.txt"), r"data\.source: 'no-such\.txt' does not exist"),
        (DataSettings(tokenizer="bite"), "'bite' does not exist, did you mean 'bytes'"),
    ],
)
def test_missing_things(settings: DataSettings, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(settings, vocab_size=256, sequence_length=8)
