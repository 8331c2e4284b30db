"""Reading aloud: many prompts side by side say what each says alone, in every form of output."""

import copy
import io
import json

import pytest
import torch

from data.tokenizer import EOT
from eval import sample
from eval.sample import Arguments, continue_prompts, converse
from eval.wrap import wrap
from launch.errors import BadInput, one_line_errors
from launch.world import autocast
from model.convert import write_ours
from model.generate import CannotSample, SampleConfig, generate, store_in
from model.gpt2 import GPT, GPTConfig

CPU = torch.device("cpu")
PROMPTS = ["In the beginning", "", "a b c d e f g h i j", "x"]


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def folder(model, tmp_path) -> str:
    write_ours(model, tmp_path / "weights")
    return str(tmp_path / "weights")


@pytest.mark.parametrize("max_tokens", [0, 5, 30])  # none, a few, past the context
def test_prompts_side_by_side_say_what_each_says_alone(model, max_tokens):
    exact = copy.deepcopy(model).double()  # no tie is decided by rounding
    config = SampleConfig(max_tokens, temperature=0)
    together = continue_prompts(exact, PROMPTS, config, CPU)
    for prompt, made in zip(PROMPTS, together, strict=True):
        assert made == continue_prompts(exact, [prompt], config, CPU)[0]
        assert made.prompt == prompt
        assert made.tokens == max_tokens


def test_a_text_ends_where_its_document_does(model):
    silent = copy.deepcopy(model)
    with torch.no_grad():  # a last LayerNorm of weight 0 leaves its bias: EOT's own direction
        silent.wte.weight[EOT] *= 10  # and nobody's that is longer
        silent.ln_f.weight.zero_()
        silent.ln_f.bias.copy_(100 * silent.wte.weight[EOT])
    for made in continue_prompts(silent, PROMPTS, SampleConfig(5), CPU):
        assert (made.text, made.tokens) == ("", 0)


def test_matrices_stored_in_bf16_compute_what_autocast_computes(model):
    """Bit for bit, once the embedding, which autocast leaves alone where it is looked up, is
    rounded too."""
    stored, cast = store_in(copy.deepcopy(model), torch.bfloat16), copy.deepcopy(model)
    cast.wte.weight.data = cast.wte.weight.data.bfloat16().float()
    idx = torch.tensor([[5, 6, 7]])
    with autocast(CPU, "bf16"), torch.no_grad():
        assert torch.equal(stored(idx), cast(idx))
    assert stored.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert stored.ln_f.weight.dtype == stored.wpe.weight.dtype == torch.float32


def test_onednn_is_back_whenever_the_caller_is(model):
    assert torch.backends.mkldnn.enabled
    for _ in generate(model, torch.tensor([[1]]), SampleConfig(3)):
        assert torch.backends.mkldnn.enabled


def test_json_is_one_object_a_sample_and_speed_goes_to_stderr(folder, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("one two\n\nthree \u2028 ☃\n", encoding="utf-8")
    sample.main(Arguments(max_tokens=4, checkpoint=folder, prompts=str(path), num=2, json=True))
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["prompt"] for row in rows] == ["one two"] * 2 + ["three \u2028 ☃"] * 2
    assert all(set(row) == {"prompt", "text", "tokens"} for row in rows)
    assert rows[0]["text"] != rows[1]["text"]
    assert "tokens/s" in printed.err


def test_no_text_is_drawn_twice_where_batches_part(folder, capsys, monkeypatch):
    monkeypatch.setattr(sample, "ROWS_AT_ONCE", 1)
    sample.main(Arguments(checkpoint=folder, prompt="one", num=2, json=True))
    first, second = (json.loads(line)["text"] for line in capsys.readouterr().out.splitlines())
    assert first != second


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_a_single_text_is_streamed_as_it_is_computed(folder, capsys, dtype):
    arguments = Arguments(max_tokens=4, checkpoint=folder, prompt="one", dtype=dtype)
    sample.main(arguments)
    streamed = capsys.readouterr().out
    sample.main(Arguments(**(vars(arguments) | {"json": True})))
    row = json.loads(capsys.readouterr().out)
    assert streamed == row["prompt"] + row["text"] + "\n"


