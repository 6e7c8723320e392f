"""Tensors that grow in place, and blocks of a cache that do."""

import copy
from itertools import pairwise

import pytest
import torch

from artifacts.codes import Codes
from artifacts.quantizer import Quantizer
from artifacts.quantizers.dynamic_affine import DynamicAffine
from artifacts.quantizers.identity import Identity
from simquant import CachePolicy
from simquant.cache.store.room import Room
from simquant.cache.store.token_store import TokenStore

pytestmark = pytest.mark.shapes

ROWS = torch.arange(600.0).view(200, 3)


def grown(room: Room, steps: list[int]) -> list[torch.Tensor]:
    """What each step joins to what is there."""
    found, start = [ROWS[:1]], 1
    for n in steps:
        found.append(room.join([found[-1], ROWS[start : start + n]]))
        start += n
    return found


def test_what_was_handed_out_never_changes() -> None:
    steps = [1, 0, 5, 1, 1, 30, 1]
    for index, found in enumerate(grown(Room(), steps)):
        assert torch.equal(found, ROWS[: 1 + sum(steps[:index])])


def test_an_entry_is_copied_a_few_times_whatever_follows_it() -> None:
    """A step used to copy all that was there: quadratic in the tokens of a block."""
    found = grown(Room(), [1] * 199)
    moved = [len(now) for before, now in pairwise(found) if before.data_ptr() != now.data_ptr()]
    assert sum(moved) < 30 * len(ROWS)


def test_two_that_share_a_beginning_grow_apart() -> None:
    room, other = Room(), Room()
    shared = grown(room, [64, 1])[-1]
    one, two = room.join([shared, ROWS[100:101]]), other.join([shared, ROWS[50:52]])
    again = room.join([shared, ROWS[60:61]])
    for found, tail in ((one, ROWS[100:101]), (two, ROWS[50:52]), (again, ROWS[60:61])):
        assert torch.equal(found, torch.cat([shared, tail]))
    assert one.data_ptr() != two.data_ptr()


def test_a_copied_room_does_not_write_into_the_first() -> None:
    room = Room()
    shared = grown(room, [64, 1])[-1]
    other = copy.deepcopy(room)
    one, two = room.join([shared, ROWS[100:101]]), other.join([shared, ROWS[50:51]])
    assert torch.equal(one[66:], ROWS[100:101])
    assert torch.equal(two[66:], ROWS[50:51])


def test_what_began_in_inference_mode_goes_on_outside_of_it() -> None:
    room = Room()
    with torch.inference_mode():
        head = room.join([ROWS[:1].clone(), ROWS[1:2]])
    assert torch.equal(room.join([head, ROWS[2:3]]), ROWS[:3])


@pytest.mark.parametrize("quantizer", [Identity(channels=3), DynamicAffine(channels=3, bits=4)])
def test_a_block_grows_in_place_and_holds_the_codes_of_all_at_once(quantizer: Quantizer) -> None:
    policy = CachePolicy()
    store = TokenStore(quantizer, policy, policy.window("key"), 64)
    name, *_ = (whole := quantizer.encode(ROWS[:150])).tensors
    places: list[int] = []
    for start in range(150):
        store.append(ROWS[start : start + 1])
        places.append(store.blocks[-1].tensors[name].data_ptr())
        if start == 70:
            other = store.copy()
    assert sum(before != now for before, now in pairwise(places)) < 120
    other.append(ROWS[100:101])
    assert torch.equal(store.read(0, 150), quantizer.decode(whole))
    assert torch.equal(other.read(71, 72), quantizer.simulate(ROWS[100:101]))
    found = Codes.cat(store.blocks)
    for own, tensor in whole.tensors.items():
        assert torch.equal(found.tensors[own], tensor)
    assert store.encoded_bytes == whole.nbytes
    for codes in store.blocks[:-1]:
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in codes.all_tensors())
