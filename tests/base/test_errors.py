"""What a user reads of an error, and that its fields survive where it is sent or renamed."""

import pickle

import pytest

from dpo.base.errors import UserError, renamed_places


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (("loss.beta", "must be > 0, got -1", "a number > 0"), "loss.beta: must be > 0, got -1; valid: a number > 0"),
        (("a.jsonl:3", "broken JSON"), "a.jsonl:3: broken JSON"),
        (("a.yaml: loss.beta", "is\n  missing", "a\tnumber"), "a.yaml: loss.beta: is missing; valid: a number"),
    ],
)
def test_an_error_is_one_line_of_its_fields(fields: tuple[str, ...], line: str) -> None:
    error = UserError(*fields)
    assert str(error) == line
    assert (error.place, error.what, error.valid) == (*fields, "")[:3]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_the_fields(protocol: int) -> None:
    error = UserError("data.train[0].path", "no such file: a.jsonl", "a file")
    found = pickle.loads(pickle.dumps(error, protocol))
    assert type(found) is UserError
    assert (found.place, found.what, found.valid) == (error.place, error.what, error.valid)
    assert str(found) == "data.train[0].path: no such file: a.jsonl; valid: a file"


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("model.path", "command line: --model"),
        ("model.path_of", "model.path_of"),
        ("a.yaml: model.path", "a.yaml: model.path"),
    ],
)
def test_a_program_names_its_own_flag(place: str, found: str) -> None:
    """For that place alone; what the message says of a key is not touched."""
    with pytest.raises(UserError) as caught, renamed_places({"model.path": "command line: --model"}):
        raise UserError(place, "model.path: is bad", "model.path: good")
    assert (caught.value.place, caught.value.what, caught.value.valid) == (
        found,
        "model.path: is bad",
        "model.path: good",
    )
