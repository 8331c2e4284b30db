"""Completions: what a request may ask, and that its answer is the model's own, token by token."""

import copy
import math

import pytest
import torch

from data.tokenizer import EOT, decode, encode
from eval.completion_request import FIELDS, CompletionRequest, parse_request
from eval.completions import Answer, Choice, complete
from eval.sample import continue_prompts
from launch.errors import BadInput, Failed
from model.generate import SampleConfig, generate
from model.gpt2 import GPT
from tests.running import CONFIG

CPU = torch.device("cpu")
NONE = (None, None)  # likelihoods that nobody asked for


def ask(**body) -> CompletionRequest:
    return parse_request(body, CONFIG)


def answer(model: GPT, **body) -> dict:
    request = ask(**body)
    answer = Answer(request, "tiny")
    for pieces in complete(model, request):
        answer.add(pieces)
    return answer.whole()


def texts(whole: dict) -> list[str]:
    return [choice["text"] for choice in whole["choices"]]


def test_a_completion_is_what_eval_sample_says(model):
    whole = answer(model, prompt="In the beginning", max_tokens=9, top_k=50, seed=7, n=3)
    config = SampleConfig(9, top_k=50, seed=7)
    expected = continue_prompts(model, ["In the beginning"] * 3, config, CPU)
    assert texts(whole) == [made.text for made in expected]
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 27, "total_tokens": 30}
    assert {choice["finish_reason"] for choice in whole["choices"]} == {"length"}


def test_several_prompts_as_texts_and_as_tokens(model):
    prompts = ["In the beginning", "a b c"]
    whole = answer(model, prompt=prompts, max_tokens=5, seed=1, n=2)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    alone = [answer(model, prompt=prompt, max_tokens=5, seed=1, n=2) for prompt in prompts]
    assert texts(whole) == texts(alone[0]) + texts(alone[1])
    tokens = [encode(prompt) for prompt in prompts]
    assert texts(answer(model, prompt=tokens, max_tokens=5, seed=1, n=2)) == texts(whole)
    assert texts(answer(model, prompt=tokens[0], max_tokens=5, seed=1, n=2)) == texts(alone[0])


def test_likelihoods_are_those_of_one_pass_over_the_text(model):
    """fp64 logits of size 1 from sums in another order: 1e-10 is 10^5 roundings."""
    whole = answer(model, prompt="In the beginning ☃", max_tokens=6, seed=3, echo=True, logprobs=2)
    choice = whole["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    config = SampleConfig(6, top_k=0, seed=3)
    idx = torch.tensor([encode("In the beginning ☃")])
    drawn = torch.cat(list(generate(model, idx, config)))
    ids = torch.cat([idx[0], drawn])
    with torch.no_grad():
        logp = model(ids[None])[0].log_softmax(-1)  # (T, V)
    expected = logp[:-1].gather(1, ids[1:, None])[:, 0].tolist()
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-10)
    for row, likeliest in zip(logp[:-1], found["top_logprobs"][1:], strict=True):
        assert max(likeliest.values()) == pytest.approx(row.max().item(), abs=1e-10)
        assert len(likeliest) in (2, 3)
    ends = [start + len(text) for start, text in zip(found["text_offset"], found["tokens"],
                                                    strict=True)]
    assert [0, *ends[:-1]] == found["text_offset"]


def test_a_prompt_is_scored_without_drawing_anything(model):
    whole = answer(model, prompt="a b", max_tokens=0, echo=True, logprobs=0)
    assert texts(whole) == ["a b"]
    assert whole["usage"]["completion_tokens"] == 0
    assert texts(answer(model, prompt="", max_tokens=0, echo=True)) == [""]


def shown(stops: list[str], tokens: list[int]) -> tuple[list[str], str | None]:
    """What a choice shows at each token, and at its end; and why it ended."""
    choice, pieces = Choice(0, stops), []
    for token in tokens:
        if choice.finish_reason is None:
            pieces.append(choice.add(token, NONE))
    if choice.finish_reason is None:
        pieces.append(choice.end())
    return ["".join(token.text for token in piece.tokens) for piece in pieces], choice.finish_reason


@pytest.mark.parametrize(
    ("text", "stops", "before"),
    [("the spirit of god was good", [" god"], "the spirit of"),
     ("the spirit of god was good", ["it of g", "zzz", "od"], "the spir"),
     ("the spirit of god", ["the"], ""),
     ("snow ☃ man", ["☃"], "snow "),
     ("snow ☃ man", ["woman", "an ", "w m"], None)],
)
def test_a_text_ends_before_a_stop_text_and_nothing_of_it_is_shown(text, stops, before):
    pieces, reason = shown(stops, encode(text))
    assert "".join(pieces) == (text if before is None else before)
    assert reason == ("length" if before is None else "stop")


def test_what_might_begin_a_stop_text_waits_and_the_rest_does_not():
    pieces = ["spirit", "", " of man", ""]
    assert shown([" of god"], encode("spirit of man")) == (pieces, "length")


