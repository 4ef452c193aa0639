"""The audio tower encodes a recording once: by content, within bounds, and from disk in later runs if that is configured."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import nn

from tars_fast.models.audio_cache import AudioCache, fingerprint
from tars_fast.types import Modality, UserError


def embeddings(value: float, num_tokens: int = 10) -> torch.Tensor:
    return torch.full((num_tokens, 4), value)


def encode(model, recordings):
    return model.encode_audio([model.load_audio(recording) for recording in recordings])


@pytest.fixture
def towers_calls(model):
    calls = []
    model.module.model.audio_tower.conv1.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    return calls


def test_the_same_content_under_another_name_is_encoded_once(model, questions, towers_calls, tmp_path):
    copy = tmp_path / "other_name.ogg"
    copy.write_bytes(questions[0].audio.read_bytes())
    (first,) = encode(model, [questions[0].audio])[0]
    (second,) = encode(model, [copy])[0]
    assert torch.equal(first, second)
    assert towers_calls == [1]


def test_changed_content_under_the_same_name_is_encoded_again(model, questions, towers_calls, tmp_path):
    path = tmp_path / "a.ogg"
    path.write_bytes(questions[0].audio.read_bytes())
    (first,) = encode(model, [path])[0]
    path.write_bytes(questions[1].audio.read_bytes())
    os.utime(path, ns=(1, 1))
    (second,) = encode(model, [path])[0]
    assert towers_calls == [1, 1]
    assert first.shape != second.shape or not torch.equal(first, second)


def test_least_recently_used_goes_first_and_the_bound_holds():
    cache = AudioCache(max_bytes=3 * embeddings(0).nbytes)
    for name in "abc":
        cache.put(name, (embeddings(ord(name)),))
    assert torch.equal(cache.get("a")[0], embeddings(ord("a")))
    cache.put("d", (embeddings(ord("d")),))
    assert cache.get("b") is None
    assert all(cache.get(name) is not None for name in "acd")
    cache.put("large", (embeddings(1, num_tokens=1000),))
    assert cache.get("large") is None, "one that alone exceeds the bound is not kept"


def test_putting_again_does_not_count_twice():
    cache = AudioCache(max_bytes=2 * embeddings(0).nbytes)
    for _ in range(5):
        cache.put("a", (embeddings(1),))
    cache.put("b", (embeddings(2),))
    assert cache.get("a") is not None
    assert cache.get("b") is not None


def test_no_memory_at_all_still_works(model, questions, towers_calls):
    model.set_audio_cache(0, None, 0)
    first = model.encode_prompts(questions[:2], Modality.SPEECH)
    second = model.encode_prompts(questions[:2], Modality.SPEECH)
    assert towers_calls == [1, 1, 1, 1]
    assert all(torch.equal(a.audio_clips[0], b.audio_clips[0]) for a, b in zip(first, second, strict=True))


def test_the_next_run_hears_nothing_again(make_model, questions, tmp_path):
    paths = [question.audio for question in questions]
    model = make_model()
    model.set_audio_cache(2**20, tmp_path, 2**30)
    first = encode(model, paths)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(paths)

    second = make_model()
    second.module.model.audio_tower.conv1.register_forward_hook(lambda *_: pytest.fail("encoded again"))
    second.set_audio_cache(2**20, tmp_path, 2**30)
    assert all(torch.equal(a, b) for (a,), (b,) in zip(first, encode(second, paths), strict=True))


def test_another_tower_hears_for_itself(make_model, questions, tmp_path):
    calls = []
    for change in (0.0, 0.01):
        model = make_model()
        with torch.no_grad():
            model.module.model.multi_modal_projector.linear.bias[3] += change
        model.set_audio_cache(2**20, tmp_path, 2**30)
        model.module.model.audio_tower.conv1.register_forward_hook(lambda *_: calls.append(1))
        encode(model, [questions[0].audio])
    assert len(calls) == 2
    linear = nn.Linear(4, 4)
    assert fingerprint(linear) != fingerprint(nn.Linear(4, 4).to(torch.bfloat16))


@pytest.mark.parametrize("damage", ["half", "one bit"])
def test_a_damaged_file_is_encoded_again_and_replaced(make_model, questions, tmp_path, damage):
    model = make_model()
    model.set_audio_cache(2**20, tmp_path, 2**30)
    ((expected,),) = encode(model, [questions[0].audio])
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(path.read_bytes()[:50] if damage == "half" else content)
    again = make_model()
    again.set_audio_cache(2**20, tmp_path, 2**30)
    assert torch.equal(encode(again, [questions[0].audio])[0][0], expected)
    third = AudioCache(2**20, tmp_path, 2**30, path.name.rpartition("-")[0])
    assert torch.equal(third.get(third.key(questions[0].audio))[0], expected)


def test_a_folder_that_goes_away_costs_time_and_not_the_run(make_model, questions, tmp_path):
    model = make_model()
    model.set_audio_cache(0, tmp_path / "cache", 2**30)
    shutil.rmtree(tmp_path / "cache")
    (expected,) = encode(make_model(), [questions[0].audio])[0]
    assert torch.equal(encode(model, [questions[0].audio])[0][0], expected)


def test_the_folder_is_bounded_too(tmp_path):
    cache = AudioCache(0, tmp_path, max_folder_bytes=5000)
    for number in range(40):
        cache.put(f"k{number}", (embeddings(number),))
        for path in tmp_path.glob("*.safetensors"):
            os.utime(path, ns=(int(path.stem[2:]), int(path.stem[2:])))
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert sum(path.stat().st_size for path in files) <= 5000
    assert cache.get("k39") is not None
    assert cache.get("k0") is None
    assert not list(tmp_path.glob("*.partial"))


def test_a_tower_in_training_is_never_answered_from_the_cache(make_model, questions):
    model = make_model(freeze_audio=False)
    calls = []
    model.module.model.audio_tower.conv1.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        assert model.encode_prompts(questions[:1], Modality.SPEECH)[0].audio_clips[0].requires_grad
    assert len(calls) == 2


def test_what_cannot_be_read_or_made(model, tmp_path):
    with pytest.raises(UserError, match=r"missing\.wav: cannot be read"):
        encode(model, [tmp_path / "missing.wav"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--audio-cache-dir .*cannot be made"):
        model.set_audio_cache(0, tmp_path / "file" / "folder", 0)
