"""The table of prompt embeddings and its cache on disk."""

from __future__ import annotations

import threading

import pytest
import torch

from gardo.models.embeddings import EMPTY, EmbeddingCache, EmbeddingTable
from gardo.types import UserError

PROMPTS = ["three red circles", "two blue squares", "three red circles"]


class Recorder:
    """A model that counts what it is asked to encode."""

    def __init__(self, model):
        self.model, self.device, self.asked = model, model.device, []

    def encode_prompts(self, prompts):
        self.asked += prompts
        return self.model.encode_prompts(prompts)


def test_each_prompt_is_encoded_once_and_looked_up_by_text(model):
    recorder = Recorder(model)
    table = EmbeddingTable(recorder, PROMPTS, batch_size=2)
    assert recorder.asked == [EMPTY, "three red circles", "two blue squares"]
    direct = model.encode_prompts(["two blue squares", EMPTY]).tensors
    looked_up = table(["two blue squares", EMPTY, "two blue squares"]).tensors
    for name, tensor in direct.items():
        torch.testing.assert_close(looked_up[name][:2], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(looked_up[name][2], looked_up[name][0])
        assert not looked_up[name].is_inference()


def test_cache_spares_the_encoders_and_gives_the_same_bits(model, tmp_path):
    cache = EmbeddingCache(tmp_path / "cache", path="m", max_sequence_length=16)
    first = EmbeddingTable(model, PROMPTS, cache=cache)
    recorder = Recorder(model)
    second = EmbeddingTable(recorder, PROMPTS, cache=cache)
    assert (first.encoded, second.encoded, recorder.asked) == (3, 0, [])
    for name, tensor in first(PROMPTS).tensors.items():
        assert torch.equal(tensor, second(PROMPTS).tensors[name])


def test_another_key_is_another_file(tmp_path):
    caches = [
        EmbeddingCache(tmp_path, path="m", max_sequence_length=n, revision=r)
        for n in (16, 32)
        for r in (None, "main")
    ]
    assert len({c.path("x") for c in caches} | {caches[0].path("y")}) == 5


def test_a_truncated_file_is_encoded_again(model, tmp_path):
    cache = EmbeddingCache(tmp_path, path="m")
    EmbeddingTable(model, PROMPTS, cache=cache)
    file = cache.path("two blue squares")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert EmbeddingTable(model, PROMPTS, cache=cache).encoded == 1
    assert len(file.read_bytes()) == len(whole)
    assert cache.load("two blue squares") is not None


def test_concurrent_writers_and_readers_never_meet_half_a_file(tmp_path):
    cache = EmbeddingCache(tmp_path, path="m")
    tensors = {"encoder_hidden_states": torch.arange(200_000.0)}
    seen, stop = [], threading.Event()

    def write():
        while not stop.is_set():
            cache.save("x", tensors)

    def read():
        while not stop.is_set():
            found = cache.load("x")
            seen.append(
                found is None
                or torch.equal(found["encoder_hidden_states"], tensors["encoder_hidden_states"])
            )

    cache.save("x", tensors)
    threads = [threading.Thread(target=f) for f in (write, read, read)]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(seen) > 10
    assert all(seen)
    assert cache.load("x") is not None


def test_an_impossible_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="model.embedding_cache"):
        EmbeddingCache(tmp_path / "file" / "cache", path="m")
