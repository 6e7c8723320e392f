"""Notebooks import and show, and define nothing; what they import keeps its promises."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.contract import every_check, every_check_by_dtype
from helpers.quantizers import BITS, QUANTIZERS, every_dtype
from helpers.sites import everywhere
from matplotlib.figure import Figure
from transformers import LlamaForCausalLM

from artifacts.model.attention import attention_layers
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from scripts.notebook.decoding import log_probabilities, revised_shares
from scripts.notebook.example_quantizer import SquareLevels
from scripts.notebook.plots import plot_tokens_read
from simquant import CachePolicy
from simquant.protocols.protocol import Protocol

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
IMPORTS = (ast.Import, ast.ImportFrom)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_all_notebooks_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {
        "add_your_own_quantizer",
        "compare_recipes",
        "decode_exact",
        "inspect_codebooks",
        "predictive_coding",
    }


def definitions(source: str) -> list[str]:
    """Functions and classes of a cell, and lambdas that get a name; a cell's magics are no Python."""
    tree = ast.parse("".join(line for line in source.splitlines(keepends=True) if not line.startswith("%")))
    named = [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)]
    lambdas = ["lambda" for value in named if isinstance(value, ast.Lambda)]
    return [node.name for node in ast.walk(tree) if isinstance(node, DEFINITIONS)] + lambdas


@every_notebook
def test_notebooks_define_nothing(path: Path) -> None:
    code = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]
    assert [name for source in code for name in definitions(source)] == []


def test_definitions_would_be_found() -> None:
    source = "%%capture\ndef a():\n    pass\nclass B: ...\nc = lambda: 0\nd = sorted(x, key=lambda e: e)\n"
    assert definitions(source) == ["a", "B", "lambda"]


@every_notebook
def test_what_notebooks_import_is_there(path: Path) -> None:
    sources = [cell["source"] for cell in cells(path) if cell["cell_type"] == "code"]
    code = ["".join(line for line in source if not line.startswith("%")) for source in sources]
    lines = [ast.unparse(node) for source in code for node in ast.parse(source).body if isinstance(node, IMPORTS)]
    assert lines
    exec("\n".join(lines), {})


@every_notebook
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


# --- the example


def example(channels: int, bits: int = BITS) -> SquareLevels:
    return SquareLevels(channels=channels, bits=bits)


@pytest.fixture
def in_matrix(monkeypatch: pytest.MonkeyPatch) -> str:
    """The example's name in the matrix of quantizers."""
    monkeypatch.setitem(QUANTIZERS, "example", example)
    return "example"


@every_check
def test_the_example_keeps_the_contract(check: Callable[[str], None], in_matrix: str) -> None:
    check(in_matrix)


@every_dtype
@every_check_by_dtype
def test_the_example_keeps_the_contract_in_every_dtype(
    check: Callable[[str, torch.dtype], None], dtype: torch.dtype, in_matrix: str
) -> None:
    check(in_matrix, dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_example_has_levels_at_squares(bits: int) -> None:
    top = 2**bits - 2
    shares = [2 * code / top - 1 for code in range(top + 1)]
    levels = 3 * torch.tensor([[s * abs(s) for s in shares]])
    torch.testing.assert_close(example(len(shares), bits).simulate(levels), levels)
    assert torch.equal(example(4, bits).simulate(torch.zeros(2, 4)), torch.zeros(2, 4))


# --- what is measured and drawn


def per_token() -> Quantizer:
    return DynamicAffine(channels=16, bits=2)


def test_log_probabilities_of_decode_and_cache_agree_and_differ_from_full(tiny_llama: LlamaForCausalLM) -> None:
    ids, policy = torch.randint(3, 64, (1, 24)), CachePolicy(residual_tokens=6)
    protocols = [Protocol(name="full", policy=CachePolicy())]
    protocols += [Protocol(name=name, policy=policy) for name in ("decode", "cache")]
    layers, quantizers = attention_layers(tiny_llama), everywhere(per_token, "pre_rope")
    full, decode, cache = (log_probabilities(tiny_llama, ids, quantizers, each, layers) for each in protocols)
    exact = log_probabilities(tiny_llama, ids)
    naive = tiny_llama(ids).logits[0].log_softmax(-1)
    assert torch.allclose(exact, torch.stack([naive[t, ids[0, t + 1]] for t in range(23)]), atol=1e-5)
    assert (decode - cache).abs().max() < 1e-3
    assert (full - cache).abs().max() > 0.01
    assert torch.allclose(cache[:5], exact[:5], atol=1e-4)  # the window holds all that the first queries read


def test_tokens_are_revised_only_where_later_ones_share_their_scale() -> None:
    x = torch.randn(64, 16)
    shares = {
        per: revised_shares(DynamicAffine(channels=16, bits=4, per=per), x, 8, [8, 16, 64])
        for per in ("token", "channel")
    }
    assert shares["token"] == [0, 0, 0]
    assert shares["channel"][0] == 0 < shares["channel"][1] <= shares["channel"][2]


def test_the_picture_tells_unread_exact_and_decoded_tokens_apart() -> None:
    axes = Figure().subplots()
    plot_tokens_read(torch.tensor([[True, True], [True, False]]), "", axes)
    assert axes.images[0].get_array().tolist() == [[2, 0], [2, 1]]
