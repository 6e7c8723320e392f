"""Compiled functions: kept on disk where that is possible, work without it, and are spread over threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import pytest
import torch

from calib.solvers.compiled import compiled
from calib.solvers.threads import in_parts, torch_threads

pytestmark = pytest.mark.shapes


def test_where_nothing_can_be_kept_a_function_is_compiled_all_the_same() -> None:
    """As in a container whose packages and home are read-only."""
    places: dict[str, object] = {}
    exec("def double(x): return 2 * x", places)
    double = places["double"]
    assert callable(double)
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(double)
    assert compiled(double)(3) == 6


def test_what_was_compiled_is_kept_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    first, again = compiled(_double), compiled(_double)
    assert [first(3), again(3)] == [6, 6]
    assert any("_double" in path.name for path in tmp_path.rglob("*.nbc"))
    assert again.stats.cache_hits  # type: ignore[attr-defined]


@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("n", [0, 1, 5, 100])
def test_every_piece_is_done_once(n: int, n_threads: int) -> None:
    done, before = torch.zeros(n), torch.get_num_threads()

    def work(part: slice) -> None:
        done[part] += 1

    try:
        torch.set_num_threads(n_threads)
        in_parts(work, n)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(done, torch.ones(n))


def test_threads_are_limited_in_the_block_alone_and_in_threads_that_it_starts() -> None:
    """Sites that are fitted side by side once had all cores each, and waited for one another at every operation."""
    before = torch.get_num_threads()
    with torch_threads(1), ThreadPoolExecutor(1) as pool:
        assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_what_fails_in_a_thread_is_told() -> None:
    def work(part: slice) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_parts(work, 100)


def _double(x: int) -> int:
    return 2 * x
