"""Named errors: text, attributes, pickling, and the way back from a kernel's message."""

import pickle

import pytest

from ep_mojo import errors
from ep_mojo.errors import EPError

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, EPError)]
NATURAL = {
    "ConfigError": ValueError,
    "ShapeError": ValueError,
    "DTypeError": TypeError,
    "PeerTimeoutError": TimeoutError,
    "PeerLostError": ConnectionError,
    "SharedMemoryError": OSError,
    "DeviceMemoryError": MemoryError,
    "MissingDependencyError": ImportError,
    "UnsupportedError": NotImplementedError,
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_survives_pickling(cls):
    error = cls("went wrong", field="x", value=[1, 2], allowed="one", remedy="do this")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error) == "x = [1, 2]: went wrong. Allowed: one. Remedy: do this."
    assert (again.field, again.value, again.allowed, again.remedy) == ("x", [1, 2], "one", "do this")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_plain_message(cls):
    error = cls("only words")
    assert str(error) == "only words"
    assert (error.field, error.value, error.allowed, error.remedy) == (None, None, None, None)
    assert cls.__doc__


@pytest.mark.parametrize(("name", "base"), NATURAL.items())
def test_natural_base(name, base):
    assert issubclass(getattr(errors, name), base)


def test_long_values_are_cut():
    assert len(str(errors.ConfigError(field="x", value="y" * 1000))) < 200


def test_from_text_of_a_kernel():
    text = "An error occurred in kernel named 'ep_mojo_dispatch_wait':\nep_mojo.OrderError: too many rounds\nmore words"
    error = errors.error_from_text(text)
    assert type(error) is errors.OrderError
    assert str(error) == "too many rounds"


@pytest.mark.parametrize("text", ["", "plain words", "ep_mojo.NoSuchError: x", "ep_mojo.re: x", "ep_mojo.Any: x"])
def test_from_other_text(text):
    assert errors.error_from_text(text) is None


def test_from_text_skips_other_names():
    assert type(errors.error_from_text("in ep_mojo.ops: ep_mojo.ShapeError: T = 9")) is errors.ShapeError
