"""Prompts of every type that a model takes, and the one sentence that answers everything else."""

from __future__ import annotations

import math
import re
from array import array

import numpy as np
import pytest
import torch

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.sequences.prompts import PROMPT_IS, PromptError, as_prompts

GREEDY = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm(tiny, tmp_path_factory):
    with LLM(str(tiny.path), policy=Policy(4), offload_dir=tmp_path_factory.mktemp("offload")) as found:
        yield found


def without_address(value: object) -> str:
    """A name that is the same in every process."""
    return re.sub(r" at 0x\w+", "", repr(value))


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ([], []),
        ((), []),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        (range(1, 3), [[1, 2]]),
        (array("i", [1, 2]), [[1, 2]]),
        ([np.int64(1), np.int8(2)], [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        (np.array([1, 2], dtype=np.uint8), [[1, 2]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        (torch.tensor([1, 2], dtype=torch.int16), [[1, 2]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (([1], (2,)), [[1], [2]]),
        ((p for p in ("a", [1])), ["a", [1]]),
        (["a", [1, 2], np.array([3]), torch.tensor([4]), range(5, 6)], ["a", [1, 2], [3], [4], [5]]),
        ([""], [""]),
        ([[]], [[]]),
    ],
    ids=without_address,
)
def test_what_prompts_are(given, prompts):
    found = as_prompts(given)
    assert found == prompts
    assert all(isinstance(p, str) or all(type(t) is int for t in p) for p in found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "the prompts are None"),
        (5, "the prompts are 5 (int)"),
        (1.5, "the prompts are 1.5 (float)"),
        (True, "the prompts are True (bool)"),
        (b"ab", "the prompts are b'ab' (bytes)"),
        ({"a": 1}, "the prompts are {'a': 1} (dict)"),
        ({1, 2}, "the prompts are {1, 2} (set)"),
        ([1, 2.9], "the prompt holds 2.9 (float)"),
        ([1.7, 2.9], "prompt 0 is 1.7 (float)"),
        ([1, "a"], "the prompt holds 'a' (str)"),
        (["a", 1], "prompt 1 is 1 (int)"),
        ([1, True], "the prompt holds True (bool)"),
        ([True, 1], "prompt 0 is True (bool)"),
        ([1, None], "the prompt holds None"),
        ([None], "prompt 0 is None"),
        ([1, [2]], "the prompt holds [2] (list)"),
        ([["1", "2"]], "prompt 0 holds '1' (str)"),
        ([[1], [[2]]], "prompt 1 holds [2] (list)"),
        ([[1, math.nan]], "prompt 0 holds nan (float)"),
        ([b"ab"], "prompt 0 is b'ab' (bytes)"),
        ([{"prompt": "a"}], "prompt 0 is {'prompt': 'a'} (dict)"),
        ([(t for t in [1])], "prompt 0 is <generator"),
        (np.array(5), "the prompts are an array of int64 of shape ()"),
        (np.array([1.0, 2.0]), "prompt 0 holds 1.0 (float)"),
        (np.array([True]), "prompt 0 holds True (bool)"),
        (np.zeros((1, 2, 3), int), "the prompts are an array of int64 of shape (1, 2, 3)"),
        ([np.zeros((2, 3), int)], "prompt 0 is an array of int64 of shape (2, 3)"),
        (torch.tensor([0.5]), "prompt 0 holds 0.5 (float)"),
        (torch.tensor([[0.5]]), "prompt 0 holds 0.5 (float)"),
        ([torch.tensor(1)], "prompt 0 is an array of torch.int64 of shape ()"),
    ],
    ids=without_address,
)
def test_what_they_are_not(llm, given, words):
    with pytest.raises(PromptError) as caught:
        llm.generate(given, GREEDY)
    message = str(caught.value)
    assert message.startswith(f"{words}") and "\n" not in message
    assert PROMPT_IS in message or message.endswith("give one of 1 dimension for a prompt, of 2 for several")


def test_arrays_run_as_the_lists_they_stand_for(llm, tiny):
    length = min(map(len, tiny.prompts[:3]))
    rows = [p[:length] for p in tiny.prompts[:3]]
    right = [o.outputs[0].token_ids for o in llm.generate(rows, GREEDY)]
    for given in (np.array(rows), torch.tensor(rows), [np.array(r, dtype=np.int32) for r in rows]):
        assert [o.outputs[0].token_ids for o in llm.generate(given, GREEDY)] == right
    assert llm.generate(np.array(rows[0]), GREEDY)[0].outputs[0].token_ids == right[0]
    assert [o.outputs[0].token_ids for o in llm.stream([(torch.tensor(rows[1]), GREEDY)])] == right[1:2]


@pytest.mark.parametrize("given", [1.5, None, [1.5], ["1"], [[1]], b"ab", {"a": 1}], ids=without_address)
def test_a_request_is_one_prompt(llm, given):
    with pytest.raises(PromptError, match=re.escape(PROMPT_IS)):
        llm.request(given)
    with pytest.raises(PromptError, match=re.escape(PROMPT_IS)):
        llm.token_ids(given)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_tokens": 2}, "sampling_params is {'max_tokens': 2} (dict)"),
        (5, "sampling_params is 5 (int)"),
        ("greedy", "sampling_params is 'greedy' (str)"),
        (0, "sampling_params is 0 (int)"),
        ([GREEDY, {"n": 1}], "sampling_params holds {'n': 1} (dict)"),
        ([GREEDY], "2 prompts but 1 sampling parameters; give one, or one each"),
        ([], "2 prompts but 0 sampling parameters; give one, or one each"),
        ([None, None], "sampling_params holds None"),
    ],
    ids=str,
)
def test_what_sampling_parameters_are_not(llm, params, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}[^\n]*$"):
        llm.generate([[5], [6]], params)


