"""The engine from outside: requests that come at any time, each with its own settings, and what is refused."""

from __future__ import annotations

import gc
import itertools
import math
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.infer.test_engine import PROMPTS, same
from tests.infer.test_sampling import SETTINGS
from tests.strategies import tiny, tiny_copy, tokenizers
from tidal.infer import engine as module
from tidal.infer.completion import Limits
from tidal.infer.decoder import Decoder
from tidal.infer.engine import Completion, Engine, generate, stream
from tidal.infer.sampling import Sampling, choose
from tidal.streams import ReaderToken
from tidal.tokenizer import Block

LIMITS = (Limits(12), Limits(25), Limits(40, max_new_blocks=2), Limits(20, stop="a"))


def alone(prompt: str, sampling: Sampling, limits: Limits, seed: int) -> Completion:
    return generate(*tiny("english", "memory"), [prompt], **vars(sampling), **vars(limits), seed=[seed])[0]


def check_requests(batch_size: int, every: int) -> list[int]:
    """Some come at once, others every few steps, each with other settings; each is as alone. Sizes of the batch."""
    engine, sizes = Engine(*tiny("english", "memory"), batch_size=batch_size), []
    asked = [(PROMPTS[i % len(PROMPTS)], SETTINGS[i % len(SETTINGS)], LIMITS[i % len(LIMITS)], i) for i in range(24)]
    coming = list(asked)
    blocks: dict[int, list[str]] = {}
    done: dict[int, Completion] = {}
    rounds = 0
    while coming or engine.unfinished:
        for request in coming[: 3 if rounds % every == 0 else 0]:
            assert engine.submit(*request) == asked.index(request)
            coming.pop(0)
        rounds += 1
        for number, event in engine.step():
            assert number not in done
            if isinstance(event, str):
                blocks.setdefault(number, []).append(event)
            else:
                done[number] = event
        sizes.append(len(engine._rows))
        assert len(asked) == len(coming) + len(done) + engine.unfinished
    for number, request in enumerate(asked):
        same(done[number], alone(*request), 1e-9)
        if done[number].stop_reason != "stop_string":
            assert blocks.get(number, []) == done[number].blocks
    return sizes


@pytest.mark.parametrize(("batch_size", "every"), [(1, 1), (4, 3), (64, 1), (64, 13), (64, 60)])
def test_requests_come_at_any_time(batch_size: int, every: int) -> None:
    sizes = check_requests(batch_size, every)
    assert max(sizes) <= batch_size
    if batch_size == 64:
        assert any(b > a for a, b in itertools.pairwise(sizes)), "it grows while others are written"
        assert any(b < a for a, b in itertools.pairwise(sizes)), "and shrinks"


def settings_of_a_neighbour(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "choose", lambda logits, allowed, settings, *rest: choose(
        logits, allowed, [*settings[1:], settings[0]], *rest))  # fmt: skip


def generator_of_a_neighbour(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "choose", lambda logits, allowed, settings, generators, *rest: choose(
        logits, allowed, settings, [*generators[1:], generators[0]], *rest))  # fmt: skip


def joins_what_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Decoder, "open", lambda self, rows: None)


def all_are_cleared(patch: pytest.MonkeyPatch) -> None:
    clear = Decoder.clear
    patch.setattr(Decoder, "clear", lambda self, rows: clear(self, range(len(self.builders))))


