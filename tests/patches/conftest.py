import pytest

from rehead.patches.tiny import tiny_model


@pytest.fixture
def model():
    return tiny_model("llama")