def test_stop_tokens_that_never_come_are_refused(llm):
    for token in (1003, 10**9):
        words = f"stop_token_ids holds {token}, which never comes; the vocabulary has 1003"
        with pytest.raises(ValueError, match=words):
            llm.request([5], SamplingParams(stop_token_ids=[1002, token]))
    llm.request([5], SamplingParams(stop_token_ids=[0, 1002]))


@pytest.mark.parametrize("item", [[5], "text", ([5],), ([5], GREEDY, 1), None], ids=repr)
def test_a_stream_takes_pairs(llm, item):
    with pytest.raises(ValueError, match="it takes pairs of a prompt and a SamplingParams"):
        list(llm.stream([item]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": 5}, "model is 5 (int); give a directory"),
        ({"model": None}, "model is None; give a directory"),
        ({"policy": {"gpu_batch_size": 1}}, "policy is {'gpu_batch_size': 1} (dict); give a Policy, or 'auto'"),
        ({"policy": None}, "policy is None; give a Policy, or 'auto'"),
        ({"policy": "best"}, "policy is 'best'; give a Policy, or 'auto'"),
        ({"base": "auto"}, "base is 'auto' (str); give a Policy"),
        ({"allow": "4bit"}, "allow is '4bit' (str); give a list of some of 4bit, 4bit-cache, sparse"),
        ({"allow": ["8bit"]}, "allow holds '8bit' (str); it may hold 4bit, 4bit-cache, sparse"),
        ({"allow": [["4bit"]]}, "allow holds ['4bit'] (list); it may hold"),
        ({"gpu_memory": -1}, "-1 is no amount of memory"),
        ({"cpu_memory": math.nan}, "nan is no amount of memory"),
        ({"cpu_memory": math.inf}, "inf is no amount of memory"),
        ({"disk_memory": [1]}, "[1] is no amount of memory"),
        ({"cpu_memory": True}, "True is no amount of memory"),
        ({"cpu_memory": "9" * 400}, "'9999"),
        ({"device": "tpu"}, "device is 'tpu' (str); it must be"),
        ({"device": "meta"}, "device is 'meta' (str); it must be"),
        ({"device": 1.5}, "device is 1.5 (float); it must be"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but there are "),
        ({"dtype": ["float16"]}, "dtype is ['float16'] (list); give a text"),
        ({"dtype": "int3"}, "dtype 'int3' is not supported"),
        ({"seed": "one"}, "seed is 'one' (str); it must be a whole number"),
        ({"copies": "yes"}, "copies is 'yes' (str); it must be True, False or None"),
        ({"progress": 5}, "progress is 5 (int); it must be a function"),
        ({"check": True}, "check is True (bool); it must be a function"),
        ({"offload_dir": 5}, "offload_dir is 5 (int); give a directory"),
        ({"offload_dir": None}, "offload_dir is None; give a directory"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_a_model_cannot_be_made_of(tiny, tmp_path, fields, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}[^\n]*$"):
        LLM(**{"model": str(tiny.path), "policy": Policy(), "offload_dir": tmp_path, **fields})


def test_an_offload_directory_that_is_a_file(tiny, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises(ValueError, match=re.escape(f"offload_dir is {path}, which is no directory; name another")):
            LLM(str(tiny.path), policy=Policy(), offload_dir=path)


def test_a_path_names_a_model_and_another_policy_must_be_one(tiny, tmp_path):
    with LLM(tiny.path, policy=Policy(), offload_dir=str(tmp_path), cpu_memory=np.int64(1 << 40)) as llm:
        assert llm.spec.vocab == 1003
        with pytest.raises(ValueError, match=r"policy is 'auto'; give a Policy$"):
            llm.use("auto")
        assert llm.generate([[5]], GREEDY)[0].outputs, "the old one is still in use"
