"""What is written as JSON is JSON: other programs' readers take it."""

import json
import math

import pytest

from mikoshi.data.io.json import dumps, non_finite


def strictly(text):
    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_wherever_it_stands(value):
    assert strictly(dumps({"a": [1, (value, {"b": value})], "c": 0.5})) == {"a": [1, [None, {"b": None}]], "c": 0.5}
    assert strictly(dumps(value)) is None
    assert non_finite({"a": value, "b": 1.0, "c": "nan", "d": None}) == {"a": str(value)}


def test_anything_else_is_as_json_has_it():
    value = {"a": [1, 2.5, True, None, "é"], "b": {}}
    assert dumps(value) == json.dumps(value)
    assert dumps(value, indent=2, sort_keys=True) == json.dumps(value, indent=2, sort_keys=True)
    with pytest.raises(TypeError):
        dumps({"a": object()})
