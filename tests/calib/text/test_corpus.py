"""Corpora and windows: KVQuant's sampling, every refusal, fingerprints and sketches."""

import csv
import gzip
import io
import json
import random
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from calib.text import corpus as corpus_module
from calib.text import hub_datasets
from calib.text.corpus import Corpus, CorpusError, LazyDocuments, PaddingIds, check_dataset, load_corpus
from calib.text.sketches import merge_sketches, ngram_sketch, overlap_fraction, window_digests
from calib.text.windows import check_vocabulary, sample_windows, split_windows, without_start

pytestmark = pytest.mark.shapes

HubCalls = list[tuple[tuple[object, ...], dict[str, object]]]


def to_bytes(text: str) -> list[int]:
    return list(text.encode())


def make_corpus(*lengths: int) -> Corpus:
    documents = tuple(torch.arange(length) + 1000 * i for i, length in enumerate(lengths))
    return Corpus(name="made", documents=documents, digest="")


def random_windows(n_windows: int, seqlen: int, seed: int) -> Tensor:
    return torch.randint(0, 32000, (n_windows, seqlen), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> HubCalls:
    """The calls to a loader that always returns the same twelve rows."""
    calls = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        calls.append((args, kwargs))
        rows = ["x" * length for length in (3, 40, 16, 0, 25, 17, 8, 90, 15, 33, 16, 5)]
        return datasets.Dataset.from_dict({"text": rows, "sentence": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


# --- sampling


def kvquant_stream(tokens: Tensor, n_windows: int, seqlen: int, seed: int) -> Tensor:
    random.seed(seed)
    starts = [random.randint(0, len(tokens) - seqlen - 1) for _ in range(n_windows)]
    return torch.stack([tokens[start : start + seqlen] for start in starts])


def kvquant_documents(documents: list[Tensor], n_windows: int, seqlen: int, seed: int) -> Tensor:
    random.seed(seed)
    windows = []
    for _ in range(n_windows):
        while len(tokens := documents[random.randint(0, len(documents) - 1)]) <= seqlen:
            pass
        start = random.randint(0, len(tokens) - seqlen - 1)
        windows.append(tokens[start : start + seqlen])
    return torch.stack(windows)


@pytest.mark.parametrize("seed", [0, 1, 42])
@pytest.mark.parametrize("n_tokens", [17, 500])
def test_a_stream_is_sampled_as_in_kvquant(seed: int, n_tokens: int) -> None:
    corpus = make_corpus(n_tokens)
    windows = sample_windows(corpus, n_windows=20, seqlen=16, seed=seed)
    assert torch.equal(windows, kvquant_stream(corpus.documents[0], 20, 16, seed))


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_documents_are_sampled_as_in_kvquant(seed: int) -> None:
    corpus = make_corpus(5, 16, 17, 40, 16, 3, 99)
    windows = sample_windows(corpus, n_windows=20, seqlen=16, seed=seed)
    assert torch.equal(windows, kvquant_documents(list(corpus.documents), 20, 16, seed))


def test_each_short_document_is_tokenised_once() -> None:
    seen = []
    texts = ["a"] * 50 + ["b" * 9]
    documents = LazyDocuments(texts, lambda text: seen.append(text) or to_bytes(text))
    sample_windows(Corpus(name="c4", documents=documents, digest=""), n_windows=5, seqlen=8, seed=0)
    assert seen.count("a") <= 50
    assert seen.count("b" * 9) == 5


@pytest.mark.parametrize("lengths", [(16,), (3, 16, 9)])
def test_no_document_is_long_enough(lengths: tuple[int, ...]) -> None:
    with pytest.raises(CorpusError, match=rf"made: .*17 tokens.*; got 16 in the longest of {len(lengths)}; .*--seqlen"):
        sample_windows(make_corpus(*lengths), n_windows=1, seqlen=16, seed=0)


@pytest.mark.parametrize(("n_windows", "seqlen", "match"), [(0, 8, "n_windows.*1; got 0"), (1, 1, "seqlen.*2; got 1")])
def test_senseless_requests(n_windows: int, seqlen: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sample_windows(make_corpus(100), n_windows=n_windows, seqlen=seqlen, seed=0)


# --- splitting


def test_split_covers_the_stream_and_drops_the_tail() -> None:
    windows = split_windows(make_corpus(35), seqlen=8)
    assert torch.equal(windows, torch.arange(32).view(4, 8))
    assert torch.equal(split_windows(make_corpus(35), seqlen=8, limit=3), windows[:3])


def test_no_window_spans_two_documents() -> None:
    assert split_windows(make_corpus(9, 3, 16), seqlen=8)[:, 0].tolist() == [0, 2000, 2008]


def test_split_refuses() -> None:
    with pytest.raises(CorpusError, match=r"made: .*8 tokens.*; got 7 in the longest of 2"):
        split_windows(make_corpus(7, 2), seqlen=8)
    with pytest.raises(ValueError, match="limit: expected at least 1; got 0"):
        split_windows(make_corpus(7), seqlen=2, limit=0)


# --- start tokens


@pytest.mark.parametrize("seed", [0, 7])
def test_windows_begin_with_the_start_token_and_go_on_with_text(seed: int) -> None:
    """Regression: prompts began with a start token, and no window that was calibrated on."""
    plain = make_corpus(60)
    windows = sample_windows(plain, n_windows=9, seqlen=16, seed=seed, start_token=77)
    assert torch.equal(windows[:, 1:], sample_windows(plain, n_windows=9, seqlen=15, seed=seed))
    parts = split_windows(plain, seqlen=16, start_token=77)
    assert torch.equal(parts[:, 1:], torch.arange(60).view(4, 15))
    assert torch.equal(parts[:2], split_windows(plain, seqlen=16, limit=2, start_token=77))
    for found in (windows, parts):
        assert found.shape[1] == 16
        assert (found[:, 0] == 77).all()


@pytest.mark.parametrize("lazy", [False, True])
def test_a_document_that_begins_with_the_start_token_brings_no_second_one(lazy: bool) -> None:
    texts = ["s" + "abcdefgh" * 3, "sxyz" * 6]
    documents = LazyDocuments(texts, to_bytes) if lazy else tuple(torch.tensor(to_bytes(text)) for text in texts)
    begun = Corpus(name="c4", documents=documents, digest="")
    assert [len(document) for document in without_start(begun, 9, ord("s")).documents] == [24, 23]
    for windows in (
        sample_windows(begun, n_windows=40, seqlen=9, seed=0, start_token=ord("s")),
        split_windows(begun, seqlen=9, start_token=ord("s")),
    ):
        assert (windows[:, 0] == ord("s")).all()
        assert not (windows[:, 1] == ord("s")).all()
        assert bytes(windows[0].tolist()) not in (b"ssabcdefg", b"ssxyzsxyz")


def test_a_start_token_alone_is_no_window() -> None:
    for cut in (partial(sample_windows, n_windows=1, seed=0), split_windows):
        with pytest.raises(ValueError, match="seqlen: expected at least 3; got 2"):
            cut(make_corpus(60), seqlen=2, start_token=7)


# --- data sets of the hub


def test_wikitext2_is_one_stream(hub: HubCalls) -> None:
    corpus = load_corpus("wikitext2", "evaluation", to_bytes)
    (args, kwargs), n_tokens = hub[0], 268 + 11 * len("\n\n")
    assert args == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert kwargs["split"] == "test"
    assert (corpus.name, [len(tokens) for tokens in corpus.documents]) == ("wikitext2", [n_tokens])


def test_ptb_is_joined_by_spaces(hub: HubCalls) -> None:
    corpus = load_corpus("ptb", "calibration", to_bytes)
    assert hub[0][1]["revision"] == "refs/convert/parquet"
    assert [len(tokens) for tokens in corpus.documents] == [268 + 11]


@pytest.mark.parametrize(("split", "part"), [("calibration", "train"), ("evaluation", "validation")])
def test_c4_is_tokenised_on_demand(hub: HubCalls, split: corpus_module.Split, part: str) -> None:
    tokenised = []
    corpus = load_corpus("c4", split, lambda text: tokenised.append(text) or to_bytes(text))
    assert hub[0][1]["data_files"].keys() == {part}
    assert len(tokenised) == 8  # for the digest
    assert [len(tokens) for tokens in corpus.documents] == [3, 40, 16, 0, 25, 17, 8, 90, 15, 33, 16, 5]


def test_c4_evaluation_is_256_windows_drawn_with_seed_0(hub: HubCalls) -> None:
    corpus = load_corpus("c4", "evaluation", lambda text: list(range(len(text))))
    windows = split_windows(corpus, seqlen=16)
    assert torch.equal(windows, kvquant_documents(list(corpus.documents), 256, 16, 0))
    assert torch.equal(split_windows(corpus, seqlen=16, limit=10), windows[:10])


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_a_failing_loader_is_one_clear_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise OSError("disk\nfull")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        CorpusError, match=rf"^{name}: .*OSError: disk full; pass a local file instead.*--dataset.*jsonl"
    ):
        load_corpus(name, "calibration", to_bytes)


def test_without_network_the_hub_client_does_not_retry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its retries take 23 s, which it spares itself in offline mode."""
    offline, load_dataset = [], datasets.load_dataset

    def watched(*args: object, **kwargs: object) -> object:
        offline.append(datasets.config.HF_HUB_OFFLINE)
        return load_dataset(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(hub_datasets, "hub_answers", lambda endpoint: False)
    with pytest.raises(CorpusError, match=r"wikitext2: .*ConnectionError"):
        load_corpus("wikitext2", "calibration", to_bytes)
    assert set(offline) == {True}
    assert datasets.config.HF_HUB_OFFLINE is False


def test_an_unreachable_hub_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    assert not hub_datasets.hub_answers("http://127.0.0.1:9")
    assert "no answer from http://127.0.0.1:9" in caplog.text


# --- local files


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("file_name", ["a.txt", "wiki.test.raw", "README"])
def test_text_is_read_as_it_is(tmp_path: Path, file_name: str) -> None:
    text = " é\n\n= Title =\u2028\r \n"
    corpus = load_corpus(write(tmp_path / file_name, text), "evaluation", to_bytes)
    assert corpus.name == file_name
    assert read_back(corpus) == text


def read_back(corpus: Corpus) -> str:
    [document] = corpus.documents
    return bytes(document.tolist()).decode()


RECORDS = ["one", "", 'two, "quoted"\u2028\nand more', "é" * 70_000]


def as_csv(delimiter: str) -> str:
    written = io.StringIO(newline="")
    rows = csv.writer(written, delimiter=delimiter)
    rows.writerows([["number", "body"], *enumerate(RECORDS)])
    return written.getvalue()


AS_JSONL = "\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in RECORDS)
FILES = {
    **dict.fromkeys(("a.jsonl", "a.ndjson", "a.jsonlines", "UPPER.JSONL"), AS_JSONL),
    "blank.jsonl": f"\n\n{AS_JSONL}\n \n".replace("\n", "\n\n"),
    **dict.fromkeys(("a.csv", "A.CSV"), as_csv(",")),
    "a.tsv": as_csv("\t"),
}


@pytest.mark.parametrize("disguise", ["as it is", "Windows", "gzip"])
@pytest.mark.parametrize("file_name", FILES)
def test_records_are_read_whatever_they_lie_in(tmp_path: Path, file_name: str, disguise: str) -> None:
    """Regression: what was not called .jsonl was scored with all its brackets, and blank lines were refused."""
    data = FILES[file_name].encode()
    match disguise:
        case "Windows":
            data = b"\xef\xbb\xbf" + data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        case "gzip":
            file_name, data = f"{file_name}.gz", gzip.compress(data)
    corpus = load_corpus(write(tmp_path / file_name, data), "evaluation", to_bytes, field="body")
    assert read_back(corpus) == "\n\n".join(RECORDS)


@pytest.mark.parametrize(
    "data", [b"\xef\xbb\xbfone\r\n\r\ntwo", gzip.compress(b"one\n\ntwo", mtime=0)], ids=["Windows", "gzip"]
)
def test_a_text_is_the_same_from_windows_and_out_of_gzip(tmp_path: Path, data: bytes) -> None:
    """Regression: line ends and byte order marks were scored."""
    assert read_back(load_corpus(write(tmp_path / "a.txt", data), "calibration", to_bytes)) == "one\n\ntwo"


def test_tables_of_datasets_are_read(tmp_path: Path) -> None:
    """Regression: they were read as text, with advice about iconv."""
    table = datasets.Dataset.from_dict({"body": RECORDS, "number": range(4)})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_parquet(tmp_path / "unnamed")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table.select([0]), "test": table}).save_to_disk(tmp_path / "parts")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    for path in (tmp_path / "a.parquet", tmp_path / "unnamed", tmp_path / "saved", arrow, tmp_path / "parts"):
        check_dataset(str(path))
        assert read_back(load_corpus(str(path), "evaluation", to_bytes, field="body")) == "\n\n".join(RECORDS)
    assert read_back(load_corpus(str(tmp_path / "parts"), "calibration", to_bytes, field="body")) == "one"
    with pytest.raises(CorpusError, match=r"expected a column 'text'; got 'body', 'number'; .*--field"):
        load_corpus(str(tmp_path / "a.parquet"), "evaluation", to_bytes)
    with pytest.raises(CorpusError, match=r"row 1: expected text in the column 'number'; got int 0; .*--field"):
        load_corpus(str(tmp_path / "a.parquet"), "evaluation", to_bytes, field="number")
    datasets.DatasetDict({"all": table}).save_to_disk(tmp_path / "odd")
    with pytest.raises(
        CorpusError, match=r"odd: expected a part test or validation for evaluation; got all; .*odd/all"
    ):
        load_corpus(str(tmp_path / "odd"), "evaluation", to_bytes)


@pytest.mark.parametrize(
    ("file_name", "data", "match"),
    [
        ("a.html", b"<p>text</p>", "an HTML page; .*lynx"),
        ("a.txt", b"\n<!DOCTYPE html><p>text</p>", "an HTML page"),
        ("a.txt", b'{"text": "a"}\n{"text": "b"}', r"lines of JSON objects; rename it to \.jsonl"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', r"got a \.json file; rename it to \.jsonl"),
        ("a.npz", b"PK\x03\x04" + bytes(99), r"a zip archive; .*numpy\.save"),
        ("a.pt", b"PK\x03\x04" + bytes(99), r"a zip archive; .*numpy\.save"),
        ("a.docx", b"PK\x03\x04" + bytes(99), "a zip archive; export it as plain text"),
        ("a.pt", b"\x80\x02" + bytes(99), r"a pickle; .*numpy\.save"),
        (
            "a.bin.gz",
            gzip.compress(bytes(range(1, 200)), mtime=0),
            "in binary data; unpack it: bare token ids are read",
        ),
        ("a.dat", bytes(range(1, 200)), "in binary data; name a text"),
        ("a.pdf", b"%PDF-1.4 \xff", "a PDF file; .*pdftotext"),
        ("a.tar", bytes(257) + b"ustar", "a tar archive; unpack it"),
        ("a.tgz", gzip.compress(bytes(257) + b"ustar", mtime=0), "a tar archive; unpack it"),
        ("a.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a whole \.gz file; got .*download it again"),
        ("a.gz", gzip.compress(b"PK\x03\x04", mtime=0), "a zip archive"),
        ("a.txt", b"\x28\xb5\x2f\xfd", "a zstd file; unpack it with unzstd"),
        ("a.txt", b"\x7fELF", "a program"),
        ("a.parquet", b"PAR1" + bytes(99), "expected a table that `datasets` can read"),
        ("a.arrow", b"\xff\xff\xff\xff" + bytes(99), "expected a table that `datasets` can read"),
        ("a.csv", b"number,body\n1,a", "expected a column 'text'; got 'number', 'body'; name one with --field"),
        ("a.csv", b"number,text\n1,a\n2", "line 3: expected 2 columns"),
        ("a.csv", b"text\nHello, world", "line 2: expected 1 columns; got another number; quote"),
        ("a.csv", b"text,text\na,b", "expected one column 'text'; got 2"),
        ("a.csv", b'text,number\n"a"b,1', r"after line 1: expected a table; got "),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, file_name: str, data: bytes, match: str) -> None:
    """Regression: pages and tables were scored as text, and binary files got advice about iconv."""
    with pytest.raises(CorpusError, match=match) as refused:
        load_corpus(write(tmp_path / file_name, data), "calibration", to_bytes)
    assert "iconv" not in str(refused.value)
    assert "\n" not in str(refused.value)


# --- padding

TEXTS = [[5, 7, 5, 9, 7, 5], [5, 2, 9, 9, 2], [8], [7, 7, 5, 8, 6]]


def padded(token: int, side: str) -> np.ndarray:
    width = max(map(len, TEXTS))
    fill = [[token] * (width - len(text)) for text in TEXTS]
    return np.array(
        [[*text, *own] if side == "right" else [*own, *text] for text, own in zip(TEXTS, fill, strict=True)]
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padding", [PaddingIds(pad=0), PaddingIds(special=(1, 0)), PaddingIds(pad=0, special=(0, 1))])
def test_padding_is_no_text(tmp_path: Path, side: str, padding: PaddingIds, caplog: pytest.LogCaptureFixture) -> None:
    """Regression: rows of a padded file were scored with their padding, perplexity 953."""
    np.save(tmp_path / "a.npy", padded(0, side))
    corpus = load_corpus(str(tmp_path / "a.npy"), "evaluation", None, padding=padding)
    single = [0] if padding.special else []  # one token that ends or begins a text belongs to it
    kept = [row if len(row) != 5 else [*row, *single] if side == "right" else [*single, *row] for row in TEXTS]
    assert [document.tolist() for document in corpus.documents] == kept
    assert "a.npy: padding left out" in caplog.text


def test_rows_that_look_padded_are_refused_where_nothing_tells(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", padded(0, "right"))
    with pytest.raises(CorpusError, match=r"a\.npy: .*token 0, which occurs nowhere else.*Remove"):
        load_corpus(str(tmp_path / "a.npy"), "evaluation", None)
    np.save(tmp_path / "a.npy", np.zeros((2, 9), int))
    with pytest.raises(CorpusError, match="2 of padding only"):
        load_corpus(str(tmp_path / "a.npy"), "evaluation", None, padding=PaddingIds(pad=0))


def test_rows_without_padding_stay_whole(tmp_path: Path) -> None:
    rows = np.array([[5, 6, 7, 7], [7, 8, 5, 2], [2, 5, 9, 6]])  # 2 ends a text
    np.save(tmp_path / "a.npy", rows)
    for padding in (PaddingIds(), PaddingIds(pad=0), PaddingIds(pad=2, special=(1, 2))):
        corpus = load_corpus(str(tmp_path / "a.npy"), "evaluation", None, padding=padding)
        assert [document.tolist() for document in corpus.documents] == rows.tolist()


def test_jsonl_fields_are_joined_by_blank_lines(tmp_path: Path) -> None:
    texts = ["one", "", "two\u2028three"]
    lines = "\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in texts)
    corpus = load_corpus(write(tmp_path / "a.jsonl", lines + "\r\n"), "evaluation", to_bytes, field="body")
    assert bytes(corpus.documents[0].tolist()).decode() == "\n\n".join(texts)


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u2"])
def test_npy_needs_no_tokenizer(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "stream.npy", np.arange(20).astype(dtype))
    np.save(tmp_path / "rows.npy", np.arange(20).reshape(2, 10).astype(dtype))
    stream, rows = (load_corpus(str(tmp_path / name), "evaluation", None) for name in ("stream.npy", "rows.npy"))
    assert [tokens.tolist() for tokens in stream.documents] == [list(range(20))]
    assert [tokens.tolist() for tokens in rows.documents] == [list(range(10)), list(range(10, 20))]
    assert stream.digest != rows.digest


@pytest.mark.parametrize(
    ("file_name", "content", "match"),
    [
        ("a.txt", b"", "0 bytes"),
        ("a.txt", b" \n ", r"expected text; got 3 characters"),
        ("a.txt", b"caf\xe9 au lait", r"UTF-8 text; got byte 0xe9 at offset 3 .*iconv"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("a.npy", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("a.npy", b"\x93NUMPY", "expected a .npy array"),
        ("a.npy", b"PK\x03\x04 an archive", "expected a .npy array"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: expected a JSON object; got Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}', "line 3: expected text in the field 'text'; got .*body"),
        ("a.jsonl", b'{"text": 3}', "line 1: expected text in the field 'text'"),
        ("a.jsonl", b'"text"', 'line 1: expected a JSON object; got "text"; correct or remove'),
        ("a.jsonl", b"[" * 100_000, "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": ""}', "expected text; got 0 characters"),
        ("a.jsonl", b"\n\n", "a JSON object on every line; got empty lines"),
    ],
)
def test_unusable_files(tmp_path: Path, file_name: str, content: bytes, match: str) -> None:
    with pytest.raises(CorpusError, match=match):
        load_corpus(write(tmp_path / file_name, content), "calibration", to_bytes)


@pytest.mark.parametrize(
    "array",
    [np.zeros(4), np.zeros((2, 2, 2), int), np.zeros(0, int), np.array(3), np.array([None]), np.array([True])],
    ids=["float", "3-D", "empty", "0-D", "objects", "bool"],
)
def test_unusable_arrays(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(CorpusError, match=r"a\.npy: expected"):
        load_corpus(str(tmp_path / "a.npy"), "calibration", None)


@pytest.mark.parametrize("array", [np.array([1, -100]), np.array([2**63], np.uint64)])
def test_negative_token_ids(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(CorpusError, match=r"expected token ids from 0; got -"):
        load_corpus(str(tmp_path / "a.npy"), "calibration", None)


def test_a_truncated_array_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**13,)})
    with pytest.raises(CorpusError, match=r"expected a \.npy array"):
        load_corpus(str(tmp_path / "a.npy"), "calibration", None)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError,
        match=r"wikitext: expected demo, wikitext2, ptb, c4, kjv, self or a file; .*did you mean wikitext2\?",
    ):
        load_corpus("wikitext", "calibration", to_bytes)
    with pytest.raises(CorpusError, match=r"none\.txt: expected .* or a file; got neither; check the path"):
        load_corpus(str(tmp_path / "none.txt"), "calibration", to_bytes)
    with pytest.raises(CorpusError, match="got a directory"):
        load_corpus(str(tmp_path), "calibration", to_bytes)


def test_a_path_that_is_too_long() -> None:
    with pytest.raises(CorpusError, match="expected a readable file; got File name too long"):
        load_corpus("x" * 5000, "calibration", to_bytes)


def test_text_needs_a_tokenizer_and_a_known_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abc")
    with pytest.raises(CorpusError, match="needs a tokenizer"):
        load_corpus(path, "calibration", None)
    unchecked = getattr(load_corpus, "__wrapped__", load_corpus)  # without the tests' own check of types
    with pytest.raises(ValueError, match="calibration or evaluation; got 'train'"):
        unchecked(path, "train", to_bytes)


# --- vocabulary and fingerprints


def test_vocabulary() -> None:
    windows = torch.tensor([[0, 5], [9, 7]])
    check_vocabulary(windows, 10, "a.txt")
    with pytest.raises(CorpusError, match=r"a\.txt: expected token ids from 0 to 6; got 2 outside.* from 0 to 9; "):
        check_vocabulary(windows, 7, "a.txt")
    with pytest.raises(CorpusError, match=r"got 1 outside.* from -100 to 9"):
        check_vocabulary(torch.tensor([[-100, 9]]), 10, "a.txt")


def test_digests_do_not_change_between_machines_and_versions(tmp_path: Path) -> None:
    # Made without this package: struct.pack("<q...") into hashlib, and splitmix64 on Python integers.
    corpus = load_corpus(write(tmp_path / "a.txt", "digest"), "calibration", to_bytes)
    assert corpus.digest == "2c426d3da08cd7f45a1c40d9a31ffcfdf15a218c9fce85ea2ef82cf7031fd1ce"
    assert window_digests(torch.arange(6).view(2, 3)) == ["ab25350e3e65efeb", "59cd57a19b34c873"]
    assert ngram_sketch(torch.arange(8)[None], ngram_tokens=6).tolist() == [
        3438283313602724896,
        5957641968636650188,
        7910711214191132105,
    ]


def test_digests_tell_content_and_boundaries_apart() -> None:
    digest = corpus_module._digest
    parts = [torch.tensor(ids) for ids in ([1, 2], [3], [1], [2, 3], [1, 2, 3])]
    assert len({digest(parts[:2]), digest(parts[2:4]), digest(parts[4:])}) == 3


def test_window_digests_depend_on_content_alone() -> None:
    tokens = torch.arange(40)
    windows = tokens.unfold(0, 8, 4)  # overlapping views, not contiguous
    assert window_digests(windows) == window_digests(windows.clone())
    assert len(set(window_digests(windows))) == len(windows)


# --- sketches


@pytest.mark.parametrize("n_windows", [2, 40])  # a sketch with room, and a full one
def test_overlap_of_text_with_itself_and_with_another(n_windows: int) -> None:
    windows, others = random_windows(n_windows, 256, 0), random_windows(n_windows, 256, 1)
    sketch = ngram_sketch(windows)
    assert (len(sketch) == 4096) == (n_windows == 40)
    assert overlap_fraction(windows, sketch) == 1.0
    assert overlap_fraction(others, sketch) == 0.0


def test_overlap_of_half_a_text() -> None:
    windows = random_windows(200, 256, 0)
    sketch = ngram_sketch(windows[:100])
    assert overlap_fraction(windows, sketch) == pytest.approx(0.5, abs=0.03)  # 4 standard errors at 8192 n-grams
    assert overlap_fraction(windows[:2], ngram_sketch(windows[:1])) == 0.5


def test_overlap_is_found_at_any_offset() -> None:
    tokens = random_windows(1, 400, 0)[0]
    sketch = ngram_sketch(tokens[None, :300])
    assert overlap_fraction(tokens[None, 101:201], sketch) == 1.0


def test_repeated_text_counts_once_in_a_sketch() -> None:
    windows = random_windows(4, 64, 0)
    assert torch.equal(ngram_sketch(windows.repeat(3, 1)), ngram_sketch(windows))


def test_merged_sketches_are_the_sketch_of_the_whole() -> None:
    windows = random_windows(60, 256, 0)
    parts = [ngram_sketch(part) for part in windows.split([10, 20, 30])]
    whole = ngram_sketch(windows)
    assert torch.equal(merge_sketches(*parts), whole)
    assert torch.equal(merge_sketches(parts[2], merge_sketches(parts[1], parts[0]), parts[1]), whole)


def test_sketch_equals_the_naive_one() -> None:
    windows = torch.randint(0, 3, (5, 20), generator=torch.Generator().manual_seed(0))
    n_distinct = len({tuple(row[i : i + 4].tolist()) for row in windows for i in range(17)})
    sketch = ngram_sketch(windows, ngram_tokens=4)
    assert len(sketch) == n_distinct
    assert torch.equal(sketch, sketch.sort().values)
    assert torch.equal(ngram_sketch(windows, ngram_tokens=4, capacity=7), sketch[:7])


def test_too_little_text_to_tell_is_nan() -> None:
    sketch = ngram_sketch(random_windows(40, 256, 0), capacity=1)
    assert np.isnan(overlap_fraction(random_windows(1, 32, 1), sketch, capacity=1))


def test_windows_shorter_than_an_ngram() -> None:
    with pytest.raises(ValueError, match="ngram_tokens: expected at most 16, the length of a window; got 32"):
        ngram_sketch(random_windows(2, 16, 0))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "café".encode("utf-16"), "iconv -f utf-16"),
        ("a.txt", "café".encode("latin1"), "iconv -f latin1"),
        ("a.dat", b"abc\0def", r"a\.dat: expected text; got a zero byte at offset 3"),
        ("a.json", b'{"text": "abc"}', r"got a \.json file; write one object per line"),
        ("a.jsonl", b'{"text": 5}', r"line 1: expected text in the field 'text'; got int 5; .*--field"),
        ("a.jsonl", b'{"body": "abc"}', r"got \{\"body\": \"abc\"\}; name another one with --field"),
    ],
)
def test_what_is_no_text_is_refused_with_a_way_out(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        load_corpus(str(tmp_path / name), "calibration", to_bytes)