def test_a_conversation_crops_a_prompt_that_is_too_long_and_says_so(model, capsys, monkeypatch):
    lines = iter(["one", "a " * 20, "", EOFError()])

    def typed(_):
        line = next(lines)
        if isinstance(line, EOFError):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    converse(model, Arguments(max_tokens=3), CPU)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].startswith("one")
    assert "has 21 tokens, and the model's context 16: the model reads the last 16" in printed.err
    assert printed.err.count("tokens/s") == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "can't read prompts"), (b"\n \n", "holds no prompt"), (b"\xff", "can't read prompts")],
    ids=["absent", "empty", "binary"],
)
def test_prompts_that_are_none(folder, tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        sample.main(Arguments(checkpoint=folder, prompts=str(path)))
    with pytest.raises(BadInput, match="one of them"):
        sample.main(Arguments(checkpoint=folder, prompt="a", prompts=str(path)))


@pytest.mark.parametrize("more", [{}, {"num": 2}, {"json": True}, {"temperature": 0.0}], ids=str)
def test_broken_weights_are_one_line_and_no_text(model, tmp_path, capsys, more):
    """Exit code 1: the command was right. What is printed as JSON stays JSON."""
    broken = copy.deepcopy(model)
    broken.ln_f.bias.data[3] = torch.nan
    write_ours(broken, tmp_path / "weights")
    arguments = Arguments(max_tokens=4, checkpoint=str(tmp_path / "weights"), prompt="one", **more)
    with pytest.raises(SystemExit) as ended, one_line_errors():
        sample.main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 1
    assert printed.err.startswith("error: the model's logits are no numbers")
    assert printed.err.count("\n") == 1
    assert printed.out in ("", "one\n")


def test_a_conversation_with_broken_weights_ends(model, monkeypatch):
    broken = copy.deepcopy(model)
    broken.ln_f.bias.data[3] = torch.nan
    monkeypatch.setattr("builtins.input", lambda _: "one")
    with pytest.raises(CannotSample):
        converse(broken, Arguments(max_tokens=3), CPU)


def test_more_than_one_text_is_parted_by_a_line(folder, capsys):
    sample.main(Arguments(max_tokens=2, checkpoint=folder, prompt="one", num=3))
    assert capsys.readouterr().out.count("---\n") == 2


def test_standard_input_is_one_prompt_without_its_last_line_break(folder, capsys, monkeypatch):
    arguments = Arguments(max_tokens=4, checkpoint=folder, json=True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("In the\nbeginning ☃\n".encode())))
    sample.main(arguments)
    assert json.loads(capsys.readouterr().out)["prompt"] == "In the\nbeginning ☃"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    with pytest.raises(BadInput, match="can't read a prompt from standard input"):
        sample.main(arguments)


def test_a_long_prompt_is_continued_as_its_end_is(model, capsys):
    """The model reads its last 16 tokens; all of it is printed."""
    long = " word" * 10 + " a" * 16
    config = SampleConfig(5, temperature=0)
    made, of_its_end = continue_prompts(model, [long, " a" * 16], config, CPU)
    assert (made.prompt, made.text) == (long, of_its_end.text)


def test_a_terminal_gets_whole_words_and_a_file_the_exact_text(model, capsys, monkeypatch):
    text = "In the beginning " * 10 + "\x1b[31m"
    sample.print_text([text])
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    sample.print_text([text])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "In the beginning In the beginning In the"
    assert lines[-1].endswith("\\x1b[31m")
    assert max(map(len, lines)) == 40


TEXT = "In the  beginning, God created\n\n  the heavens: antidisestablishmentarianism "


@pytest.mark.parametrize("width", [1, 8, 20, 80])
def test_wrapping_keeps_every_word_and_does_not_depend_on_the_pieces(width):
    whole = "".join(wrap([TEXT], width))
    assert whole == "".join(wrap(TEXT, width))  # a character at a time
    assert max(map(len, whole.split("\n"))) <= width
    assert "".join(whole.split()) == "".join(TEXT.split())
    if width == 80:
        assert whole == TEXT.rstrip(" ")