@pytest.mark.parametrize("bug", [settings_of_a_neighbour, generator_of_a_neighbour, joins_what_left, all_are_cleared])
def test_planted_bugs_show(bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {i: alone(PROMPTS[i % len(PROMPTS)], SETTINGS[i % len(SETTINGS)], LIMITS[i % len(LIMITS)], i)
             for i in range(24)}  # fmt: skip
    monkeypatch.setitem(globals(), "alone", lambda prompt, sampling, limits, seed: expected[seed])
    bug(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check_requests(64, 5)


def test_requests_are_cancelled() -> None:
    engine = Engine(*tiny("english", "memory"), batch_size=2)
    numbers = [engine.submit(prompt, Sampling(1.0), Limits(15), seed) for seed, prompt in enumerate(PROMPTS[:5])]
    assert engine.cancel(numbers[3])  # waits
    events = engine.step()
    assert engine.cancel(numbers[0])  # is being written
    assert not engine.cancel(numbers[0])
    assert not engine.cancel(99)
    assert engine.unfinished == 3
    while engine.unfinished:
        events += engine.step()
    done = {number: event for number, event in events if isinstance(event, Completion)}
    assert sorted(done) == [numbers[1], numbers[2], numbers[4]]
    for number, completion in done.items():
        same(completion, alone(PROMPTS[number], Sampling(1.0), Limits(15), number), 1e-9)
    assert not engine.cancel(numbers[1])
    assert engine.step() == []
    same(finish(engine, engine.submit("the cat", Sampling(), Limits(9))), alone("the cat", Sampling(), Limits(9), 0),
         1e-9)  # fmt: skip


def test_nothing_comes_of_a_request_once_it_is_cancelled() -> None:
    """Also if it wrote in the same step as what made its owner cancel it."""
    engine = Engine(*tiny("english", "memory"))
    first, second = (engine.submit("the cat", Sampling(1.0), Limits(60), 4) for _ in range(2))  # both write the same
    events, cancelled = [], False
    for number, _ in engine.drain():
        assert number == first or not cancelled
        events.append(number)
        cancelled = cancelled or engine.cancel(second)
    assert len(events) > 2
    first, second = (engine.submit("the cat", Sampling(1.0), Limits(60), 4) for _ in range(2))
    ended = []
    for number, event in engine.drain():  # but what has ended in the same step has ended
        if isinstance(event, Completion):
            ended.append(number)
            assert not engine.cancel(second)
    assert ended == [first, second]


def finish(engine: Engine, number: int) -> Completion:
    completion = dict(engine.drain())[number]
    assert isinstance(completion, Completion)
    return completion


@pytest.mark.parametrize(("request_", "message"), [
    (("\ud800",), "surrogate"), ((b"a",), "prompt is b'a'; it must be a str"), ((None,), "prompt is None"),
    (("a", {"temperature": 1}), "sampling is {'temperature': 1}; it must be a Sampling"),
    (("a", Sampling(), 5), "limits is 5; it must be a Limits"),
    *((("a", Sampling(), Limits(), seed), f"seed is {seed}; it must be") for seed in (1.7, -1, math.nan)),
    (("a", Sampling(), Limits(), [3, -1]), "seed is -1; it must be at least 0"),
])  # fmt: skip
def test_requests_that_make_no_sense(request_: Any, message: str) -> None:
    engine = Engine(*tiny("english", "memory"))
    with pytest.raises(ValueError, match=message) as caught:
        engine.submit(*request_)
    assert "\n" not in str(caught.value)
    assert not engine.unfinished


def test_requests_come_from_several_threads() -> None:
    """While another writes: each has a number of its own, and none is lost."""
    engine, numbers = Engine(*tiny("english", "memory"), batch_size=8), queue.SimpleQueue[int]()
    prompt = "the light, the fox " * 20  # splitting it takes long enough to be interrupted

    def submit() -> None:
        for _ in range(10):
            numbers.put(engine.submit(prompt, limits=Limits(1)))

    threads, done = [threading.Thread(target=submit) for _ in range(4)], []
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or engine.unfinished:
            done += [number for number, event in engine.step() if isinstance(event, Completion)]
    finally:
        sys.setswitchinterval(often)
    assert sorted(numbers.get() for _ in range(40)) == sorted(done) == list(range(40))


def test_seeds_of_requests_without_one() -> None:
    """Those that `generate` gives its prompts: none draws as another."""
    engine = Engine(*tiny("english", "memory"))
    for number in range(8):
        assert engine.submit("the", Sampling(1.0), Limits(20)) == number
    done = dict(engine.drain())
    wanted = generate(*tiny("english", "memory"), ["the"] * 8, temperature=1.0, max_new_units=20, seed=0)
    for number, completion in enumerate(wanted):
        mine = done[number]
        assert isinstance(mine, Completion)
        same(mine, completion, 1e-9)
    assert len({completion.text for completion in wanted}) > 4


@pytest.mark.parametrize(("how", "message"), [
    ({"max_new_units": math.nan}, "max_new_units is nan; it must be an integer"),
    ({"max_new_units": math.inf}, "max_new_units is inf"), ({"max_new_units": 2.5}, "max_new_units is 2.5"),
    ({"max_new_blocks": 1.5}, "max_new_blocks is 1.5"), ({"top_k": 5.0}, "top_k is 5.0; it must be an integer"),
    ({"temperature": "1"}, "temperature is '1'; it must be a number"), ({"top_p": None}, "top_p is None"),
    ({"seed": 1.7}, "seed is 1.7"), ({"seed": -1}, "seed is -1"), ({"seed": [5, -1]}, "seed is -1"),
    ({"seed": [1, 2.5]}, "seed is 2.5"), ({"batch_size": 2.0}, "batch_size is 2.0"), ({"stop": [3]}, "string is 3"),
    ({"stop": 3}, "stop is 3"), ({"seed": None}, "seed is None"),
])  # fmt: skip
def test_settings_of_a_wrong_type(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(*tiny("english", "memory"), ["a", "b"], **how)  # at once, before anything is asked of it


def test_settings_of_numpy() -> None:
    how: dict[str, Any] = {"temperature": 1, "top_k": 5, "seed": 3, "max_new_units": 9}
    of_numpy = {"temperature": np.float32(1), **{name: np.int64(how[name]) for name in ("top_k", "seed",
                "max_new_units")}}  # fmt: skip
    one, two = (generate(*tiny("english", "memory"), ["a"], **h)[0] for h in (how, of_numpy))
    assert one.blocks == two.blocks
    assert type(Sampling(top_k=np.int64(5)).top_k) is int


def test_the_mode_of_the_model_is_its_own() -> None:
    """Also with streams that take turns, and with one that is given up."""
    model, tokenizer = tiny_copy("english", "memory")
    model.train()
    streams = [stream(model, tokenizer, PROMPTS[:4], temperature=1.0, max_new_units=20, seed=i) for i in range(2)]
    texts: list[dict[int, Any]] = [{}, {}]
    while any(len(t) < 4 for t in texts):
        for events, done in zip(streams, texts, strict=True):
            for number, event in events:
                if isinstance(event, Completion):
                    done[number] = event.text
                break
            assert model.training
    for i, done in enumerate(texts):
        wanted = generate(model, tokenizer, PROMPTS[:4], temperature=1.0, max_new_units=20, seed=i)
        assert [done[n] for n in range(4)] == [c.text for c in wanted]
    given_up = stream(model, tokenizer, PROMPTS, temperature=1.0)
    next(given_up)
    assert model.training
    model.eval()
    del given_up
    assert not model.training


def test_an_error_leaves_nothing_behind() -> None:
    model, tokenizer = tiny_copy("english", "memory")
    model.train()
    engine = Engine(model, tokenizer)
    for seed, prompt in enumerate(PROMPTS):
        engine.submit(prompt, Sampling(1.0), Limits(30), seed)
    engine.step()
    assert engine.unfinished
    assert engine._decoder
    decoder = weakref.ref(engine._decoder)
    with torch.no_grad():
        norm = model.writer_norm.weight.clone()
        model.writer_norm.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="NaN or infinite: the weights are damaged"):
        engine.step()
    assert model.training
    assert engine.unfinished == 0
    gc.collect()  # the traceback's frames
    assert decoder() is None
    with torch.no_grad():
        model.writer_norm.weight.copy_(norm)
    same(finish(engine, engine.submit("the cat", limits=Limits(9))), generate(
        model, tokenizer, ["the cat"], max_new_units=9)[0], 1e-9)  # fmt: skip


def test_one_long_prompt_does_not_make_all_rows_long_for_ever() -> None:
    """Its memory is given back once it has left, its row costs nothing until another joins; nothing else changes."""
    model, tokenizer = tiny("english", "memory")
    engine = Engine(model, tokenizer, batch_size=4)
    much = "the cat sat on the mat " * 300
    asked = [(much, Sampling(1.0), Limits(12), 4),
             *((prompt, Sampling(1.0), Limits(60), seed) for seed, prompt in enumerate(("the cat", "a", "sat")))]
    numbers = [engine.submit(*request) for request in asked]
    events, sizes, longest = [], [], []
    while engine.unfinished:
        events += engine.step()
        assert engine._decoder
        sizes.append((engine._decoder.capacity, *(cache.data.untyped_storage().nbytes()
                                                  for cache in engine._decoder.reader_caches)))  # fmt: skip
        longest.append(max(builder.n_read for builder in engine._decoder.builders))
    done = dict(events)
    for number, request in zip(numbers, asked, strict=True):
        completion = done[number]
        assert isinstance(completion, Completion)
        same(completion, alone(*request), 1e-9)
        assert number or completion.blocks, "the long one writes while others are there"
    assert longest[-1] < 100
    assert sizes[0][0] > 2000 > 400 > sizes[-1][0]
    assert sizes[0][1] > 4 * sizes[-1][1], "not only a smaller view of the same memory"
    engine.submit(much, limits=Limits(3))
    while engine.unfinished:
        engine.step()
    assert engine._decoder
    assert engine._decoder.capacity < 400, "nor does the last request leave its memory behind"


def memory_cut_short(patch: pytest.MonkeyPatch) -> None:
    def trim(self: Decoder) -> None:
        self._resize(max(1, max(builder.n_read for builder in self.builders) - 5))

    patch.setattr(Decoder, "trim", trim)


def test_memory_cut_short_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [(prompt, Sampling(1.0), Limits(60), seed) for seed, prompt in enumerate(PROMPTS)]
    expected = [alone(*request) for request in asked]
    memory_cut_short(monkeypatch)

    def check() -> None:
        for request, wanted in zip(asked, expected, strict=True):
            same(alone(*request), wanted, 1e-9)

    with pytest.raises((AssertionError, RuntimeError)):
        check()


def test_what_is_read_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the bound, rows are read alone; texts do not change."""
    model, tokenizer = tiny("english", "memory")
    prompts = ["the cat sat on the mat " * n for n in (9, 2, 1, 2, 8, 2, 1, 2)]
    how: dict[str, Any] = {"temperature": 1.0, "max_new_units": 20}
    wanted = generate(model, tokenizer, prompts, **how)
    passes, read = list[tuple[int, int]](), Decoder.read

    def watched(self: Decoder, rows: Sequence[int], blocks: Sequence[Sequence[Block]]) -> None:
        passes.append((len(rows), len(rows) * max(sum(len(block.tokens) for block in mine) for mine in blocks)))
        read(self, rows, blocks)

    monkeypatch.setattr(module, "PASS_TOKENS", 64)
    monkeypatch.setattr(Decoder, "read", watched)
    for done, expected in zip(generate(model, tokenizer, prompts, **how), wanted, strict=True):
        same(done, expected, 1e-9)
    assert all(size <= 64 for n, size in passes if n > 1)
    assert any(size > 64 for n, size in passes if n == 1)
    assert max(n for n, _ in passes) > 1


def test_a_prompt_is_read_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that joins others and has to wait for them: a pass over its `<bos>` alone costs as much."""
    first, append = list[int](), Decoder._append

    def watched(self: Decoder, rows: Sequence[int], news: list[list[ReaderToken]]) -> None:
        first.extend(len(new) for row, new in zip(rows, news, strict=True) if self.builders[row].n_read == len(new))
        append(self, rows, news)

    monkeypatch.setattr(Decoder, "_append", watched)
    generate(*tiny("english", "memory"), ["the cat sat"] * 12, temperature=1.0, max_new_units=20, batch_size=4)
    assert len(first) == 12
    assert set(first) == {first[0]} != {1}


def test_another_tokenizer_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(tiny("english", "memory")[0], tokenizers()["bytes"])