def test_characters_come_whole_and_half_ones_at_the_end_are_marked():
    tokens = encode("a ☃")
    assert len(tokens) == 3  # the snowman takes two, the first with a space before it
    assert shown([], tokens)[0] == ["a", "", " ☃", ""]
    assert shown([], tokens[:-1])[0] == ["a", "", " \ufffd"]
    assert shown([], [*tokens[:-1], EOT]) == (["a", "", " \ufffd"], "stop")


def test_a_text_ends_where_its_document_does(model):
    silent = copy.deepcopy(model)
    with torch.no_grad():  # a last LayerNorm of weight 0 leaves its bias: EOT's own direction
        silent.ln_f.weight.zero_()
        silent.ln_f.bias.copy_(100 * silent.wte.weight[EOT])
    whole = answer(silent, prompt="a", max_tokens=5, n=2, temperature=0)
    assert texts(whole) == ["", ""]
    assert {choice["finish_reason"] for choice in whole["choices"]} == {"stop"}
    assert whole["usage"]["completion_tokens"] == 0


def test_a_long_prompt_is_refused_or_cropped_where_that_was_asked(model):
    long = " a" * 40
    with pytest.raises(BadInput, match="prompt: 40 tokens, and the model's context is 32"):
        ask(prompt=long)
    request = ask(prompt=long, truncate_prompt_tokens=1000)
    assert request.prompts == [encode(" a" * 32)]
    assert "40 tokens, and the model's context 32: the model reads the last 32" in request.note
    assert "last 32" in answer(model, prompt=long, truncate_prompt_tokens=32, max_tokens=1)["note"]
    assert ask(prompt="a b c", truncate_prompt_tokens=2).prompts == [encode(" b c")]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "expected a JSON object"),
        ({"promt": "a"}, "no field is called 'promt': did you mean prompt?"),
        ({"best_of": 3}, "best_of is not done here"),
        ({"max_tokens": 10**6}, "max_tokens 1000000: expected a whole number, 0 to 2,048"),
        ({"max_tokens": True}, "max_tokens True: expected a whole number"),
        ({"max_tokens": 2.0}, "max_tokens 2.0: expected a whole number"),
        ({"temperature": "hot"}, "temperature 'hot': expected a number, 0 to 2"),
        ({"temperature": math.nan}, "temperature nan: expected a number, 0 to 2"),
        ({"top_p": 0}, "top_p 0: expected a number"),
        ({"top_k": -1}, "top_k -1: expected a whole number"),
        ({"seed": 2**63}, "seed 9223372036854775808: expected"),
        ({"n": 9}, "n 9: expected a whole number, 1 to 8"),
        ({"logprobs": 6}, "logprobs 6: expected a whole number, 0 to 5"),
        ({"echo": 1}, "echo 1: expected true or false"),
        ({"stop": ["a"] * 5}, "expected a text, or a list of up to 4"),
        ({"stop": [""]}, "expected a text, or a list of up to 4"),
        ({"stream_options": 3}, "stream_options 3: expected"),
        ({"prompt": 3}, "prompt 3: expected a text, a list of tokens"),
        ({"prompt": []}, "0 of them, expected 1 to 64"),
        ({"prompt": ["a"] * 65}, "65 of them, expected 1 to 64"),
        ({"prompt": [50257]}, "token 50257 is none of 0 to 50,256"),
        ({"prompt": [[-1]]}, "token -1 is none of"),
        ({"prompt": [["a"]]}, r"prompt \['a'\]: expected a text or a list of tokens"),
        ({"prompt": [1, True]}, "prompt 1: expected a text or a list of tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens 0: expected"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_what_is_refused_gets_one_line(body, words):
    with pytest.raises(BadInput, match=words) as refused:
        parse_request(body, CONFIG)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_null_is_a_field_left_out():
    nothing = dict.fromkeys([*FIELDS, "best_of", "suffix"])
    assert ask(**(nothing | {"seed": 1})) == ask(seed=1)


def test_broken_weights_are_an_error_and_no_text(model):
    broken = copy.deepcopy(model)
    broken.ln_f.bias.data[3] = torch.nan
    with pytest.raises(Failed, match="no numbers"):
        answer(broken, prompt="a")
    with pytest.raises(Failed, match="no numbers"):
        answer(broken, prompt="a b", max_tokens=0, echo=True, logprobs=0)


def test_nothing_is_computed_that_nobody_asks_for(model, monkeypatch):
    """Each step of the generator is one of the model."""
    passes = []
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda *a, **k: passes.append(1) or hidden(*a, **k))
    steps = complete(model, ask(prompt="a", max_tokens=20))
    for expected in (1, 2, 3):
        next(steps)
        assert len(passes) == expected
    steps.close()
    assert len(passes) == 3


def test_decoded_tokens_add_up(model):
    whole = answer(model, prompt=[1, 2, 3], echo=True, logprobs=0, max_tokens=0)
    assert texts(whole) == [decode([1, 2, 3])]
