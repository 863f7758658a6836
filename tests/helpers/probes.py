"""What several tests of patches share: tokens to run, logits, and the form that every error message has."""

import torch

TOKENS = torch.randint(8, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model, **kwargs):
    """Logits on TOKENS, without gradients and without a cache."""
    with torch.no_grad():
        return model(TOKENS, use_cache=False, **kwargs).logits


def one_line(error):
    """The message of a caught error, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text
