"""What the command lines of several programs have in common."""

import argparse

import pytest

from ep_mojo.errors import OrderError
from ep_mojo.programs import options


def test_each_value_once_and_in_order():
    assert options.numbers("128,4096,128") == [128, 4096]
    assert options.words("a", "b")("b,a,b") == ["b", "a"]


@pytest.mark.parametrize("text", ["", "1,", "0", "-1", "1.5", "1,x"])
def test_not_a_number_from_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"Allowed: whole numbers from 1 with commas"):
        options.numbers(text)


@pytest.mark.parametrize("text", ["", "c", "a,", "ab"])
def test_not_one_of_the_words(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"Allowed: a, b, or several with commas"):
        options.words("a", "b")(text)


def test_rounds():
    parser = argparse.ArgumentParser()
    options.add_rounds(parser, tokens="1,2", formats="bf16")
    opts = parser.parse_args(["--formats", "fp8"])
    assert (opts.ranks, opts.tokens, opts.formats) == (0, [1, 2], ["fp8"])
    assert (opts.hidden, opts.experts, opts.top_k) == (7168, 256, 8)


def test_a_named_error_is_one_message_and_status_2(capsys):
    def fails():
        raise OrderError("what happened")

    assert options.status_of(lambda: 1) == 1
    assert options.status_of(fails) == 2
    assert capsys.readouterr().err == "OrderError: what happened\n"
