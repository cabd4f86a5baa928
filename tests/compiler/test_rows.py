"""Sequences in pages of a pool: shared where they are equal, copied when one of them writes."""

from __future__ import annotations

import gc
import random
import threading

import pytest
import torch

import effc
from effc.ir import InputError
from effc.rows import Pages, Pool
from tests.compiler.decoders import Plain, close, llama, some, whole

PAGE = 8
RECIPE = f"raised,page-kv-cache{{page={PAGE}}}"


def pool(pages: int = 4) -> Pool:
    return Pool(lambda n: [torch.full((n, 1, PAGE, 1), -1.0)], PAGE, pages)


def write(rows: Pages, start: int, values: list[list[float]]) -> None:
    """As a graph does: rows of the batch, from a token on."""
    rows.write(start, start + len(values[0]))
    table, state = rows.inputs
    for pages, new in zip(table, values):
        for at, value in enumerate(new, start):
            state[pages[at // PAGE], 0, at % PAGE, 0] = value


def read(rows: Pages, length: int) -> list[list[float]]:
    table, state = rows.inputs
    return [[state[p[i // PAGE], 0, i % PAGE, 0].item() for i in range(length)] for p in table]


def test_a_fork_shares_pages_until_it_writes() -> None:
    pages = pool()
    a = Pages(pages, 1, 3 * PAGE)
    write(a, 0, [list(range(12))])
    assert pages.used == 2
    b = a.select(torch.tensor([0, 0]), 12)
    assert pages.used == 2 and b.nbytes == 4 * pages.nbytes // 4
    write(b, 12, [[50.0], [60.0]])
    assert pages.used == 4  # the full page is shared by three, the last is each one's own
    assert read(a, 12) == [list(range(12))]
    assert read(b, 13) == [[*range(12), 50], [*range(12), 60]]
    a.keep(0)
    assert pages.used == 3
    del b
    gc.collect()
    assert pages.used == 0


def test_pages_behind_a_rollback_are_given_back() -> None:
    pages = pool()
    a = Pages(pages, 1, 4 * PAGE)
    write(a, 0, [list(range(30))])
    b = a.select(torch.tensor([0]), 30)
    a.keep(9)
    write(a, 9, [[99.0] * 10])
    assert read(a, 19)[0] == [*range(9), *[99] * 10]
    assert read(b, 30)[0] == list(range(30))


def test_a_pool_grows_and_keeps_what_it_holds() -> None:
    pages = pool(1)
    rows = [Pages(pages, 2, 3 * PAGE) for _ in range(3)]
    values = [[[100 * i + j + k for k in range(20)] for j in range(2)] for i in range(3)]
    for r, v in zip(rows, values):
        write(r, 0, v)
    assert pages.used == 18 and pages.pages == 32
    assert [read(r, 20) for r in rows] == values


def test_growing_waits_for_calls_that_run() -> None:
    pages = pool(1)
    pages.take()
    started, done = threading.Event(), []

    def more() -> None:
        started.set()
        done.append(pages.take())

    with pages.running():
        thread = threading.Thread(target=more)
        thread.start()
        started.wait()
        thread.join(0.05)
        assert not done and pages.pages == 1
    thread.join(5)
    assert done == [1] and pages.pages == 2


# ------------------------------------------------------------------ decoders


@pytest.fixture(scope="module", params=["cpu", "reference"])
def decoder(request):
    torch.manual_seed(0)
    model = Plain().eval().requires_grad_(False)
    return model, effc.decoder(model, RECIPE, target=request.param)


def test_any_order_of_doing_and_undoing(decoder) -> None:
    model, made = decoder
    chance = random.Random(0)
    kept = [(made.sequence(), some(1, 0))]
    for _ in range(60):
        at = chance.randrange(len(kept))
        s, ids = kept[at]
        act = chance.choice(["append", "append", "append", "fork", "rollback", "drop"])
        if act == "append":
            new = some(1, chance.choice([1, 1, 3, 9]))
            ids = torch.cat((ids, new), 1)
            close(s.append(new), whole(model, ids)[:, -1])
            kept[at] = s, ids
        elif act == "fork" and len(kept) < 6:
            kept.append((s.fork(), ids))
        elif act == "rollback":
            n = chance.randint(0, len(s))
            s.rollback(n)
            kept[at] = s, ids[:, : ids.shape[1] - n]
        elif act == "drop" and len(kept) > 1:
            del kept[at]
    del kept, s
    gc.collect()
    assert made._pool.used == 0


def test_beams_share_what_they_have_in_common(decoder) -> None:
    model, made = decoder
    ids = some(1, 21)
    s = made.sequence()
    s.append(ids)
    beams = s.select([0, 0, 0])
    del s
    gc.collect()
    assert made._pool.used == 3
    new = some(3, 1)
    close(beams.append(new), whole(model, torch.cat((ids.repeat(3, 1), new), 1))[:, -1])
    assert made._pool.used == 2 + 3
    beams.reorder([2, 2, 0])
    again = some(3, 1)
    rows = torch.cat((ids.repeat(3, 1), new[[2, 2, 0]], again), 1)
    close(beams.append(again), whole(model, rows)[:, -1])


def test_capacity_is_that_which_was_asked_for(decoder) -> None:
    s = decoder[1].sequence(capacity=10)
    s.append(some(1, 10))
    with pytest.raises(InputError, match="11 tokens do not fit a sequence with room for 10"):
        s.append(some(1, 1))
    assert s.capacity == 16


def test_threads_share_a_pool() -> None:
    torch.manual_seed(0)
    model = llama().eval().requires_grad_(False)
    alone = effc.decoder(model)
    shared = effc.decoder(model, RECIPE)
    prompts = [some(3 + i).tolist() for i in range(4)]
    want = [alone.generate(p, 40, eos=()) for p in prompts]
    held = shared.sequence(5)
    held.append(some(5, 90))  # the next generation needs more pages than there are
    got: list = [None] * len(prompts)

    def run(i: int) -> None:
        got[i] = shared.generate(prompts[i], 40, eos=())

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == want
    assert shared._pool.pages > 64
    mixed = [[5, 6, 7, 8, 9], [8, 9]]
    assert shared.generate(mixed, 20, eos=()) == alone.generate(mixed, 20, eos=())
